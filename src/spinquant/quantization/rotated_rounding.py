"""Rounding in rotated coordinates, on tensors that stay as they are: what a rotated model rounds, without rotating it.

    y = Q(x R) R^T = x + e R^T            e = Q(z) - z, z = x R

With gradients straight through Q, y moves with x as if nothing was rounded. When R moves to R (I - A), with A skew, the
loss moves by <A, e^T g R>, where g is its gradient at y: one product of errors and gradients for each rotation, and
no derivative of the rounding itself.

That gradient (the one of arXiv 2405.16406) does not know that a rotation changes the size of errors: a step is the
same for all numbers of a token, so errors have no direction, and on average e^T g R is symmetric, which no A sees. What
a rotation can do is to make the range of a token small. So e is also taken as s times a residue that stays, where s,
the step, goes with the range: the largest and smallest number of a group then have the gradient

    p = +-(sum of e g R over the group) / range        and A has  - z^T p  besides

Both are noisy: e g R holds what the errors of all other quantizers do to the loss too, which has nothing to do with
this rotation. Where g is the gradient of log p(y), y drawn from the network's own predictions, it is known what an
error of random direction costs on average (Fisher information, see `learning/sensitivity.py`):

    1/2 ||g||^2 ||e||^2 / n for a group of n numbers,  p = +-||g||^2 ||e||^2 / (n range)   and A has  - z^T p  alone
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinquant.plan import Span
from spinquant.quantization.integer import fake_quantize, group_of
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.rotation import Orthogonal, Rotation, check_blocks, nearest_orthogonal


@dataclass
class Tally:
    """What rounding is expected to cost, 1/2 ||g||^2 ||e||^2 / n, by quantizer and backward pass."""

    costs: list[Tensor] = field(default_factory=list)

    def take(self) -> float:
        """The sum since the last call."""
        total = sum(float(cost) for cost in self.costs)
        self.costs.clear()
        return total


@dataclass(frozen=True, eq=False)
class Moving:
    """A dense rotation that is being learned: weight, (n, n), changes in place; skew is the leaf that takes gradients.

    The gradient of `skew` is that of the loss with respect to A, where the rotation is `weight` (I - A) and A is zero.
    range_gradient: with the part that comes through the range of a group. tally: gradients are those of the expected
    cost instead, which is added to it; the loss has to be the nll of labels drawn from the network's predictions.
    """

    weight: Tensor
    skew: Tensor
    range_gradient: bool = True
    tally: Tally | None = None

    @classmethod
    def starting(cls, weight: Tensor, *, range_gradient: bool = True, tally: Tally | None = None) -> "Moving":
        """A rotation that starts at a matrix, which is copied."""
        return cls(weight.clone(), torch.zeros_like(weight).requires_grad_(), range_gradient, tally)

    @property
    def order(self) -> int:
        """Rows of the matrix."""
        return len(self.weight)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`; no gradients reach the rotation this way."""
        check_blocks(x, self.order, dim)
        r = (self.weight.T if transpose else self.weight).to(x.dtype)
        y = (x.movedim(dim, -1).unflatten(-1, (-1, self.order)) @ r).flatten(-2).movedim(-1, dim)
        return y if out is None else out.copy_(y)

    def tensors(self) -> dict[str, Tensor]:
        """Of the rotation as it is now."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """Of the rotation as it is now."""
        return self.frozen().describe()

    def frozen(self) -> Orthogonal:
        """The rotation as it is now, as a value that stays: the nearest orthogonal matrix in float64."""
        return Orthogonal(nearest_orthogonal(self.weight.detach().double().cpu()))


@dataclass(frozen=True)
class Turn:
    """An axis of a tensor and the rotation of the space that it, or a span of it, lives in."""

    rotation: Rotation
    dim: int = -1
    span: Span | None = None


def round_rotated(x: Tensor, turns: Sequence[Turn], quantizer: Quantizer) -> Tensor:
    """x with what a rotated model would round rounded: same shape and dtype; gradients as above.

    Numbers are rounded along the last axis, after all turns.
    """
    skews = [turn.rotation.skew for turn in turns if isinstance(turn.rotation, Moving)]
    return _RoundRotated.apply(x, tuple(turns), quantizer, *skews)  # pyright: ignore[reportReturnType]


class _RoundRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: tuple[Turn, ...], quantizer: Quantizer, *skews: Tensor) -> Tensor:
        # Products in the dtype of x, as a rotated network has them; rounding in float32 at least.
        z = turned(x, turns)
        error = _round(z, quantizer)
        if any(ctx.needs_input_grad[3:]):
            ctx.turns, ctx.quantizer = turns, quantizer
            tallied = _moving(turns)[0].rotation.tally is not None
            # Of the expected cost's gradients the errors' lengths are enough.
            kept = _energies(error, group_of(z.shape[-1], quantizer)) if tallied else error.to(x.dtype)
            ctx.save_for_backward(z, kept)
        return x + turned(error.to(x.dtype), turns[::-1], transpose=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not any(ctx.needs_input_grad[3:]):
            return grad, None, None, *[None] * len(ctx.needs_input_grad[3:])
        z, kept = ctx.saved_tensors
        group = group_of(z.shape[-1], ctx.quantizer)
        moving = _moving(ctx.turns)
        tally = moving[0].rotation.tally
        if tally is not None:
            # Rotating whole groups keeps their lengths.
            inside = all(_turns_inside(turn, group) for turn in ctx.turns)
            slope = kept * _energies(grad if inside else turned(grad.to(_exact(grad)), ctx.turns), group) / group
            tally.costs.append(slope.sum(dtype=torch.float64) / 2)
            gradients = [torch.zeros_like(turn.rotation.weight) for turn in moving]
        else:
            kept, moved = kept.to(_exact(grad)), turned(grad.to(_exact(grad)), ctx.turns)
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
    """The dtype of products with gradients: float16 ends where they, times errors, still count."""
    return torch.float32 if gradient.dtype == torch.float16 else gradient.dtype


def _round(z: Tensor, quantizer: Quantizer) -> Tensor:
    """What rounding adds to z, in float32 at least."""
    numbers = z.to(_wide(z))
    return fake_quantize(numbers, quantizer).sub_(numbers)


def _energies(x: Tensor, group: int) -> Tensor:
    """The squared length of every group of the last axis, (.., groups, 1)."""
    norm = torch.linalg.vector_norm(x.unflatten(-1, (-1, group)), dim=-1, keepdim=True, dtype=_wide(x))
    return norm.square()


def _moving(turns: Sequence[Turn]) -> list[Any]:
    """Those whose rotation is learned."""
    return [turn for turn in turns if isinstance(turn.rotation, Moving)]


def _turns_inside(turn: Turn, group: int) -> bool:
    """Whether every group is rotated within itself."""
    return turn.dim == -1 and turn.span is None and group % turn.rotation.order == 0


def _ends(slope: Tensor, groups: Tensor, quantizer: Quantizer) -> list[tuple[Tensor, Tensor]]:
    """The numbers that set the groups' ranges, by their places in the groups, and the gradients of the loss there.

    groups: (.., groups, group). slope: (.., groups, 1), the derivative by the logarithm of a group's range; so are
    places and gradients.
    """
    tiny = torch.finfo(slope.dtype).tiny
    if quantizer.kind != "int" or quantizer.symmetric:
        at = groups.abs().argmax(-1, keepdim=True)
        number = groups.gather(-1, at).to(slope.dtype)
        return [(at, number.sign() * slope / number.abs().clamp(min=tiny))]
    (high, at_high), (low, at_low) = groups.max(-1, keepdim=True), groups.min(-1, keepdim=True)
    high, low = (number.to(slope.dtype) for number in (high, low))
    pull = slope / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=tiny)
    # A range starts or ends at zero where all numbers are on one side of it.
    return [(at_high, torch.where(high > 0, pull, 0.0)), (at_low, torch.where(low < 0, -pull, 0.0))]


def _add(gradient: Tensor, z: Tensor, ends: Sequence[tuple[Tensor, Tensor]], turn: Turn) -> None:
    """gradient += p^T z, p being zero but at the ends of groups. For a skew A that is the same as - z^T p."""
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


def turned(x: Tensor, turns: Sequence[Turn], *, transpose: bool = False) -> Tensor:
    """x rotated along its axes; `transpose` takes rotations back, when turns are given in reverse."""
    for turn in turns:
        if turn.span is None:
            x = turn.rotation.apply(x, transpose=transpose, dim=turn.dim)
        else:
            x = x.clone()
            part = _part(x, turn.dim, turn.span)
            part.copy_(turn.rotation.apply(part.contiguous(), transpose=transpose, dim=-1))
    return x


def _part(x: Tensor, dim: int, span: Span) -> Tensor:
    """A view of the span's elements, moved last: (.., periods, length)."""
    return x.movedim(dim, -1).unflatten(-1, (-1, span.period)).narrow(-1, span.start, span.length)


def _rows(x: Tensor, turn: Turn) -> Tensor:
    """What one rotation turns, as rows of its order."""
    part = x.movedim(turn.dim, -1) if turn.span is None else _part(x, turn.dim, turn.span)
    return part.reshape(-1, turn.rotation.order)
