"""Fast transform: apply a Kronecker product of small matrices to an axis of a tensor.

    y = x (F1 kron F2 kron ...)

costs one small matrix product per factor instead of one of the full order. On a CPU it is limited by memory
bandwidth, so rows go through all factors in chunks that stay in cache, alternating between two buffers. Half-precision
inputs are widened chunk by chunk and rounded once, at the end. A factor that commutes with the exchange of two equal
runs of indices is split into sums and differences of the runs, which halves its arithmetic.

A factor is a matrix, or `Sylvester`: a Hadamard matrix that `numba_kernels.py` applies by butterflies if numba is
installed. `_apply` is the only place that does the arithmetic, except under torch.compile and torch.export. They cannot
trace its buffers, so `_traced` takes plain matrix products there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spinquant.compute.threads import each
from spinquant.compute.workspace import workspace
from spinquant.errors import RotationError

# Elements per chunk. Measured with 32 MiB of L3: 2^18 is up to 20 % slower (call overhead), 2^21 up to twice as slow
# (cache misses).
_CHUNK = 1 << 20
# The two additional passes of a split do not pay for smaller factors: order 76 takes the same time, 148 and 172 take
# a quarter less.
_SPLIT_FROM = 92

# Bytes of the largest tensor in float32 from which kernels are used. Kernels and numba's compiler take 105 MB, which
# is what three times a largest tensor of this size leaves of the memory bound of streaming.
COMPILED_FROM = 48 << 20
_barred = False

# A step reads one flat buffer and writes another of the same size.
_Step = Callable[[Tensor, Tensor], object]
_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Sylvester:
    """The orthonormal Sylvester-Hadamard matrix, applied by butterflies; symmetric, its order a power of two >= 2."""

    order: int

    def __post_init__(self):
        if self.order < 2 or self.order & (self.order - 1):
            raise RotationError(f"a Sylvester matrix has an order that is a power of two, at least 2, not {self.order}")

    def __len__(self) -> int:
        return self.order

    @property
    def shape(self) -> tuple[int, int]:
        """(order, order), as of a dense matrix."""
        return self.order, self.order


Factor = Tensor | Sylvester


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The compiled kernels; None if numba is not installed."""
    try:
        from spinquant.rotations import numba_kernels
    except ImportError:
        return None
    return numba_kernels


@contextmanager
def kernels_for(largest: int) -> Iterator[bool]:
    """Within the block, in all threads, use compiled kernels only if the model's largest tensor repays their memory.

    Fusing in memory and streaming both decide this way, or their last bits would differ.

    Args:
        largest: bytes of the largest tensor in float32, compared with `COMPILED_FROM`.

    Yields:
        Whether kernels are used.
    """
    global _barred
    before, _barred = _barred, _barred or largest < COMPILED_FROM
    try:
        yield not _barred and kernels() is not None
    finally:
        _barred = before


def takes_kernels(x: Tensor) -> bool:
    """Whether `Sylvester` factors can be applied to x: a plain CPU tensor, outside torch.compile, numba installed."""
    if torch.compiler.is_compiling():
        return False
    plain = x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)
    return plain and not _barred and kernels() is not None


