"""Mean-preserving rotations (R 1 = 1) for models with LayerNorm.

LayerNorm is (x - mean) / std, times a scale, plus a bias. If R 1 = 1 (then R^T 1 = 1 too), x R has the mean and the
standard deviation of x, and (x - mean 1) R = x R - mean 1: once its scale is fused, the norm commutes with R. So the
model keeps its class, and every runtime still loads it. QuaRot's random signs would change the mean, so the three
transform types are constructed as follows:

    hadamard         Kronecker product of G_k = (2/k) J - I, J all ones: for k = 4 the regular Hadamard matrix, so for
                     orders 4^n perfectly flat, else with the odd prime factors of the order
    random-hadamard  H diag(1, signs) H^T / n, where the first column of H is constant
    random-matrix    P diag(1, Q) P^T, Q Haar-distributed, P the Householder reflection that takes e_1 to 1 / sqrt(n)

The first two use fast transforms, and none of the three runs online. In saved folders they have the kinds
"centred-hadamard" and "centred-random-hadamard".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.plan import Plan
from spinquant.rotations.fast_transform import kronecker_transform
from spinquant.rotations.hadamard import hadamard_transform
from spinquant.rotations.rotation import check_blocks

TOLERANCE = 1e-4  # of a row sum: a rotation learned in float32 is orthogonal to less than that


@dataclass(frozen=True)
class CentredHadamard:
    """Deterministic mean-preserving rotation: the Kronecker product of G_k = (2/k) J - I over factors of the order."""

    order: int

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`; the matrix is symmetric."""
        check_blocks(x, self.order, dim)
        wide = torch.promote_types(x.dtype, torch.float32)
        factors = [2 / k * torch.ones(k, k, dtype=wide) - torch.eye(k, dtype=wide) for k in factors_of(self.order)]
        factors = [factor.to(x.device) for factor in factors]
        return kronecker_transform(x, factors, transpose=transpose, dim=dim, out=out)

    def dual(self) -> "CentredHadamard":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Empty: the order determines the rotation."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Kind and order, as JSON."""
        return describe("centred-hadamard", self.order)


@dataclass(frozen=True, eq=False)
class CentredRandomHadamard:
    """Random mean-preserving rotation Q kron H diag(1, signs) H^T / m.

    The rows of H are negated where needed to make its first column constant.

    Attributes:
        signs: int8, shape (m,), the first of them 1.
        weight: Q, a mean-preserving orthogonal matrix of the odd factor of the order; None if the order needs none.
    """

    signs: Tensor
    weight: Tensor | None = None

    @property
    def order(self) -> int:
        """Order of the Kronecker product."""
        return len(self.signs) * (1 if self.weight is None else len(self.weight))

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`; the Hadamard factor is symmetric."""
        check_blocks(x, self.order, dim)
        dim, m = dim % x.ndim, len(self.signs)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide).unflatten(dim, (-1, m))  # (.., blocks, m, ..)
        shape = [m, *[1] * (y.ndim - dim - 2)]
        signs = self.signs.to(x.device, wide).view(shape)
        first = torch.zeros(m, dtype=wide, device=x.device)
        first[0] = 1
        flips = hadamard_transform(first, m, transpose=True).sign().view(shape)
        y = hadamard_transform(y * flips, m, dim=dim + 1)
        y = hadamard_transform(y * signs, m, transpose=True, dim=dim + 1) * flips
        if self.weight is not None:
            weight = self.weight.to(x.device, wide)
            y = kronecker_transform(y.contiguous(), [weight], transpose=transpose, dim=dim)
        y = y.reshape(x.shape).to(x.dtype)
        return y if out is None else out.copy_(y)

    def dual(self) -> "CentredRandomHadamard":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The signs, and Q if there is one."""
        return {"signs": self.signs, **({} if self.weight is None else {"weight": self.weight})}

    def describe(self) -> dict[str, Any]:
        """Kind and order, as JSON."""
        return describe("centred-random-hadamard", self.order, hadamard_order=len(self.signs))


def describe(kind: str, order: int, **more: int) -> dict[str, Any]:
    """Kind, order and construction of a mean-preserving rotation, as JSON."""
    hadamard = more.get("hadamard_order", order)
    if kind == "centred-hadamard":
        construction = "(2/k) J - I, k = " + " x ".join(map(str, factors_of(order)))
    else:
        odd = f"orthogonal {order // hadamard} x " if hadamard != order else ""
        construction = f"{odd}H diag(1, signs) H^T of order {hadamard}"
    return {"kind": kind, "order": order, "construction": f"{construction}, keeps the mean", **more}


def factors_of(order: int) -> list[int]:
    """Factors of the order whose G_k are as flat as possible: fours, odd primes, and 8 or 2p for a remaining two."""
    fours = 0
    while order % 4 == 0:
        order, fours = order // 4, fours + 1
    odd = _odd_primes(order // (2 if order % 2 == 0 else 1))
    if order % 2:
        return [4] * fours + odd or [1]
    # G_2 swaps two elements and mixes nothing, so a single two is merged into another factor.
    if fours:
        return [4] * (fours - 1) + [8, *odd]
    return [2 * odd[0], *odd[1:]] if odd else [2]


def _odd_primes(number: int) -> list[int]:
    found, p = [], 3
    while number > 1:
        while number % p == 0:
            found.append(p)
            number //= p
        p += 2
    return found


def random_mean_preserving(order: int, orthogonal: Tensor) -> Tensor:
    """The mean-preserving matrix P diag(1, Q) P^T, (order, order), of an orthogonal Q of order - 1."""
    v = torch.full((order,), -(order**-0.5), dtype=orthogonal.dtype)
    v[0] += 1
    inner = torch.block_diag(torch.ones(1, 1, dtype=orthogonal.dtype), orthogonal)
    norm = v @ v
    if norm == 0:  # order 1
        return inner
    p = torch.eye(order, dtype=orthogonal.dtype) - torch.outer(v, v) * (2 / norm)
    return p @ inner @ p


def check_mean_preserving(plan: Plan, rotations: Mapping[str, Any]) -> None:
    """Raise RotationError for a rotation that is not mean-preserving in a space whose norms subtract the mean."""
    for space in plan.spaces:
        if not space.centred or space.name not in rotations:
            continue
        ones = torch.ones(rotations[space.name].order, dtype=torch.float64)
        moved = (rotations[space.name].apply(ones, transpose=True) - ones).abs().max().item()
        if not moved <= TOLERANCE:
            raise RotationError(
                f"norms subtract the mean of the space {space.name!r}, and this rotation is not mean-preserving (a row "
                f"sum is off by {moved:.2g}): the outputs of the model would change. Every row must sum to 1; "
                "`make_rotations` makes such rotations"
            )
