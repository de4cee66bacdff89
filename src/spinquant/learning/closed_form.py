"""The best invertible transform of a space, in closed form, from two second moments per quantizer.

A quantizer that reads rows x may read x T instead, if what reads them gets T^-1 W. Errors of rounding have no preferred
direction in the coordinates in which they are made, and their length is proportional to that of the row. With g the
gradient of log p(y) at x, y drawn from the model's own predictions, their expected cost (`sensitivity.py`) is
proportional to

    sum over rows of |x T|^2 |g T^-T|^2  ~  tr(T^T X T) tr(T^-1 G T^-T)      X = sum |g|^2 x^T x,  G = sum |x|^2 g^T g

It depends on T through P = T T^T alone, so any orthogonal matrix may follow, and is least where P X P = G:

    P = X^-1/2 (X^1/2 G X^1/2)^1/2 X^-1/2

T is block-diagonal, and only the blocks of X and G count: one block is a full matrix, blocks of one number are a
diagonal (s_j^4 = G_jj / X_jj), equal blocks have the sums of their moments. A transform that serves several quantizers
has a sum of such costs. At its minimum P X P = G still holds, for the sums of all X and all G, each weighted by the
other factor of its cost, which takes a few iterations.

Rounding the weight W of a linear that reads x T has a cost of the same form: the error of a row w is proportional to
|w T^-T| (`rounded_weights.py`). Moments are estimates from few tokens, so they are regularized (`Damping`), by as much
as is best on held-out samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from spinquant.compute.threads import each, single_threaded

ITERATIONS = 6
FROM_SIMILAR = 2  # iterations from the transform for slightly different damping
TOGETHER = 8  # spaces that are computed together


@dataclass(frozen=True)
class Moments:
    """Second moments of the rows of a quantizer, and of their gradients.

    Attributes:
        x: X, float64 (.., terms, blocks, n, n); dimensions before `terms` are spaces, each with a T. A term is what is
            rounded with one scale: its cost is a product, and costs of terms are added. `blocks` are those of T within
            a term. The heads of a KV cache are terms of one block each, the heads at the input of o_proj blocks of one
            term.
        g: G, shaped like `x`.
        length: Numbers in a row of a term.
        noise: Expected square of the relative error of a rounded row. Default: 1.
    """

    x: Tensor
    g: Tensor
    length: int
    noise: float = 1.0

    def __add__(self, other: "Moments") -> "Moments":
        return replace(self, x=self.x + other.x, g=self.g + other.g)

    def costs(self, p: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors of the cost of every term, (terms,); p is T T^T and `inverse` its inverse, (blocks, n, n)."""
        shape, last = self.x.shape, (-3, -2, -1)
        energy = (self.x * p.reshape(shape)).sum(last) / _trace(self.x)
        return energy, (self.g * inverse.reshape(shape)).sum(last) * (self.noise / self.length)


