"""Fake quantization in transformed coordinates, with gradients for rotations: Q(x T) T^-1 in an untransformed model.

    y = Q(x T) T^-1 = x + e T^-1            e = Q(z) - z, z = x T

The gradient passes straight through Q (STE), so y moves with x as if nothing was rounded. A rotation R that is learned
comes last in T. If it moves to R (I - A) with A skew, the loss changes by <A, e^T g T^-T>, where g is its gradient at
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
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spinquant.plan import Span
from spinquant.quantization.integer import fake_quantize, group_of
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.rotation import (
    Orthogonal,
    Transform,
    check_blocks,
    dual,
    is_orthogonal,
    nearest_orthogonal,
)
from spinquant.rotations.transforms import Composed, apply_to_heads


@dataclass
class Tally:
    """Expected cost of rounding, 1/2 ||g||^2 ||e||^2 / n, collected over quantizers and backward passes."""

    costs: list[Tensor] = field(default_factory=list)

    def take(self) -> float:
        """The sum since the last call."""
        total = sum(float(cost) for cost in self.costs)
        self.costs.clear()
        return total


@dataclass(frozen=True, eq=False)
class Moving:
    """A dense rotation that is being learned.

    Attributes:
        weight: the current rotation, (n, n); changes in place.
        skew: the leaf that receives gradients: those of the loss with respect to A, where the rotation is
            `weight` (I - A) and A is zero.
        range_gradient: include the gradient through the range of a group.
        tally: if given, gradients are those of the expected cost, which is added to it; the loss then has to be the nll
            of labels drawn from the network's predictions.
    """

    weight: Tensor
    skew: Tensor
    range_gradient: bool = True
    tally: Tally | None = None

    @classmethod
    def starting(cls, weight: Tensor, *, range_gradient: bool = True, tally: Tally | None = None) -> "Moving":
        """A rotation that starts at a copy of a matrix."""
        return cls(weight.clone(), torch.zeros_like(weight).requires_grad_(), range_gradient, tally)

    @property
    def order(self) -> int:
        """Rows of the matrix."""
        return len(self.weight)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`, without gradients for the rotation."""
        check_blocks(x, self.order, dim)
        r = (self.weight.T if transpose else self.weight).to(x.dtype)
        y = (x.movedim(dim, -1).unflatten(-1, (-1, self.order)) @ r).flatten(-2).movedim(-1, dim)
        return y if out is None else out.copy_(y)

    def dual(self) -> "Moving":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the current rotation."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """The description of the current rotation."""
        return self.frozen().describe()

    def frozen(self) -> Orthogonal:
        """The current rotation as an immutable value: the nearest orthogonal matrix in float64."""
        return Orthogonal(nearest_orthogonal(self.weight.detach().double().cpu()))


@dataclass(frozen=True)
class Turn:
    """An axis of a tensor, or a span of it, and the transform of its space.

    Attributes:
        rotation: the transform; one that is being learned (`Moving`) is the last of its axis.
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
    skews = [turn.rotation.skew for turn in turns if isinstance(turn.rotation, Moving)]
    return _RoundRotated.apply(x, tuple(turns), quantizer, *skews)  # pyright: ignore[reportReturnType]


class _RoundRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: tuple[Turn, ...], quantizer: Quantizer, *skews: Tensor) -> Tensor:
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
        if tally is not None:
            # Rotations within groups do not change the groups' lengths.
            inside = all(_turns_inside(turn, group) for turn in ctx.turns)
            slope = kept * _energies(grad if inside else turned(grad.to(_exact(grad)), duals), group) / group
            tally.costs.append(slope.sum(dtype=torch.float64) / 2)
            gradients = [torch.zeros_like(turn.rotation.weight) for turn in moving]
        else:
            kept, moved = kept.to(_exact(grad)), turned(grad.to(_exact(grad)), duals)
            slope = (kept * moved).unflatten(-1, (-1, group)).sum(-1, keepdim=True, dtype=_wide(grad))
            gradients = [(_rows(kept, t).T @ _rows(moved, t)).to(t.rotation.weight.dtype) for t in moving]
        if tally is not None or any(turn.rotation.range_gradient for turn in moving):
            ends = _ends(slope, z.unflatten(-1, (-1, group)), ctx.quantizer)
            for turn, gradient in zip(moving, gradients, strict=True):
                if tally is not None or turn.rotation.range_gradient:
                    _add(gradient, z, ends, turn)
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
    norm = torch.linalg.vector_norm(x.unflatten(-1, (-1, group)), dim=-1, keepdim=True, dtype=_wide(x))
    return norm.square()


def _parts(turn: Turn) -> list[Turn]:
    """The turn, or one for each transform of a product in which one is being learned."""
    chain = turn.rotation.chain() if isinstance(turn.rotation, Composed) else ()
    if not any(isinstance(part, Moving) for part in chain):
        return [turn]
    return [replace(turn, rotation=part) for part in chain]


def _moving(turns: Sequence[Turn]) -> list[Any]:
    """The turns whose rotation is being learned."""
    return [turn for turn in turns if isinstance(turn.rotation, Moving)]


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


def _add(gradient: Tensor, z: Tensor, ends: Sequence[tuple[Tensor, Tensor]], turn: Turn) -> None:
    """gradient += p^T z, where p is zero except at the ends of groups. For a skew A this equals - z^T p."""
    if turn.dim == -1 and turn.span is None:
        rows = z.reshape(-1, turn.rotation.order)
        group = z.shape[-1] // ends[0][0].shape[-2]
        first = torch.arange(0, z.numel(), group, device=z.device)
        for at, pull in ends:
            place = first + at.flatten()
            row = rows[place // turn.rotation.order].to(gradient.dtype)
            gradient.index_add_(0, place % turn.rotation.order, row.mul_(pull.reshape(-1, 1)))
        return
    dense = torch.zeros_like(z, dtype=gradient.dtype).unflatten(-1, (ends[0][0].shape[-2], -1))
    for at, pull in ends:
        dense.scatter_add_(-1, at, pull.to(dense.dtype))
    gradient.addmm_(_rows(dense.flatten(-2), turn).T, _rows(z.to(gradient.dtype), turn))


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
