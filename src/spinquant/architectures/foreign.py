"""Say why a checkpoint does not fit its config: layers that the config cuts off, scales, a value head, no head.

No table describes such tensors, so a plan refuses them anyway; here are the reasons, with the way out.
"""

import re
from collections.abc import Iterable
from typing import Any

from spinquant.architectures.family import Family, Named

SAVED_AGAIN = (
    "load the model with transformers and save it again (from_pretrained(MODEL), save_pretrained(NEW)), which leaves "
    "them out"
)
_CACHE = re.compile(r"\.(?:[kvq]|kv|prob)_scale$|\.[kv]_proj\.output_scale$")
_PACKED = re.compile(
    r"\.(?:weight_scale|weight_scale_inv|weight_global_scale|weight_zero_point|weight_packed|weight_shape|weight_g_idx"
    r"|input_scale|input_global_scale|qweight|qzeros|scales|g_idx|absmax|quant_map)$"
)


def layers_beyond(family: Family, config: Any, names: Iterable[str]) -> str | None:
    """Why tensors of layers beyond the config's number are refused; None without such tensors.

    names: those of the module, without layers for multi-token prediction.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = Named(text, family.names).num_hidden_layers
    place = re.compile(re.escape(family.block).replace(r"\{i\}", r"(\d+)") + r"\.")
    found = {name: int(match[1]) for name in names if (match := place.match(name))}
    beyond = min((name for name, i in found.items() if i >= layers), key=lambda name: (found[name], name), default=None)
    if beyond is None:
        return None
    last = max(found.values())
    return (
        f"tensor {beyond!r} belongs to layer {found[beyond]}, and the config has num_hidden_layers: {layers}, while "
        f"the checkpoint has layers 0 to {last}. The config was cut, or is of another model. Set num_hidden_layers to "
        f"{last + 1} in config.json; or, to drop the other layers, {SAVED_AGAIN}"
    )


def foreign_among(names: Iterable[str]) -> str | None:
    """Why tensors of which the config says nothing are refused: scales, a value head; None without such tensors."""
    for name in names:
        if name.startswith("v_head."):
            return (
                f"tensor {name!r} is a value head of trl, which reads the hidden states that R1 rotates, and which the "
                f"class of the config does not have. To rotate the model without it, {SAVED_AGAIN}"
            )
        if _CACHE.search(name):
            return (
                f"tensor {name!r} is a scale of a quantized KV cache, calibrated for the keys and values of the model "
                f"before it is rotated. To rotate the model without such scales, {SAVED_AGAIN}"
            )
        if _PACKED.search(name):
            return (
                f"tensor {name!r} is part of a quantized weight, and the config has no quantization_config: rotate and "
                "quantize the 16-bit model that it came from"
            )
    return None


def missing_head(head: str) -> str:
    """Why a checkpoint without the tensor of the head is refused, if the config does not tie it."""
    return (
        f"tensor {head!r} is missing, and the config has tie_word_embeddings: false. If the head of this model shares "
        "the embedding's weight, set tie_word_embeddings to true in config.json; otherwise the checkpoint is "
        "incomplete: download it again"
    )
