"""Mixture-of-experts families (Mixtral, Qwen-MoE, gpt-oss, DeepSeek, ...), and multi-head latent attention (MLA).

Router, experts, shared experts and their gate read the norm before the MLP, so its gain is fused into all of them.
transformers stacks the experts of a layer in one parameter, (experts, out, in), while checkpoints store them one by
one; a table lists both. All experts of a layer share one R4 rotation, which runs online between the experts'
activation and their second matrix product (site `experts`).

In MLA, keys and values are rows of `kv_b_proj`, head by head, computed from a latent that one linear writes, a norm
scales and another linear reads, so the latent is a space too. The KV cache stores this latent, so R2 rotates it. R3
would rotate the keys of each head before they enter the cache, and there are none.
"""

from spinquant.architectures.family import AxisPart, Family, Norm, Refusal
from spinquant.architectures.layernorm import CLIPPED
from spinquant.architectures.llama import ATTENTION, HIDDEN, LAYER, LLAMA, MLP, VALUE

EXPERTS = f"{MLP}.experts"
EXPERT = "layers.{i}.experts"
SHARED = "layers.{i}.shared"
_NORM = f"{LAYER}.post_attention_layernorm.weight"
_DENSE = tuple(f"{MLP}.{name}_proj." for name in ("gate", "up", "down"))

QWEN3_MOE = LLAMA.like(
    "qwen3_moe",
    "qwen3_moe",
    "mellum",
    tensors={
        f"{MLP}.gate.weight": (None, "residual"),
        f"{EXPERTS}.gate_up_proj": (None, None, "residual"),
        f"{EXPERTS}.down_proj": (None, "residual", EXPERT),
        f"{EXPERTS}.{{e}}.gate_proj.weight": (None, "residual"),
        f"{EXPERTS}.{{e}}.up_proj.weight": (None, "residual"),
        f"{EXPERTS}.{{e}}.down_proj.weight": ("residual", EXPERT),
    },
    spaces={EXPERT: ("R4", "moe_intermediate_size")},
    gains={
        _NORM: (
            *(f"{MLP}.{name}" for name in ("gate", "gate_proj", "up_proj")),
            *(f"{EXPERTS}.{name}" for name in ("gate_up_proj", "{e}.gate_proj", "{e}.up_proj")),
        )
    },
    onlines={EXPERTS: ("experts", EXPERT)},
    # Dense layers, stacked experts, single experts.
    choices=(
        (
            _DENSE,
            (f"{EXPERTS}.gate_up_proj", EXPERTS + ".down_proj", f"{MLP}.gate."),
            (f"{EXPERTS}.{{e}}.", f"{MLP}.gate."),
        ),
    ),
    experts="num_local_experts|num_experts|n_routed_experts",
    # Router bias that corrects the choice of experts: a buffer, which checkpoints store.
    ignored=(*LLAMA.ignored, r"model\.layers\.\d+\.mlp\.(gate\.)?e_score_correction_bias"),
)


def with_shared(
    family: Family, module: str, size: str, *, gate: str = "gate_proj", down: str = "down_proj", scaled: bool = True
) -> Family:
    """The family with shared experts, which process every token, and their gate, if they have one.

    Args:
        family: the family without them.
        module: name of the shared experts' module in a layer.
        size: expression for their intermediate size.
        gate: name of the gate linear; any other than gate_proj is gate and up in one weight.
        down: name of the down projection.
        scaled: the output of the up projection is a factor of the product, so intermediate channels may be scaled.
    """
    path = f"{LAYER}.{module}"
    inside = (f"{path}.{gate}", *((f"{path}.up_proj",) if gate == "gate_proj" else ()))
    weighing = f"{path}_gate"
    norm = _NORM if _NORM in family.gains else _INPUT
    # In a weight with both, the first half of the rows is the gate.
    factor = {f"{path}.up_proj": SHARED} if gate == "gate_proj" else {f"{path}.{gate}": AxisPart(SHARED, size, size)}
    factor = factor if scaled else {}
    return family.like(
        family.name,
        *family.model_types,
        tensors={
            **{f"{name}.weight?": (None, "residual") for name in (*inside, weighing)},
            f"{path}.{down}.weight?": ("residual", SHARED),
        },
        spaces={SHARED: ("R4", size)},
        gains={norm: (*family.readers(norm), *inside, weighing)},
        onlines={f"{path}.{down}": ("input", SHARED)},
        scaled=factor,
        linears=(*family.linears, inside, (f"{path}.{down}",)),
    )


