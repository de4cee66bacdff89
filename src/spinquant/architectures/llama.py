"""The Llama family: pre-norm RMSNorm blocks, gated MLP, separate q, k, v, rotary positions.

Biases are optional everywhere, and q/k norms act on a head after the projection and before RoPE, where no
rotation reaches them, so Mistral, Qwen2, Qwen3, SmolLM3 and Granite (whose multipliers are scalars, which
commute with a rotation) follow the same table.
"""

from spinquant.architectures.table import Family

_ATTENTION = "model.layers.{i}.self_attn"
_MLP = "model.layers.{i}.mlp"
_VALUE = "layers.{i}.value"
_HIDDEN = "layers.{i}.hidden"

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
    tensors={
        "model.embed_tokens.weight": (None, "residual"),
        "lm_head.weight": (None, "residual"),
        "model.norm.weight": (None,),
        "model.layers.{i}.input_layernorm.weight": (None,),
        "model.layers.{i}.post_attention_layernorm.weight": (None,),
        f"{_ATTENTION}.q_proj.weight": (None, "residual"),
        f"{_ATTENTION}.k_proj.weight": (None, "residual"),
        f"{_ATTENTION}.v_proj.weight": (_VALUE, "residual"),
        f"{_ATTENTION}.o_proj.weight": ("residual", _VALUE),
        f"{_ATTENTION}.q_proj.bias?": (None,),
        f"{_ATTENTION}.k_proj.bias?": (None,),
        f"{_ATTENTION}.v_proj.bias?": (_VALUE,),
        f"{_ATTENTION}.o_proj.bias?": ("residual",),
        f"{_ATTENTION}.q_norm.weight?": (None,),
        f"{_ATTENTION}.k_norm.weight?": (None,),
        f"{_MLP}.gate_proj.weight": (None, "residual"),
        f"{_MLP}.up_proj.weight": (None, "residual"),
        f"{_MLP}.down_proj.weight": ("residual", _HIDDEN),
        f"{_MLP}.gate_proj.bias?": (None,),
        f"{_MLP}.up_proj.bias?": (None,),
        f"{_MLP}.down_proj.bias?": ("residual",),
    },
    spaces={
        "residual": ("R1", "hidden_size"),
        _VALUE: ("R2", "head_dim"),
        "layers.{i}.query_key": ("R3", "head_dim"),
        _HIDDEN: ("R4", "intermediate_size"),
    },
    gains={
        "model.layers.{i}.input_layernorm.weight": tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv"),
        "model.layers.{i}.post_attention_layernorm.weight": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
        "model.norm.weight": ("lm_head",),
    },
    onlines={
        _ATTENTION: ("query_key", "layers.{i}.query_key"),
        f"{_MLP}.down_proj": ("input", _HIDDEN),
    },
    linears=(
        tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv"),
        (f"{_ATTENTION}.o_proj",),
        (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
        (f"{_MLP}.down_proj",),
    ),
    attention=_ATTENTION,
    block="model.layers.{i}",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    # Checkpoints of old transformers store the rotary frequencies, which are computed from the config.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
