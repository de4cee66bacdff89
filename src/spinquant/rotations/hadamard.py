"""Hadamard matrices by construction (H H^T = n I, entries +-1), as Kronecker products, and the fast transform by them.

An order n = 2^k m, m odd, is written as a Sylvester matrix (power of two) times base orders whose odd parts multiply
to m. The sum of the base orders is made as small as possible, because the transform's cost is about the sum of its
factors: 29568 is 32 x 12 x 28 x 44 / 16, not 32 x 924.

No large tables of matrices are stored: a base is constructed from the squares of a finite field (Paley I and II,
Miyamoto), or from four short sequences (Williamson, Goethals and Seidel). See `hadamard_constructions.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce, wraps
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinquant.errors import HadamardOrderError
from spinquant.rotations.fast_transform import (
    Factor,
    Sylvester,
    called_while_tracing,
    kronecker_transform,
    outside_modes,
    takes_kernels,
)
from spinquant.rotations.finite_fields import factorize, is_prime_power
from spinquant.rotations.hadamard_constructions import (
    FOUR_CIRCULANTS,
    four_circulants,
    miyamoto,
    paley_one,
    paley_two,
    sylvester,
)

_REMEMBERED = 64  # number of cached factorizations
# Order from which butterflies are used: numba and its compiler take 105 MB, more than small models do.
KERNELS_FROM = 2048

__all__ = [
    "Construction",
    "construct",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_transform",
    "kronecker_transform",
]


_Made = TypeVar("_Made", bound=Callable[..., tuple[Any, ...]])


def _remembered(make: _Made) -> _Made:
    """Cache a function's results, except for those made under a torch mode such as FakeTensorMode."""
    known: dict[Any, tuple[Any, ...]] = {}

    @wraps(make)
    def found(*arguments: Any) -> tuple[Any, ...]:
        made = known.get(arguments)
        if made is None:
            made = make(*arguments)
            if all(type(factor) in (Tensor, Sylvester) for factor in made):
                if len(known) >= _REMEMBERED:
                    known.clear()
                known[arguments] = made
        return made

    found.cache_clear = known.clear  # pyright: ignore[reportAttributeAccessIssue]
    return found  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Construction:
    """How a Hadamard matrix is constructed: a Kronecker product of (construction, order) factors, in this order."""

    order: int
    factors: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return " x ".join(f"{name} {order}" for name, order in self.factors)


def construct(order: int) -> Construction:
    """The construction of a Hadamard matrix of this order, without building it.

    Raises:
        HadamardOrderError: no such matrix exists or can be constructed here; the message lists the alternatives.
    """
    if order < 1 or (order > 2 and order % 4):
        raise _impossible(order, "no Hadamard matrix of this order exists: it must be 1, 2 or a multiple of 4")
    power = (order & -order).bit_length() - 1
    bases = _bases(order >> power, power)
    if bases is None:
        raise _impossible(order, "none of the constructions known here reaches this order")
    rest = order // math.prod(bases)
    factors = [(_base_name(base) or "", base) for base in bases]
    if len(bases) > 1 and 1 < rest < 16:
        return Construction(order, _shared_out(factors, rest))
    if rest > 1 or not bases:
        # After small bases the power of two can be split to suit them; before large ones (11008: 64 x 172) it takes
        # 8 % less time.
        behind = max(bases, default=1) <= 64
        factors.insert(len(factors) if behind else 0, ("Sylvester", rest))
    return Construction(order, tuple(factors))


def _shared_out(bases: list[tuple[str, int]], power_of_two: int) -> tuple[tuple[str, int], ...]:
    """Distribute a small power of two over the smallest bases: 24 x 24 takes 0.75 of the time of 12 x 48."""
    shares = [1] * len(bases)
    for _ in range(power_of_two.bit_length() - 1):
        smallest = min(range(len(bases)), key=lambda i: bases[i][1] * shares[i])
        shares[smallest] *= 2
    pairs = zip(bases, shares, strict=True)
    return tuple(factor for base, share in pairs for factor in (base, ("Sylvester", share)) if factor[1] > 1)


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix H of the given order: entries +-1, H H^T = order I.

    The construction is deterministic (Sylvester 1867; Paley 1933; Williamson 1944; Goethals and Seidel 1967; Turyn
    1974; Miyamoto 1991), so every call gives the same matrix.

    Args:
        order: 1, 2, or a multiple of 4.

    Returns:
        int8 tensor on the CPU, shape (order, order).

    Raises:
        HadamardOrderError: no matrix of this order exists, or none can be constructed here; the message lists the
            alternatives.

    Example:
        >>> from spinquant import hadamard_matrix
        >>> hadamard_matrix(4)
        tensor([[ 1,  1,  1,  1],
                [ 1, -1,  1, -1],
                [ 1,  1, -1, -1],
                [ 1, -1, -1,  1]], dtype=torch.int8)
        >>> h = hadamard_matrix(172).int()
        >>> bool((h @ h.T == 172 * h.new_ones(172).diag()).all())
        True
    """
    # Callers may build models under `torch.device("meta")` or inference mode; the matrix must inherit neither.
    with torch.device("cpu"), torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.int8)
        for name, base in construct(order).factors:
            matrix = torch.kron(matrix, _BUILDERS[name](base))
    return matrix


@_remembered
def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Orthonormal float64 matrices whose Kronecker product is H / sqrt(order). Cached and shared: do not modify."""
    return tuple(factor for factor in _pieces(order) if isinstance(factor, Tensor))