def called_while_tracing(function: _Function) -> _Function:
    """Decorator: torch.compile calls the function while it traces, instead of tracing it; its result is a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports torch's compiler, which takes longer
    than importing spinquant.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def outside_modes(make: Callable[[], _Result]) -> _Result:
    """Call a function where no torch mode is active, such as those of torch.export: modes belong to a thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def kronecker_transform(
    x: Tensor, factors: Sequence[Factor], *, transpose: bool = False, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """Contract x with R = F1 kron F2 kron ... along an axis.

    Differentiable with respect to x alone. Half-precision inputs are computed in float32.

    Args:
        x: floating-point tensor; axis `dim` is a multiple of the order of R and is transformed block by block.
        factors: square matrices, or `Sylvester`, in the order of the product.
        transpose: contract with R^T instead.
        dim: the axis.
        out: contiguous tensor of x's shape and dtype for the result; may be x itself. It saves the memory pages of a
            new tensor, which cost as much as the arithmetic. Without gradients only.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        RotationError: R does not divide the axis, x is not floating point, or `out` does not fit.
    """
    order = 1
    for factor in factors:  # torch.compile traces a loop; `math.prod` would split the graph
        order *= factor.shape[0]
    if x.dim() == 0 or order == 0 or x.shape[dim] % order:
        axis = "last axis" if dim == -1 else f"axis {dim}"
        raise RotationError(
            f"a rotation of order {order} cannot be applied to a tensor of shape {tuple(x.shape)}: its {axis} "
            "must be a multiple of the order; choose a block size that divides it"
        )
    if not x.dtype.is_floating_point:
        raise RotationError(f"only floating-point tensors can be rotated, not {x.dtype}: convert it first")
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling() and out is None:
        return _traced(x, factors, transpose, dim)
    if out is not None and (differentiated or out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous()):
        raise RotationError(
            f"`out` must be contiguous, of shape {tuple(x.shape)} and {x.dtype}, and x must not require gradients; "
            f"found shape {tuple(out.shape)} and {out.dtype}"
        )
    if differentiated:
        return _Transform.apply(x, tuple(factors), transpose, dim)  # pyright: ignore[reportReturnType]
    return _apply(x, factors, transpose, dim, out)


def _traced(x: Tensor, factors: Sequence[Factor], transpose: bool, dim: int) -> Tensor:
    """The same product in operations that torch.compile and torch.export can trace, without buffers.

    Nothing is decided from the values of a factor, which a traced graph may not read.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    shape, width = y.shape, 1
    for factor in reversed(factors):
        assert isinstance(factor, Tensor)  # compiled kernels are never traced
        matrix = (factor.T if transpose else factor).to(y.device, y.dtype)
        order = matrix.shape[0]
        y = y.reshape(-1, order) @ matrix if width == 1 else matrix.T @ y.reshape(-1, order, width)
        width *= order
    return y.reshape(shape).movedim(-1, dim).to(x.dtype)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factors: tuple[Factor, ...], transpose: bool, dim: int) -> Tensor:
        ctx.factors, ctx.transpose, ctx.dim = factors, transpose, dim
        return _apply(x, factors, transpose, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        back = kronecker_transform(grad, ctx.factors, transpose=not ctx.transpose, dim=ctx.dim)
        return back, None, None, None


@torch.no_grad()
def _apply(x: Tensor, factors: Sequence[Factor], transpose: bool, dim: int, out: Tensor | None = None) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    order = math.prod(factor.shape[0] for factor in factors)
    width = math.prod(x.shape[dim:][1:])
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not x.numel():
        return result
    rows, results = x.reshape(-1, order, width), result.view(-1, order, width)
    parts = [_prepare(factor, transpose, dtype, x.device) for factor in reversed(factors)]
    on_cpu = x.device.type == "cpu"
    # A chunk is several whole rows, or several columns of one row if a row is longer than a chunk.
    count = max(1, _CHUNK // (order * width)) if on_cpu else len(rows)
    columns = min(width, max(16, _CHUNK // order)) if on_cpu else width

    def transform(corner: tuple[int, int]) -> None:
        start, left = corner
        source = rows[start : start + count, :, left : left + columns]
        target = results[start : start + count, :, left : left + columns]
        _apply_chunk(source, target, _steps(parts, source.shape[-1]), dtype)

    each(transform, [(start, left) for start in range(0, len(rows), count) for left in range(0, width, columns)])
    return result


def _apply_chunk(source: Tensor, target: Tensor, steps: list[_Step], dtype: torch.dtype) -> None:
    """Take one chunk through the steps, alternating between two buffers; the last one writes to the target."""
    flat = source.numel()
    buffers = [workspace(slot, (flat,), dtype, source) for slot in range(2)]
    turn = 0
    direct = target.is_contiguous() and target.dtype == dtype
    # A single product cannot write where it reads.
    if source.dtype == dtype and source.is_contiguous() and not (direct and len(steps) == 1):
        current = source.view(-1)
    else:
        buffers[0].view(source.shape).copy_(source)
        current, turn = buffers[0], 1
    for step in steps[:-1] if direct else steps:
        step(current, buffers[turn])
        current, turn = buffers[turn], 1 - turn
    if direct:
        steps[-1](current, target.view(-1))
    else:
        target.copy_(current.view(target.shape))


def _prepare(factor: Factor, transpose: bool, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """The factor itself, or the two halves that it splits into if that is faster."""
    if isinstance(factor, Sylvester):
        return (factor,)
    factor = (factor.T if transpose else factor).to(device=device, dtype=dtype)
    run = (len(factor) - 4) // 2 if len(factor) >= _SPLIT_FROM and device.type == "cpu" else 0
    if not run or not _exchangeable(factor, run):
        return (factor,)
    odd = (factor[:run, :run] - factor[:run, run : 2 * run]) / 2
    even = factor[run:, run:].clone()
    even[:run, :run] = (factor[:run, :run] + factor[:run, run : 2 * run]) / 2
    return odd, even


def _steps(parts: Sequence[tuple[Any, ...]], width: int) -> list[_Step]:
    """The steps for the prepared factors, last factor first. width: elements after the axis."""
    steps: list[_Step] = []  # `width` is multiplied by the orders of the factors already applied
    for part in parts:
        if isinstance(part[0], Sylvester):
            steps.append(_butterflies(part[0].order, width))
        elif len(part) == 1:
            steps.append(_dense_step(part[0], width))
        else:
            steps += _split_steps(part[0], part[1], width)
        width *= sum(len(matrix) for matrix in part)
    return steps


def _multiply(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out[b, j, w] = sum_i x[b, i, w] factor[i, j]; a single matrix product if w has length 1."""
    batch, order, width = x.shape
    if width == 1:
        torch.mm(x.view(batch, order), factor, out=out.view(batch, order))
    else:
        torch.bmm(factor.T.expand(batch, order, order), x, out=out)


def _butterflies(order: int, width: int) -> _Step:
    found = kernels()
    assert found is not None

    def step(source: Tensor, target: Tensor) -> None:
        numbers, result = source.detach().numpy(), target.detach().numpy()
        scale = numbers.dtype.type(order**-0.5)
        if width == 1:
            found.rows(numbers, result, order, scale, *(numbers.dtype.type(0).repeat(order) for _ in range(2)))
        else:
            shape = -1, order, width
            found.columns(numbers.reshape(shape), result.reshape(shape), scale)

    return step


def _dense_step(factor: Tensor, width: int) -> _Step:
    def step(source: Tensor, target: Tensor) -> None:
        shape = -1, len(factor), width
        _multiply(source.view(shape), factor, target.view(shape))

    return step


def _exchangeable(factor: Tensor, run: int) -> bool:
    """Whether exchanging the first two runs of rows and of columns leaves the factor unchanged."""
    first, second, rest = slice(run), slice(run, 2 * run), slice(2 * run, None)
    return (
        torch.equal(factor[first, first], factor[second, second])
        and torch.equal(factor[first, second], factor[second, first])
        and torch.equal(factor[first, rest], factor[second, rest])
        and torch.equal(factor[rest, first], factor[rest, second])
    )


def _split_steps(odd: Tensor, even: Tensor, width: int) -> list[_Step]:
    """Steps for a split factor: differences of the two runs, and sums with the remaining indices, multiply apart."""
    run, order = len(odd), len(odd) + len(even)

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
