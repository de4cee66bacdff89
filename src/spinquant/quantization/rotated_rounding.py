"""Fake quantization in transformed coordinates, with gradients for rotations: Q(x T) T^-1 in an untransformed model.

    y = Q(x T) T^-1 = x + e T^-1            e = Q(z) - z, z = x T

The gradient passes straight through Q (STE), so y moves with x as if nothing was rounded. If a rotation R at the end of
T moves to R (I - A) with A skew, the loss changes by <A, e^T g T^-T>, where g is its gradient at
y: one product of errors and gradients for each rotation, and no derivative of the rounding itself. T is R alone below.

That gradient (the one of arXiv 2405.16406) ignores that a rotation changes the size of the errors. The step size is the
same for all numbers of a token, so errors have no preferred direction, and on average e^T g R is symmetric, which has
no inner product with a skew A. What a rotation can do is to reduce the range of a token. So e is also written as s
times a constant residue, where the step size s is proportional to the range. The largest and smallest number of a
group then have the gradient

    p = +-(sum of e g R over the group) / range        and A has the additional gradient  - z^T p

Both are noisy: e g R includes what the errors of all other quantizers do to the loss, which has nothing to do with
this rotation. If g is the gradient of log p(y) with y drawn from the network's own predictions, the average cost of an
error of random direction is known (Fisher information, see `learning/sensitivity.py`):

    1/2 ||g||^2 ||e||^2 / n for a group of n numbers,  p = +-||g||^2 ||e||^2 / (n range)   and A has  - z^T p  alone

If scales D follow R, g R D^-1 changes with R too, and A has  - (g R)^T (g R D^-2 ||e||^2 / n)  in addition. Scales d
that are learned come last in T. With g the gradient at e, log d has the gradient p z - e g, or, of the
expected cost, p z - g^2 ||e||^2 / n, summed over rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spinquant.plan import Span
from spinquant.quantization.integer import fake_quantize, group_of
from spinquant.quantization.moving import Moving, MovingScales, leaf_of
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.rotation import Transform, dual, is_orthogonal
from spinquant.rotations.transforms import Composed, Diagonal, apply_to_heads, positional


@dataclass(frozen=True)
class Turn:
    """An axis of a tensor, or a span of it, and the transform of its space.

    Attributes:
        rotation: the transform; scales that are being learned (`MovingScales`) are the last of their axis.
        dim: the axis.
        span: the part of it that is transformed; None for all of it.
        heads: the tensor is (.., heads, tokens, size), and the last axis is transformed. A transform with several heads
            then takes its head from the third axis from the end.
    """

    rotation: Transform
    dim: int = -1
    span: Span | None = None
    heads: bool = False


def round_rotated(x: Tensor, turns: Sequence[Turn], quantizer: Quantizer) -> Tensor:
    """Transform x, fake-quantize it along the last axis, and undo that; see the module docstring for the gradients.

    Args:
        x: the tensor.
        turns: transforms of axes, applied in order.
        quantizer: how the transformed tensor is quantized.

    Returns:
        A tensor of x's shape and dtype.
    """
    turns = [part for turn in turns for part in _parts(turn)]
    leaves = [leaf_of(turn.rotation) for turn in _moving(turns)]
    return _RoundRotated.apply(x, tuple(turns), quantizer, *leaves)  # pyright: ignore[reportReturnType]


class _RoundRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: tuple[Turn, ...], quantizer: Quantizer, *leaves: Tensor) -> Tensor:
        # Products are in the dtype of x, as in a rotated network; rounding is in float32 at least.
        z = turned(x, turns)
        error = _round(z, quantizer)
        if any(ctx.needs_input_grad[3:]):
            ctx.turns, ctx.quantizer = turns, quantizer
            tallied = _moving(turns)[0].rotation.tally is not None
            # The gradients of the expected cost need only the lengths of the errors.
            kept = _energies(error, group_of(z.shape[-1], quantizer)) if tallied else error.to(x.dtype)
            ctx.save_for_backward(z, kept)
        return x + unturned(error.to(x.dtype), turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not any(ctx.needs_input_grad[3:]):
            return grad, None, None, *[None] * len(ctx.needs_input_grad[3:])
        z, kept = ctx.saved_tensors
        group = group_of(z.shape[-1], ctx.quantizer)
        # What e T^-1 is added to has the gradient g, so e has g T^-T.
        moving, duals = _moving(ctx.turns), [replace(turn, rotation=dual(turn.rotation)) for turn in ctx.turns]
        tally = moving[0].rotation.tally
        # Whether scales follow a rotation or are learned, so that the gradient by g counts too.
        scaled = any(isinstance(turn.rotation, MovingScales) or _later(turn, ctx.turns) for turn in moving)
        if tally is not None:
            # Rotations within groups do not change the groups' lengths.
            inside = not scaled and all(_turns_inside(turn, group) for turn in ctx.turns)
            moved = grad if inside else turned(grad.to(_exact(grad)), duals)
            slope = kept * _energies(moved, group) / group
            tally.costs.append(slope.sum(dtype=torch.float64) / 2)
            # The derivative of the expected cost by g: g ||e||^2 / n.
            error = _grouped(moved, group).mul(kept / group).flatten(-2) if scaled else moved
        else:
            error, moved = kept.to(_exact(grad)), turned(grad.to(_exact(grad)), duals)
            slope = (error * moved).unflatten(-1, (-1, group)).sum(-1, keepdim=True, dtype=_wide(grad))
        ranged = tally is not None or any(turn.rotation.range_gradient for turn in moving)
        ends = _ends(slope, _grouped(z, group), ctx.quantizer) if ranged else []
        gradients = []
        for turn in moving:
            later = _later(turn, ctx.turns)
            used = ends if tally is not None or turn.rotation.range_gradient else []
            if isinstance(turn.rotation, MovingScales):
                gradients.append(_of_scales(error, moved, z, used, turn))
                continue
            gradient = torch.zeros_like(turn.rotation.weight)
            if tally is None or later:
                errors, slopes = _rows(unturned(error, later), turn), _rows(_pulled(moved, later), turn)
                product = errors.T @ slopes if tally is None else -(slopes.T @ errors)
                gradient += product.to(gradient.dtype)
            _add(gradient, z, used, turn, later)
            gradients.append(gradient)
        return grad, None, None, *gradients


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exact(gradient: Tensor) -> torch.dtype:
    """The dtype of products with gradients: float16 would underflow where gradients times errors still matter."""
    return torch.float32 if gradient.dtype == torch.float16 else gradient.dtype


def _round(z: Tensor, quantizer: Quantizer) -> Tensor:
    """The rounding error Q(z) - z, in float32 at least."""
    numbers = z.to(_wide(z))
    return fake_quantize(numbers, quantizer).sub_(numbers)


def _energies(x: Tensor, group: int) -> Tensor:
    """Squared norm of every group of the last axis, (.., groups, 1)."""
    return torch.linalg.vector_norm(_grouped(x, group), dim=-1, keepdim=True, dtype=_wide(x)).square()


def _grouped(x: Tensor, group: int) -> Tensor:
    """x with the groups of its last axis, (.., groups, group)."""
    return x.unflatten(-1, (-1, group))


def _parts(turn: Turn) -> list[Turn]:
    """The turn, or one for each transform of a product in which one is being learned."""
    chain = turn.rotation.chain() if isinstance(turn.rotation, Composed) else ()
    if not any(isinstance(part, Moving | MovingScales) for part in chain):
        return [turn]
    return [replace(turn, rotation=part) for part in chain]


def _moving(turns: Sequence[Turn]) -> list[Any]:
    """The turns whose transform is being learned."""
    return [turn for turn in turns if isinstance(turn.rotation, Moving | MovingScales)]


def _later(turn: Turn, turns: Sequence[Turn]) -> list[Turn]:
    """The turns of the same axis after one of them."""
    place = next(i for i, other in enumerate(turns) if other is turn)
    return [other for other in turns[place + 1 :] if other.dim == turn.dim]


def _turns_inside(turn: Turn, group: int) -> bool:
    """Whether the transform is a rotation that mixes numbers only within groups."""
    inside = turn.dim == -1 and turn.span is None and group % turn.rotation.order == 0
    return inside and is_orthogonal(turn.rotation)


def _ends(slope: Tensor, groups: Tensor, quantizer: Quantizer) -> list[tuple[Tensor, Tensor]]:
    """The numbers that determine each group's range: pairs of their index in the group and the gradient of the loss.

    groups: (.., groups, group). slope: derivative by the logarithm of a group's range, (.., groups, 1), which is also
    the shape of indices and gradients.
    """
    tiny = torch.finfo(slope.dtype).tiny
    if quantizer.kind != "int" or quantizer.symmetric:
        at = groups.abs().argmax(-1, keepdim=True)
        number = groups.gather(-1, at).to(slope.dtype)
        return [(at, number.sign() * slope / number.abs().clamp(min=tiny))]
    (high, at_high), (low, at_low) = groups.max(-1, keepdim=True), groups.min(-1, keepdim=True)
    high, low = (number.to(slope.dtype) for number in (high, low))
    pull = slope / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=tiny)
    # If all numbers have one sign, the range starts or ends at zero.
    return [(at_high, torch.where(high > 0, pull, 0.0)), (at_low, torch.where(low < 0, -pull, 0.0))]


def _add(gradient: Tensor, z: Tensor, ends: Sequence[tuple[Tensor, Tensor]], turn: Turn, later: Sequence[Turn]) -> None:
    """gradient += p^T z, where p is zero except at the ends of groups. For a skew A this equals - z^T p."""
    if not ends:
        return
    order = turn.rotation.order
    channels = all(other.rotation.order == order and _scales(other.rotation) for other in later)
    if turn.dim == -1 and turn.span is None and channels:
        rows = z.reshape(-1, order)
        group = z.shape[-1] // ends[0][0].shape[-2]
        first = torch.arange(0, z.numel(), group, device=z.device)
        scale = turned(torch.ones(order, dtype=gradient.dtype, device=z.device), later)
        for at, pull in ends:
            place = first + at.flatten()
            row, column = rows[place // order].to(gradient.dtype), place % order
            if later:
                row, pull = row / scale, pull.reshape(-1) * scale[column]
            gradient.index_add_(0, column, row.mul_(pull.reshape(-1, 1)))
        return
    dense = _at_ends(z, ends, gradient.dtype)
    found = _rows(unturned(z.to(gradient.dtype), later), turn)
    gradient.addmm_(_rows(_pulled(dense, later), turn).T, found)


def _of_scales(error: Tensor, moved: Tensor, z: Tensor, ends: Sequence[tuple[Tensor, Tensor]], turn: Turn) -> Tensor:
    """The gradient of the logarithms of scales that are the last transform of their axis."""
    scales: Any = turn.rotation
    logs = scales.logs
    total = -(error.to(logs.dtype) * moved.to(logs.dtype))
    if ends:
        total += _at_ends(z, ends, logs.dtype) * z.to(logs.dtype)
    return scales.sign * _rows(total, turn).sum(0)


def _at_ends(z: Tensor, ends: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """p, shaped like z: zero except at the ends of groups."""
    dense = torch.zeros_like(z, dtype=dtype).unflatten(-1, (ends[0][0].shape[-2], -1))
    for at, pull in ends:
        dense.scatter_add_(-1, at, pull.to(dtype))
    return dense.flatten(-2)


def _scales(transform: Transform) -> bool:
    return isinstance(transform, MovingScales) or (isinstance(transform, Diagonal) and not positional(transform))


def _pulled(gradient: Tensor, turns: Sequence[Turn]) -> Tensor:
    """The gradient before turns, of one after them: x T has the gradient p, so x has p T^T."""
    for turn in reversed(turns):
        gradient = _turned(gradient, turn, transpose=True)
    return gradient


def turned(x: Tensor, turns: Sequence[Turn]) -> Tensor:
    """x transformed along its axes, in order."""
    for turn in turns:
        x = _turned(x, turn, transpose=False)
    return x


def unturned(x: Tensor, turns: Sequence[Turn]) -> Tensor:
    """The inverse of `turned`."""
    for turn in reversed(turns):
        x = _turned(x, replace(turn, rotation=dual(turn.rotation)), transpose=True)
    return x


def _turned(x: Tensor, turn: Turn, *, transpose: bool) -> Tensor:
    if turn.heads:
        return apply_to_heads(turn.rotation, x, transpose=transpose)
    if turn.span is None:
        return turn.rotation.apply(x, transpose=transpose, dim=turn.dim)
    x = x.clone()
    part = _part(x, turn.dim, turn.span)
    # Periods one after another are the blocks of one axis.
    part.copy_(turn.rotation.apply(part.flatten(-2), transpose=transpose).reshape(part.shape))
    return x


def _part(x: Tensor, dim: int, span: Span) -> Tensor:
    """A view of the span's elements with the axis moved last: (.., periods, length)."""
    return x.movedim(dim, -1).unflatten(-1, (-1, span.period)).narrow(-1, span.start, span.length)


def _rows(x: Tensor, turn: Turn) -> Tensor:
    """The elements that a rotation acts on, as rows of its order."""
    part = x.movedim(turn.dim, -1) if turn.span is None else _part(x, turn.dim, turn.span)
    return part.reshape(-1, turn.rotation.order)
