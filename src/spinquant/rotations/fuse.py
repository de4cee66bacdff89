"""Fuse norm gains and rotations into one weight tensor: tensor in, fused tensor out.

    T' = T, multiplied along each axis that reads a norm by the norm's gain (a norm's bias is divided by it),
         multiplied along each axis that writes a scaled space by its scales (divided, for an axis that reads it),
         then contracted along each axis of a rotated space with the rotation of that space

Fusing a module, streaming a checkpoint and learning all call `transform`; weights are rotated nowhere else. There is
no case per layer type: embeddings, input sides, output sides, biases and attention heads are all axes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from spinquant.compute.threads import each, single_threaded
from spinquant.compute.workspace import workspace
from spinquant.errors import RotationError
from spinquant.plan import Gain, Plan, Span
from spinquant.rotations.rotation import Rotation
from spinquant.rotations.wrappers import Scaled

# Elements fused at once, so that they stay in cache.
SLICE = 1 << 20


def transform(
    name: str,
    tensor: Tensor,
    plan: Plan,
    gains: Mapping[str, Tensor],
    rotations: Mapping[str, Rotation],
    *,
    precision: torch.dtype | None = None,
    work: Tensor | None = None,
    out: Tensor | None = None,
    place: tuple[int, int] = (0, 0),
) -> Tensor:
    """The fused value of one weight: gains and scales multiplied in, then rotated.

    Args:
        name: name of the tensor in the plan.
        tensor: the original weight, or a part of it (see `place`).
        plan: the plan of the model.
        gains: the original norm weights by name.
        rotations: rotations by space name; a space without one is not rotated.
        precision: dtype of the arithmetic; by default float32 for half-precision tensors, else the tensor's own.
        work: working memory that the result may share: contiguous, of the tensor's shape, in the arithmetic's dtype.
        out: tensor for the result; may be the input itself.
        place: (dim, index) at which a part of the whole tensor begins.

    Returns:
        A tensor of the same shape, dtype and device; the input itself if nothing changes it and there is no `out`.

    Raises:
        RotationError: a norm's gain is zero where its bias is not.
    """
    gain = plan.gain_of_norm.get(name)
    if gain is not None and gain.space in rotations:
        return torch.full_like(tensor, 1.0 - gain.offset) if out is None else out.fill_(1.0 - gain.offset)
    scales = [(gains[g.norm] + g.offset, dim) for g, dim in plan.gains_of.get(name, ()) if g.space in rotations]
    for scale, dim in scales_of(name, plan, rotations):
        scales.append((scale.narrow(0, place[1], tensor.shape[dim]) if dim == place[0] else scale, dim))
    axes = [axis for axis in plan.axes_of.get(name, ()) if axis.space in rotations]
    if not scales and not axes:
        return tensor if out is None else _copy(tensor, out)
    # A single rounding at the end keeps half-precision checkpoints as close to the original as the dtype allows.
    wide = _wide(tensor, precision)
    fused = tensor if tensor.dtype == wide else tensor.to(wide) if work is None else _copy(tensor, work)
    for scale, dim in scales:
        shape = [-1 if d == dim else 1 for d in range(fused.ndim)]
        fused = torch.mul(fused, scale.to(fused.device, wide).view(shape), out=work)
    shifted = plan.gain_of_bias.get(name)
    if shifted is not None and shifted.space in rotations:
        fused = _without_gain(fused, gains[shifted.norm].to(fused.device, wide) + shifted.offset, shifted)
    for axis in axes:
        fused = rotate_axis(fused, axis.dim, rotations[axis.space], axis.span, out=work)
    return fused.to(tensor.dtype) if out is None else _copy(fused, out)


def scales_of(name: str, plan: Plan, rotations: Mapping[str, Rotation]) -> Iterator[tuple[Tensor, int]]:
    """Channel scales of a tensor, from `Scaled` rotations: (factors of the whole axis, its dim) for each."""
    for scaling, dim, span, writes in plan.scalings_of.get(name, ()):
        rotation = rotations.get(scaling.space)
        if isinstance(rotation, Scaled):
            factors = rotation.scale if writes else 1 / rotation.scale
            if span is not None:
                part, factors = factors, torch.ones(span.period, dtype=factors.dtype)
                factors[span.start : span.start + span.length] = part
            yield factors, dim


def _without_gain(bias: Tensor, scale: Tensor, gain: Gain) -> Tensor:
    """The bias of a norm whose scale is fused into its readers: bias / scale."""
    lost = (scale == 0) & (bias != 0)
    if lost.any():
        raise RotationError(
            f"{gain.norm} is zero in {int(lost.sum())} places where {gain.bias} is not: that bias cannot be expressed "
            f"once the scale is fused into the next linear. Leave out the rotation of {gain.space}."
        )
    return torch.where(scale == 0, torch.zeros_like(bias), bias / scale)


def fuse_in_place(
    name: str,
    tensor: Tensor,
    plan: Plan,
    gains: Mapping[str, Tensor],
    rotations: Mapping[str, Rotation],
    *,
    precision: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    first: int = 0,
) -> None:
    """Fuse a weight in place, slice by slice; see `transform`. On a CPU the number of threads changes no bit.

    Args:
        name: name of the tensor in the plan.
        tensor: the weight, or whole slices of its rows (`rows_at_once`).
        plan: the plan of the model.
        gains: the original norm weights by name.
        rotations: rotations by space name.
        precision: dtype of the arithmetic, as in `transform`.
        shape: shape of the whole weight, if only rows of it are given.
        first: number of the first row that is given.
    """

    def fuse(piece: tuple[Tensor, tuple[int, int]]) -> None:
        part, place = piece
        work = working_memory(part, precision)
        transform(name, part, plan, gains, rotations, precision=precision, work=work, out=part, place=place)

    with single_threaded() if tensor.device.type == "cpu" else nullcontext():
        each(fuse, slices(name, tensor, plan, rotations, shape, first))


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """Copy the source into the target, in parallel pieces if it is large; returns the target."""
    if source is target:
        return target
    if target.numel() <= 2 * SLICE:
        return target.copy_(source)
    rows = max(1, SLICE * len(target) // target.numel())
    each(lambda pair: pair[0].copy_(pair[1]), zip(target.split(rows), source.split(rows), strict=True))
    return target


def _units(name: str, ndim: int, plan: Plan, rotations: Mapping[str, Rotation]) -> dict[int, int]:
    """Axes along which a tensor can be cut into independently fused parts, and the unit that parts are multiples of."""
    units = dict.fromkeys(range(ndim), 1)
    for axis in plan.axes_of.get(name, ()):
        if axis.space in rotations:
            # Heads, or blocks of a rotation, lie one after another along the axis, and each is rotated separately.
            units[axis.dim] = 0 if axis.span is not None else math.lcm(units[axis.dim], rotations[axis.space].order)
    for gain, dim in plan.gains_of.get(name, ()):
        if gain.space in rotations:
            units[dim] = 0
    if name in plan.gain_of_bias:
        units[0] = 0
    return {dim: unit for dim, unit in units.items() if unit}


def rows_at_once(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Rotation]) -> int | None:
    """Number of rows per slice, for a tensor that is cut along its first axis; None for any other."""
    cut = _cut(name, shape, plan, rotations)
    return cut[1] if cut is not None and cut[0] == 0 else None


def _cut(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Rotation]) -> tuple[int, int] | None:
    """(axis, slice length) to cut a tensor by; None if it has to stay whole.

    The axis with the smallest unit is taken, because its slices can be made as small as they should be.
    """
    elements = max(1, math.prod(shape))
    units = _units(name, len(shape), plan, rotations)
    for dim, unit in sorted(units.items(), key=lambda item: (item[1], item[0])):
        if unit < shape[dim] or unit == 1:
            return dim, max(unit, SLICE * shape[dim] // elements // unit * unit)
    return None


def slices(
    name: str,
    tensor: Tensor,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    shape: Sequence[int] | None = None,
    first: int = 0,
) -> Sequence[tuple[Tensor, tuple[int, int]]]:
    """Cut a weight into views that `transform` can fuse one by one; no views if nothing changes the weight.

    The cut is along an axis that is only scaled, or that is rotated block by block, if there is one. An embedding of
    gigabytes then needs megabytes of working memory, which stay in cache.

    Args:
        name: name of the tensor in the plan.
        tensor: the weight, or rows of it.
        plan: the plan of the model.
        rotations: rotations by space name.
        shape: shape of the whole weight, if only rows of it are given.
        first: number of the first row that is given.

    Returns:
        (view, place) pairs, with the place as in `transform`.
    """
    units = _units(name, tensor.ndim, plan, rotations)
    untouched = list(units.values()) == [1] * tensor.ndim and name not in plan.gain_of_norm
    if untouched and not any(scales_of(name, plan, rotations)):
        return ()
    cut = _cut(name, shape or tensor.shape, plan, rotations)
    if cut is None:
        return ((tensor, (0, 0)),)
    dim, length = cut
    start = first if dim == 0 else 0
    return [(part, (dim, start + i * length)) for i, part in enumerate(tensor.split(length, dim))]


def working_memory(tensor: Tensor, precision: torch.dtype | None) -> Tensor:
    """Working memory for `transform(..., work=...)`; the next call returns the same memory."""
    return workspace(2, tuple(tensor.shape), _wide(tensor, precision), tensor)


def _wide(tensor: Tensor, precision: torch.dtype | None) -> torch.dtype:
    return precision or torch.promote_types(tensor.dtype, torch.float32)


def rotate_axis(
    tensor: Tensor,
    dim: int,
    rotation: Rotation,
    span: Span | None = None,
    *,
    transpose: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate one axis of a tensor, or a span of it: T'[.., j, ..] = sum_i T[.., i, ..] R[i, j].

    Args:
        tensor: any floating-point tensor.
        dim: the axis.
        rotation: R; its order divides the axis or the span.
        span: the part of the axis to rotate; None for all of it.
        transpose: apply R^T, the inverse.
        out: contiguous tensor for the result; may be the input itself.
    """
    dim %= tensor.ndim
    if span is None:
        return rotation.apply(tensor, transpose=transpose, dim=dim, out=out)
    result = tensor.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(tensor)
    periods = result.unflatten(dim, (-1, span.period))
    part = periods.narrow(dim + 1, span.start, span.length)
    part.copy_(rotation.apply(part.contiguous(), transpose=transpose, dim=dim + 1))
    return result
