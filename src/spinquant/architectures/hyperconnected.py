"""Hyper-connections (several parallel residual streams): DeepSeek-V4.

A layer reads a weighted sum of the streams and adds its output to all of them. The weights are computed from all
streams, concatenated, by a matrix after a norm without a scale. Every stream belongs to the residual space, so the
input axis of that matrix is several copies of the space, and R1 rotates each by the same matrix.

Keys and values are one tensor, with rotary positions, and the attention's output is rotated back by its position. That
rules out R2 on values and R3. R2 rotates the latent of the queries, as in DeepSeek-V3.
"""

from spinquant.architectures.family import AxisPart, Norm, Refusal
from spinquant.architectures.llama import ATTENTION, LAYER, MLP, VALUE
from spinquant.architectures.moe import EXPERTS, MIXTRAL, QUERY_LATENT, with_shared

_STREAMS = AxisPart("residual", "0", "hidden_size", "hidden_size")
_MIXES = tuple(f"{LAYER}.{name}_hc" for name in ("attn", "ffn"))
_COMPRESSOR = f"{ATTENTION}.compressor"
_INDEXER = f"{_COMPRESSOR}.indexer"
_READS = tuple(f"{ATTENTION}.{name}_proj" for name in ("q_a", "kv"))
_COMPRESSING = (
    *(f"{module}.{name}_proj" for module in (_COMPRESSOR, _INDEXER) for name in ("kv", "gate")),
    f"{_INDEXER}.scorer.weights_proj",
)
_NORM = f"{LAYER}.post_attention_layernorm.weight"

# The names of the published checkpoints, and of what transformers saves.
_NAMES = (
    (r"^(embed\.|layers\.|norm\.|hc_head_)", r"model.\1"),
    (r"^head\.", "lm_head."),
    (r"^model\.embed\.", "model.embed_tokens."),
    (r"^model\.hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"(self_attn\..*|self_attn)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.w(q|o)_(a|b)\.", r".\1_\2_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    *(
        (rf"(experts\.\d+|shared_experts)\.w{n}\.", rf"\1.{name}_proj.")
        for n, name in ((1, "gate"), (2, "down"), (3, "up"))
    ),
)

_EXPERTS = with_shared(
    MIXTRAL.like(
        "deepseek_v4",
        "deepseek_v4",
        without=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        choices=(((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"), (f"{EXPERTS}.{{e}}.",)),),
    ),
    "mlp.shared_experts",
    "intermediate_size",
    scaled=False,  # the up projection is clamped before it is multiplied
)
DEEPSEEK_V4 = _EXPERTS.like(
    "deepseek_v4",
    "deepseek_v4",
    without=("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    tensors={
        f"{ATTENTION}.sinks": (None,),
        f"{ATTENTION}.q_a_proj.weight": (QUERY_LATENT, "residual"),
        f"{ATTENTION}.q_b_proj.weight": (None, QUERY_LATENT),
        f"{ATTENTION}.kv_proj.weight": (None, "residual"),
        f"{ATTENTION}.kv_norm.weight": (None,),
        f"{ATTENTION}.o_a_proj.weight": (None, None),
        f"{ATTENTION}.o_b_proj.weight": ("residual", None),
        **{f"{name}.weight?": (None, "residual") for name in _COMPRESSING},
        **{f"{module}.kv_norm.weight?": (None,) for module in (_COMPRESSOR, _INDEXER)},
        **{f"{module}.position_bias?": (None, None) for module in (_COMPRESSOR, _INDEXER)},
        f"{_INDEXER}.q_b_proj.weight?": (None, QUERY_LATENT),
        **{f"{mix}.fn": (None, _STREAMS) for mix in _MIXES},
        **{f"{mix}.{name}": (None,) for mix in _MIXES for name in ("base", "scale")},
        "model.hc_head.hc_fn": (None, _STREAMS),
        "model.hc_head.hc_base": (None,),
        "model.hc_head.hc_scale": (None,),
    },
    spaces={VALUE: None, QUERY_LATENT: ("R2", "q_lora_rank"), "layers.{i}.query_key": ("R3", "head_dim")},
    gains={
        f"{LAYER}.input_layernorm.weight": (*_READS, *_COMPRESSING),
        f"{ATTENTION}.q_a_norm.weight": Norm((f"{ATTENTION}.q_b_proj", f"{_INDEXER}.q_b_proj"), QUERY_LATENT),
    },
    linears=(
        (*_READS, *_COMPRESSING),
        (f"{ATTENTION}.q_b_proj", f"{_INDEXER}.q_b_proj"),
        (f"{ATTENTION}.o_a_proj",),
        (f"{ATTENTION}.o_b_proj",),
        *(group for group in _EXPERTS.linears if not group[0].startswith((ATTENTION, f"{MLP}.gate_proj"))),
    ),
    refused=(
        Refusal(
            "R3",
            "model.layers.*.self_attn has one tensor for keys and values, with rotary positions, and compressed keys "
            "and values that do not pass through the cache: rotating queries and cached keys would rotate the values "
            "too, and leave the compressed ones unrotated",
        ),
    ),
    ignored=(*MIXTRAL.ignored, r"model\.layers\.\d+\.mlp\.gate\.tid2eid"),
    stored=_NAMES,
)

FAMILIES = (DEEPSEEK_V4,)
