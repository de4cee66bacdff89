"""The Llama family (Llama, Mistral, Qwen, Granite, Gemma, Phi-3, ...): RMSNorm before each block, gated MLP, RoPE.

Biases are optional everywhere, and q/k norms act on a head after the projection and before RoPE, where no
rotation reaches them, so Mistral, Qwen2, Qwen3, SmolLM3 and Granite (whose multipliers are scalars, which
commute with a rotation) follow the same table. So does Seed-OSS; Ministral's queries are scaled by position, which
is a scalar too.
"""

from spinquant.architectures.family import AxisPart, Family

LAYER = "model.layers.{i}"
ATTENTION = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"
VALUE = "layers.{i}.value"
HIDDEN = "layers.{i}.hidden"

LLAMA = Family(
    name="llama",
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "seed_oss",
        "ernie4_5",
        "cwm",
        "internlm3",
        "iquestcoder",
    ),
    tensors={
        "model.embed_tokens.weight": (None, "residual"),
        "lm_head.weight": (None, "residual"),
        f"{ATTENTION}.q_proj.weight": (None, "residual"),
        f"{ATTENTION}.k_proj.weight": (None, "residual"),
        f"{ATTENTION}.v_proj.weight": (VALUE, "residual"),
        f"{ATTENTION}.o_proj.weight": ("residual", VALUE),
        f"{ATTENTION}.q_norm.weight?": (None,),
        f"{ATTENTION}.k_norm.weight?": (None,),
        f"{MLP}.gate_proj.weight": (None, "residual"),
        f"{MLP}.up_proj.weight": (None, "residual"),
        f"{MLP}.down_proj.weight": ("residual", HIDDEN),
    },
    spaces={
        "residual": ("R1", "hidden_size"),
        VALUE: ("R2", "head_dim"),
        "layers.{i}.query_key": ("R3", "head_dim"),
        HIDDEN: ("R4", "intermediate_size"),
    },
    gains={
        f"{LAYER}.input_layernorm.weight": tuple(f"{ATTENTION}.{name}_proj" for name in "qkv"),
        f"{LAYER}.post_attention_layernorm.weight": (f"{MLP}.gate_proj", f"{MLP}.up_proj"),
        "model.norm.weight": ("lm_head",),
    },
    onlines={
        ATTENTION: ("query_key", "layers.{i}.query_key"),
        f"{MLP}.down_proj": ("input", HIDDEN),
    },
    scaled={f"{MLP}.up_proj": HIDDEN},
    linears=(
        tuple(f"{ATTENTION}.{name}_proj" for name in "qkv"),
        (f"{ATTENTION}.o_proj",),
        (f"{MLP}.gate_proj", f"{MLP}.up_proj"),
        (f"{MLP}.down_proj",),
    ),
    attention=ATTENTION,
    block=LAYER,
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    # Checkpoints of old transformers store the rotary frequencies, which are computed from the config.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

HELIUM = LLAMA.like("helium", "helium", filled=1)

# Norms multiply by 1 + w, and embeddings are scaled by a scalar.
GEMMA = LLAMA.like("gemma", "gemma", norm_offset=1.0)

# An MLP without a gate, whose activation (squared ReLU, xIELU) has no parameters but scalars.
ARCEE = LLAMA.like("arcee", "arcee", without=("gate_proj",), scaled={f"{MLP}.up_proj": None})
APERTUS = ARCEE.like(
    "apertus",
    "apertus",
    rename={"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"},
    tensors={f"{MLP}.act_fn.alpha_p?": (None,), f"{MLP}.act_fn.alpha_n?": (None,)},
    # Buffers of the activation, which are scalars.
    ignored=(r"model\.layers\.\d+\.mlp\.act_fn\.(beta|eps)",),
)

HUNYUAN = LLAMA.like(
    "hunyuan",
    "hunyuan_v1_dense",
    rename={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
)

# Gate and up are rows of one weight: both only read the residual space.
GLM = LLAMA.like(
    "glm",
    "glm",
    rename={"gate_proj": "gate_up_proj"},
    without=("mlp.up_proj",),
    scaled={f"{MLP}.gate_up_proj": AxisPart(HIDDEN, "intermediate_size", "intermediate_size")},
)
PHI3 = GLM.like(
    "phi3",
    "phi3",
    filled=1,
    rename={"q_proj": "qkv_proj"},
    without=("k_proj", "v_proj"),
    tensors={
        f"{ATTENTION}.qkv_proj.weight": (
            AxisPart(
                VALUE,
                "num_attention_heads*head_dim + num_key_value_heads*head_dim",
                "num_key_value_heads*head_dim",
            ),
            "residual",
        ),
    },
)

FAMILIES = (LLAMA, HELIUM, GEMMA, ARCEE, APERTUS, HUNYUAN, GLM, PHI3)
