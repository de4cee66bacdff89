"""Hybrids of delta-net layers and multi-head latent attention (MLA) under one module name: Kimi Linear, Ling.

`o_proj`, which writes to the residual stream, reads values in an attention layer and something else in a delta-net
layer. So no value space is defined for it, and R2 rotates only the latents. Linears that both kinds of layer have
under the same name (q_proj, a gate) read the norm in both. The gate of the attention is one number per head.
"""

from spinquant.architectures.family import INSIDE, Family
from spinquant.architectures.llama import ATTENTION, LAYER, VALUE
from spinquant.architectures.moe import DEEPSEEK, KEY_VALUE_LATENT, MIXTRAL_NAMES, SHARED

_NORM = f"{LAYER}.input_layernorm.weight"
_READS, _QUERIES, _EXPANDS, *_REST = DEEPSEEK.linears
_ATTENTION_PARTS = tuple(f"{ATTENTION}.{name}." for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))


def _delta_or_latent(
    name: str,
    *,
    reads: tuple[str, ...],
    inner: tuple[str, ...] = (),
    shared: tuple[str, ...] = (),
    stored: tuple[tuple[str, str], ...],
) -> Family:
    """A hybrid family, from the linears of its delta net.

    Args:
        name: name and model type of the family.
        reads: linears of the delta net that read the norm, besides q, k and v.
        inner: linears that read the output of these.
        shared: linears that read the norm in both kinds of layer.
        stored: as in `Family`.
    """
    reading, inner, gates = (
        tuple(f"{ATTENTION}.{part}_proj" for part in parts) for parts in (("k", "v", *reads), inner, shared)
    )
    own = (*reading, *inner, f"{ATTENTION}.forget_gate", f"{ATTENTION}.o_norm")
    return DEEPSEEK.like(
        name,
        name,
        tensors={
            f"{ATTENTION}.kv_b_proj.weight": (None, KEY_VALUE_LATENT),
            f"{ATTENTION}.o_proj.weight": ("residual", None),
            **{f"{linear}.weight": (None, "residual") for linear in (*reading, *gates)},
            **{f"{linear}.weight": (None, None) for linear in inner},
            **{f"{ATTENTION}.forget_gate.{part}": INSIDE for part in ("dt_bias", "A_log")},
            f"{ATTENTION}.o_norm.weight": (None,),
            **{f"{ATTENTION}.{part}conv1d.weight?": INSIDE for part in ("", "q_", "k_", "v_")},
        },
        spaces={VALUE: None, SHARED: ("R4", "moe_intermediate_size*num_shared_experts")},
        gains={_NORM: (*DEEPSEEK.readers(_NORM), *reading, *gates)},
        linears=(
            (*_READS, *reading, *gates),
            _QUERIES,
            _EXPANDS,
            *((linear,) for linear in inner),
            *_REST,
        ),
        attention_part="kv_a_proj_with_mqa.",
        choices=(*DEEPSEEK.choices, (_ATTENTION_PARTS, tuple(f"{module}." for module in own))),
        stored=stored,
    )


KIMI_LINEAR = _delta_or_latent(
    "kimi_linear",
    reads=("forget_gate.f_a", "b", "g_a"),
    inner=("forget_gate.f_b", "g_b"),
    stored=(
        *MIXTRAL_NAMES,
        (r"\.self_attn\.(f_[ab]_proj\.|dt_bias$|A_log$)", r".self_attn.forget_gate.\1"),
        (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
    ),
)
BAILING_HYBRID = _delta_or_latent(
    "bailing_hybrid",
    reads=("forget_gate.f", "b"),
    shared=("g",),
    stored=(
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.", ".self_attn."),
        (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        (r"\.self_attn\.(f_proj\.|dt_bias$|A_log$)", r".self_attn.forget_gate.\1"),
        (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    ),
)

FAMILIES = (KIMI_LINEAR, BAILING_HYBRID)