def _pieces(order: int, behind: int = 0) -> list[Factor]:
    """The float64 factors of least cost. behind: approximate elements after the axis; 0 rules out butterflies."""
    with torch.device("cpu"), torch.inference_mode(False):
        if order <= 64:  # one matrix product is faster than two narrow ones
            return [hadamard_matrix(order).double() / math.sqrt(order)]
        atoms = _atoms(order)
        orders, pieces, width = tuple(part for _, part in atoms), [], behind or 1
        cuts = pairwise(accumulate(_groups(orders, width, behind > 0), initial=0))
        for i, j in reversed(list(cuts)):
            size = math.prod(orders[i:j])
            butterflies = behind > 0 and _butterflies_cost(size, width) < _product_cost(size, width)
            pieces.append(Sylvester(size) if butterflies else reduce(torch.kron, map(_dense, atoms[i:j])))
            width *= size
        return pieces[::-1]


def _atoms(order: int) -> list[tuple[str, int]]:
    """(name, order) of the smallest factors: a Sylvester matrix is split into matrices of order 2."""
    return [
        (name, part)
        for name, base in construct(order).factors
        for part in ([2] * (base.bit_length() - 1) if name == "Sylvester" else [base])
    ]


def _dense(atom: tuple[str, int]) -> Tensor:
    name, order = atom
    return _BUILDERS[name](order).double() / math.sqrt(order)


@_remembered
def _factors(order: int, dtype: torch.dtype, device: torch.device, behind: int) -> tuple[Factor, ...]:
    """Factors in the dtype and on the device where they are applied; `behind` as in `_pieces`."""
    with torch.inference_mode(False):
        pieces = _pieces(order, behind)
        return tuple(piece.to(device, dtype) if isinstance(piece, Tensor) else piece for piece in pieces)


