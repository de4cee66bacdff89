"""Tiny configs for every family table, on which tests/laws/test_families.py runs. Add one for a new model type.

They cover what a family allows: grouped-query heads, heads that do not fill the hidden size, sliding and full
attention, biases.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
)

from models import CONFIGS, SIZES, VOCABULARY, random_weights
from spinquant.compute.releases import release_of
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.modules import model_class, tensor_shapes

SMALL = {**SIZES, "num_hidden_layers": 2}
# Families whose heads fill the hidden size.
FULL = {k: v for k, v in {**SMALL, "num_attention_heads": 4, "hidden_size": 64}.items() if k != "head_dim"}
# GPT-J and CodeGen compute attention in their own code before transformers 5.24.
OWN_ATTENTION = "R3" if release_of("transformers") < (5, 24) else ""
# So do Aria's experts before 5.18.
OWN_EXPERTS = "R4" if release_of("transformers") < (5, 18) else ""
LAYERS = ["full_attention", "sliding_attention"]
CHUNKED = ["chunked_attention", "full_attention"]
MOE = {
    **SMALL,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
TEXT = {**SMALL, "vocab_size": VOCABULARY + 4}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14, "intermediate_size": 40}
DEEP_TOWER = {
    **QWEN_TOWER,
    "patch_size": 16,
    "hidden_size": 32,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
IMAGE = VOCABULARY  # the token that stands for an image


DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
MAMBA = {"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
ONE_MIXER = {
    **{key: size for key, size in MOE.items() if key in SIZES and key != "num_hidden_layers"},
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "ssm_state_size": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 4,
}
MIXERS = ["linear_attention", "full_attention", "mlp", "moe"]
# The heads fill twice the hidden size.
ZAMBA = {
    **{key: size for key, size in SMALL.items() if key not in ("head_dim", "num_hidden_layers")},
    **{"hidden_size": 48, "num_hidden_layers": 4, "mamba_d_state": 8, "pad_token_id": 0},
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"],
}
SHARING = ["hybrid", "linear_attention", "hybrid", "hybrid"]
ZAMBA2 = {"n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 4, "adapter_rank": 8}
# Two residual streams, and every kind of layer.
STREAMS = {
    **MOE,
    **{"num_hidden_layers": 3, "num_key_value_heads": 1, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 2, "hc_mult": 2, "sliding_window": 6},
    "compress_rates": dict.fromkeys(("compressed_sparse_attention", "heavily_compressed_attention"), 4),
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
}
# Layers without a window have no positions.
COMPASS = {
    "full_attention": None,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
COHERE = {"prefix_dense_intermediate_size": 40, "layer_types": LAYERS, "sliding_window": 5}
MLA = {
    **MOE,
    "head_dim": None,
    "num_key_value_heads": 6,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_shared_experts": 1,
}
DELTA_LATENT = {
    **MLA,
    **{"linear_num_heads": 4, "linear_head_dim": 8, "num_experts_per_token": 2, "num_expert_group": 1},
    **{"num_hidden_layers": 3, "num_shared_experts": 2},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MLA_ALONE = {**{key: size for key, size in MLA.items() if key not in MOE or key in SIZES}, "q_lora_rank": 24}
MLA_ALONE["num_hidden_layers"] = 2
SPARSE = {
    **{key: size for key, size in MOE.items() if key not in SIZES},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
}


@dataclass(frozen=True)
class Instance:
    """A config, the rotations that its table refuses, and those that have no space in it."""

    config: Callable[[], Any]
    refused: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        return tuple(name for name in ("R1", "R2", "R3", "R4") if name not in (*self.refused, *self.lacks))


def of(model_type: str, base: dict[str, Any] = SMALL, refused: str = "", lacks: str = "", **changes: Any) -> Instance:
    """An instance with the sizes of `base`, changed; None takes a size away."""
    sizes = {key: value for key, value in {**base, **changes}.items() if value is not None or key.endswith("_id")}
    return Instance(lambda: AutoConfig.for_model(model_type, **sizes), tuple(refused.split()), tuple(lacks.split()))


def seeing(model_type: str, text: dict[str, Any], tower: dict[str, Any], refused: str = "", **changes: Any) -> Instance:
    """An instance that sees; no text token of the tests stands for an image."""
    token = "image_token_index" if model_type in ("llava", "mistral3") else "image_token_id"
    parts = {"text_config": {**TEXT, **text}, "vision_config": tower, token: IMAGE, **changes}
    return Instance(lambda: AutoConfig.for_model(model_type, **parts), tuple(refused.split()))


FAMILIES: dict[str, Instance] = {
    "ministral": of("ministral", layer_types=LAYERS, sliding_window=5),
    "ministral3": of("ministral3"),
    "seed_oss": of("seed_oss", attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "ernie4_5": of("ernie4_5", use_bias=True, tie_word_embeddings=True),
    "helium": of("helium", FULL, head_dim=16),
    "cwm": of(
        "cwm",
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=LAYERS,
        sliding_window=5,
    ),
    "internlm3": of("internlm3", qkv_bias=True, bias=True),
    "iquestcoder": of("iquestcoder"),
    "gemma": of("gemma", attention_bias=True),
    "arcee": of("arcee", attention_bias=True, mlp_bias=True),
    "apertus": of("apertus", attention_bias=True),
    "hunyuan": of("hunyuan_v1_dense", attention_bias=True),
    "glm": of("glm", attention_bias=True),
    "phi3": of("phi3", FULL, num_key_value_heads=2, sliding_window=5),
    # norms after the block
    "gemma2": of("gemma2", refused="R1", layer_types=LAYERS, sliding_window=5, query_pre_attn_scalar=16),
    "gemma3": of("gemma3_text", refused="R1", layer_types=LAYERS, sliding_window=5, query_pre_attn_scalar=16),
    "olmo2": of("olmo2", refused="R1", attention_bias=True),
    "olmo3": of("olmo3", refused="R1", layer_types=LAYERS, sliding_window=5),
    "exaone4": of("exaone4", refused="R1", layer_types=LAYERS, sliding_window=5),
    "glm4": of("glm4", refused="R1", attention_bias=True),
    # norms that subtract the mean
    "olmo": of("olmo", attention_bias=True),
    "olmo-clipped": of("olmo", refused="R2", clip_qkv=0.5),
    "nemotron": of("nemotron", attention_bias=True, mlp_bias=True),
    "jais2": of("jais2", attention_bias=True, mlp_bias=True),
    "starcoder2": of("starcoder2", FULL, num_key_value_heads=2, use_bias=True, sliding_window=5),
    "cohere": of("cohere", use_qk_norm=True, attention_bias=True),
    "cohere2": of("cohere2", layer_types=LAYERS, sliding_window=5),
    "cohere_compass": of("cohere_compass_text", layer_types=LAYERS, sliding_window=5, rope_parameters=COMPASS),
    "stablelm": of("stablelm", FULL, use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": of("stablelm", FULL, use_parallel_residual=True),
    "phi": of("phi", FULL, qk_layernorm=True),
    "gptj": of("gptj", FULL, refused=OWN_ATTENTION, rotary_dim=8, intermediate_size=None),
    "opt": of("opt", FULL, ffn_dim=80, word_embed_proj_dim=64),
    "opt-post": of("opt", FULL, refused="R1", ffn_dim=80, word_embed_proj_dim=64, do_layer_norm_before=False),
    "xglm": of("xglm", FULL, refused="R1 R3", ffn_dim=80),
    "biogpt": of("biogpt", FULL, tie_word_embeddings=True),
    "codegen": of("codegen", FULL, refused=OWN_ATTENTION, rotary_dim=8, intermediate_size=None, n_ctx=64),
    "gpt_neo": of("gpt_neo", FULL, refused="R3", attention_types=[[["global", "local"], 1]], window_size=5),
    "gpt_neox": of("gpt_neox", FULL),
    "gpt_neox-sequential": of("gpt_neox", FULL, use_parallel_residual=False, attention_bias=False),
    "gpt_neox_japanese": of("gpt_neox_japanese", FULL, refused="R3", intermediate_multiple_size=2),
    "persimmon": of("persimmon", FULL),
    "falcon": of("falcon", FULL, refused="R3", multi_query=True, parallel_attn=True, bias=True),
    "falcon-sequential": of(
        "falcon", FULL, refused="R3", multi_query=False, parallel_attn=False, alibi=True, bias=True
    ),
    "falcon-grouped": of("falcon", FULL, refused="R3", new_decoder_architecture=True, num_kv_heads=2),
    "falcon-grouped-one-norm": of(
        "falcon", FULL, refused="R3", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "bloom": of("bloom", FULL, refused="R1 R3"),
    "bloom-slow": of("bloom", FULL, refused="R1 R3 R4", slow_but_exact=True, pretraining_tp=2),
    "mpt": of("mpt", FULL, refused="R3"),
    "mpt-clipped": of("mpt", FULL, refused="R2 R3", attn_config={"clip_qkv": 0.5}),
    "gpt_bigcode": of("gpt_bigcode", FULL, multi_query=True),
    "gpt_bigcode-multi-head": of("gpt_bigcode", FULL, multi_query=False, n_inner=80),
    "gpt2": of("gpt2", FULL),
    # mixtures of experts
    "mixtral": of("mixtral", MOE, sliding_window=5),
    "minimax_m2": of("minimax_m2", MOE, rotary_dim=8),
    "qwen2_moe": of("qwen2_moe", MOE, head_dim=None, hidden_size=96, shared_expert_intermediate_size=48),
    "qwen3_moe": of("qwen3_moe", MOE, mlp_only_layers=[0], attention_bias=True),
    "mellum": of("mellum", MOE, layer_types=LAYERS, sliding_window=5),
    "olmoe": of("olmoe", MOE, head_dim=None, hidden_size=96),
    "olmoe-clipped": of("olmoe", MOE, head_dim=None, hidden_size=96, refused="R2", clip_qkv=0.5),
    "phimoe": of("phimoe", MOE, head_dim=None, hidden_size=96, attention_bias=True, lm_head_bias=True),
    "granitemoe": of("granitemoe", MOE, head_dim=None, hidden_size=96, attention_bias=True),
    "granitemoeshared": of("granitemoeshared", MOE, head_dim=None, hidden_size=96, shared_intermediate_size=48),
    "gpt_oss": of("gpt_oss", MOE, layer_types=LAYERS, sliding_window=5),
    "glm4_moe": of("glm4_moe", MOE, attention_bias=True, use_qk_norm=True),
    "solar_open": of("solar_open", MOE),
    "dots1": of("dots1", MOE, n_shared_experts=2, first_k_dense_replace=1),
    "ernie4_5_moe": of("ernie4_5_moe", MOE, use_bias=False, moe_num_experts=4, moe_k=2, tie_word_embeddings=True),
    "hunyuan_v1_moe": of("hunyuan_v1_moe", MOE, moe_topk=2),
    "cohere2_moe": of("cohere2_moe", MOE, num_shared_experts=1, mlp_layer_types=["dense", "sparse"], **COHERE),
    "cohere2_moe-rms": of("cohere2_moe", MOE, rms_norm_eps=1e-5, **COHERE),
    "deepseek_v2": of("deepseek_v2", MLA, refused="R3", q_lora_rank=None),
    "deepseek_v3": of("deepseek_v3", MLA, refused="R3", q_lora_rank=24, attention_bias=True),
    "glm4_moe_lite": of("glm4_moe_lite", MLA, refused="R3", q_lora_rank=24),
    "youtu": of("youtu", MLA_ALONE, refused="R3"),
    "minicpm3": of("minicpm3", MLA_ALONE, refused="R3", attention_bias=True),
    "deepseek_v32": of("deepseek_v32", MLA_ALONE, refused="R3", **SPARSE),
    "glm_moe_dsa": of("glm_moe_dsa", MLA_ALONE, refused="R3", attention_bias=True, **SPARSE),
    "minimax_m3": of(
        "minimax_m3_vl_text",
        MOE,
        refused="R3",
        dense_intermediate_size=40,
        shared_intermediate_size=56,
        rotary_dim=8,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=2,
        index_topk_blocks=2,
        swiglu_limit=1.0,
    ),
    # recurrences, alone and beside attention
    "qwen3_next": of("qwen3_next", MOE, refused="R2", shared_expert_intermediate_size=48, **DELTA),
    "qwen3_5": of("qwen3_5_text", refused="R2", attention_bias=True, **DELTA),
    "qwen3_5_moe": of("qwen3_5_moe_text", MOE, refused="R2", shared_expert_intermediate_size=48, **DELTA),
    "jamba": of(
        "jamba",
        MOE,
        head_dim=None,
        hidden_size=96,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bamba": of("bamba", FULL, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, **MAMBA),
    "falcon_h1": of("falcon_h1", mamba_d_ssm=96, mamba_n_heads=6, **MAMBA),
    "granitemoehybrid": of(
        "granitemoehybrid",
        {**MOE, "hidden_size": 96},
        head_dim=None,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=48,
        mamba_n_heads=12,
        **MAMBA,
    ),
    "granitemoehybrid-dense": of(
        "granitemoehybrid",
        {**MOE, "hidden_size": 96},
        head_dim=None,
        num_local_experts=0,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=48,
        mamba_n_heads=12,
        **MAMBA,
    ),
    "lfm2": of("lfm2", FULL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "recurrent_gemma": of(
        "recurrent_gemma",
        hidden_size=96,
        lru_width=96,
        num_key_value_heads=2,
        block_types=["recurrent", "attention"],
        attention_window_size=5,
        attention_bias=True,
    ),
    "kimi_linear": of("kimi_linear", DELTA_LATENT, q_lora_rank=None, first_k_dense_replace=1, refused="R3"),
    "kimi_linear-queries": of(
        "kimi_linear",
        DELTA_LATENT,
        refused="R3",
        q_lora_rank=24,
        attention_bias=True,
        num_hidden_layers=2,
        num_shared_experts=1,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bailing_hybrid": of("bailing_hybrid", DELTA_LATENT, num_nextn_predict_layers=0, refused="R3"),
    "zamba": of("zamba", ZAMBA, n_mamba_heads=2, mamba_dt_rank=4),
    "zamba2": of("zamba2", ZAMBA, layers_block_type=SHARING, num_mem_blocks=2, **ZAMBA2),
    "zamba2-adapters": of(
        "zamba2",
        ZAMBA,
        layers_block_type=SHARING,
        num_mem_blocks=2,
        num_key_value_heads=6,
        use_shared_attention_adapter=True,
        use_mem_rope=True,
        add_bias_linear=True,
        **ZAMBA2,
    ),
    "nemotron_h": of("nemotron_h", ONE_MIXER, layers_block_type=MIXERS),
    "nemotron_h-latent": of("nemotron_h", ONE_MIXER, layers_block_type=MIXERS, moe_latent_size=32, use_bias=True),
    "mamba": of("mamba", FULL, lacks="R2 R3 R4", state_size=8, time_step_rank=4),
    "falcon_mamba": of("falcon_mamba", FULL, lacks="R2 R3 R4", state_size=8, time_step_rank=4),
    "mamba2": of("mamba2", FULL, lacks="R2 R3 R4", state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=4),
    # others but for a thing or two
    "granite_swa": of("granite_swa", layer_types=LAYERS, sliding_window=5, attention_bias=True, mlp_bias=True),
    "flint": of("flint", MOE, layer_types=LAYERS, sliding_window=5),
    "vaultgemma": of("vaultgemma", layer_types=LAYERS, sliding_window=5, query_pre_attn_scalar=16),
    "nanochat": of("nanochat", attention_bias=True),
    "bitnet": of("bitnet", FULL, num_key_value_heads=2),
    "diffllama": of("diffllama", num_attention_heads=8, num_key_value_heads=4, attention_bias=True),
    "doge": of("doge", refused="R1", attention_bias=True, mlp_bias=True),
    "hyperclovax": of("hyperclovax", refused="R1", attention_bias=True),
    "hyperclovax-pre": of("hyperclovax", use_post_norm=False),
    "granitemoe_swa": of("granitemoe_swa", MOE, shared_intermediate_size=48, layer_types=LAYERS, sliding_window=5),
    "hy_v3": of("hy_v3", MOE, num_shared_experts=2),
    "exaone_moe": of("exaone_moe", MOE, num_shared_experts=1, layer_types=LAYERS, sliding_window=5),
    "mimo_v2_flash": of(
        "mimo_v2_flash", MOE, num_attention_heads=8, v_head_dim=8, layer_types=LAYERS, sliding_window=5
    ),
    "laguna": of("laguna", MOE, shared_expert_intermediate_size=40, layer_types=LAYERS, sliding_window=5),
    "laguna-gated": of("laguna", MOE, refused="R2", shared_expert_intermediate_size=40, gating="per-element"),
    "kolibri1": of(
        "kolibri1", MOE, refused="R1", shared_expert_intermediate_size=40, layer_types=LAYERS, sliding_window=5
    ),
    "flex_olmo": of("flex_olmo", MOE, refused="R1"),
    "afmoe": of("afmoe", MOE, refused="R1 R2", num_dense_layers=1, num_shared_experts=1, layer_types=LAYERS),
    "axk1": of("axk1", MLA, refused="R1 R3", q_lora_rank=24),
    "aria_text": of("aria_text", MOE, refused=OWN_EXPERTS, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2),
    "llama4_text": of("llama4_text", MOE, intermediate_size_mlp=48, moe_layers=[1], layer_types=CHUNKED),
    "lfm2_moe": of(
        "lfm2_moe", MOE, head_dim=None, hidden_size=96, num_dense_layers=1, layer_types=["conv", "full_attention"]
    ),
    "lfm3": of(
        "lfm3",
        refused="R1",
        layer_types=["conv", "full_attention", "sliding_attention"],
        num_hidden_layers=3,
        sliding_window=5,
    ),
    "lfm3-pre": of("lfm3", layer_types=["conv", "full_attention"], use_sandwich_norm=False),
    "olmo_hybrid": of("olmo_hybrid", refused="R1", **DELTA),
    "deepseek_v4": of("deepseek_v4", STREAMS, refused="R3"),
    # vision-language models
    "llava": seeing("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **TOWER}),
    "llava-qwen2": seeing("llava", {"model_type": "qwen2"}, {"model_type": "clip_vision_model", **TOWER}),
    "mistral3": seeing("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 16, **TOWER}),
    "gemma3-vision": seeing("gemma3", {"query_pre_attn_scalar": 16}, TOWER, refused="R1", mm_tokens_per_image=4),
    "smolvlm": seeing("smolvlm", {"model_type": "llama"}, TOWER, scale_factor=2),
    "idefics3": seeing("idefics3", {"model_type": "llama"}, TOWER, scale_factor=2),
    "qwen2_vl": seeing("qwen2_vl", {**ROPE, "hidden_size": 96}, {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 96}),
    "qwen2_5_vl": seeing(
        "qwen2_5_vl",
        {**ROPE, "hidden_size": 96},
        {**QWEN_TOWER, "hidden_size": 32, "out_hidden_size": 96, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": seeing("qwen3_vl", ROPE, {**DEEP_TOWER, "deepstack_visual_indexes": [0, 1]}),
    "qwen3_5_moe-vision": seeing(
        "qwen3_5_moe",
        {**MOE, **ROPE, **DELTA, "vocab_size": VOCABULARY + 4, "shared_expert_intermediate_size": 48},
        DEEP_TOWER,
        refused="R2",
    ),
    "qwen3_5-vision": seeing("qwen3_5", {**ROPE, **DELTA}, DEEP_TOWER, refused="R2"),
    "phi3-mha": of("phi3", FULL, num_key_value_heads=4, partial_rotary_factor=0.5),
}


def known(instance: Instance) -> bool:
    """Whether the installed transformers has the class; 5.17 lacks six of the model types."""
    try:
        instance.config()
    except ValueError as error:
        if "Unrecognized model identifier" in str(error):
            return False
        raise
    return True


FAMILIES = {name: instance for name, instance in FAMILIES.items() if known(instance)}
assert VOCABULARY == SMALL["vocab_size"]


def tiny(name, *, attention=None):
    """By default with the attention that the class prefers: sdpa, where it knows that."""
    config = FAMILIES[name].config()
    model = model_class(config).from_config(config, dtype=torch.float64, attn_implementation=attention)
    return random_weights(prepared(model))


def prepared(model):
    """In float64 throughout, which some classes and grouped products of experts are not."""
    exact_experts(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.eval()


def config_of(name):
    return CONFIGS[name]() if name in CONFIGS else FAMILIES[name].config()


def shapes_of(config):
    with torch.device("meta"):
        return tensor_shapes(model_class(config).from_config(config))


def usable(plan):
    """What a plan lets one do: everything but reasons, and spaces that are refused."""
    refused = {name for name, _ in plan.refused}
    kept = {space.name for space in plan.spaces if not {space.rotation, space.beside} & refused}
    return {
        "spaces": {space for space in plan.spaces if space.name in kept},
        "axes": {axis for axis in plan.axes if axis.space in kept},
        "gains": {replace(gain, readers=tuple(sorted(gain.readers))) for gain in plan.gains if gain.space in kept},
        "onlines": {online for online in plan.onlines if online.space in kept},
        "refused": refused,
        "linears": tuple(tuple(sorted(group)) for group in plan.linears),  # those of a group read one activation
        **{part: getattr(plan, part) for part in ("ties", "attentions", "blocks", "head")},
    }
