"""Transforms that are no rotations: a diagonal, a dense matrix, and a Kronecker product of matrices.

    Diagonal          x T = x * s
    Matrix            x T, T dense
    KroneckerMatrix   x (F1 kron F2 kron ...), by the fast transform

`Diagonal` and `Matrix` may hold one transform per head. An axis of b blocks is then divided into as many parts as there
are heads, and block k takes the transform k // (b // heads): in grouped-query attention, query heads that share a
key-value head share its transform.

The dual T^-T is computed in float64, once, and kept, so that dual().dual() is the transform itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.fast_transform import kronecker_transform
from spinquant.rotations.rotation import Parts, PartsMemo, check_blocks, parts_like

# Entries of W W^-1 - I, of a matrix and an inverse that are given together.
_INVERSE = 1e-6

_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Diagonal transform: x becomes x * scale.

    Attributes:
        scale: finite numbers other than zero, shape (n,), or (heads, n) for a diagonal per head; kept in float64.

    Raises:
        RotationError: the numbers have another shape, or one is zero or not finite.

    Example:
        >>> import torch
        >>> from spinquant import Diagonal
        >>> per_head = Diagonal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> per_head.apply(torch.ones(8))  # four heads share two diagonals
        tensor([1., 2., 1., 2., 3., 4., 3., 4.])
    """

    scale: Tensor
    _parts: PartsMemo = field(default_factory=dict, repr=False)
    _dual: list["Diagonal"] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        scale = _float64(self, "scale", self.scale)
        if scale.ndim not in (1, 2) or not scale.numel() or not bool((scale != 0).all() & scale.isfinite().all()):
            raise RotationError(
                f"the scale of a diagonal transform has shape {tuple(scale.shape)} and numbers from "
                f"{_ends(scale)}: expected finite numbers other than zero, of shape (n,) or (heads, n)"
            )

    @property
    def order(self) -> int:
        """n."""
        return self.scale.shape[-1]

    @property
    def heads(self) -> int:
        """Number of diagonals."""
        return 1 if self.scale.ndim == 1 else len(self.scale)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """x * scale along an axis, block by block; see `Transform.apply`."""
        dim = checked_axis(self, x, dim, out)
        scale, _ = parts_like(x, self)
        assert scale is not None
        blocks = x.unflatten(dim, (self.heads, -1, self.order))
        factors = scale.view(self.heads, 1, self.order, *[1] * (x.ndim - dim - 1))
        if out is None:
            return (blocks * factors).to(x.dtype).reshape(x.shape)
        if x.dtype == scale.dtype:
            torch.mul(blocks, factors, out=out.view(blocks.shape))
        else:
            out.view(blocks.shape).copy_(blocks * factors)
        return out

    def dual(self) -> "Diagonal":
        """The diagonal of 1 / scale."""
        return kept_dual(self, lambda: Diagonal(1 / self.scale))

    def parts(self) -> Parts:
        """Its tensors, as `parts_like` moves them to the device of x."""
        return self.scale, ()

    def tensors(self) -> dict[str, Tensor]:
        """The scale."""
        return {"scale": self.scale}

    def describe(self) -> dict[str, Any]:
        """Kind, order and heads, as JSON."""
        return description_of("diagonal", self.order, "diagonal", heads=self.scale.ndim - 1 and self.heads)


