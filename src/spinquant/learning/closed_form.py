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
|w T^-T|, and meets x T. It adds a multiple of W^T diag(h) W to G, h = sum over tokens of |x|^2 times the squared
gradients at the linear's outputs. Moments are estimates from few tokens, so they are regularized (`Damping`), by as
much as is best on held-out samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

ITERATIONS = 6


@dataclass(frozen=True)
class Moments:
    """Second moments of the rows of a quantizer, and of their gradients.

    Attributes:
        x: X, float64 (terms, blocks, n, n). A term is what is rounded with one scale: its cost is a product, and costs
            of terms are added. `blocks` are those of T within a term. The heads of a KV cache are terms of one block
            each, the heads at the input of o_proj blocks of one term.
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
        shape = self.x.shape
        energy = (self.x * p.view(shape)).sum((1, 2, 3)) / _trace(self.x)
        return energy, (self.g * inverse.view(shape)).sum((1, 2, 3)) * (self.noise / self.length)


def second_moments(x: Tensor, g: Tensor, length: int, noise: float = 1.0) -> Moments:
    """The moments of rows and gradients, both (rows, terms, blocks, copies, n).

    copies: parts of a row that share a block of T, such as the query heads that share a KV head, or both numbers of a
    rotary pair.
    """
    energy, slope = (t.square().sum((2, 3, 4)) for t in (x, g))  # (rows, terms)
    weighted = "ts,tsbci,tsbcj->sbij"
    return Moments(
        torch.einsum(weighted, slope, x, x).double(), torch.einsum(weighted, energy, g, g).double(), length, noise
    )


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
    inverse = torch.linalg.inv(p)
    return sum(float((energy * slope).sum()) for m in moments for energy, slope in [m.costs(p, inverse)])


def best_transform(moments: Sequence[Moments]) -> Tensor:
    """P = T T^T of the transform T with the lowest expected cost, float64 (blocks, n, n), with determinant one.

    Args:
        moments: Of the quantizers that read what T transforms, positive definite.
    """
    first = moments[0].x
    p = torch.eye(first.shape[-1], dtype=first.dtype).expand(first.shape[0] * first.shape[1], -1, -1)
    for _ in range(1 if len(moments) == 1 else ITERATIONS):
        inverse = torch.linalg.inv(p)
        x, g = torch.zeros_like(p), torch.zeros_like(p)
        for m in moments:
            energy, slope = (factor[:, None, None, None] for factor in m.costs(p, inverse))
            x += (slope / _trace(m.x)[:, None, None, None] * m.x).flatten(0, 1)
            g += (energy * (m.noise / m.length) * m.g).flatten(0, 1)
        p = _solution(x, g)
        p = p / torch.linalg.slogdet(p).logabsdet.mean().div(p.shape[-1]).exp()
    return p


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
    best: tuple[Damping | None, float] = (None, 1.0)
    for damping in candidates:
        ratio = 1.0
        for number, held_out in enumerate(folds):
            others = [fold for other, fold in enumerate(folds) if other != number]
            known = [damping.of(_sum(parts)) for parts in zip(*others, strict=True)]
            p = best_transform(known)
            none = torch.eye(p.shape[-1], dtype=p.dtype).expand_as(p)
            ratio *= expected_cost(held_out, p) / expected_cost(held_out, none)
        ratio **= 1 / len(folds)
        if ratio < best[1]:
            best = damping, ratio
    return best


def chosen_transform(
    folds: Sequence[Sequence[Moments]], candidates: Sequence[Damping]
) -> tuple[Tensor | None, Damping | None, float]:
    """The best transform P = T T^T from the moments of all folds, with what `choose_damping` found; None for none."""
    damping, ratio = choose_damping(folds, candidates)
    if damping is None:
        return None, None, ratio
    return best_transform([damping.of(_sum(parts)) for parts in zip(*folds, strict=True)]), damping, ratio


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _solution(x: Tensor, g: Tensor) -> Tensor:
    """The positive definite solution of P X P = G, (.., n, n)."""
    if x.shape[-1] == 1:
        return (g / x).sqrt()
    values, vectors = torch.linalg.eigh(x)
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    p = inverse @ _power(root @ g @ root, 0.5) @ inverse
    return (p + p.mT) / 2


def _power(p: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(p)
    return (vectors * values.clamp(min=0).pow(exponent).unsqueeze(-2)) @ vectors.mT