_INPUT = f"{LAYER}.input_layernorm.weight"

QWEN2_MOE = with_shared(
    QWEN3_MOE.like("qwen2_moe", "qwen2_moe"), "mlp.shared_expert", "shared_expert_intermediate_size"
)
GLM4_MOE = with_shared(
    QWEN3_MOE.like("glm4_moe", "glm4_moe", "dots1", "solar_open"),
    "mlp.shared_experts",
    "moe_intermediate_size*n_shared_experts",
)
ERNIE4_5_MOE = with_shared(
    QWEN3_MOE.like(
        "ernie4_5_moe",
        "ernie4_5_moe",
        tensors={f"{MLP}.gate.moe_statics.e_score_correction_bias?": (None, None)},
        stored=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
    ),
    "mlp.shared_experts",
    "moe_intermediate_size*moe_num_shared_experts",
)
HUNYUAN_MOE = with_shared(
    QWEN3_MOE.like(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        rename={"q_norm": "query_layernorm", "k_norm": "key_layernorm", f"{MLP}.gate.": f"{MLP}.gate.wg."},
        spaces={EXPERT: ("R4", "intermediate_size")},
        gains={_NORM: (f"{MLP}.gate.wg", *(r for r in QWEN3_MOE.readers(_NORM) if r != f"{MLP}.gate"))},
    ),
    "mlp.shared_mlp",
    "intermediate_size",
)
# Names in old checkpoints: w1 is the gate, w3 the up, w2 the down projection.
EXPERT_NAMES = tuple(
    (rf"\.experts\.(\d+)\.w{n}\.", rf".experts.\1.{name}_proj.") for n, name in ((1, "gate"), (2, "down"), (3, "up"))
)
MIXTRAL_NAMES = ((r"\.block_sparse_moe\.", ".mlp."), *EXPERT_NAMES)
MIXTRAL = QWEN3_MOE.like(
    "mixtral",
    "mixtral",
    "minimax_m2",
    spaces={EXPERT: ("R4", "intermediate_size")},
    stored=MIXTRAL_NAMES,
)
OLMOE = MIXTRAL.like(
    "olmoe",
    "olmoe",
    filled=1,
    stored=(),
    refused=(Refusal("R2", CLIPPED.format("model.layers.*.self_attn.v_proj", "o_proj"), "clip_qkv"),),
)
PHIMOE = MIXTRAL.like(
    "phimoe",
    "phimoe",
    centred=True,
    rename={f"{MLP}.gate.": f"{MLP}.router."},
    gains={_NORM: (f"{MLP}.router", *(r for r in QWEN3_MOE.readers(_NORM) if r != f"{MLP}.gate"))},
    stored=(*MIXTRAL_NAMES, (r"\.mlp\.gate\.", ".mlp.router.")),
)
GRANITE_MOE = with_shared(
    MIXTRAL.like(
        "granitemoe",
        "granitemoe",
        "granitemoeshared",
        rename={f"{MLP}.gate.": f"{LAYER}.block_sparse_moe.router.", EXPERTS: f"{LAYER}.block_sparse_moe.experts"},
        gains={
            _NORM: (f"{LAYER}.block_sparse_moe.router", f"{LAYER}.block_sparse_moe.experts.gate_up_proj"),
        },
        stored=(
            (r"\.block_sparse_moe\.input_linear\.weight", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight", ".block_sparse_moe.experts.down_proj"),
            (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
        ),
    ),
    "shared_mlp",
    "shared_intermediate_size",
    gate="input_linear",
    down="output_linear",
)

# Experts as (experts, in, out), with biases; gate and up alternate in the columns of one weight.
GPT_OSS = MIXTRAL.like(
    "gpt_oss",
    "gpt_oss",
    rename={f"{MLP}.gate.": f"{MLP}.router."},
    without=("{e}", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    tensors={
        f"{ATTENTION}.sinks": (None,),
        f"{MLP}.router.bias": (None,),
        f"{EXPERTS}.gate_up_proj": (None, "residual", None),
        f"{EXPERTS}.gate_up_proj_bias": (None, None),
        f"{EXPERTS}.down_proj": (None, EXPERT, "residual"),
        f"{EXPERTS}.down_proj_bias": (None, "residual"),
    },
    gains={_NORM: (f"{MLP}.router", f"{EXPERTS}.gate_up_proj")},
    choices=(),
    stored=(),
)

# Attention and experts read one norm, which subtracts the mean or does not.
_COHERE_READERS = (*(f"{ATTENTION}.{name}_proj" for name in "qkv"), *QWEN3_MOE.readers(_NORM))
COHERE2_MOE = with_shared(
    QWEN3_MOE.like(
        "cohere2_moe",
        "cohere2_moe",
        centred=True,
        spaces={EXPERT: ("R4", "intermediate_size"), "layers.{i}.hidden": ("R4", "prefix_dense_intermediate_size")},
        gains={_NORM: None, _INPUT: _COHERE_READERS},
        when=("not rms_norm_eps",),
    ),
    "mlp.shared_experts",
    "intermediate_size*num_shared_experts",
)
COHERE2_MOE_RMS = COHERE2_MOE.like("cohere2_moe, RMSNorm", "cohere2_moe", centred=False, when=("rms_norm_eps",))

KEY_VALUE_LATENT, QUERY_LATENT = "layers.{i}.key_value_latent", "layers.{i}.query_latent"
_HEADLESS = Refusal(
    "R3",
    "model.layers.*.self_attn caches a latent that all heads share, and kv_b_proj expands it to keys after the cache, "
    "so the cache has no keys per head that could be rotated; R2 rotates the latent",
)
DEEPSEEK = GLM4_MOE.like(
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    without=("k_proj", "v_proj", "q_norm", "k_norm", "self_attn.q_proj"),
    tensors={
        f"{ATTENTION}.q_proj.weight": (None, "residual"),
        f"{ATTENTION}.q_a_proj.weight": (QUERY_LATENT, "residual"),
        f"{ATTENTION}.q_b_proj.weight": (None, QUERY_LATENT),
        f"{ATTENTION}.kv_a_proj_with_mqa.weight": (AxisPart(KEY_VALUE_LATENT, "0", "kv_lora_rank"), "residual"),
        f"{ATTENTION}.kv_b_proj.weight": (
            AxisPart(VALUE, "qk_nope_head_dim", "v_head_dim", "qk_nope_head_dim + v_head_dim"),
            KEY_VALUE_LATENT,
        ),
    },
    spaces={
        VALUE: ("R2", "v_head_dim"),
        KEY_VALUE_LATENT: ("R2", "kv_lora_rank"),
        QUERY_LATENT: ("R2", "q_lora_rank"),
        "layers.{i}.query_key": ("R3", "qk_nope_head_dim + qk_rope_head_dim"),
    },
    gains={
        _INPUT: tuple(f"{ATTENTION}.{name}" for name in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
        f"{ATTENTION}.q_a_layernorm.weight": Norm((f"{ATTENTION}.q_b_proj",), QUERY_LATENT),
        f"{ATTENTION}.kv_a_layernorm.weight": Norm((f"{ATTENTION}.kv_b_proj",), KEY_VALUE_LATENT),
    },
    linears=(
        tuple(f"{ATTENTION}.{name}" for name in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
        (f"{ATTENTION}.q_b_proj",),
        (f"{ATTENTION}.kv_b_proj",),
        *GLM4_MOE.linears[1:],
    ),
    choices=(
        *GLM4_MOE.choices,
        (
            (f"{ATTENTION}.q_proj.",),
            tuple(f"{ATTENTION}.{name}." for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")),
        ),
    ),
    refused=(_HEADLESS,),
)

# The same attention with dense MLPs.
MLA_DENSE = DEEPSEEK.like(
    "mla, dense",
    "youtu",
    "minicpm3",
    without=(".experts", ".shared_experts", f"{MLP}.gate."),
    gains={_NORM: (f"{MLP}.gate_proj", f"{MLP}.up_proj")},
)

# Sparse attention: an indexer selects keys, from the normed input and the latent of the queries.
_INDEXER = f"{ATTENTION}.indexer"
_INDEXED = tuple(f"{_INDEXER}.{name}" for name in ("wk", "weights_proj"))
DEEPSEEK_SPARSE = DEEPSEEK.like(
    "deepseek, sparse",
    "deepseek_v32",
    "glm_moe_dsa",
    tensors={
        **{f"{name}.weight?": (None, "residual") for name in _INDEXED},
        f"{_INDEXER}.wq_b.weight?": (None, QUERY_LATENT),
        f"{_INDEXER}.k_norm.weight?": (None,),
        f"{_INDEXER}.k_norm.bias?": (None,),
    },
    gains={
        _INPUT: (*DEEPSEEK.readers(_INPUT), *_INDEXED),
        f"{ATTENTION}.q_a_layernorm.weight": Norm((f"{ATTENTION}.q_b_proj", f"{_INDEXER}.wq_b"), QUERY_LATENT),
    },
)

# An indexer selects blocks of keys from the normed input alone. Except in experts, gate and up are one linear.
_BLOCK_INDEXED = tuple(f"{_INDEXER}.{name}_proj" for name in "qk")
_MINIMAX_M3 = MIXTRAL.like(
    "minimax_m3",
    "minimax_m3_vl_text",
    norm_offset=1.0,
    rename={"mlp.gate_proj": "mlp.gate_up_proj"},
    without=("mlp.up_proj",),
    tensors={
        **{f"{name}.weight?": (None, "residual") for name in _BLOCK_INDEXED},
        **{f"{_INDEXER}.{name}_norm.weight?": (None,) for name in "qk"},
    },
    spaces={HIDDEN: ("R4", "dense_intermediate_size")},
    gains={_INPUT: (*MIXTRAL.readers(_INPUT), *_BLOCK_INDEXED)},
    linears=(
        (*MIXTRAL.linears[0], *_BLOCK_INDEXED),
        MIXTRAL.linears[1],
        (f"{MLP}.gate_up_proj",),
        (f"{MLP}.down_proj",),
    ),
    refused=(
        Refusal(
            "R3",
            "model.layers.*.self_attn applies its indexer, which selects blocks of keys, only under the attention "
            "implementations eager and sdpa, and R3 needs an attention implementation with another name",
        ),
    ),
    stored=(
        (r"\.block_sparse_moe\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.self_attn\.index_([qk]_(proj|norm))\.", r".self_attn.indexer.\1."),
        *MIXTRAL_NAMES,
    ),
)
# The up projection is clamped before it is multiplied.
MINIMAX_M3 = with_shared(
    _MINIMAX_M3, "mlp.shared_experts", "shared_intermediate_size", gate="gate_up_proj", scaled=False
)

FAMILIES = (
    *(QWEN3_MOE, QWEN2_MOE, GLM4_MOE, ERNIE4_5_MOE, HUNYUAN_MOE, MIXTRAL, OLMOE, PHIMOE, GRANITE_MOE, GPT_OSS),
    *(COHERE2_MOE, COHERE2_MOE_RMS, DEEPSEEK, MLA_DENSE, DEEPSEEK_SPARSE, MINIMAX_M3),
)
