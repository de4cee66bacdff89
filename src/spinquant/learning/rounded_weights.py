"""The cost of rounding weights, as moments: of the linears that read a space, and of those that write it.

Rounding a row w of a weight makes an error e of length r |w|^2 (squared; r: `relative_error`) without a preferred
direction in the coordinates in which it is rounded, and errors of different rows are independent. With M the gradient
of log p(y) by the weight for one sample (y: `sensitivity.py`), log p moves by sum_j M_j . e_j, so the expected cost is
proportional to r / n times

    sum over samples and rows j of |(M T)_j|^2 |(W T^-T)_j|^2       weights W T^-T, which read x T
    sum over samples and rows j of |(T^-1 M)_j|^2 |(T^T W)_j|^2     weights T^T W, which write v T for v = x W^T

n: length of a row. Both have the form of `closed_form.py`, with one factor averaged over the rows for the other:

    tr(T^T X T) tr(T^-1 G T^-T) / tr X       X = sum |w_j|^2 M_j^T M_j,  G = sum |M_j|^2 w_j^T w_j
    tr(T^T A T) tr(T^-1 D T^-T) / size       A = W W^T,  D = sum M M^T

In the second, the rotation that follows T makes rows about equally long. Channel scales change the length of the rows
that write them, and not their relative error, so only linears that read them count.

M is the sum over the tokens of a sample, since they meet the same error. Errors of an activation differ by token.
Weights that write values show the difference: a query attends to many tokens, whose inputs are alike in part, and their
errors add up (`docs/experiments/learning.md`).
"""

from torch import Tensor

from spinquant.learning.closed_form import Moments, wide
from spinquant.plan import Axis, Plan, Space


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """M of a linear, (outputs, inputs), from its inputs, (.., inputs), and the gradients of its outputs."""
    return gradient.detach().flatten(0, -2).float().T @ x.detach().flatten(0, -2).float()


def rows_of(weight: Tensor, *, transposed: bool) -> Tensor:
    """The rows of a linear's weight, float32 (outputs, inputs). transposed: it is stored as (inputs, outputs)."""
    return weight.detach().float().T if transposed else weight.detach().float()


def writers_of(plan: Plan, space: Space) -> dict[str, Axis]:
    """The linears whose weights write a space, with the axis of their outputs that does."""
    linears = {plan.weight_of(name): name for group in plan.linears for name in group}
    axes = (axis for axis in plan.axes if axis.space == space.name and not axis.reads)
    return {linears[axis.tensor]: axis for axis in axes if axis.tensor in linears}


def by_head(space: Space, axis: Axis, rows: Tensor) -> Tensor:
    """Rows of a linear that writes a space, (outputs, inputs), by head: (heads, size, inputs)."""
    if axis.span is not None:
        inside = rows.unflatten(0, (-1, axis.span.period))
        rows = inside[:, axis.span.start : axis.span.start + axis.span.length].flatten(0, 1)
    return rows.unflatten(0, (space.heads, -1))


def of_writer(w: Tensor, space: Space, axis: Axis, d: Tensor) -> Moments:
    """The moments of rounding the weight of a linear that writes a space, of which every head is a term.

    Args:
        w: rows of the weight, (outputs, inputs).
        space: the space.
        axis: that writes it.
        d: D by head, (heads, 1, size, size).
    """
    a = outer(by_head(space, axis, w))
    square = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # mean squared length of a row, by head
    return Moments(a.cpu(), (square * d).cpu(), w.shape[-1])


def outer(heads: Tensor) -> Tensor:
    """M M^T of every head, float64 (heads, 1, size, size), from (heads, size, inputs)."""
    return wide(heads @ heads.mT)[:, None]
