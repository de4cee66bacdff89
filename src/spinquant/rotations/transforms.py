"""Products of transforms, and what holds for every transform: how it acts on heads, and how well it is conditioned.

    Composed          x (A B) = (x A) B, for instance channel scales, then a Hadamard matrix

The transforms that are multiplied are rotations (`rotation.py`) and matrices (`matrices.py`). One with several heads
treats equal blocks differently, so that an axis must not be cut between blocks and transformed in pieces
(`positional`).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.matrices import (
    Diagonal,
    KroneckerMatrix,
    Matrix,
    checked_axis,
    description_of,
    kept_dual,
)
from spinquant.rotations.rotation import (
    Hadamard,
    Kronecker,
    Orthogonal,
    Transform,
    dual,
    heads_of,
    is_orthogonal,
    matrix,
)

# Largest condition number. Float32 logits of a tiny Llama whose R3 and R4 have this one move by 5e-5 (relative; as much
# as 1e-3 of single logits), those of ten times as much by 3e-4; a proof in float32 allows 1e-4.
LARGEST_CONDITION = 1e3
# Largest ratio of the scales of a diagonal transform. It mixes no numbers, so each keeps its relative error; what is
# multiplied and divided by them has to stay within the range of float16.
LARGEST_RATIO = 1e6
# Order up to which a product with a dense matrix is multiplied out: one product of that order replaces two.
_DENSE = 1024
# Order up to which the condition number of a product is computed; it is bounded above that.
_DECOMPOSED = 2048
# Classes of immutable values.
_FIXED = (Diagonal, Hadamard, Kronecker, KroneckerMatrix, Matrix, Orthogonal)

__all__ = [
    "LARGEST_CONDITION",
    "LARGEST_RATIO",
    "Composed",
    "Diagonal",
    "KroneckerMatrix",
    "Matrix",
    "apply_to_heads",
    "check_conditioned",
    "compose",
    "condition",
    "positional",
]


@dataclass(frozen=True, eq=False)
class Composed:
    """Product of two transforms: x becomes (x first) second.

    Attributes:
        first: A.
        second: B. The order of one of them is a multiple of the other's.

    Raises:
        RotationError: the orders or numbers of heads do not fit.

    Example:
        >>> import torch
        >>> from spinquant import Composed, Diagonal, Hadamard
        >>> transform = Composed(Diagonal(torch.tensor([1.0, 3.0])), Hadamard(2))
        >>> x = torch.tensor([1.0, 2.0])
        >>> torch.allclose(transform.apply(x), torch.tensor([7.0, -5.0]) / 2**0.5)
        True
    """

    first: Transform
    second: Transform
    _dual: list["Composed"] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        orders, heads = (self.first.order, self.second.order), (heads_of(self.first), heads_of(self.second))
        for what, (one, other) in {"orders": orders, "numbers of heads": heads}.items():
            if max(one, other) % min(one, other):
                raise RotationError(
                    f"two transforms with the {what} {one} and {other} have no product: expected one that divides the "
                    "other"
                )

    @property
    def order(self) -> int:
        """The larger order of the two."""
        return max(self.first.order, self.second.order)

    @property
    def heads(self) -> int:
        """The larger number of heads of the two."""
        return max(heads_of(self.first), heads_of(self.second))

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """(x A) B along an axis, or (x B^T) A^T, block by block; see `Transform.apply`."""
        dim = checked_axis(self, x, dim, out)
        one, other = (self.second, self.first) if transpose else (self.first, self.second)
        wide = torch.promote_types(x.dtype, torch.float32)
        if wide != x.dtype:  # rounded once
            y = other.apply(one.apply(x.to(wide), transpose=transpose, dim=dim), transpose=transpose, dim=dim)
            return y.to(x.dtype) if out is None else out.copy_(y)
        y = one.apply(x, transpose=transpose, dim=dim, out=out)
        return other.apply(y, transpose=transpose, dim=dim, out=out)

    def dual(self) -> "Composed":
        """The product of the duals; itself, if both are rotations."""
        if is_orthogonal(self.first) and is_orthogonal(self.second):
            return self
        return kept_dual(self, lambda: Composed(dual(self.first), dual(self.second)))

    def chain(self) -> tuple[Transform, ...]:
        """The transforms that it is a product of, none of which is a product itself."""
        return _chain(self.first) + _chain(self.second)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its chain, by number and name."""
        return {f"{i}_{name}": t for i, part in enumerate(self.chain()) for name, t in part.tensors().items()}

    def describe(self) -> dict[str, Any]:
        """Kind, order and the descriptions of its chain, as JSON."""
        described = [part.describe() for part in self.chain()]
        construction = ", then ".join(str(one.get("construction", one["kind"])) for one in described)
        return description_of("composed", self.order, construction, parts=described)


