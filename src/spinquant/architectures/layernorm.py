"""LayerNorm families (GPT-2, GPT-J, GPT-NeoX, OPT, Phi, Falcon, BLOOM, MPT, StarCoder2, OLMo, Cohere, ...).

Their norms subtract the mean, so the residual space is `centred` and R1 has to be mean-preserving. If attention and MLP
read the same norm (parallel blocks), its gain is fused into both. In fused q, k, v weights the values are a span: the
last third (GPT-2), the last of three parts in every head (GPT-NeoX), or in every group of heads (Falcon). Model classes
older than transformers' attention interface compute attention in their own code, where R3 cannot be applied.
"""

from collections.abc import Mapping
from dataclasses import replace

from spinquant.architectures.family import AxisPart, Family, Refusal
from spinquant.architectures.llama import ARCEE, ATTENTION, HIDDEN, LAYER, LLAMA, MLP, VALUE

QUERY_KEY = "layers.{i}.query_key"
FILLED = {VALUE: ("R2", "hidden_size/num_attention_heads"), QUERY_KEY: ("R3", "hidden_size/num_attention_heads")}
EVERY_HEAD = AxisPart(VALUE, "2*head_dim", "head_dim", "3*head_dim")

OWN_ATTENTION = Refusal(
    "R3",
    "the attention module computes q k^T in its own code, not through transformers' attention interface, so queries "
    "cannot be rotated after their position embedding",
)
OWN_UNTIL_5_24 = replace(OWN_ATTENTION, reason=f"{OWN_ATTENTION.reason}; in transformers 5.24 they can", before=(5, 24))
CLIPPED = (
    "the output of {} is clipped element by element (clip_qkv) before {} reads it, and clipping does not commute "
    "with a rotation"
)