def second_moments(x: Tensor, g: Tensor, length: int, noise: float = 1.0) -> Moments:
    """The moments of rows and gradients, both (rows, terms, blocks, copies, n).

    copies: parts of a row that share a block of T, such as the query heads that share a KV head, or both numbers of a
    rotary pair.

    They are computed in the dtype of the rows, as batched matrix products.
    """
    energy, slope = (t.square().sum((2, 3, 4)) for t in (x, g))  # (rows, terms)
    return Moments(wide(weighted_sum(x, slope)), wide(weighted_sum(g, energy)), length, noise)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Sum of w x^T x, (terms, blocks, n, n), over rows and copies of x; weights are (rows, terms)."""
    if x.shape[-1] == 1:
        squares = x.squeeze(-1).square().sum(-1)  # (rows, terms, blocks)
        return torch.einsum("ts,tsb->sb", weights, squares)[..., None, None]
    rows, terms, blocks, copies, n = x.shape
    scaled = (x * weights.sqrt()[:, :, None, None, None]).permute(1, 2, 0, 3, 4).reshape(-1, rows * copies, n)
    return (scaled.mT @ scaled).view(terms, blocks, n, n)


def wide(t: Tensor) -> Tensor:
    """The tensor in float64, on its device if that has it."""
    return t.cpu().double() if t.device.type == "mps" else t.double()


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum((-1, -2))


@dataclass(frozen=True)
class Damping:
    """How moments are regularized.

    Attributes:
        mean: This multiple of the mean of its diagonal is added to the diagonal of every moment.
        diagonal: Fraction in [0, 1] by which numbers off the diagonal are reduced.
    """

    mean: float
    diagonal: float = 0.0

    def of(self, moments: Moments) -> Moments:
        """The moments, regularized. The condition number of T is then at most (terms * blocks * n / mean + 1)^1/2."""
        return replace(moments, x=self._applied(moments.x), g=self._applied(moments.g))

    def _applied(self, moment: Tensor) -> Tensor:
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean((-1, -2), keepdim=True)
        return (1 - self.diagonal) * moment + torch.diag_embed(self.diagonal * diagonal + self.mean * mean)


# In order of distance from the identity: of two that are equally good, the first is chosen.
DIAGONAL = tuple(Damping(mean) for mean in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01))
MATRIX = tuple(
    Damping(mean, diagonal) for mean, diagonal in product((1.0, 0.1, 0.03, 0.01, 0.003), (1.0, 0.3, 0.1, 0.0))
)


def expected_cost(moments: Sequence[Moments], p: Tensor) -> float:
    """Expected cost of rounding after a transform T, summed over quantizers; p: its P = T T^T, (blocks, n, n)."""
    return float(_cost(moments, p))


def _cost(moments: Sequence[Moments], p: Tensor) -> Tensor:
    """Expected cost for every space."""
    inverse = _inverse(p)
    return torch.stack([energy.mul(slope).sum(-1) for m in moments for energy, slope in [m.costs(p, inverse)]]).sum(0)


def best_transform(moments: Sequence[Moments], start: Tensor | None = None) -> Tensor:
    """P = T T^T of the transform T with the lowest expected cost, float64 (.., blocks, n, n), with determinant one.

    Args:
        moments: Of the quantizers that read what T transforms, positive definite.
        start: P for similar moments, from which a few iterations are enough. Default: none.
    """
    p = _identity(moments) if start is None else start
    for _ in range(1 if len(moments) == 1 else ITERATIONS if start is None else FROM_SIMILAR):
        inverse = _inverse(p)
        x, g = torch.zeros_like(p), torch.zeros_like(p)
        for m in moments:
            energy, slope = (factor[..., None, None, None] for factor in m.costs(p, inverse))
            x += (slope / _trace(m.x)[..., None, None, None] * m.x).reshape(p.shape)
            g += (energy * (m.noise / m.length) * m.g).reshape(p.shape)
        p = _solution(x, g)
        p = p / _log_determinant(p).mean(-1).div(p.shape[-1]).exp()[..., None, None, None]
    return p


def _identity(moments: Sequence[Moments]) -> Tensor:
    """P of no transform, (.., blocks, n, n)."""
    *spaces, terms, blocks, n, _ = moments[0].x.shape
    return torch.eye(n, dtype=moments[0].x.dtype).expand(*spaces, terms * blocks, n, n)


def symmetric_root(p: Tensor) -> Tensor:
    """T = P^1/2, symmetric positive definite, (.., n, n)."""
    return _power(p, 0.5)


def choose_damping(folds: Sequence[Sequence[Moments]], candidates: Sequence[Damping]) -> tuple[Damping | None, float]:
    """Choose how moments are regularized, by cross-validation.

    Args:
        folds: Moments of the same quantizers from disjoint samples, at least two.
        candidates: What is tried.

    Returns:
        The best candidate, or None if none is better than no transform, and its expected cost on held-out moments as a
        fraction of that without a transform.
    """
    return _choose(_stacked([folds]), candidates)[0]


def _choose(folds: Sequence[Sequence[Moments]], candidates: Sequence[Damping]) -> list[tuple[Damping | None, float]]:
    """`choose_damping` for every space of stacked moments."""
    ratios = torch.ones(len(candidates), len(folds[0][0].x), dtype=torch.float64)
    for number, held_out in enumerate(folds):
        others = [_sum(parts) for parts in zip(*(f for other, f in enumerate(folds) if other != number), strict=True)]
        none, p = _cost(held_out, _identity(held_out)), None
        for i, damping in enumerate(candidates):
            p = best_transform([damping.of(one) for one in others], p)
            ratios[i] *= _cost(held_out, p) / none
    found = []
    for column in ratios.pow(1 / len(folds)).T.tolist():
        best: tuple[Damping | None, float] = (None, 1.0)
        for damping, ratio in zip(candidates, column, strict=True):
            best = (damping, ratio) if ratio < best[1] else best
        found.append(best)
    return found


def chosen_transforms(
    spaces: Sequence[Sequence[Sequence[Moments]]], candidates: Sequence[Damping]
) -> list[tuple[Tensor | None, Damping | None, float]]:
    """For every space, the best transform P = T T^T from the moments of all folds, and what `choose_damping` found.

    Args:
        spaces: For each space its folds: moments of the same quantizers from disjoint samples, at least two.
        candidates: What is tried.

    Returns:
        P, its damping and its expected cost on held-out moments, for each space; None for both where no transform is
        better. Spaces of equal shapes are computed together, some at a time.
    """
    alike: dict[Any, list[int]] = {}
    for number, folds in enumerate(spaces):
        key = tuple((*m.x.shape, m.length, m.noise) for m in folds[0])
        alike.setdefault(key, []).append(number)
    found: dict[int, tuple[Tensor | None, Damping | None, float]] = {}

    def solve(numbers: Sequence[int]) -> None:
        chosen = _choose(_stacked([spaces[number] for number in numbers]), candidates)
        for number, (damping, ratio) in zip(numbers, chosen, strict=True):
            p = None
            if damping is not None:
                p = best_transform([damping.of(_sum(parts)) for parts in zip(*spaces[number], strict=True)])
            found[number] = p, damping, ratio

    with single_threaded():  # decompositions of small matrices do not use several threads
        each(solve, [same[i : i + TOGETHER] for same in alike.values() for i in range(0, len(same), TOGETHER)])
    return [found[number] for number in range(len(spaces))]


def _stacked(spaces: Sequence[Sequence[Sequence[Moments]]]) -> list[list[Moments]]:
    """Moments of spaces, all with the same shapes, as one for every fold and quantizer."""

    def stack(parts: Sequence[Moments]) -> Moments:
        return replace(parts[0], x=torch.stack([m.x for m in parts]), g=torch.stack([m.g for m in parts]))

    return [[stack(parts) for parts in zip(*fold, strict=True)] for fold in zip(*spaces, strict=True)]


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _solution(x: Tensor, g: Tensor) -> Tensor:
    """The positive definite solution of P X P = G, (.., n, n): with X = L L^T it is L^-T (L^T G L)^1/2 L^-1."""
    if x.shape[-1] == 1:
        return (g / x).sqrt()
    lower = torch.linalg.cholesky(x)
    root = _power(lower.mT @ g @ lower, 0.5)
    half = torch.linalg.solve_triangular(lower.mT, root, upper=True)
    p = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return (p + p.mT) / 2


def _inverse(p: Tensor) -> Tensor:
    if p.shape[-1] == 1:
        return p.reciprocal()
    return torch.linalg.inv(p)


def _log_determinant(p: Tensor) -> Tensor:
    """Of positive definite matrices, (.., n, n); returns (..)."""
    return p.squeeze((-1, -2)).log() if p.shape[-1] == 1 else torch.linalg.slogdet(p).logabsdet


def _power(p: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(p)
    return (vectors * values.clamp(min=0).pow(exponent).unsqueeze(-2)) @ vectors.mT
