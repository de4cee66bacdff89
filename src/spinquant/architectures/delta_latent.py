"""Layers with a delta net, and layers with DeepSeek's attention, under one name: Kimi Linear, Ling.

What writes to the residual stream, `o_proj`, reads values in the one kind and something else in the other, so it reads
no space of values, and R2 rotates the latents alone. Where both kinds have a linear of one name (q_proj, a gate), both
read the norm with it. The gate of the attention is a number for each head.
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
    behind: tuple[str, ...] = (),
    shared: tuple[str, ...] = (),
    stored: tuple[tuple[str, str], ...],
) -> Family:
    """The family whose delta net has linears that read the norm beside q, k and v, and some behind those.

    shared: linears that read the norm in both kinds of layers.
    """
    reading, behind, gates = (
        tuple(f"{ATTENTION}.{part}_proj" for part in parts) for parts in (("k", "v", *reads), behind, shared)
    )
    own = (*reading, *behind, f"{ATTENTION}.forget_gate", f"{ATTENTION}.o_norm")
    return DEEPSEEK.like(
        name,
        name,
        tensors={
            f"{ATTENTION}.kv_b_proj.weight": (None, KEY_VALUE_LATENT),
            f"{ATTENTION}.o_proj.weight": ("residual", None),
            **{f"{linear}.weight": (None, "residual") for linear in (*reading, *gates)},
            **{f"{linear}.weight": (None, None) for linear in behind},
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
            *((linear,) for linear in behind),
            *_REST,
        ),
        attention_part="kv_a_proj_with_mqa.",
        choices=(*DEEPSEEK.choices, (_ATTENTION_PARTS, tuple(f"{module}." for module in own))),
        stored=stored,
    )


KIMI_LINEAR = _delta_or_latent(
    "kimi_linear",
    reads=("forget_gate.f_a", "b", "g_a"),
    behind=("forget_gate.f_b", "g_b"),
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