def compose(first: Transform, second: Transform) -> Transform:
    """x -> (x first) second, as one value that takes the least time to apply.

    Two diagonals are one diagonal. Where one of them is dense, of the same order and not large, the product is dense,
    unless it has a transform of another class, which may be one that changes as it is learned.
    """
    if isinstance(first, Diagonal) and isinstance(second, Diagonal) and first.order == second.order:
        one, other = _repeated(first.scale, second.scale, 2)
        return Diagonal(one * other)
    # Scales beside a matrix are applied one after the other: it costs less than multiplying them out.
    scales = isinstance(first, Diagonal) or isinstance(second, Diagonal)
    dense = not scales and any(isinstance(one, Matrix | Orthogonal) for one in (first, second))
    product = Composed(first, second)
    fixed = all(isinstance(part, _FIXED) for part in product.chain())
    if not dense or not fixed or first.order != second.order or product.order > _DENSE:
        return product
    if is_orthogonal(first) and is_orthogonal(second):
        return Orthogonal(matrix(product))
    return Matrix(matrix(product), matrix(dual(product)).mT.contiguous())


def positional(transform: Transform) -> bool:
    """Whether equal blocks of an axis are treated differently, so that the axis must not be cut between blocks."""
    return heads_of(transform) > 1


def apply_to_heads(transform: Transform, x: Tensor, *, transpose: bool = False) -> Tensor:
    """x T of queries, keys or values (.., heads, tokens, size), along the last axis; x T^T with `transpose`.

    A transform with several heads counts the blocks of all heads, which lie along another axis here.
    """
    if not positional(transform):
        return transform.apply(x, transpose=transpose)
    rows = x.transpose(-3, -2)  # (.., tokens, heads, size)
    y = transform.apply(rows.flatten(-2), transpose=transpose)
    return y.unflatten(-1, rows.shape[-2:]).transpose(-3, -2)


def condition(transform: Transform) -> float:
    """Largest over smallest singular value, of the head where it is largest; 1 for a rotation.

    Of a product of two transforms that are no rotations, of an order above 2048, it is an upper bound.
    """
    if is_orthogonal(transform):
        return 1.0
    if isinstance(transform, Diagonal):
        scale = transform.scale.abs()
        return float((scale.amax(-1) / scale.amin(-1)).max())
    if isinstance(transform, KroneckerMatrix):
        return math.prod(map(_condition, transform.factors))
    if isinstance(transform, Composed):
        pair = transform.first, transform.second
        if any(map(is_orthogonal, pair)) or transform.order > _DECOMPOSED:
            return math.prod(map(condition, pair))
    return _condition(transform.weight if isinstance(transform, Matrix) else matrix(transform))


def check_conditioned(space: str, transform: Transform) -> None:
    """Raise RotationError for a transform that changes lengths by such ratios that rounding would spoil the model.

    Args:
        space: name of its space.
        transform: the transform.
    """
    found = condition(transform)
    most = LARGEST_RATIO if isinstance(transform, Diagonal) else LARGEST_CONDITION
    if not found <= most:
        raise RotationError(
            f"the transform of {space} has the condition number {found:.3g} (its largest over its smallest singular "
            f"value), and rounding would spoil the model from {most:g} on: damp it (add a part of their mean to the "
            "moments that it is made of, or to its scales), or use a rotation"
        )


def _condition(square: Tensor) -> float:
    values = torch.linalg.svdvals(square)
    return float((values[..., 0] / values[..., -1]).max())


def _chain(transform: Transform) -> tuple[Transform, ...]:
    return transform.chain() if isinstance(transform, Composed) else (transform,)


def _repeated(one: Tensor, other: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Two tensors with the same number of heads: each head of the one with fewer is shared by several of the other."""
    if one.ndim < ndim and other.ndim < ndim:
        return one, other
    pair = [tensor if tensor.ndim == ndim else tensor[None] for tensor in (one, other)]
    most = max(map(len, pair))
    return pair[0].repeat_interleave(most // len(pair[0]), 0), pair[1].repeat_interleave(most // len(pair[1]), 0)
