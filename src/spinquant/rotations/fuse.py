"""Fuse norm gains and transforms into one weight tensor: tensor in, fused tensor out.

    W' = W, multiplied along each axis that reads a norm by the norm's gain (a norm's bias is divided by it),
         then contracted along each axis of a transformed space with its transform T if W writes the space, with T^-T
         if it reads it

Fusing a module, streaming a checkpoint and learning all call `transform`; weights are transformed nowhere else. There
is no case per layer type: embeddings, input sides, output sides, biases, norms and attention heads are all axes. A
rotation is its own T^-T; channel scales are a diagonal T.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from spinquant.compute.threads import each, single_threaded
from spinquant.compute.workspace import workspace
from spinquant.errors import RotationError
from spinquant.plan import Axis, Gain, Plan, Span
from spinquant.rotations.rotation import Transform, dual
from spinquant.rotations.transforms import Diagonal, positional

# Elements fused at once, so that they stay in cache.
SLICE = 1 << 20


def transform(
    name: str,
    tensor: Tensor,
    plan: Plan,
    gains: Mapping[str, Tensor],
    rotations: Mapping[str, Transform],
    *,
    precision: torch.dtype | None = None,
    work: Tensor | None = None,
    out: Tensor | None = None,
    place: tuple[int, int] = (0, 0),
) -> Tensor:
    """The fused value of one weight: gains multiplied in, then transformed axis by axis.

    Args:
        name: name of the tensor in the plan.
        tensor: the original weight, or a part of it (see `place`).
        plan: the plan of the model.
        gains: the original norm weights by name.
        rotations: transforms by space name; a space without one is left as it is.
        precision: dtype of the arithmetic; by default float32 for half-precision tensors, else the tensor's own.
        work: working memory that the result may share: contiguous, of the tensor's shape, in the arithmetic's dtype.
        out: tensor for the result; may be the input itself.
        place: (dim, index) at which a part of the whole tensor begins.

    Returns:
        A tensor of the same shape, dtype and device; the input itself if nothing changes it and there is no `out`.

    Raises:
        RotationError: a norm's gain is zero where its bias is not.
    """
    axes = [axis for axis in plan.axes_of.get(name, ()) if axis.space in rotations]
    gain = plan.gain_of_norm.get(name)
    if gain is not None and gain.space in rotations:
        tensor = torch.full_like(tensor, 1.0 - gain.offset) if out is None else out.fill_(1.0 - gain.offset)
    scales = [(gains[g.norm] + g.offset, dim) for g, dim in plan.gains_of.get(name, ()) if g.space in rotations]
    if not scales and not axes:
        return tensor if out is None else _copy(tensor, out)
    # A single rounding at the end keeps half-precision checkpoints as close to the original as the dtype allows.
    wide = _wide(tensor, precision)
    fused = tensor if tensor.dtype == wide else tensor.to(wide) if work is None else _copy(tensor, work)
    for scale, dim in scales:
        fused = _multiplied(fused, scale, dim, work)
    shifted = plan.gain_of_bias.get(name)
    if shifted is not None and shifted.space in rotations:
        fused = _without_gain(fused, gains[shifted.norm].to(fused.device, wide) + shifted.offset, shifted)
    for axis in axes:
        fused = transform_axis(fused, axis, rotations[axis.space], first=place[1] * (axis.dim == place[0]), out=work)
    return fused.to(tensor.dtype) if out is None else _copy(fused, out)


def transform_axis(
    tensor: Tensor,
    axis: Axis,
    transform: Transform,
    *,
    dim: int | None = None,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Contract an axis of a tensor with the transform T of its space, or, if it reads the space, with T^-T.

    Args:
        tensor: the tensor, or a part of it.
        axis: the axis and its space.
        transform: T.
        dim: the axis of `tensor`, if it is another one than `axis.dim`.
        first: index in the whole axis at which the part begins, of a T that is diagonal.
        out: contiguous tensor for the result; may be the input itself.
    """
    dim = axis.dim if dim is None else dim
    side = dual(transform) if axis.reads else transform
    shifted = tensor + axis.offset if axis.offset else tensor
    if isinstance(side, Diagonal) and not positional(side):
        result = _multiplied(shifted, _factors(side, axis.span, first, tensor.shape[dim]), dim, out)
    else:
        result = rotate_axis(shifted, dim, side, axis.span, out=out)
    return result.sub_(axis.offset) if axis.offset else result


def _factors(diagonal: Diagonal, span: Span | None, first: int, length: int) -> Tensor:
    """The factors of `length` elements of an axis, from `first` on; 1 outside the span."""
    period = diagonal.scale.reshape(-1)
    if span is not None:
        inside, period = period, torch.ones(span.period, dtype=period.dtype, device=period.device)
        period[span.start : span.start + span.length] = inside.repeat(span.length // len(inside))
    at = torch.arange(first, first + length, device=period.device)
    return period[at % len(period)]


def _multiplied(tensor: Tensor, factors: Tensor, dim: int, out: Tensor | None) -> Tensor:
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return torch.mul(tensor, factors.to(tensor.device, tensor.dtype).view(shape), out=out)


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
    rotations: Mapping[str, Transform],
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
        rotations: transforms by space name.
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


def _units(name: str, ndim: int, plan: Plan, rotations: Mapping[str, Transform]) -> dict[int, int]:
    """Axes along which a tensor can be cut into independently fused parts, and the unit that parts are multiples of."""
    units = dict.fromkeys(range(ndim), 1)
    for axis in plan.axes_of.get(name, ()):
        rotation = rotations.get(axis.space)
        if rotation is None or (isinstance(rotation, Diagonal) and not positional(rotation)):
            continue
        # Heads, or blocks of a rotation, lie one after another along the axis, and each is rotated separately.
        whole = axis.span is not None or positional(rotation)
        units[axis.dim] = 0 if whole else math.lcm(units[axis.dim], rotation.order)
    for gain, dim in plan.gains_of.get(name, ()):
        if gain.space in rotations:
            units[dim] = 0
    if name in plan.gain_of_bias:
        units[0] = 0
    return {dim: unit for dim, unit in units.items() if unit}


def rows_at_once(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Transform]) -> int | None:
    """Number of rows per slice, for a tensor that is cut along its first axis; None for any other."""
    cut = _cut(name, shape, plan, rotations)
    return cut[1] if cut is not None and cut[0] == 0 else None


def _cut(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Transform]) -> tuple[int, int] | None:
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
    rotations: Mapping[str, Transform],
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
    touched = any(axis.space in rotations for axis in plan.axes_of.get(name, ()))
    if not touched and list(units.values()) == [1] * tensor.ndim and name not in plan.gain_of_norm:
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
    rotation: Transform,
    span: Span | None = None,
    *,
    transpose: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Contract one axis of a tensor, or a span of it, with a matrix: W'[.., j, ..] = sum_i W[.., i, ..] R[i, j].

    Args:
        tensor: any floating-point tensor.
        dim: the axis.
        rotation: R; its order divides the axis or the span.
        span: the part of the axis to contract; None for all of it.
        transpose: apply R^T.
        out: contiguous tensor for the result; may be the input itself.
    """
    dim %= tensor.ndim
    if span is None:
        return rotation.apply(tensor, transpose=transpose, dim=dim, out=out)
    result = tensor.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(tensor)
    periods = result.unflatten(dim, (-1, span.period))
    part = periods.narrow(dim + 1, span.start, span.length)
    joined = part.flatten(dim, dim + 1)  # one head after another
    part.copy_(rotation.apply(joined.contiguous(), transpose=transpose, dim=dim).unflatten(dim, (-1, span.length)))
    return result
