"""Post-norm families (norms on the outputs of attention and MLP), for which R1 is impossible: Gemma 2, OLMo 2, GLM-4.

Such a norm scales element by element what a block adds to the residual stream. Its scale g has no linear to be fused
into, and diag(g) does not commute with a rotation unless all elements of g are equal, so the residual stream cannot be
rotated. R2, R3 and R4 are possible.
"""

from spinquant.architectures.family import Refusal
from spinquant.architectures.llama import ATTENTION, GLM, LAYER, LLAMA


def post_norm(*norms: str, when: str | None = None) -> tuple[Refusal, ...]:
    """The refusal of R1 because these norms scale what a block adds to the residual stream."""
    return (
        Refusal(
            "R1",
            f"{' and '.join(f'model.layers.*.{norm}.weight' for norm in norms)} scale what a block adds to the "
            "residual stream element by element, and diag(g) R = R diag(g) holds only if all elements of g are equal; "
            "no linear reads the norm before the sum, so g cannot be fused away",
            when,
        ),
    )


GEMMA2 = LLAMA.like(
    "gemma2",
    "gemma2",
    "gemma3_text",
    norm_offset=1.0,
    rename={"post_attention_layernorm": "pre_feedforward_layernorm"},
    tensors={
        f"{LAYER}.post_attention_layernorm.weight": (None,),
        f"{LAYER}.post_feedforward_layernorm.weight": (None,),
    },
    refused=post_norm("post_attention_layernorm", "post_feedforward_layernorm"),
)

# Attention and MLP read the residual stream directly. The q/k norms of OLMo 2 act on all heads at once, before RoPE.
OLMO2 = LLAMA.like(
    "olmo2",
    "olmo2",
    "olmo3",
    "exaone4",
    gains={f"{LAYER}.input_layernorm.weight": None, f"{LAYER}.post_attention_layernorm.weight": None},
    tensors={
        f"{ATTENTION}.q_norm.weight": (None,),
        f"{ATTENTION}.k_norm.weight": (None,),
        f"{LAYER}.post_attention_layernorm.weight": (None,),
        f"{LAYER}.post_feedforward_layernorm.weight": (None,),
    },
    refused=post_norm("post_attention_layernorm", "post_feedforward_layernorm"),
)

GLM4 = GLM.like(
    "glm4",
    "glm4",
    tensors={f"{LAYER}.post_self_attn_layernorm.weight": (None,), f"{LAYER}.post_mlp_layernorm.weight": (None,)},
    refused=post_norm("post_self_attn_layernorm", "post_mlp_layernorm"),
)

FAMILIES = (GEMMA2, OLMO2, GLM4)
