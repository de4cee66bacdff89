"""Rotations are values: they know their order and how to apply themselves to an axis of a tensor, by default the last.

    apply(x)                  y[.., j] = sum_i x[.., i] R[i, j]        R orthogonal
    apply(x, transpose=True)  the inverse

An axis longer than the order is rotated block by block, so a block-diagonal rotation is the same value applied
to a longer axis. A rotation becomes a dense matrix only where someone asks for `matrix()`.

Random Hadamard rotations are D H / sqrt(n) with random signs D (QuaRot, arXiv 2404.00456); random orthogonal
ones are Haar-distributed: the Q of a Gaussian matrix, with the signs of R's diagonal moved into Q (Mezzadri,
arXiv math-ph/0609050), since plain QR is not uniform.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.hadamard import construct, hadamard_factors, hadamard_transform, kronecker_transform

Memo = dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]]


class Rotation(Protocol):
    """An orthogonal matrix of some order."""

    @property
    def order(self) -> int: ...

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """x R along an axis, block by block; x R^T with `transpose`. Keeps shape, dtype and device.

        out: contiguous, for the result; may be x. Without gradients only.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved; with `describe`, enough for `restore`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind and order, as JSON."""
        ...


def matrix(rotation: Rotation, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rotation as a dense (order, order) matrix."""
    return rotation.apply(torch.eye(rotation.order, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Hadamard:
    """H / sqrt(n), or D H / sqrt(n) with a diagonal D of +-1 given as `signs`, shape (n,)."""

    order: int
    signs: Tensor | None = None
    _memo: Memo = field(default_factory=dict, repr=False)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        if self.signs is None:
            return hadamard_transform(x, self.order, transpose=transpose, dim=dim, out=out)
        (signs,) = _like(x, (self.signs,), x.dtype, self._memo)
        if transpose:
            return _flip(hadamard_transform(x, self.order, transpose=True, dim=dim, out=out), signs, dim, out)
        return hadamard_transform(_flip(x, signs, dim, out), self.order, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.signs is None else {"signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("hadamard" if self.signs is None else "random-hadamard", self.order)


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """A dense orthogonal matrix, shape (n, n): random or learned."""

    weight: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0]

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        factors = _like(x, (self.weight,), _wide(x), self._memo)
        return kronecker_transform(x, factors, transpose=transpose, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def describe(self) -> dict[str, Any]:
        return _description("orthogonal", self.order)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """D (Q kron H) / sqrt(m): an orthogonal Q of an order that has no Hadamard matrix, times a Hadamard of order m."""

    weight: Tensor
    hadamard_order: int
    signs: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0] * self.hadamard_order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        stored = (self.signs, self.weight, *hadamard_factors(self.hadamard_order))
        signs, *factors = _like(x, stored, _wide(x), self._memo)
        signs = signs.to(x.dtype)
        if transpose:
            return _flip(kronecker_transform(x, factors, transpose=True, dim=dim, out=out), signs, dim, out)
        return kronecker_transform(_flip(x, signs, dim, out), factors, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("kronecker", self.order, hadamard_order=self.hadamard_order)


def nearest_orthogonal(square: Tensor) -> Tensor:
    """The orthogonal matrix with the largest trace against `square`, which is the nearest one: U V of its SVD."""
    u, _, v = torch.linalg.svd(square)
    return u @ v


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


def _like(x: Tensor, stored: tuple[Tensor, ...], dtype: torch.dtype, memo: Memo) -> tuple[Tensor, ...]:
    """The stored tensors on the device of x; remembered, since an online rotation is applied at every step."""
    key = (x.device, dtype)
    found = memo.get(key)
    if found is None:
        # Outside inference mode, or the first use under it would spoil later ones with gradients.
        with torch.inference_mode(False):
            found = tuple(tensor.to(x.device, dtype) for tensor in stored)
        if all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in found):  # not of FakeTensorMode, say
            memo[key] = found
    return found


def check_blocks(x: Tensor, order: int, dim: int) -> None:
    """Raise RotationError when an axis is not made of whole blocks."""
    if x.shape[dim] % order:
        raise RotationError(f"a rotation of order {order} does not divide an axis of length {x.shape[dim]}")