# Norms without parameters.
OLMO = LLAMA.like(
    "olmo",
    "olmo",
    centred=True,
    gains={name: None for name in LLAMA.gains},
    refused=(Refusal("R2", CLIPPED.format(f"{ATTENTION}.v_proj", "o_proj").replace("{i}", "*"), "clip_qkv"),),
)
NEMOTRON = ARCEE.like("nemotron", "nemotron", centred=True, norm_offset=1.0)
JAIS2 = NEMOTRON.like("jais2", "jais2", norm_offset=0.0)
STARCODER2 = ARCEE.like(
    "starcoder2",
    "starcoder2",
    centred=True,
    filled=1,
    rename={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
)

# One norm for attention and MLP.
_SHARED = (*(f"{ATTENTION}.{name}_proj" for name in "qkv"), f"{MLP}.gate_proj", f"{MLP}.up_proj")
PARALLEL = LLAMA.like(
    "parallel",
    centred=True,
    without=("post_attention_layernorm",),
    gains={f"{LAYER}.input_layernorm.weight": _SHARED},
)
COHERE = PARALLEL.like(
    "cohere",
    "cohere",
    "cohere2",
    "cohere_compass_text",
    tensors={f"{ATTENTION}.q_norm.weight?": (None, None), f"{ATTENTION}.k_norm.weight?": (None, None)},
)
_HEAD_NORMS = (r"model\.layers\.\d+\.self_attn\.[qk]_layernorm\.norms\.\d+\.weight",)
STABLELM = LLAMA.like(
    "stablelm", "stablelm", centred=True, filled=1, when=("not use_parallel_residual",), ignored=_HEAD_NORMS
)
STABLELM_PARALLEL = PARALLEL.like(
    "stablelm, parallel", "stablelm", filled=1, when=("use_parallel_residual",), ignored=_HEAD_NORMS
)
PHI = PARALLEL.like(
    "phi",
    "phi",
    filled=1,
    rename={
        "o_proj": "dense",
        "up_proj": "fc1",
        "down_proj": "fc2",
        "model.norm": "model.final_layernorm",
        "q_norm": "q_layernorm",
        "k_norm": "k_layernorm",
    },
    without=("gate_proj",),
    scaled={f"{MLP}.fc1": None},
    tensors={f"{ATTENTION}.q_layernorm.bias?": (None,), f"{ATTENTION}.k_layernorm.bias?": (None,)},
)
GPTJ = PARALLEL.like(
    "gptj",
    "gptj",
    filled=1,
    rename={
        LAYER: "transformer.h.{i}",
        "self_attn": "attn",
        "o_proj": "out_proj",
        "up_proj": "fc_in",
        "down_proj": "fc_out",
        "input_layernorm": "ln_1",
        "model.norm": "transformer.ln_f",
        "model.embed_tokens": "transformer.wte",
    },
    without=("gate_proj", "q_norm", "k_norm"),
    scaled={"transformer.h.{i}.mlp.fc_in": None},
    spaces={HIDDEN: ("R4", "n_inner|4*hidden_size")},
    refused=(OWN_UNTIL_5_24,),
)

# Learned positions are added to the embedding: they write to the residual space too.
OPT = ARCEE.like(
    "opt",
    "opt",
    filled=1,
    centred=True,
    rename={
        "model.layers": "model.decoder.layers",
        "model.embed_tokens": "model.decoder.embed_tokens",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "model.norm": "model.decoder.final_layer_norm",
        "o_proj": "out_proj",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
    without=("q_norm", "k_norm"),
    tensors={"model.decoder.embed_positions.weight": (None, "residual")},
    spaces={HIDDEN: ("R4", "ffn_dim")},
    when=("do_layer_norm_before",),
)
_POST_NORMS = ("self_attn_layer_norm", "final_layer_norm")
OPT_POST = OPT.like(
    "opt, post-norm",
    "opt",
    # What these norms write is the residual stream itself, which not only linears read.
    gains={
        "model.decoder.final_layer_norm.weight": None,
        **{f"model.decoder.layers.{{i}}.{norm}.weight": None for norm in _POST_NORMS},
    },
    tensors={
        f"model.decoder.layers.{{i}}.{norm}.{part}": (None,) for norm in _POST_NORMS for part in ("weight", "bias")
    },
    refused=(
        Refusal(
            "R1",
            "model.decoder.layers.*.self_attn_layer_norm and final_layer_norm follow the residual sum "
            "(do_layer_norm_before is off): they scale the residual stream element by element, which does not commute "
            "with R",
        ),
    ),
    when=("not do_layer_norm_before",),
)

XGLM = OPT.like(
    "xglm",
    "xglm",
    rename={"model.decoder.final_layer_norm": "model.layer_norm", "model.decoder.": "model."},
    without=("embed_positions",),
    refused=(
        OWN_ATTENTION,
        Refusal(
            "R1",
            "model.embed_positions adds sinusoidal position embeddings to the residual stream, which the model class "
            "computes and no checkpoint stores, so they cannot be rotated like the stream",
        ),
    ),
    ignored=(r"model\.embed_positions\.weights",),  # which checkpoints store all the same
    when=(),
)
BIOGPT = OPT.like(
    "biogpt",
    "biogpt",
    rename={
        "model.decoder.final_layer_norm": "biogpt.layer_norm",
        "model.decoder.": "biogpt.",
        "lm_head": "output_projection",
    },
    spaces={HIDDEN: ("R4", "intermediate_size")},
    when=(),
)


def _fused(layer: str, attention: str, values: AxisPart, names: Mapping[str, str]) -> Family:
    """A family with a fused q, k, v linear and an MLP without a gate. names: of the linears qkv, out, up and down."""
    return ARCEE.like(
        "fused",
        centred=True,
        filled=1,
        rename={
            "q_proj": names["qkv"],
            "o_proj": names["out"],
            ATTENTION: f"{layer}.{attention}",
            "up_proj": names["up"],
            "down_proj": names["down"],
            LAYER: layer,
        },
        without=("k_proj", "v_proj", "q_norm", "k_norm", "gate_proj"),
        tensors={f"{layer}.{attention}.{names['qkv']}.weight": (values, "residual")},
        spaces=FILLED,
    )


_NEOX_NAMES = {"qkv": "query_key_value", "out": "dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h"}
GPT_NEOX = _fused("gpt_neox.layers.{i}", "attention", EVERY_HEAD, _NEOX_NAMES).like(
    "gpt_neox",
    "gpt_neox",
    rename={"model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm"},
    stored=((r"^embed_out\.", "lm_head."),),
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
# The bias of the attention's output is a tensor of the attention module, in the last layer only.
GPT_NEOX_JAPANESE = GPT_NEOX.like(
    "gpt_neox_japanese",
    "gpt_neox_japanese",
    rename={"gpt_neox": "gpt_neox_japanese", "lm_head": "embed_out"},
    tensors={"gpt_neox_japanese.layers.{i}.attention.dense_bias?": ("residual",)},
    spaces={HIDDEN: ("R4", "intermediate_multiple_size*hidden_size")},
    refused=(OWN_ATTENTION,),
    stored=(),
)
PERSIMMON = _fused(LAYER, "self_attn", EVERY_HEAD, _NEOX_NAMES).like(
    "persimmon",
    "persimmon",
    rename={"model.norm": "model.final_layernorm"},
    tensors={f"{ATTENTION}.{name}_layernorm.{part}?": (None,) for name in ("q", "k") for part in ("weight", "bias")},
)

_FALCON_NAMES = {"model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f"}
_BLOCK = "transformer.h.{i}"
FALCON_SEQUENTIAL = _fused(_BLOCK, "self_attention", EVERY_HEAD, _NEOX_NAMES).like(
    "falcon, sequential",
    "falcon",
    rename=_FALCON_NAMES,
    spaces={HIDDEN: ("R4", "ffn_hidden_size|4*hidden_size")},
    refused=(OWN_ATTENTION,),
    when=("not new_decoder_architecture", "not parallel_attn", "not multi_query"),
)
_FALCON_MLP, _FALCON_QKV = f"{_BLOCK}.mlp.dense_h_to_4h", f"{_BLOCK}.self_attention.query_key_value"
FALCON = FALCON_SEQUENTIAL.like(
    "falcon",
    "falcon",
    without=("post_attention_layernorm",),
    tensors={f"{_FALCON_QKV}.weight": (AxisPart(VALUE, "hidden_size + head_dim", "head_dim"), "residual")},
    gains={f"{_BLOCK}.input_layernorm.weight": (_FALCON_QKV, _FALCON_MLP)},
    when=("not new_decoder_architecture", "parallel_attn", "multi_query"),
)
_HEADS_OF_GROUP = "num_attention_heads/num_kv_heads*head_dim"
FALCON_GROUPED = FALCON.like(
    "falcon, grouped",
    "falcon",
    tensors={
        f"{_FALCON_QKV}.weight": (
            AxisPart(VALUE, f"{_HEADS_OF_GROUP} + head_dim", "head_dim", f"{_HEADS_OF_GROUP} + 2*head_dim"),
            "residual",
        )
    },
    # One norm for both, or one each.
    gains={
        f"{_BLOCK}.input_layernorm.weight": (_FALCON_QKV, _FALCON_MLP),
        f"{_BLOCK}.ln_attn.weight": (_FALCON_QKV,),
        f"{_BLOCK}.ln_mlp.weight": (_FALCON_MLP,),
    },
    choices=(((f"{_BLOCK}.input_layernorm",), (f"{_BLOCK}.ln_attn", f"{_BLOCK}.ln_mlp")),),
    when=("new_decoder_architecture",),
)

BLOOM = FALCON_SEQUENTIAL.like(
    "bloom",
    "bloom",
    stored=((r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1."),),
    spaces={HIDDEN: ("R4", "4*hidden_size")},
    tensors={f"transformer.word_embeddings_layernorm.{part}": (None,) for part in ("weight", "bias")},
    refused=(
        OWN_ATTENTION,
        Refusal(
            "R1",
            "transformer.word_embeddings_layernorm.weight scales the embedding element by element on its way into the "
            "residual stream, and no linear reads it before the first sum, so it cannot be fused away",
        ),
        Refusal(
            "R4",
            "the model class multiplies by slices of the weight of transformer.h.*.mlp.dense_4h_to_h (slow_but_exact) "
            "and does not call the module, so its input cannot be rotated online",
            "slow_but_exact",
        ),
    ),
    uncalled={f"{_BLOCK}.{name}": "slow_but_exact" for name in ("self_attention.dense", "mlp.dense_4h_to_h")},
    when=(),
)

MPT = _fused(
    "transformer.blocks.{i}",
    "attn",
    AxisPart(VALUE, "2*hidden_size", "hidden_size"),
    {"qkv": "Wqkv", "out": "out_proj", "up": "up_proj", "down": "down_proj"},
).like(
    "mpt",
    "mpt",
    rename={
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "mlp.": "ffn.",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.norm_f",
    },
    spaces={HIDDEN: ("R4", "4*hidden_size")},
    refused=(
        OWN_ATTENTION,
        Refusal("R2", CLIPPED.format("transformer.blocks.*.attn.Wqkv", "out_proj"), "attn_config.clip_qkv"),
    ),
)

_GPT2_NAMES = {"qkv": "c_attn", "out": "c_proj", "up": "c_fc", "down": "c_proj"}
GPT_BIGCODE = _fused(_BLOCK, "attn", EVERY_HEAD, _GPT2_NAMES).like(
    "gpt_bigcode, multi-head",
    "gpt_bigcode",
    rename={
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
    },
    tensors={"transformer.wpe.weight": (None, "residual")},
    spaces={HIDDEN: ("R4", "n_inner|4*hidden_size")},
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # causal masks, which old checkpoints store
    when=("not multi_query",),
)
_QKV = f"{_BLOCK}.attn.c_attn"
GPT_BIGCODE_MULTI_QUERY = GPT_BIGCODE.like(
    "gpt_bigcode",
    "gpt_bigcode",
    tensors={f"{_QKV}.weight": (AxisPart(VALUE, "hidden_size + head_dim", "head_dim"), "residual")},
    when=("multi_query",),
)
# Rows are in four groups of heads; each has queries, then values, then keys.
CODEGEN = GPTJ.like(
    "codegen",
    "codegen",
    rename={"q_proj": "qkv_proj"},
    without=("k_proj", "v_proj"),
    tensors={
        f"{_BLOCK}.attn.qkv_proj.weight": (
            AxisPart(VALUE, "hidden_size/4", "hidden_size/4", "3*hidden_size/4"),
            "residual",
        )
    },
    ignored=(r"transformer\.h\.\d+\.attn\.causal_mask",),
    heads=4,
)
GPT_NEO = OPT.like(
    "gpt_neo",
    "gpt_neo",
    rename={
        "model.decoder.layers": "transformer.h",
        "self_attn_layer_norm": "ln_1",
        "{i}.final_layer_norm": "{i}.ln_2",
        "model.decoder.final_layer_norm": "transformer.ln_f",
        "model.decoder.embed_tokens": "transformer.wte",
        "model.decoder.embed_positions": "transformer.wpe",
        ".self_attn": ".attn.attention",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    },
    spaces={HIDDEN: ("R4", "intermediate_size|4*hidden_size")},
    refused=(OWN_ATTENTION,),
    ignored=(r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
    when=(),
)
# Conv1D stores (in, out).
GPT2 = GPT_BIGCODE.like(
    "gpt2",
    "gpt2",
    stored=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),  # the first checkpoints, of the model without its head
    transposed=True,
    tensors={
        f"{_QKV}.weight": ("residual", AxisPart(VALUE, "2*hidden_size", "hidden_size")),
        f"{_BLOCK}.attn.c_proj.weight": (VALUE, "residual"),
        f"{_BLOCK}.mlp.c_fc.weight": ("residual", None),
        f"{_BLOCK}.mlp.c_proj.weight": (HIDDEN, "residual"),
    },
    when=(),
)

FAMILIES = (
    *(OLMO, NEMOTRON, JAIS2, STARCODER2, COHERE, STABLELM, STABLELM_PARALLEL, PHI, GPTJ, OPT, OPT_POST, XGLM, BIOGPT),
    *(GPT_NEOX, GPT_NEOX_JAPANESE, PERSIMMON, CODEGEN, GPT_NEO),
    *(FALCON_SEQUENTIAL, FALCON, FALCON_GROUPED, BLOOM, MPT, GPT_BIGCODE, GPT_BIGCODE_MULTI_QUERY, GPT2),
)
