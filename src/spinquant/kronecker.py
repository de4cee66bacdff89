"""The fast transform: a Kronecker product of small matrices applied to the last axis.

    y = x (F1 kron F2 kron ...)

costs one small matrix product per factor instead of one of the full order. What limits it on a CPU is
memory, so rows go through all factors in chunks that stay in cache, in two buffers used in turn. Half
types are widened chunk by chunk and rounded once, at the end. A factor that commutes with the exchange of
two equal runs of indices is split into sums and differences of the runs, which halves its arithmetic.

`_apply` is the only place that does the arithmetic; a native kernel would replace it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spinquant.errors import RotationError

# Elements per chunk. Measured with 32 MiB of L3: 2^18 is up to 20 % slower (calls), 2^21 up to twice (cache).
_CHUNK = 1 << 20
# Smaller factors do not repay the two additional passes of a split: 76 is equal, 148 and 172 gain a quarter.
_SPLIT_FROM = 92

# A step reads one flat buffer and fills another of the same size.
_Step = Callable[[Tensor, Tensor], object]


def kronecker_transform(
    x: Tensor, factors: Sequence[Tensor], *, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """Return x R for R = F1 kron F2 kron ..., or x R^T.

    The last axis is transformed block by block where it is longer than R. Differentiable with respect to x
    alone. Half types are computed in float32. `out` is contiguous, like x, and may be x itself; it saves the
    pages of a new tensor, which cost as much as the arithmetic. Raises RotationError where R does not divide
    the last axis.
    """
    order = math.prod(factor.shape[0] for factor in factors)
    if x.dim() == 0 or order == 0 or x.shape[-1] % order:
        raise RotationError(
            f"a rotation of order {order} cannot be applied to a tensor of shape {tuple(x.shape)}: its last "
            "axis must be a multiple of the order; choose a block size that divides it"
        )
    if not x.dtype.is_floating_point:
        raise RotationError(f"only floating-point tensors can be rotated, not {x.dtype}: convert it first")
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if out is not None and (differentiated or out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous()):
        raise RotationError(
            f"`out` must be contiguous, of shape {tuple(x.shape)} and {x.dtype}, and x must not require gradients; "
            f"found shape {tuple(out.shape)} and {out.dtype}"
        )
    if differentiated:
        return _Transform.apply(x, tuple(factors), transpose)  # pyright: ignore[reportReturnType]
    return _apply(x, factors, transpose, out)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factors: tuple[Tensor, ...], transpose: bool) -> Tensor:
        ctx.factors, ctx.transpose = factors, transpose
        return _apply(x, factors, transpose)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return kronecker_transform(grad, ctx.factors, transpose=not ctx.transpose), None, None


@torch.no_grad()
def _apply(x: Tensor, factors: Sequence[Tensor], transpose: bool, out: Tensor | None = None) -> Tensor:
    order = math.prod(factor.shape[0] for factor in factors)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = _steps(factors, dtype, x.device, transpose)
    if x.dtype != dtype:
        steps = [_copy, *steps, _copy]
    elif len(steps) == 1 and out is not None:  # a single product cannot write where it reads
        steps = [_copy, *steps]

    rows = x.reshape(-1, order)
    result = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out).view(-1, order)
    chunk = max(1, _CHUNK // order) if x.device.type == "cpu" else max(1, len(rows))
    buffers = [torch.empty(min(chunk, len(rows)) * order, dtype=dtype, device=x.device) for _ in range(2)]
    for start in range(0, len(rows), chunk):
        source = rows[start : start + chunk].reshape(-1)  # copies a chunk where x is a transposed view
        final = result[start : start + chunk].view(-1)
        for i, step in enumerate(steps):
            target = final if i == len(steps) - 1 else buffers[i % 2][: source.numel()]
            step(source, target)
            source = target
    return result.view(x.shape)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _steps(factors: Sequence[Tensor], dtype: torch.dtype, device: torch.device, transpose: bool) -> list[_Step]:
    """Return the steps for the factors, last first: the last one reads x where it is contiguous."""
    steps: list[_Step] = []
    width = 1  # the product of the orders of the factors behind this one
    for factor in reversed(factors):
        factor = (factor.T if transpose else factor).to(device=device, dtype=dtype)
        run = (len(factor) - 4) // 2 if len(factor) >= _SPLIT_FROM and device.type == "cpu" else 0
        if run and _exchangeable(factor, run):
            steps += _split_steps(factor, run, width)
        else:
            steps.append(_dense_step(factor, width))
        width *= len(factor)
    return steps


def _multiply(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out[b, j, w] = sum_i x[b, i, w] factor[i, j]; one product of matrices where w is alone."""
    batch, order, width = x.shape
    if width == 1:
        torch.mm(x.view(batch, order), factor, out=out.view(batch, order))
    else:
        torch.bmm(factor.T.expand(batch, order, order), x, out=out)


def _dense_step(factor: Tensor, width: int) -> _Step:
    def step(source: Tensor, target: Tensor) -> None:
        shape = -1, len(factor), width
        _multiply(source.view(shape), factor, target.view(shape))

    return step


def _exchangeable(factor: Tensor, run: int) -> bool:
    """Whether exchanging the first two runs of rows and of columns leaves the factor as it is."""
    first, second, rest = slice(run), slice(run, 2 * run), slice(2 * run, None)
    return (
        torch.equal(factor[first, first], factor[second, second])
        and torch.equal(factor[first, second], factor[second, first])
        and torch.equal(factor[first, rest], factor[second, rest])
        and torch.equal(factor[rest, first], factor[rest, second])
    )


def _split_steps(factor: Tensor, run: int, width: int) -> list[_Step]:
    """Differences of the two runs only meet differences, sums (with the remaining indices) only sums."""
    order = len(factor)
    odd = (factor[:run, :run] - factor[:run, run : 2 * run]) / 2
    even = factor[run:, run:].clone()
    even[:run, :run] = (factor[:run, :run] + factor[:run, run : 2 * run]) / 2

    def whole(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flat.view(-1, order, width).split([run, run, order - 2 * run], 1)  # pyright: ignore[reportReturnType]

    def halves(flat: Tensor) -> tuple[Tensor, Tensor]:
        batch = flat.numel() // (order * width)
        odd, even = flat.split([batch * run * width, batch * (order - run) * width])
        return odd.view(batch, run, width), even.view(batch, order - run, width)

    def split(source: Tensor, target: Tensor) -> None:
        (first, second, rest), (minus, plus) = whole(source), halves(target)
        torch.sub(first, second, out=minus)
        torch.add(first, second, out=plus[:, :run])
        plus[:, run:].copy_(rest)

    def multiply(source: Tensor, target: Tensor) -> None:
        for part, matrix, out in zip(halves(source), (odd, even), halves(target), strict=True):
            _multiply(part, matrix, out)

    def join(source: Tensor, target: Tensor) -> None:
        (minus, plus), (first, second, rest) = halves(source), whole(target)
        torch.add(plus[:, :run], minus, out=first)
        torch.sub(plus[:, :run], minus, out=second)
        rest.copy_(plus[:, run:])

    return [split, multiply, join]