@dataclass(frozen=True, eq=False)
class Matrix:
    """Dense invertible transform.

    Attributes:
        weight: T, shape (n, n), or (heads, n, n) for a matrix per head; kept in float64.
        inverse: T^-1. Default: computed.

    Raises:
        RotationError: the matrix is not square, has no inverse, or its inverse is another one.

    Example:
        >>> import torch
        >>> from spinquant import Matrix
        >>> shear = Matrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        >>> shear.apply(torch.tensor([1.0, 2.0]))
        tensor([1., 3.])
        >>> shear.dual().apply(torch.tensor([1.0, 3.0]), transpose=True)  # the inverse
        tensor([1., 2.])
    """

    weight: Tensor
    inverse: Tensor | None = None
    _parts: PartsMemo = field(default_factory=dict, repr=False)
    _dual: list["Matrix"] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        weight = _float64(self, "weight", self.weight)
        if weight.ndim not in (2, 3) or weight.shape[-1] != weight.shape[-2] or not weight.numel():
            raise RotationError(
                f"the matrix of a transform has shape {tuple(weight.shape)}: expected (n, n), or (heads, n, n)"
            )
        if self.inverse is None:
            object.__setattr__(self, "inverse", _inverse(weight))
            return
        inverse = _float64(self, "inverse", self.inverse)
        if inverse.shape != weight.shape:
            raise RotationError(
                f"the inverse of a transform has shape {tuple(inverse.shape)}, and its matrix {tuple(weight.shape)}"
            )
        error = (weight @ inverse - torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)).abs().max()
        if not error < _INVERSE:
            raise RotationError(
                f"the inverse of a transform of order {self.order} is not the inverse of its matrix: their product is "
                f"off the identity by {float(error):.1e}. Leave the inverse out, and it is computed"
            )

    @property
    def order(self) -> int:
        """n."""
        return self.weight.shape[-1]

    @property
    def heads(self) -> int:
        """Number of matrices."""
        return 1 if self.weight.ndim == 2 else len(self.weight)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """x T along an axis, block by block; see `Transform.apply`."""
        dim = checked_axis(self, x, dim, out)
        _, (weight,) = parts_like(x, self)
        if self.heads == 1:
            factor = weight.reshape(self.order, self.order)
            return kronecker_transform(x, (factor,), transpose=transpose, dim=dim, out=out)
        weight = weight.mT if transpose else weight
        blocks = x.to(weight.dtype).movedim(dim, -1).unflatten(-1, (self.heads, -1, self.order))
        y = torch.einsum("...hbi,hij->...hbj", blocks, weight).flatten(-3).movedim(-1, dim).to(x.dtype)
        return y.contiguous() if out is None else out.copy_(y)

    def dual(self) -> "Matrix":
        """The transform of the inverse, transposed."""
        assert self.inverse is not None
        inverse = self.inverse
        return kept_dual(self, lambda: Matrix(inverse.mT.contiguous(), self.weight.mT.contiguous()))

    def parts(self) -> Parts:
        """Its tensors, as `parts_like` moves them to the device of x."""
        return None, (self.weight,)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix; the inverse is computed again."""
        return {"weight": self.weight}

    def describe(self) -> dict[str, Any]:
        """Kind, order and heads, as JSON."""
        return description_of("matrix", self.order, "dense", heads=self.weight.ndim - 2 and self.heads)


@dataclass(frozen=True, eq=False)
class KroneckerMatrix:
    """Kronecker product of invertible matrices, F1 kron F2 kron ..., for axes too long for a dense matrix.

    Attributes:
        factors: the matrices, each (k, k); the order is the product of theirs. Kept in float64.

    Raises:
        RotationError: there is no factor, or one is not square or has no inverse.

    Example:
        >>> import torch
        >>> from spinquant import KroneckerMatrix
        >>> transform = KroneckerMatrix((torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.diag(torch.tensor([1.0, 3.0]))))
        >>> transform.apply(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        tensor([1., 3., 2., 6.])
    """

    factors: tuple[Tensor, ...]
    _parts: PartsMemo = field(default_factory=dict, repr=False)
    _dual: list["KroneckerMatrix"] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        factors = tuple(_floating("factor", factor) for factor in self.factors)
        for factor in factors:
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1] or not len(factor):
                raise RotationError(
                    f"a factor of a Kronecker transform has shape {tuple(factor.shape)}: expected (k, k)"
                )
        if not factors:
            raise RotationError("a Kronecker transform has no factor: expected at least one square matrix")
        object.__setattr__(self, "factors", factors)
        if not self._dual:
            inverses = tuple(_inverse(factor).mT.contiguous() for factor in factors)
            self._dual.append(KroneckerMatrix(inverses, _dual=[self]))

    @property
    def order(self) -> int:
        """Product of the orders of the factors."""
        order = 1
        for factor in self.factors:  # torch.compile traces a loop; `math.prod` would split the graph
            order *= factor.shape[0]
        return order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """x (F1 kron F2 kron ...) along an axis, block by block; see `Transform.apply`."""
        _, factors = parts_like(x, self)
        return kronecker_transform(x, factors, transpose=transpose, dim=dim, out=out)

    def dual(self) -> "KroneckerMatrix":
        """The product of the duals of the factors."""
        return self._dual[0]

    def parts(self) -> Parts:
        """Its tensors, as `parts_like` moves them to the device of x."""
        return None, self.factors

    def tensors(self) -> dict[str, Tensor]:
        """The factors, by their number."""
        return {f"factor{i}": factor for i, factor in enumerate(self.factors)}

    def describe(self) -> dict[str, Any]:
        """Kind, order and the orders of the factors, as JSON."""
        orders = [len(factor) for factor in self.factors]
        return description_of("kronecker-matrix", self.order, " x ".join(map(str, orders)), factors=orders)


def kept_dual(transform: Any, make: Callable[[], _Made]) -> _Made:
    """The dual of a transform, made once, whose dual is the transform."""
    if not transform._dual:
        made: Any = make()
        made._dual.append(transform)
        transform._dual.append(made)
    return transform._dual[0]


def _floating(what: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise RotationError(f"the {what} of a transform is of {found}: expected a tensor of floating-point numbers")
    with torch.inference_mode(False):  # or later uses with gradients would fail
        wide = tensor.detach().to(torch.float64)
        return wide.clone() if wide.is_inference() else wide


def _float64(transform: Any, name: str, tensor: Any) -> Tensor:
    """A tensor of a transform, replaced by its float64."""
    wide = _floating(name, tensor)
    object.__setattr__(transform, name, wide)
    return wide


def _ends(numbers: Tensor) -> str:
    return f"{float(numbers.min()):.3g} to {float(numbers.max()):.3g}" if numbers.numel() else "none"


def _inverse(weight: Tensor) -> Tensor:
    """The inverse in float64. Raises RotationError for a matrix that has none."""
    if bool(weight.isfinite().all()):
        found, failed = torch.linalg.inv_ex(weight)
        if not bool(failed.any()) and bool(found.isfinite().all()):
            return found
    raise RotationError(
        f"the matrix of a transform, of shape {tuple(weight.shape)}, has no inverse: it is singular, or not all of its "
        "numbers are finite"
    )


def checked_axis(transform: Any, x: Tensor, dim: int, out: Tensor | None) -> int:
    """The axis, counted from the first. Raises RotationError if the transform cannot be applied to it."""
    order, heads = transform.order, transform.heads
    if x.ndim == 0 or not x.dtype.is_floating_point:
        raise RotationError(
            f"a transform of order {order} cannot be applied to a tensor of shape {tuple(x.shape)} and {x.dtype}: "
            "expected floating-point numbers along an axis"
        )
    check_blocks(x, order, dim)
    if x.shape[dim] // order % heads:
        raise RotationError(
            f"a transform of order {order} with {heads} heads cannot be applied to an axis of length {x.shape[dim]}: "
            f"expected a multiple of {order * heads}"
        )
    if out is not None and (
        (torch.is_grad_enabled() and x.requires_grad)
        or (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device)
        or not out.is_contiguous()
    ):
        raise RotationError(
            f"`out` must be contiguous, of shape {tuple(x.shape)} and {x.dtype}, and x must not require gradients; "
            f"found shape {tuple(out.shape)} and {out.dtype}"
        )
    return dim % x.ndim


def description_of(kind: str, order: int, construction: str, **more: Any) -> dict[str, Any]:
    more = {name: value for name, value in more.items() if value}
    return {"kind": kind, "order": order, "construction": construction, **more}
