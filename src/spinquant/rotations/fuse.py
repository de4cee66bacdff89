"""The pure core: one tensor in, the fused tensor out.

    T' = T, scaled along the axes that read a norm by that norm's gain (the bias of a norm is divided by it),
         and along those that write or read a space with scales of its own by them, or their inverse,
         then contracted along every axis that lives in a rotated space with the rotation of that space

The module and stream backends, and learning, all call `transform`; there is no other place where a weight is
rotated, and no case per layer type: embedding, input side, output side, bias, attention heads are axes.
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

# Elements fused at once, which then stay in cache.
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
    """The tensor called `name` of the rotated model.

    gains: the original weights of the norms, by name. rotations: by space name; a space without one stays.
    precision: dtype of the arithmetic, by default float32 for half types and the tensor's own for others.
    work: working memory that the result may share, contiguous, of the tensor's shape and the dtype of the arithmetic.
    out: for the result; may be the tensor itself. place: (dim, element of it) at which a part of the tensor begins.
    Returns the same shape, dtype and device; the input itself when nothing touches it and there is no `out`.
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
    # Rounding once, at the end, keeps half-precision checkpoints as close to the original as the format allows.
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
    """What the axes of a tensor are multiplied by because spaces have scales: (factors of the whole axis, its dim)."""
    for scaling, dim, span, writes in plan.scalings_of.get(name, ()):
        rotation = rotations.get(scaling.space)
        if isinstance(rotation, Scaled):
            factors = rotation.scale if writes else 1 / rotation.scale
            if span is not None:
                part, factors = factors, torch.ones(span.period, dtype=factors.dtype)
                factors[span.start : span.start + span.length] = part
            yield factors, dim


def _without_gain(bias: Tensor, scale: Tensor, gain: Gain) -> Tensor:
    """What a norm has to add before its scale is applied, by its readers from now on."""
    lost = (scale == 0) & (bias != 0)
    if lost.any():
        raise RotationError(
            f"{gain.norm} is zero in {int(lost.sum())} places where {gain.bias} is not: what the norm adds there "
            f"cannot be said once its scale is fused. Leave out the rotation of {gain.space}."
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
    """`transform` into the tensor's own memory, slice by slice. On a CPU the number of threads changes no bit.

    Rows alone may be given, from row `first` on, whole slices of them (`rows_at_once`), with the `shape` of the tensor
    that they are of.
    """

    def fuse(piece: tuple[Tensor, tuple[int, int]]) -> None:
        part, place = piece
        work = working_memory(part, precision)
        transform(name, part, plan, gains, rotations, precision=precision, work=work, out=part, place=place)

    with single_threaded() if tensor.device.type == "cpu" else nullcontext():
        each(fuse, slices(name, tensor, plan, rotations, shape, first))


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """The target, with the numbers of the source."""
    if source is target:
        return target
    if target.numel() <= 2 * SLICE:
        return target.copy_(source)
    rows = max(1, SLICE * len(target) // target.numel())
    each(lambda pair: pair[0].copy_(pair[1]), zip(target.split(rows), source.split(rows), strict=True))
    return target


def _units(name: str, ndim: int, plan: Plan, rotations: Mapping[str, Rotation]) -> dict[int, int]:
    """The axes of a tensor along which it may be cut and its parts fused by themselves, and at multiples of what."""
    units = dict.fromkeys(range(ndim), 1)
    for axis in plan.axes_of.get(name, ()):
        if axis.space in rotations:
            # Heads, or blocks of a rotation, follow each other along the axis, and each is rotated by itself.
            units[axis.dim] = 0 if axis.span is not None else math.lcm(units[axis.dim], rotations[axis.space].order)
    for gain, dim in plan.gains_of.get(name, ()):
        if gain.space in rotations:
            units[dim] = 0
    if name in plan.gain_of_bias:
        units[0] = 0
    return {dim: unit for dim, unit in units.items() if unit}


def rows_at_once(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Rotation]) -> int | None:
    """The rows of a slice of a tensor that is cut along its first axis; None for one that is not."""
    cut = _cut(name, shape, plan, rotations)
    return cut[1] if cut is not None and cut[0] == 0 else None


def _cut(name: str, shape: Sequence[int], plan: Plan, rotations: Mapping[str, Rotation]) -> tuple[int, int] | None:
    """The axis along which a tensor is cut into slices, and the length of one; None where there is none.

    That of the smallest unit: its slices may be as small as they should be. A tensor without such an axis stays whole.
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
    """Views that make up the tensor and their places, which `transform` takes one by one; none where nothing changes.

    They are cut along an axis that nothing touches but scales, or that is rotated block by block, where there is one:
    an embedding of gigabytes then needs megabytes of working memory, which stay in cache. shape: of the tensor, if
    these are rows of it, from row `first` on.
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
    """What `transform` takes as `work` for a tensor; the next call gives the same memory."""
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
    """T'[.., j, ..] = sum_i T[.., i, ..] R[i, j] along one axis, or along the span of it that lives in the space.

    `transpose` takes the rotation back. out: contiguous, for the result; may be the tensor itself.
    """
    dim %= tensor.ndim
    if span is None:
        return rotation.apply(tensor, transpose=transpose, dim=dim, out=out)
    result = tensor.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(tensor)
    periods = result.unflatten(dim, (-1, span.period))
    part = periods.narrow(dim + 1, span.start, span.length)
    part.copy_(rotation.apply(part.contiguous(), transpose=transpose, dim=dim + 1))
    return result
