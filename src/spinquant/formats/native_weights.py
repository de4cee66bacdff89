"""The tensors of one weight in the native format (`native.py`): their names and shapes, unpacking, packing again."""

from typing import Any

import torch
from torch import Tensor, nn

from spinquant.errors import CheckpointError
from spinquant.formats.training import changed_message
from spinquant.models.modules import module_and_attribute
from spinquant.quantization.integer import Packed, dequantize, quantize_on_grid
from spinquant.quantization.scheme import Quantizer
from spinquant.quantization.targets import PARTS, Weight


def packed_layout(
    name: str, dtype: torch.dtype, matrices: Tensor, quantizer: Quantizer
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of a packed weight's tensors; `matrices`, (.., out, in), only give the shape."""
    *rows, columns = matrices.shape
    words, groups = -(-columns // (32 // quantizer.bits)), columns // (quantizer.group_size or columns)
    scale, zero = (f"{name}_{part}" for part in PARTS)
    found = {name: (torch.int32, (*rows, words)), scale: (dtype, (*rows, groups))}
    return found if quantizer.symmetric else {**found, zero: (torch.uint8, (*rows, groups))}


def expect_packed(model: Any, weight: Weight, quantizer: Quantizer | None) -> None:
    """Replace a weight by empty tensors of the names and shapes that the format stores for it."""
    owner, name = module_and_attribute(model, weight.tensor)
    plain: Tensor = getattr(owner, name)
    if quantizer is None:
        layout = {name: (plain.dtype, (plain.numel(),))}
    else:
        layout = packed_layout(name, plain.dtype, weight.turned(plain), quantizer)
    for part, (dtype, shape) in layout.items():
        placeholder = torch.empty(shape, dtype=dtype, device="meta")
        if part == name:
            setattr(owner, name, nn.Parameter(placeholder, requires_grad=False))
        else:
            owner.register_buffer(part, placeholder)


def unpack(model: Any, weight: Weight, quantizer: Quantizer | None, shape: torch.Size) -> None:
    """Replace the loaded tensors of a weight by the weight, with its grid beside it.

    Raises CheckpointError for a grid that no quantizer makes.
    """
    owner, name = module_and_attribute(model, weight.tensor)
    stored: Tensor = getattr(owner, name).detach()
    if quantizer is None:
        setattr(owner, name, nn.Parameter(stored.view(shape)))
        return
    scale, zero = weight.grid(model)
    assert scale is not None
    # transformers 5.17 drops axes of length one when it unstacks experts to save them: that of a single group.
    scale, zero = (part if part is None or part.ndim == stored.ndim else part.unsqueeze(-1) for part in (scale, zero))
    assert scale is not None
    if not bool((scale > 0).all() & scale.isfinite().all()) or (zero is not None and int(zero.max()) > quantizer.top):
        raise CheckpointError(
            f"the scales or zero points of {weight.tensor} are not positive, finite numbers and codes up to "
            f"{quantizer.top}: the checkpoint is broken, download it again"
        )
    length = shape[-2 if weight.transposed else -1]
    plain = weight.turned(dequantize(Packed(stored, scale, zero, length, quantizer))).contiguous()
    setattr(owner, name, nn.Parameter(plain))
    weight.keep_grid(model, scale, zero)


def packed_again(model: Any, weight: Weight, matrices: Tensor, quantizer: Quantizer, *, trained: bool) -> Packed:
    """A weight that is on its grid, packed. Raises CheckpointError if it is not."""
    scale, zero = weight.grid(model)
    if scale is None:
        raise CheckpointError(f"{weight.tensor} was not quantized: its scale ({weight.tensor}_scale) is missing")
    packed = quantize_on_grid(matrices, scale, zero, quantizer)
    if not trained and not torch.equal(dequantize(packed), matrices):  # a trained weight is used rounded
        raise CheckpointError(changed_message(weight.tensor, "quantized"))
    return packed
