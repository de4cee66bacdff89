"""Variants of other families with small differences: attention sinks, additional norms, gates on the attention output.

Whether R2 is possible depends on the operations between the values and the linear that reads them. A scalar per head
commutes with a rotation of the head, and so does a norm whose scale is fused into the reader; a gate with one element
per channel does not. A norm with a scale on a block's output rules out R1 (see `postnorm.py`).
"""

from spinquant.architectures.family import Family, Norm, Refusal
from spinquant.architectures.hybrid import LFM2, LFM2_NAMES, with_mixer
from spinquant.architectures.llama import ARCEE, ATTENTION, GEMMA, HIDDEN, LAYER, LLAMA, MLP, VALUE
from spinquant.architectures.moe import (
    DEEPSEEK,
    EXPERT,
    EXPERT_NAMES,
    EXPERTS,
    GRANITE_MOE,
    MIXTRAL,
    QWEN3_MOE,
    with_shared,
)
from spinquant.architectures.postnorm import OLMO2, post_norm

_INPUT, _BEFORE_MLP = f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"
_SINKS = {f"{ATTENTION}.sinks": (None,)}


def _scales(*norms: str) -> dict[str, tuple[None]]:
    return {f"{LAYER}.{norm}.weight": (None,) for norm in norms}


SINKS = LLAMA.like(
    "llama, sinks",
    "granite_swa",
    "flint",
    tensors=_SINKS,
    stored=((r"\.self_attn\.softmax_offset$", ".self_attn.sinks"),),
)
VAULTGEMMA = GEMMA.like("vaultgemma", "vaultgemma", rename={"post_attention_layernorm": "pre_feedforward_layernorm"})
# No norm has a scale.
NANOCHAT = ARCEE.like(
    "nanochat",
    "nanochat",
    rename={"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    without=("q_norm", "k_norm"),
    gains={_INPUT: None, _BEFORE_MLP: None, "model.norm.weight": None},
)
# A norm over all heads before o_proj, and one over the MLP's hidden channels before down_proj (and before R4).
BITNET = LLAMA.like(
    "bitnet",
    "bitnet",
    filled=1,
    without=("q_norm", "k_norm"),
    tensors={f"{MLP}.ffn_sub_norm.weight": (None,)},
    scaled={f"{MLP}.up_proj": None},
    gains={f"{ATTENTION}.attn_sub_norm.weight": Norm((f"{ATTENTION}.o_proj",), VALUE)},
)
# Attention over each half of the heads, one subtracted from the other, and a norm without a scale over pairs of heads,
# which keeps values from more than a rotation.
DIFFLLAMA = LLAMA.like(
    "diffllama",
    "diffllama",
    heads=2,
    without=("q_norm", "k_norm"),
    tensors={f"{ATTENTION}.lambda_{name}": (None,) for name in ("q1", "k1", "q2", "k2")},
    spaces={VALUE: ("R2", "head_dim", "orthogonal")},
)
# The attention mask is computed from the values, by a linear.
DOGE = LLAMA.like(
    "doge",
    "doge",
    tensors={
        f"{ATTENTION}.A": (None,),
        f"{ATTENTION}.dt_proj.weight": (None, VALUE),
        f"{ATTENTION}.dt_proj.bias?": (None,),
        f"{LAYER}.input_residual": (None,),
        f"{LAYER}.post_attention_residual": (None,),
    },
    refused=(
        Refusal(
            "R1",
            "model.layers.*.input_residual and model.layers.*.post_attention_residual scale the residual stream "
            "element by element, and diag(g) R = R diag(g) holds only if all elements of g are equal",
        ),
    ),
)
HYPERCLOVAX = LLAMA.like(
    "hyperclovax",
    "hyperclovax",
    tensors={f"{name}?": axes for name, axes in _scales("post_norm1", "post_norm2").items()},
    refused=post_norm("post_norm1", "post_norm2", when="use_post_norm"),
)

GRANITE_MOE_SINKS = GRANITE_MOE.like("granitemoe, sinks", "granitemoe_swa", tensors=_SINKS)
HY_V3 = with_shared(
    QWEN3_MOE.like(
        "hy_v3",
        "hy_v3",
        stored=(
            (r"\.mlp\.router\.gate\.", ".mlp.gate."),
            (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
            (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),
        ),
    ),
    "mlp.shared_experts",
    "moe_intermediate_size*num_shared_experts",
)
# The router bias that corrects the choice of experts is in the router module; checkpoints store it outside.
EXAONE_MOE = HY_V3.like(
    "exaone_moe", "exaone_moe", stored=((r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),)
)
# Values have another head size than keys; sliding-window layers have twice the key heads, and sinks.
MIMO_V2 = QWEN3_MOE.like(
    "mimo_v2_flash",
    "mimo_v2_flash",
    heads=8,
    without=("q_norm", "k_norm"),
    tensors={f"{ATTENTION}.sinks?": (None,)},
    spaces={VALUE: ("R2", "v_head_dim")},
    stored=((r"\.self_attn\.attention_sink_bias$", ".self_attn.sinks"),),
)
_SHARED_EXPERT = with_shared(
    QWEN3_MOE.like("laguna", "laguna"), "mlp.shared_experts", "shared_expert_intermediate_size"
)
LAGUNA = _SHARED_EXPERT.like(
    "laguna",
    "laguna",
    tensors={f"{ATTENTION}.g_proj.weight": (None, "residual"), f"{MLP}.gate.e_score_correction_bias?": (None,)},
    gains={_INPUT: (*_SHARED_EXPERT.readers(_INPUT), f"{ATTENTION}.g_proj")},
    linears=((*_SHARED_EXPERT.linears[0], f"{ATTENTION}.g_proj"), *_SHARED_EXPERT.linears[1:]),
    refused=(
        Refusal(
            "R2",
            "model.layers.*.self_attn multiplies the attention's output by a gate, softplus of g_proj, element by "
            "element before o_proj, and (x R) * g is not (x * g) R",
            "gating=per-element",
        ),
    ),
    stored=(
        (r"\.mlp\.experts\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    ),
)
KOLIBRI = _SHARED_EXPERT.like(
    "kolibri1",
    "kolibri1",
    tensors=_scales("post_self_attn_layernorm", "post_mlp_layernorm"),
    refused=post_norm("post_self_attn_layernorm", "post_mlp_layernorm"),
    stored=(
        (r"\.mlp\.moe\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.moe\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
        (r"\.post_ffn_norm\.", ".post_mlp_layernorm."),
    ),
)
FLEX_OLMO = MIXTRAL.like(
    "flex_olmo",
    "flex_olmo",
    gains={_INPUT: None, _BEFORE_MLP: None},
    tensors={
        f"{ATTENTION}.q_norm.weight": (None,),
        f"{ATTENTION}.k_norm.weight": (None,),
        **_scales("post_attention_layernorm", "post_feedforward_layernorm"),
    },
    refused=post_norm("post_attention_layernorm", "post_feedforward_layernorm"),
    stored=(),
)
_AFMOE = with_shared(QWEN3_MOE, "mlp.shared_experts", "moe_intermediate_size*num_shared_experts")
AFMOE = _AFMOE.like(
    "afmoe",
    "afmoe",
    rename={f"{MLP}.gate.": f"{MLP}.router.gate."},
    tensors={
        f"{ATTENTION}.gate_proj.weight": (None, "residual"),
        f"{MLP}.expert_bias?": (None,),
        **_scales("post_attention_layernorm", "post_mlp_layernorm"),
    },
    gains={
        _INPUT: (*_AFMOE.readers(_INPUT), f"{ATTENTION}.gate_proj"),
        _BEFORE_MLP: None,
        f"{LAYER}.pre_mlp_layernorm.weight": tuple(
            f"{MLP}.router.gate" if reader == f"{MLP}.gate" else reader for reader in _AFMOE.readers(_BEFORE_MLP)
        ),
    },
    linears=((*_AFMOE.linears[0], f"{ATTENTION}.gate_proj"), *_AFMOE.linears[1:]),
    refused=(
        *post_norm("post_attention_layernorm", "post_mlp_layernorm"),
        Refusal(
            "R2",
            "model.layers.*.self_attn multiplies the attention's output by a gate, sigmoid of gate_proj, element by "
            "element before o_proj, and (x R) * g is not (x * g) R",
        ),
    ),
)
AXK1 = DEEPSEEK.like(
    "axk1",
    "axk1",
    tensors={f"{MLP}.post_mlp_layernorm.weight?": (None,)},
    refused=(*post_norm("mlp.post_mlp_layernorm"), *DEEPSEEK.refused),
    stored=((r"\.layers\.(\d+)\.post_mlp_layernorm\.", r".layers.\1.mlp.post_mlp_layernorm."),),
)

# Experts as (experts, in, out).
_TRANSPOSED = {
    f"{EXPERTS}.gate_up_proj": (None, "residual", None),
    f"{EXPERTS}.down_proj": (None, EXPERT, "residual"),
}
_DENSE = ("{e}", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ARIA = with_shared(
    MIXTRAL.like(
        "aria",
        "aria_text",
        rename={f"{MLP}.gate.": f"{MLP}.router."},
        without=_DENSE,
        tensors=_TRANSPOSED,
        gains={_BEFORE_MLP: (f"{MLP}.router", f"{EXPERTS}.gate_up_proj")},
        choices=(),
        stored=(
            (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
            (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
        ),
        refused=(
            Refusal(
                "R4",
                "its experts multiply in their own code, not through transformers' experts interface, so what "
                "down_proj reads cannot be rotated; in transformers 5.18 it can",
                before=(5, 18),
            ),
        ),
    ),
    "mlp.shared_experts",
    "intermediate_size*moe_num_shared_experts",
)
# All experts process all tokens, each scaled by a scalar. There is no place between their two matrix products for R4.
LLAMA4 = with_shared(
    QWEN3_MOE.like(
        "llama4",
        "llama4_text",
        rename={f"{MLP}.gate.": f"{MLP}.router."},
        without=("{e}", "q_norm", "k_norm"),
        tensors={**_TRANSPOSED, f"{EXPERTS}.down_proj": (None, None, "residual")},
        spaces={HIDDEN: ("R4", "intermediate_size_mlp"), EXPERT: None},
        gains={_BEFORE_MLP: (f"{MLP}.router", f"{EXPERTS}.gate_up_proj", f"{MLP}.gate_proj", f"{MLP}.up_proj")},
        onlines={EXPERTS: None},
        choices=(
            (
                tuple(f"{MLP}.{name}_proj." for name in ("gate", "up", "down")),
                (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", f"{MLP}.router.", f"{MLP}.shared_expert."),
            ),
        ),
    ),
    "mlp.shared_expert",
    "intermediate_size",
).like("llama4", "llama4_text", rename={"mlp.": "feed_forward."})

LFM2_MOE = with_mixer(QWEN3_MOE, f"{LAYER}.conv", ("conv.weight", "conv.bias?")).like(
    "lfm2_moe",
    "lfm2_moe",
    rename={**LFM2_NAMES, "mlp.": "feed_forward."},
    tensors={f"{LAYER}.feed_forward.expert_bias?": (None,)},
    ignored=(*QWEN3_MOE.ignored, r"model\.layers\.\d+\.feed_forward\.expert_bias"),
    stored=EXPERT_NAMES,
)
_GATE = f"{ATTENTION}.g_proj"
LFM3 = LFM2.like(
    "lfm3",
    "lfm3",
    rename={"self_attn.out_proj": "self_attn.o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm"},
    tensors={
        **{f"{name}?": axes for name, axes in _scales("post_operator_norm", "post_ffn_norm").items()},
        f"{_GATE}.weight?": (None, "residual"),
    },
    gains={f"{LAYER}.operator_norm.weight": (*LFM2.readers(f"{LAYER}.operator_norm.weight"), _GATE)},
    linears=tuple(
        (
            *(name.replace("self_attn.out_proj", "self_attn.o_proj") for name in group),
            *((_GATE,) if "q_proj" in group[0] else ()),
        )
        for group in LFM2.linears
    ),
    refused=post_norm("post_operator_norm", "post_ffn_norm", when="use_sandwich_norm"),
    stored=((r"\.self_attn\.gate_proj\.", ".self_attn.g_proj."),),
)
# Layers with a delta net have pre-norms, those with attention post-norms.
OLMO_HYBRID = with_mixer(
    OLMO2.like(
        "olmo_hybrid",
        "olmo_hybrid",
        without=("post_feedforward_layernorm",),
        tensors={f"{LAYER}.input_layernorm.weight?": (None,), f"{LAYER}.post_feedforward_layernorm.weight?": (None,)},
        gains={_INPUT: ()},
    ),
    f"{LAYER}.linear_attn",
    ("A_log", "dt_bias", "o_norm.weight", "conv1d.weight?", *(f"{name}_conv1d.weight?" for name in "qkv")),
    reads=tuple(f"{name}_proj" for name in "qkvabg"),
    writes="o_proj",
).like(
    "olmo_hybrid",
    "olmo_hybrid",
    gains={_INPUT: None},
    stored=(
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
)

FAMILIES: tuple[Family, ...] = (
    *(SINKS, VAULTGEMMA, NANOCHAT, BITNET, DIFFLLAMA, DOGE, HYPERCLOVAX, GRANITE_MOE_SINKS, HY_V3, EXAONE_MOE, MIMO_V2),
    *(LAGUNA, KOLIBRI, FLEX_OLMO, AFMOE, AXK1, ARIA, LLAMA4, LFM2_MOE, LFM3, OLMO_HYBRID),
)
