"""Transforms: invertible matrices as immutable values that can be applied to an axis of a tensor, by default the last.

    apply(x)                  y[.., j] = sum_i x[.., i] T[i, j]
    apply(x, transpose=True)  the same with T^T
    dual()                    T^-T, the transform of what reads x T:  (x T) (w T^-T)^T = x w^T
    undo(T, x)                x T^-1, which is the dual, transposed

A rotation R is its own dual; its transpose is its inverse. This module has the rotations, `transforms.py` the others.
An axis longer than the order is transformed block by block, so a block-diagonal rotation is the same value applied
to a longer axis. Only `matrix()` makes a transform dense.

Random Hadamard rotations are D H / sqrt(n) with random signs D (QuaRot, arXiv 2404.00456); random orthogonal
ones are Haar-distributed: the Q of a Gaussian matrix, with the signs of R's diagonal moved into Q (Mezzadri,
arXiv math-ph/0609050), since plain QR is not uniform.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.fast_transform import called_while_tracing, outside_modes
from spinquant.rotations.hadamard import (
    construct,
    dense_factors,
    hadamard_factors,
    hadamard_transform,
    kronecker_transform,
)

# How far an entry of R^T R may be from the identity's, of matrices that are given, read, and learned step by step. An
# orthogonal matrix computed in float32 is off by up to 1e-6 (QR, orders 512 to 4096), one rounded to bfloat16 by 3e-4.
ORTHOGONAL = 1e-5

Memo = dict[tuple[str, torch.device, torch.dtype], Tensor]
# The signs of a rotation, and its other factors: D (F1 kron F2 kron ...)
Parts = tuple[Tensor | None, tuple[Tensor, ...]]
PartsMemo = dict[tuple[torch.device, torch.dtype], Parts]


class Transform(Protocol):
    """Protocol of an invertible matrix T that can be applied to tensors and saved.

    Rotations implement it, and so do `Diagonal`, `Matrix`, `Composed` and `KroneckerMatrix`. What writes a space is
    multiplied by T and what reads it by the dual T^-T, so products of the two stay as they are.

    Example:
        >>> import torch
        >>> from spinquant import Diagonal, Transform
        >>> transform: Transform = Diagonal(torch.tensor([2.0, 0.5]))
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> transform.apply(x)
        tensor([[2., 1.]])
        >>> torch.equal(transform.apply(x) @ transform.dual().apply(w).T, x @ w.T)
        True
    """

    @property
    def order(self) -> int:
        """Number of rows of T."""
        ...

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """Apply the transform to an axis of a tensor: x T, block by block.

        Args:
            x: floating-point tensor whose axis `dim` is a multiple of the order.
            transpose: apply T^T instead.
            dim: the axis.
            out: contiguous tensor for the result; may be x itself. Without gradients only.

        Returns:
            A tensor of x's shape, dtype and device.

        Raises:
            RotationError: the order does not divide the axis.
        """
        ...

    def dual(self) -> "Transform":
        """The transform T^-T. The dual of the dual is the transform itself."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save; with `describe`, enough to restore the transform."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, order and construction, as JSON."""
        ...


class Rotation(Transform, Protocol):
    """Protocol of an orthogonal matrix R: a transform that is its own dual, so that R^T undoes R.

    `Hadamard`, `Orthogonal` and `Kronecker` implement it; so may classes of your own, which may leave out `dual`.

    Example:
        >>> import torch
        >>> from spinquant import Hadamard, Rotation
        >>> rotation: Rotation = Hadamard(2)
        >>> rotation.order
        2
        >>> x = torch.ones(1, 4)  # an axis longer than the order is rotated block by block
        >>> torch.allclose(rotation.apply(rotation.apply(x), transpose=True), x)
        True
    """


def dual(transform: Transform) -> Transform:
    """T^-T; a class without the method `dual` is a rotation, which is its own dual."""
    found = getattr(transform, "dual", None)
    return transform if found is None else found()


def is_orthogonal(transform: Transform) -> bool:
    """Whether a transform is a rotation: its own dual."""
    return dual(transform) is transform


def undo(transform: Transform, x: Tensor, dim: int = -1) -> Tensor:
    """x T^-1 along an axis."""
    return dual(transform).apply(x, transpose=True, dim=dim)


def heads_of(transform: Transform) -> int:
    """Into how many parts of its own an axis is divided: 1 for a transform that treats all blocks alike."""
    return getattr(transform, "heads", 1)


def matrix(transform: Transform, dtype: torch.dtype = torch.float64) -> Tensor:
    """The transform as a dense matrix, (order, order); (heads, order, order) if it has several heads."""
    order, heads = transform.order, heads_of(transform)
    dense = transform.apply(torch.eye(order, dtype=dtype).repeat(1, heads))
    return dense if heads == 1 else dense.unflatten(-1, (heads, order)).movedim(1, 0).contiguous()


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Hadamard rotation H / sqrt(n), or randomized Hadamard rotation D H / sqrt(n) (QuaRot, arXiv 2404.00456).

    Attributes:
        order: n, an order that `hadamard_matrix` can construct.
        signs: the diagonal of D, entries +-1, shape (n,); None for no D.

    Example:
        >>> import torch
        >>> from spinquant import Hadamard
        >>> Hadamard(4).apply(torch.tensor([8.0, 0.0, 0.0, 0.0]))
        tensor([4., 4., 4., 4.])
        >>> signs = torch.tensor([-1, 1, 1, 1], dtype=torch.int8)
        >>> Hadamard(4, signs).apply(torch.tensor([8.0, 0.0, 0.0, 0.0]))
        tensor([-4., -4., -4., -4.])
    """

    order: int
    signs: Tensor | None = None
    _memo: Memo = field(default_factory=dict, repr=False)
    _parts: PartsMemo = field(default_factory=dict, repr=False)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        if torch.compiler.is_compiling() and out is None:
            return _apply_traced(self, x, transpose, dim)
        if self.signs is None:
            return hadamard_transform(x, self.order, transpose=transpose, dim=dim, out=out)
        signs = _like(x, self, "signs", x.dtype)
        if transpose:
            return _flip(hadamard_transform(x, self.order, transpose=True, dim=dim, out=out), signs, dim, out)
        return hadamard_transform(_flip(x, signs, dim, out), self.order, dim=dim, out=out)

    def parts(self) -> Parts:
        """Its signs, if it has any, and the dense factors of its Kronecker product."""
        return self.signs, hadamard_factors(self.order)

    def dual(self) -> "Hadamard":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.signs is None else {"signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("hadamard" if self.signs is None else "random-hadamard", self.order)


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """Dense orthogonal rotation, random or learned.

    Attributes:
        weight: the orthogonal matrix, shape (n, n). It is not checked here; `rotate` and `quantize` check it.

    Example:
        >>> import torch
        >>> from spinquant import Orthogonal
        >>> swap = Orthogonal(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
        >>> swap.apply(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2., 1., 4., 3.]])
    """

    weight: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)
    _parts: PartsMemo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0]

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        if torch.compiler.is_compiling() and out is None:
            return _apply_traced(self, x, transpose, dim)
        return kronecker_transform(x, (_like(x, self, "weight", _wide(x)),), transpose=transpose, dim=dim, out=out)

    def parts(self) -> Parts:
        """Its signs, if it has any, and the dense factors of its Kronecker product."""
        return None, (self.weight,)

    def dual(self) -> "Orthogonal":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def describe(self) -> dict[str, Any]:
        return _description("orthogonal", self.order)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Kronecker rotation D (Q kron H) / sqrt(m), for orders that have no known Hadamard matrix.

    Attributes:
        weight: Q, an orthogonal matrix of the odd factor of the order, shape (q, q).
        hadamard_order: m, the order of the Hadamard matrix H; the rotation has order q m.
        signs: the diagonal of D, entries +-1, shape (q m,).

    Example:
        >>> import torch
        >>> from spinquant import Kronecker
        >>> q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        >>> rotation = Kronecker(q, 4, torch.ones(12, dtype=torch.int8))
        >>> x = torch.randn(5, 12)
        >>> rotation.order, torch.allclose(rotation.apply(x).norm(dim=-1), x.norm(dim=-1))
        (12, True)
    """

    weight: Tensor
    hadamard_order: int
    signs: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)
    _parts: PartsMemo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0] * self.hadamard_order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        if torch.compiler.is_compiling() and out is None:
            return _apply_traced(self, x, transpose, dim)
        signs, weight = _like(x, self, "signs", x.dtype), _like(x, self, "weight", _wide(x))
        factors = (weight, *dense_factors(self.hadamard_order, x.device, _wide(x)))
        if transpose:
            return _flip(kronecker_transform(x, factors, transpose=True, dim=dim, out=out), signs, dim, out)
        return kronecker_transform(_flip(x, signs, dim, out), factors, dim=dim, out=out)

    def parts(self) -> Parts:
        """Its signs, if it has any, and the dense factors of its Kronecker product."""
        return self.signs, (self.weight, *hadamard_factors(self.hadamard_order))

    def dual(self) -> "Kronecker":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("kronecker", self.order, hadamard_order=self.hadamard_order)


def nearest_orthogonal(square: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a square one, (.., n, n) (orthogonal Procrustes): U V^T of its SVD."""
    u, _, v = torch.linalg.svd(square)
    return u @ v


