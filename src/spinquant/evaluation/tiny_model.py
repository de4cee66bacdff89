"""Tiny models: a model's class and config shrunk to a few small layers, in float64, with random weights.

Biases are non-zero and gains are not one, so that a tensor that a plan misses changes the logits. `equivalence.py`
proves rotations on tiny models, and `probing` examines unknown architectures with them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from spinquant.architectures import family_of
from spinquant.architectures.family import Named, size_of
from spinquant.architectures.model_classes import class_name, head_of_class
from spinquant.models.context import CONTEXT
from spinquant.models.modules import config_errors, new_model
from spinquant.rotations.factory import RotationSpec

TINY_HIDDEN, TINY_INTERMEDIATE, TINY_VOCABULARY, TINY_BLOCK = 48, 80, 96, 16
TINY_CONTEXT = 64
INTERMEDIATES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
# Upper limits of further sizes; a config with less keeps its own.
TINY_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "decoder_sparse_step"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    "prefix_dense_intermediate_size": TINY_INTERMEDIATE,
    # Hybrids: a period of layers, and recurrent heads of 16 that fill twice the hidden size.
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "mamba_n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "linear_head_dim": 16,
    "mamba_n_heads": 2 * TINY_HIDDEN // 16,
    "mamba_d_ssm": 2 * TINY_HIDDEN,
    "mamba_num_heads": 8,
    "moe_shared_expert_intermediate_size": 32,
    "num_heads": 2 * TINY_HIDDEN // 16,
    "lru_width": TINY_HIDDEN,
    **dict.fromkeys(("n_mamba_heads", "mamba_ngroups"), 2),
    "adapter_rank": 16,
    # Latent, sparse and compressed attention.
    **dict.fromkeys(("o_groups", "hc_mult", "index_n_heads"), 2),
    **dict.fromkeys(("o_lora_rank", "index_head_dim"), 16),
    "index_topk": 4,
}
# Fields that config classes compute from others and store.
DERIVED = ("attention_hidden_size", "mamba_headdim", "kv_channels", "num_query_groups")


@dataclass(frozen=True)
class Sizing:
    """How to shrink a config; see `Family` for `filled`, `heads` and `names`.

    each: layers of every kind. kv_heads, group: upper limits of key-value heads, and of query heads for each of them.
    head_dim: largest head size; by default the head size is kept. hidden, intermediate: sizes of the tiny model.
    """

    filled: int = 0
    heads: int = 1
    names: Mapping[str, str] = field(default_factory=dict)
    each: int = 1
    kv_heads: int = 2
    group: int = 3
    head_dim: int | None = None
    hidden: int = TINY_HIDDEN
    intermediate: int = TINY_INTERMEDIATE


def tiny_config(config: Any, sizing: Sizing | None = None) -> Any:
    """Shrink a config to a few small layers: one of every kind (more if layers share a block), at least two.

    sizing: by default that of the model's family.
    """
    if sizing is None:
        family = family_of(config)
        sizing = Sizing(family.filled, family.heads, family.names) if family else Sizing()
        if family and family.shared:  # so that layers do share a block
            sizing = replace(sizing, each=size_of(config, family.shared.blocks) + 1)
    return _tiny(config, sizing)


def _tiny(config: Any, sizing: Sizing) -> Any:
    text = config.get_text_config()
    if text is not config:
        return _tiny_with_vision(config, _tiny(text, sizing))
    data, original, names = copy.deepcopy(config.to_dict()), config, sizing.names
    config = Named(config, names)
    layers = config.num_hidden_layers
    per_layer = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == layers > 0}
    if getattr(config, "block_types", None):  # RecurrentGemma's, which it repeats
        per_layer["block_types"] = [config.block_types[i % len(config.block_types)] for i in range(layers)]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i in range(layers):
        kinds.setdefault(tuple(str(value[i]) for value in per_layer.values()), []).append(i)
    kept = sorted(i for same in kinds.values() for i in same[: sizing.each])
    kept = kept if len(kept) > 1 else [*kept, *kept]
    data.update({key: [value[i] for i in kept] for key, value in per_layer.items()})
    small: dict[str, Any] = {
        "num_hidden_layers": len(kept),
        **_small_heads(config, sizing),
        "vocab_size": TINY_VOCABULARY,
    }
    small.update({name: sizing.intermediate for name in INTERMEDIATES if getattr(config, name, None)})
    small.update({name: size for name, size in TINY_SIZES.items() if (getattr(config, name, None) or 0) > size})
    small.update({name: 16 for name in ("mamba_d_head",) if getattr(config, name, None)})
    expand, hidden = (getattr(config, name, None) for name in ("mamba_expand", "expand")), int(small["hidden_size"])
    width = next((int(factor * hidden) for factor in expand if factor), 0)  # of a recurrence, whose heads fill it
    fills = [] if getattr(config, "mamba_d_ssm", None) else ["mamba_n_heads"]
    fills += [] if hasattr(config, "num_attention_heads") else ["num_heads"]
    small.update({name: width // 16 for name in fills if width and getattr(config, name, None)})
    if getattr(config, "attn_layer_indices", None):
        small["attn_layer_indices"] = [1]
    if getattr(config, "hybrid_layer_ids", None):
        small["hybrid_layer_ids"] = [place for place, i in enumerate(kept) if i in config.hybrid_layer_ids]
    if getattr(config, "compress_rates", None):  # so that the few tokens of a proof are compressed too
        small["compress_rates"] = dict.fromkeys(config.compress_rates, 4)
    for name in DERIVED:
        data.pop(name, None)
    if getattr(config, "attention_types", None):  # GPT-Neo's kinds of layers, and how often they are repeated
        small["attention_types"] = [[[config.attention_layers[i] for i in kept], 1]]
        small["window_size"] = 6
    for name in CONTEXT:  # long enough for a proof
        if 0 < (getattr(config, name, None) or 0) < TINY_CONTEXT:
            small[name] = TINY_CONTEXT
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = 6  # shorter than the tokens of the proof, so that the window matters
    # Some classes have their own names for these fields.
    own = getattr(config, "attribute_map", {})
    data.update({own.get(named := names.get(name, name), named): size for name, size in small.items()})
    return _made(original, data)


def _tiny_with_vision(config: Any, text: Any) -> Any:
    """The config of a multimodal model with a tiny language model and a minimal vision encoder that fits it."""
    data = copy.deepcopy(config.to_dict())
    data["text_config"] = text.to_dict()
    vision, hidden = data["vision_config"], config.get_text_config().hidden_size
    vision.update({name: 2 for name in ("depth", "num_hidden_layers") if name in vision})
    vision.update({name: [0] for name in ("fullatt_block_indexes", "deepstack_visual_indexes") if name in vision})
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text.hidden_size
    elif "embed_dim" in vision and vision["hidden_size"] == hidden:  # Qwen2-VL's name for the output size
        vision["hidden_size"] = text.hidden_size
    # Image tokens must not be among the random tokens of a proof.
    data.update({name: TINY_VOCABULARY - 1 for name in data if name.endswith(("image_token_id", "image_token_index"))})
    return _made(config, data)


def _made(config: Any, data: dict[str, Any]) -> Any:
    for key in ("quantization_config", "dtype", "torch_dtype"):
        data.pop(key, None)
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    # A classifier of several texts has to tell where each ends; the tokens of a proof are smaller.
    ends = {"pad_token_id": TINY_VOCABULARY - 1} if head_of_class(class_name(config)) else {}
    try:
        return type(config).from_dict({**data, **dict.fromkeys(tokens), **ends})
    except StrictDataclassError:  # a class that insists on numbers
        return type(config).from_dict({**data, **dict.fromkeys(tokens, 0), **ends})


def _small_heads(config: Any, sizing: Sizing) -> dict[str, int]:
    """Few heads of the original's size, and a hidden size that they fill if the class requires it."""
    if not hasattr(config, "num_attention_heads"):  # no attention; heads of the recurrence
        own = {"head_dim": 16, "n_groups": 1} if hasattr(config, "n_groups") else {}
        return {"hidden_size": sizing.hidden, **own}
    names = [name for name in ("num_kv_heads", "num_key_value_heads") if getattr(config, name, None)]
    kv_heads = getattr(config, names[0]) if names else config.num_attention_heads
    few = min(max(sizing.kv_heads, sizing.heads), kv_heads)
    most = config.num_attention_heads // kv_heads
    group = min(most, sizing.group)
    group = next((g for g in range(group, most + 1) if few * g % sizing.heads == 0), group)
    heads = few * group
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_dim = min(head_dim, sizing.head_dim or head_dim)
    found = {**dict.fromkeys(names, few), "num_attention_heads": heads, "hidden_size": sizing.hidden}
    if not sizing.filled:
        return {**found, "head_dim": head_dim}
    own = {"head_dim": head_dim} if "head_dim" in config.to_dict() else {}
    return {**found, **own, "hidden_size": heads * head_dim // sizing.filled}


def make_tiny_model(
    config: Any, *, seed: int = 0, attn_implementation: str | None = None, sizing: Sizing | None = None
) -> nn.Module:
    """Make a float64 model of `tiny_config` with random weights, non-zero biases and non-unit gains."""
    with config_errors(config):
        small = tiny_config(config, sizing)
    model = new_model(small, dtype=torch.float64, attn_implementation=attn_implementation)
    exact_experts(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.double()  # some classes ask for float32 here and there
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def exact_experts(model: Any) -> None:
    """Switch experts to batched matrix products, since grouped ones do not support float64."""
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("batched_mm")


def tiny_spec(spec: RotationSpec) -> RotationSpec:
    """The spec for a tiny model: R2 and R3 unchanged, since it keeps the head size; R1 and R4 with blocks that fit."""
    blocks = {name: block for name in spec.rotations if (block := spec.block_of(name)) is not None}
    return replace(spec, block_size={name: b if name in ("R2", "R3") else TINY_BLOCK for name, b in blocks.items()})
