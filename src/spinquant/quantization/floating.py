"""Low-bit floating-point formats (FP8, NVFP4, MXFP4): rounding, scales and bit patterns.

    fp8     E4M3: 3 bits of mantissa, largest number 448; a scale per channel or token
    nvfp4   E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) in groups of 16; scales are E4M3 numbers times one power of two per tensor
    mxfp4   E2M1 in groups of 32; scales are powers of two (OCP microscaling, E8M0)

NVFP4 allows any factor per tensor. Powers of two are used here because a scale is then exact in every dtype and does
not depend on the factor, so that a part of a tensor can be rounded without seeing the whole.
"""

import torch
from torch import Tensor

from spinquant.quantization.scheme import Kind

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = {"fp8": 448.0, "nvfp4": 6.0, "mxfp4": 6.0}
_FP8 = torch.float8_e4m3fn
# E4M3 scales keep their precision down to 2^-14 of the largest; a factor of 2 is left for choosing the power of two of
# the tensor.
_REACH = 2.0**-13


def scale_of(peak: Tensor, kind: Kind) -> Tensor:
    """The dynamic scale of each group, from its largest magnitude `peak`. Zero gives zero for fp8 and nvfp4."""
    if kind == "mxfp4":
        # The smallest power of two with peak / scale < 7: clamping numbers between 6 and 7 is better than halving the
        # precision of all others.
        exponent = torch.frexp(peak / 7).exponent.clamp(-126, 127)
        return torch.ldexp(torch.ones_like(peak), exponent)
    scale = peak / LARGEST[kind]
    return _four_bits(scale) if kind == "nvfp4" else scale


def static_scale_of(peak: Tensor, kind: Kind, largest: float) -> Tensor:
    """The static scale of each group, where `largest` is the calibrated largest magnitude of the whole tensor.

    fp8 has one scale per tensor. Scales of nvfp4 are E4M3 numbers times one power of two; a group whose scale is too
    small for E4M3 becomes zero, as it does in runtimes.
    """
    scale = torch.full_like(peak, largest / LARGEST[kind])
    if kind == "fp8":
        return scale
    factor = tensor_factor(scale)
    top = LARGEST["fp8"]
    rounded = (peak / LARGEST[kind] / factor).clamp(max=top).to(_FP8).to(peak.dtype)
    return torch.where(rounded == 0, top, rounded) * factor


def _four_bits(x: Tensor) -> Tensor:
    """x rounded to the four significant bits of E4M3, with an unlimited exponent."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)


def within_reach(scale: Tensor, peak: Tensor) -> Tensor:
    """Raise the smallest scales of a tensor so that all are E4M3 numbers times one power of two.

    Args:
        scale: scales of all groups of the tensor.
        peak: largest magnitude of each group; where it is zero, any scale will do.
    """
    largest = scale.where(peak > 0, 0).amax()
    return scale.clamp(largest * _REACH, largest) if largest > 0 else scale


def tensor_factor(scale: Tensor) -> Tensor:
    """The power of two, shape (), for which scale / factor are E4M3 numbers, if there is one."""
    exponent = torch.frexp(scale.amax()).exponent
    # At most 448 = 0.875 * 2^9; the largest scale may have the mantissa 0.9375, so it is kept below 2^8.
    return torch.ldexp(torch.ones((), dtype=scale.dtype), exponent - 8)


def nearest(x: Tensor, kind: Kind) -> Tensor:
    """Round x to the nearest numbers of the format (ties to even), clamped to its largest; in the dtype of x."""
    limit = LARGEST[kind]
    x = x.clamp(-limit, limit)
    if kind == "fp8":
        return x.to(_FP8).to(x.dtype)
    # Steps of E2M1: 0.5 up to 2, 1 up to 4, 2 up to 6.
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return (x / step).round_().mul_(step)


def to_bits(numbers: Tensor, kind: Kind) -> Tensor:
    """Bit patterns (int32) of numbers of the format, sign in the highest bit."""
    if kind == "fp8":
        return numbers.to(_FP8).view(torch.uint8).to(torch.int32)
    values = torch.tensor(E2M1, dtype=numbers.dtype, device=numbers.device)
    index = torch.bucketize(numbers.abs(), values).to(torch.int32)
    return index + 8 * (numbers < 0).to(torch.int32)


def from_bits(bits: Tensor, kind: Kind) -> Tensor:
    """The float32 numbers of bit patterns; the inverse of `to_bits`."""
    if kind == "fp8":
        return bits.to(torch.uint8).view(_FP8).to(torch.float32)
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float32, device=bits.device)
    return values[bits.long()]