def off_orthogonal(square: Tensor) -> float:
    """How far a square matrix is from an orthogonal one: the largest entry of |R^T R - I|; NaN if an entry is."""
    wide = square.to(torch.promote_types(square.dtype, torch.float32))
    return float((wide.T @ wide - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())


def _description(kind: str, order: int, **more: int) -> dict[str, Any]:
    if kind == "orthogonal":
        construction = "dense orthogonal"
    elif kind == "kronecker":
        power = more["hadamard_order"]
        construction = f"orthogonal {order // power} x {construct(power)}"
    else:
        construction = str(construct(order))
    return {"kind": kind, "order": order, "construction": construction, **more}


def _flip(x: Tensor, signs: Tensor, dim: int, out: Tensor | None) -> Tensor:
    blocks = x.unflatten(dim, (-1, len(signs)))
    signs = signs.view(-1, *[1] * len(x.shape[dim:][1:]))
    if out is None:
        return (blocks * signs).reshape(x.shape)
    torch.mul(blocks, signs, out=out.view(blocks.shape))
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def parts_like(x: Tensor, transform: Any) -> Parts:
    """The parts of a transform on the device of x, in the dtype of its arithmetic; cached, as in `_like`."""
    key = x.device, _wide(x)
    if torch.compiler.is_compiling():
        _make_parts(transform, *key)
        return transform._parts[key]
    found = transform._parts.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _moved(transform.parts(), *key)
        signs, factors = found
        if all(type(part) in (Tensor, torch.nn.Parameter) for part in (*factors, *([] if signs is None else [signs]))):
            transform._parts[key] = found
    return found


def _like(x: Tensor, rotation: Any, name: str, dtype: torch.dtype) -> Tensor:
    """A stored tensor on the device of x; cached, since an online rotation is applied at every step."""
    key, memo = (name, x.device, dtype), rotation._memo
    found = memo.get(key)
    if found is None:
        # Outside inference mode, or a first use in inference mode would break later uses with gradients.
        with torch.inference_mode(False):
            found = getattr(rotation, name).to(x.device, dtype)
        if type(found) in (Tensor, torch.nn.Parameter):  # no tensors of FakeTensorMode
            memo[key] = found
    return found


def _apply_traced(rotation: Any, x: Tensor, transpose: bool, dim: int) -> Tensor:
    """`apply` in a graph that torch.compile or torch.export is tracing; stored tensors become inputs of the graph."""
    signs, factors = parts_like(x, rotation)
    if signs is None:
        return kronecker_transform(x, factors, transpose=transpose, dim=dim)
    signs = signs.to(x.dtype)
    if transpose:
        return _flip(kronecker_transform(x, factors, transpose=True, dim=dim), signs, dim, None)
    return kronecker_transform(_flip(x, signs, dim, None), factors, dim=dim)


@called_while_tracing
def _make_parts(rotation: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Have signs and factors of a rotation stored with it, on a device and in a dtype."""
    if (device, dtype) not in rotation._parts:
        rotation._parts[device, dtype] = outside_modes(lambda: _moved(rotation.parts(), device, dtype))
    return True


def _moved(parts: Parts, device: torch.device, dtype: torch.dtype) -> Parts:
    signs, factors = parts
    return None if signs is None else signs.to(device, dtype), tuple(part.to(device, dtype) for part in factors)


def check_blocks(x: Tensor, order: int, dim: int) -> None:
    """Raise RotationError if the order does not divide an axis."""
    if x.shape[dim] % order:
        raise RotationError(f"a rotation of order {order} does not divide an axis of length {x.shape[dim]}")
