"""Hadamard matrices by construction: H H^T = n I with entries +-1, as Kronecker products of known bases.

An order n = 2^k m, m odd, is written as a Sylvester power of two times base orders whose odd parts
multiply to m. The sum of the base orders is made as small as possible, because the transform's cost is
about the sum of its factors: 29568 is 32 x 12 x 28 x 44 / 16, not 32 x 924.

No big table is read: a base comes from the squares of a finite field (Paley I and II, Miyamoto), or from
four short sequences (Williamson, Goethals and Seidel). See `hadamard_bases.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise

import torch
from torch import Tensor

from spinquant.errors import HadamardOrderError
from spinquant.galois import factorize, is_prime_power
from spinquant.hadamard_bases import (
    FOUR_CIRCULANTS,
    four_circulants,
    miyamoto,
    paley_one,
    paley_two,
    sylvester,
)
from spinquant.kronecker import kronecker_transform

__all__ = [
    "Construction",
    "construct",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_transform",
    "kronecker_transform",
]


@dataclass(frozen=True)
class Construction:
    """How a Hadamard matrix is made: the Kronecker product of named bases, in this order."""

    order: int
    factors: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return " x ".join(f"{name} {order}" for name, order in self.factors)


def construct(order: int) -> Construction:
    """Return the construction of this order without building it; raises HadamardOrderError with the remedies."""
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
        # Behind small bases the power of two can be split to suit them; before large ones (11008: 64 x 172)
        # it takes 8 % less time.
        behind = max(bases, default=1) <= 64
        factors.insert(len(factors) if behind else 0, ("Sylvester", rest))
    return Construction(order, tuple(factors))


def _shared_out(bases: list[tuple[str, int]], power_of_two: int) -> tuple[tuple[str, int], ...]:
    """Give a small power of two to the smallest bases: 24 x 24 takes 0.75 of the time of 12 x 48."""
    shares = [1] * len(bases)
    for _ in range(power_of_two.bit_length() - 1):
        smallest = min(range(len(bases)), key=lambda i: bases[i][1] * shares[i])
        shares[smallest] *= 2
    pairs = zip(bases, shares, strict=True)
    return tuple(factor for base, share in pairs for factor in (base, ("Sylvester", share)) if factor[1] > 1)


def hadamard_matrix(order: int) -> Tensor:
    """Return the int8 matrix (order, order) on the CPU; the same at every call."""
    # Callers build models under `torch.device("meta")` or inference mode; a matrix must not inherit either.
    with torch.device("cpu"), torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.int8)
        for name, base in construct(order).factors:
            matrix = torch.kron(matrix, _BUILDERS[name](base))
    return matrix


@lru_cache(maxsize=64)
def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Return orthonormal float64 factors whose Kronecker product is H / sqrt(order); shared, do not modify."""
    if order <= 64:  # one product is faster than two narrow ones
        with torch.inference_mode(False):
            return (hadamard_matrix(order).double() / math.sqrt(order),)
    with torch.device("cpu"), torch.inference_mode(False):
        # Sylvester matrices are themselves products of the matrix of order 2, so they may be cut anywhere.
        atoms = [
            _BUILDERS[name](part).double() / math.sqrt(part)
            for name, base in construct(order).factors
            for part in ([2] * (base.bit_length() - 1) if name == "Sylvester" else [base])
        ]
        groups = _groups(tuple(len(atom) for atom in atoms))
        cuts = [sum(groups[:i]) for i in range(len(groups) + 1)]
        return tuple(reduce(torch.kron, atoms[i:j]) for i, j in pairwise(cuts))


@lru_cache(maxsize=64)
def _factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(factor.to(device, dtype) for factor in hadamard_factors(order))


def hadamard_transform(
    x: Tensor, order: int, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """Return x H / sqrt(order) along an axis, or x H^T / sqrt(order); see `kronecker_transform`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return kronecker_transform(x, _factors(order, dtype, x.device), transpose=transpose, dim=dim, out=out)


@lru_cache(maxsize=1024)
def _groups(orders: tuple[int, ...], width: int = 1) -> tuple[int, ...]:
    """Return how many neighbouring atoms make up each factor, for the least cost; `width` stands behind them."""
    if not orders:
        return ()
    options = [
        (*_groups(orders[:-count], width * math.prod(orders[-count:])), count) for count in range(1, len(orders) + 1)
    ]
    return min(options, key=lambda groups: _cost(orders, groups, width))


def _cost(orders: tuple[int, ...], groups: tuple[int, ...], width: int) -> float:
    """Return the time per element, fitted to one core (ns of float32: order 16 0.8, 32 1.2, 64 1.9, 128 3.3).

    Narrow products are badly served: a factor below 8 costs more, one below 16 too unless 32 columns or more stand
    behind it, and much more as the last factor of all.
    """
    total, end = 0.0, len(orders)
    for count in reversed(groups):
        order = math.prod(orders[end - count : end])
        narrow = 0.0 if order >= 16 or width >= 32 else (2.0 if width == 1 else 0.8)
        tiny = 0.4 if order < 8 else 0.0
        total += 0.45 + 0.022 * order + narrow + tiny
        width, end = width * order, end - count
    return total


def _base_name(order: int) -> str | None:
    """Return the construction that gives this order without a Kronecker product."""
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
    """Return ascending base orders with this product of odd parts, at most 2^power in all, of least sum."""
    if odd == 1:
        return ()
    best = None
    for part in _divisors(odd):
        for bits in range(2, power + 1):
            base = part << bits
            # Ascending order: `part` may be any divisor, since the rest is solved in the same way.
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