def hadamard_transform(
    x: Tensor, order: int, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """Orthonormal Hadamard transform along an axis: x H / sqrt(order), by a fast transform.

    Differentiable. Half-precision inputs are computed in float32. An axis longer than the order is transformed block
    by block.

    Args:
        x: floating-point tensor; the length of axis `dim` is a multiple of the order.
        order: order of the Hadamard matrix, see `hadamard_matrix`.
        transpose: multiply by H^T / sqrt(order), the inverse, instead.
        dim: the axis.
        out: contiguous tensor of x's shape and dtype for the result; may be x itself. Without gradients only.

    Returns:
        A tensor of x's shape, dtype and device.

    Raises:
        HadamardOrderError: no Hadamard matrix of the order can be constructed.
        RotationError: the order does not divide the axis, x is not floating point, or `out` does not fit.

    Example:
        >>> import torch
        >>> from spinquant import hadamard_transform
        >>> x = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
        >>> hadamard_transform(x, 4)  # the outlier is spread over all channels
        tensor([[2., 2., 2., 2.]])
        >>> hadamard_transform(hadamard_transform(x, 4), 4, transpose=True)
        tensor([[4., 0., 0., 0.]])
    """
    return kronecker_transform(x, factors_for(x, order, dim), transpose=transpose, dim=dim, out=out)


def factors_for(x: Tensor, order: int, dim: int = -1) -> tuple[Factor, ...]:
    """The factors by which `hadamard_transform` transforms x. Cached and shared: do not modify."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if order >= KERNELS_FROM and takes_kernels(x):
        return _factors(order, dtype, x.device, 64 if math.prod(x.shape[dim:][1:]) >= 32 else 1)
    return dense_factors(order, x.device, dtype)


def dense_factors(order: int, device: torch.device, dtype: torch.dtype) -> tuple[Factor, ...]:
    """The factors without butterflies. Cached and shared: do not modify."""
    if torch.compiler.is_compiling():
        _make_factors(order, device, dtype)
    return _factors(order, dtype, device, 0)


@called_while_tracing
def _make_factors(order: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Have the factors cached, so that they are not computed in the traced graph."""
    outside_modes(lambda: _factors(order, dtype, device, 0))
    return True


@lru_cache(maxsize=1024)
def _groups(orders: tuple[int, ...], width: int = 1, fast: bool = False) -> tuple[int, ...]:
    """How many neighbouring atoms to merge into each factor for the least cost. width: elements after the axis."""
    if not orders:
        return ()
    options = [
        (*_groups(orders[:-count], width * math.prod(orders[-count:]), fast), count)
        for count in range(1, len(orders) + 1)
    ]
    return min(options, key=lambda groups: _cost(orders, groups, width, fast))


def _butterflies_cost(order: int, width: int) -> float:
    """Estimated time of butterflies: ns per float32 on one core; infinite if the order is no power of two.

    width: elements after the axis. Fitted to these measurements. Width 1: order 4096 0.5, 512 0.55, 128 0.9, 64 1.3,
    16 3.2. Width 64: 4096 1.0, 512 0.75, 64 0.6, 16 0.4. Width 16: 2.5, 2.1, 1.4, 1.2.
    """
    if order < 2 or order & (order - 1):
        return math.inf
    if width == 1:
        return 0.45 + 50 / order
    return 0.25 + (0.02 + 1.3 / width) * math.log2(order) + 10 / width


def _product_cost(order: int, width: int) -> float:
    """Estimated time of a matrix product: ns per float32 on one core, fitted to order 16 0.8, 32 1.2, 64 1.9, 128 3.3.

    Narrow products are slow: a factor below 8 costs more; one below 16 does too unless at least 32 elements follow the
    axis, and much more as the last factor of all.
    """
    narrow = 0.0 if order >= 16 or width >= 32 else (2.0 if width == 1 else 0.8)
    tiny = 0.4 if order < 8 else 0.0
    return 0.45 + 0.022 * order + narrow + tiny


def _cost(orders: tuple[int, ...], groups: tuple[int, ...], width: int, fast: bool) -> float:
    """Estimated time per element of all factors. fast: butterflies are used where they are faster."""
    total, end = 0.0, len(orders)
    for count in reversed(groups):
        order = math.prod(orders[end - count : end])
        product = _product_cost(order, width)
        total += min(product, _butterflies_cost(order, width)) if fast else product
        width, end = width * order, end - count
    return total


def _base_name(order: int) -> str | None:
    """The construction that gives this order without a Kronecker product; None if there is none."""
    if order % 4 or order < 12:
        return None
    if is_prime_power(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return "Paley II"
    if is_prime_power(order - 1):
        return "Paley I"
    if order // 4 in FOUR_CIRCULANTS:
        return "four circulants"
    q = order // 4
    if q % 4 == 1 and is_prime_power(q) and _bases_of(q - 1) is not None:
        return "Miyamoto"
    return None


def _miyamoto(order: int) -> Tensor:
    return miyamoto(order, hadamard_matrix(order // 4 - 1))


_BUILDERS: dict[str, Callable[[int], Tensor]] = {
    "Sylvester": sylvester,
    "Paley I": paley_one,
    "Paley II": paley_two,
    "four circulants": four_circulants,
    "Miyamoto": _miyamoto,
}


def _bases_of(order: int) -> tuple[int, ...] | None:
    power = (order & -order).bit_length() - 1
    return _bases(order >> power, power)


@lru_cache(maxsize=4096)
def _bases(odd: int, power: int) -> tuple[int, ...] | None:
    """Base orders, ascending, of least sum: odd parts multiply to `odd`, powers of two to at most 2^power."""
    if odd == 1:
        return ()
    best = None
    for part in _divisors(odd):
        for bits in range(2, power + 1):
            base = part << bits
            # `part` may be any divisor, since the rest is solved in the same way.
            if _base_name(base) is None:
                continue
            rest = _bases(odd // part, power - bits)
            if rest is not None and (best is None or base + sum(rest) < sum(best)):
                best = tuple(sorted((base, *rest)))
    return best


def _divisors(odd: int) -> list[int]:
    divisors = [1]
    for prime, exponent in factorize(odd).items():
        divisors = [d * prime**e for d in divisors for e in range(exponent + 1)]
    return sorted(divisors)[1:]


def _impossible(order: int, reason: str) -> HadamardOrderError:
    remedies = ["`random-matrix` (any order)"]
    if order > 0 and (power := order & -order) > 1:
        remedies.insert(0, f"a `block_size` that divides it, for instance {power}, its largest power of two")
        remedies.append(f"`auto` (an orthogonal factor of order {order // power} times a Hadamard factor of {power})")
    return HadamardOrderError(f"Hadamard order {order}: {reason}. Use instead: " + "; or ".join(remedies) + ".")
