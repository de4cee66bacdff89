"""Quantize, dequantize and pack: scales, zero points, codes. Only this file and `floating.py` round numbers.

    code = clamp(round(x / scale) + zero, 0, top)        x ~ (code - zero) * scale

Symmetric quantizers have the constant zero point 2^(bits-1), so one formula serves both kinds and every code is
an unsigned integer. A floating-point format has the zero point 0, and its codes are the numbers of the format, so
`decode` is the same formula; they become bit patterns only when they are packed. Everything acts on the last axis, in
groups.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinquant.errors import SchemeError
from spinquant.quantization.floating import from_bits, nearest, scale_of, static_scale_of, to_bits, within_reach
from spinquant.quantization.scheme import Quantizer

# Elements processed at once, so that all passes below find them in cache. Measured on two cores with 1 MiB of L2 each:
# 2^16 1.3 ns per element, 2^18 0.6, 2^19 0.5, 2^20 3.4.
BLOCK = 1 << 18
# On a GPU every operation costs a launch, so blocks only bound the memory of intermediate results (256 MB each).
BLOCK_ON_DEVICE = 1 << 26


def grid(
    x: Tensor, quantizer: Quantizer, stored: torch.dtype, *, clip: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point over the last axis of x.

    Args:
        x: numbers, shape (.., n).
        quantizer: how they are quantized.
        stored: dtype that scales are stored in. The scale is rounded to it, so that packed and fake-quantized numbers
            are the same.
        clip: clip ratio instead of the quantizer's; a tensor broadcasts against (.., 1).

    Returns:
        (scale, zero point), shape (.., 1), in the dtype of x.

    Raises:
        SchemeError: the clip ratio has to be searched ("mse"), or a static range has not been calibrated.
    """
    ratio = clip if clip is not None else quantizer.clip
    if ratio == "mse":
        raise SchemeError("clip 'mse' is for weights only: use a ratio in (0, 1] for activations and KV cache")
    return grid_of_range(*extremes(x), quantizer, stored, ratio)


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number along the last axis, shape (.., 1)."""
    # Two passes, because torch's aminmax is 15 times slower on a CPU (measured).
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def grid_of_range(
    low: Tensor, high: Tensor, quantizer: Quantizer, stored: torch.dtype, ratio: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a grid over a fraction `ratio` of the range from `low` to `high`; all shapes broadcast.

    `stored` is the dtype of the scales, as in `grid`. Raises SchemeError if a static range has not been calibrated.
    """
    if quantizer.kind != "int":
        peak = torch.maximum(high, -low) * ratio
        if not quantizer.static:
            scale = scale_of(peak, quantizer.kind)
        elif quantizer.peak is None:
            raise SchemeError(f"the range of static {quantizer.kind} is not known yet: calibration has to find it")
        else:
            scale = static_scale_of(peak, quantizer.kind, quantizer.peak)
        scale = _storable(scale, stored)
        return scale, torch.zeros_like(scale)
    if quantizer.symmetric:
        centre = 2 ** (quantizer.bits - 1)
        scale = _storable(torch.maximum(high, -low) * ratio / (centre - 1), stored)
        return scale, torch.full_like(scale, centre)
    low, high = low.clamp(max=0) * ratio, high.clamp(min=0) * ratio
    scale = _storable((high - low) / quantizer.top, stored)
    return scale, (-low / scale).round_().clamp_(0, quantizer.top)


def _storable(scale: Tensor, stored: torch.dtype) -> Tensor:
    if stored != scale.dtype:
        scale = _rounded_to(scale, stored) if torch.compiler.is_compiling() else scale.to(stored).to(scale.dtype)
    # For a group of zeros (or of numbers too small for the scale's dtype) any scale will do: its codes are zero.
    return scale.masked_fill_(scale == 0, 1.0)


def _rounded_to(scale: Tensor, stored: torch.dtype) -> Tensor:
    """`scale.to(stored).to(scale.dtype)` in arithmetic that a compiler keeps.

    Inductor drops a cast to 16 bits and back, and other scales would give other codes than eager execution: with
    bfloat16, 10 to 25 % of them.
    """
    if scale.dtype != torch.float32 or stored not in (torch.bfloat16, torch.float16):
        return scale.to(stored).to(scale.dtype)
    dropped = 16 if stored == torch.bfloat16 else 13  # bits of the mantissa
    bits = scale.view(torch.int32)
    even = (bits >> dropped) & 1
    rounded = ((bits + (1 << (dropped - 1)) - 1 + even) & -(1 << dropped)).view(torch.float32)
    limits = torch.finfo(stored)
    if stored == torch.float16:  # its exponents are fewer
        step = limits.smallest_normal * limits.eps
        rounded = torch.where(scale < limits.smallest_normal, (scale / step).round() * step, rounded)
    return torch.where(scale.isfinite(), torch.where(rounded > limits.max, torch.inf, rounded), scale)


def encode(x: Tensor, scale: Tensor, zero: Tensor, quantizer: Quantizer) -> Tensor:
    """Codes 0 .. top of x, in the floating dtype of x; for a floating-point format, its nearest numbers."""
    if quantizer.kind != "int":
        return nearest(x / scale, quantizer.kind)
    return (x / scale).round_().add_(zero).clamp_(0, quantizer.top)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers of codes: (codes - zero) * scale, in the dtype of the scale."""
    return (codes - zero).mul_(scale)


def fake_quantize(x: Tensor, quantizer: Quantizer, ratio: Tensor | None = None) -> Tensor:
    """Quantize and dequantize: x rounded to the quantizer's grid, in the same shape and dtype.

    Gradients pass straight through (STE) to x. With a scale s = ratio * range, where a number is y = s k, the
    derivative with respect to log s is y - x for a number that is rounded, and y for one that is clipped (LSQ, arXiv
    1902.08153).

    Args:
        x: numbers, shape (.., n).
        quantizer: how they are quantized.
        ratio: clip ratio instead of the quantizer's, of no dimension; it gets gradients. Integers only.

    Raises:
        SchemeError: the group size does not divide the last axis.
    """
    if ratio is not None:
        return _Clipped.apply(x, quantizer, ratio)  # pyright: ignore[reportReturnType]
    return _FakeQuantize.apply(x, quantizer)  # pyright: ignore[reportReturnType]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, quantizer: Quantizer) -> Tensor:
        group = group_of(x.shape[-1], quantizer)
        rows = x.reshape(-1, group)
        if torch.compiler.is_compiling():  # a compiler chooses its own blocks
            return _rounded(rows, quantizer).to(x.dtype).view(x.shape)
        out = torch.empty_like(rows)
        step = max(1, block_for(x) // group)
        for source, target in zip(rows.split(step), out.split(step), strict=True):
            target.copy_(_rounded(source, quantizer))
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Clipped(torch.autograd.Function):
    """`_FakeQuantize` with a gradient for the clip ratio."""

    @staticmethod
    def forward(ctx, x: Tensor, quantizer: Quantizer, ratio: Tensor) -> Tensor:
        rows = x.reshape(-1, group_of(x.shape[-1], quantizer))
        wide = rows.to(_wide(rows.dtype))
        scale, zero = grid(wide, quantizer, rows.dtype, clip=ratio)
        y = decode(encode(wide, scale, zero, quantizer), scale, zero)
        low, high = (bound * scale for bound in (-zero - 0.5, quantizer.top - zero + 0.5))
        outside = (wide < low) | (wide > high)
        ctx.save_for_backward(torch.where(outside, y, y - wide).to(x.dtype), ratio)
        return y.to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, ratio = ctx.saved_tensors
        moved = (grad.reshape(slope.shape).to(_wide(grad.dtype)) * slope).sum()
        return grad, None, (moved / ratio).to(ratio.dtype)


def _rounded(rows: Tensor, quantizer: Quantizer) -> Tensor:
    """The numbers of one group in each row, rounded, in at least float32."""
    wide = rows.to(_wide(rows.dtype))
    scale, zero = grid(wide, quantizer, rows.dtype)
    return decode(encode(wide, scale, zero, quantizer), scale, zero)


def block_for(x: Tensor) -> int:
    """How many elements to process at once on the device of a tensor."""
    return BLOCK if x.device.type == "cpu" else BLOCK_ON_DEVICE


def group_of(length: int, quantizer: Quantizer) -> int:
    """The group size on an axis of this length. Raises SchemeError if it does not divide the axis."""
    group = quantizer.group_size or length
    if length % group:
        raise SchemeError(f"group size {group} does not divide an axis of length {length}")
    return group


@dataclass(frozen=True)
class Packed:
    """Quantized numbers as they are stored: packed codes with scales and zero points.

    Attributes:
        words: int32, codes packed along the last axis, 32 // bits per word.
        scale: shape (.., groups), in the model's dtype.
        zero: zero points, uint8, shaped like `scale`; None for symmetric quantizers.
        length: numbers along the last axis.
        quantizer: how they were quantized.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    length: int
    quantizer: Quantizer

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.nbytes for t in (self.words, self.scale, self.zero) if t is not None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Words, scale, and zero point if there is one."""
        return (self.words, self.scale) if self.zero is None else (self.words, self.scale, self.zero)

    def with_tensors(self, *tensors: Tensor) -> "Packed":
        """The same layout with other tensors, in the order of `tensors()`."""
        words, scale, *zero = tensors
        return Packed(words, scale, zero[0] if zero else None, self.length, self.quantizer)

    def to(self, device: torch.device) -> "Packed":
        """A copy on another device."""
        return self.with_tensors(*(tensor.to(device) for tensor in self.tensors()))


def stacked(parts: Sequence[Packed]) -> Packed:
    """Stack packed numbers of one shape along a new first axis."""
    return parts[0].with_tensors(*(torch.stack(tensors) for tensors in zip(*(p.tensors() for p in parts), strict=True)))


def quantize(x: Tensor, quantizer: Quantizer, *, clip: Tensor | None = None) -> Packed:
    """Quantize x by round-to-nearest (RTN) and pack it, with scales in the dtype of x.

    Args:
        x: numbers, shape (.., n).
        quantizer: how they are quantized.
        clip: clip ratios instead of the quantizer's, shape (.., groups, 1).
    """
    group = group_of(x.shape[-1], quantizer)
    groups = x.unflatten(-1, (-1, group)).to(_wide(x.dtype))
    scale, zero = grid(groups, quantizer, x.dtype, clip=clip)
    if quantizer.kind == "nvfp4":
        scale = within_reach(scale, groups.abs().amax(dim=-1, keepdim=True))
    return quantize_on_grid(x, scale.squeeze(-1).to(x.dtype), zero.squeeze(-1), quantizer)


def quantize_on_grid(x: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> Packed:
    """Quantize and pack x with a given scale and zero point, (.., groups). Lossless if x lies on that grid."""
    wide = _wide(x.dtype)
    found = []
    for part, scales, zeros in _in_parts(x.numel(), x, scale, zero):
        groups = part.unflatten(-1, (scale.shape[-1], -1)).to(wide)
        codes = encode(groups, _column(scales, wide), _zero_column(zeros, scales, quantizer, wide), quantizer)
        if quantizer.kind != "int":
            codes = to_bits(codes, quantizer.kind)
        found.append(pack(codes.flatten(-2), quantizer.bits))
    stored_zero = None if quantizer.symmetric or zero is None else zero.to(torch.uint8)
    words = found[0] if len(found) == 1 else torch.cat(found)
    return Packed(words, scale, stored_zero, x.shape[-1], quantizer)


def dequantize(packed: Packed) -> Tensor:
    """The numbers of packed codes, shape (.., length), in the dtype of the scale."""
    quantizer, wide = packed.quantizer, _wide(packed.scale.dtype)
    found = []
    numbers = packed.length * math.prod(packed.words.shape[:-1])
    for words, scale, stored in _in_parts(numbers, packed.words, packed.scale, packed.zero):
        bits = unpack(words, quantizer.bits, packed.length).unflatten(-1, (scale.shape[-1], -1))
        codes = bits.to(wide) if quantizer.kind == "int" else from_bits(bits, quantizer.kind).to(wide)
        zero = _zero_column(stored, scale, quantizer, wide)
        found.append(decode(codes, _column(scale, wide), zero).flatten(-2).to(scale.dtype))
    return found[0] if len(found) == 1 else torch.cat(found)


def _in_parts(
    numbers: int, x: Tensor, scale: Tensor, zero: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Split all three along the first axis, so that the intermediate copies are small."""
    block = block_for(x)
    if x.ndim == 1 or numbers <= block:
        yield x, scale, zero
        return
    step = max(1, block * len(x) // numbers)
    zeros = [None] * len(range(0, len(x), step)) if zero is None else zero.split(step)
    yield from zip(x.split(step), scale.split(step), zeros, strict=True)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (.., n) of any dtype into int32 words (.., ceil(n / (32 // bits))), lowest bits first."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    lanes = codes.to(torch.int32).unflatten(-1, (-1, per))
    words = lanes[..., 0].clone()
    for i in range(1, per):
        words |= lanes[..., i] << (bits * i)
    return words


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """Unpack the first `length` codes of int32 words; int32, shape (.., length)."""
    shifts = torch.arange(0, 32 // bits * bits, bits, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :length]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _column(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).unsqueeze(-1)


def _zero_column(zero: Tensor | None, scale: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    if zero is None:
        centre = 2 ** (quantizer.bits - 1) if quantizer.kind == "int" else 0
        return torch.full_like(scale, centre, dtype=dtype).unsqueeze(-1)
    return _column(zero, dtype)
