"""Transforms that are being learned: their numbers change in place, and a leaf of each receives its gradient.

`rotated_rounding.py` computes these gradients where an activation or a weight is rounded.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spinquant.rotations.rotation import Orthogonal, check_blocks, nearest_orthogonal
from spinquant.rotations.transforms import Diagonal


@dataclass
class Tally:
    """Expected cost of rounding, 1/2 ||g||^2 ||e||^2 / n, collected over quantizers and backward passes."""

    costs: list[Tensor] = field(default_factory=list)

    def take(self) -> float:
        """The sum since the last call."""
        total = sum(float(cost) for cost in self.costs)
        self.costs.clear()
        return total


@dataclass(frozen=True, eq=False)
class Moving:
    """A dense rotation that is being learned.

    Attributes:
        weight: the current rotation, (n, n); changes in place.
        skew: the leaf that receives gradients: those of the loss with respect to A, where the rotation is
            `weight` (I - A) and A is zero.
        range_gradient: include the gradient through the range of a group.
        tally: if given, gradients are those of the expected cost, which is added to it; the loss then has to be the nll
            of labels drawn from the network's predictions.
    """

    weight: Tensor
    skew: Tensor
    range_gradient: bool = True
    tally: Tally | None = None

    @classmethod
    def starting(cls, weight: Tensor, *, range_gradient: bool = True, tally: Tally | None = None) -> "Moving":
        """A rotation that starts at a copy of a matrix."""
        return cls(weight.clone(), torch.zeros_like(weight).requires_grad_(), range_gradient, tally)

    @property
    def order(self) -> int:
        """Rows of the matrix."""
        return len(self.weight)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`, without gradients for the rotation."""
        check_blocks(x, self.order, dim)
        r = (self.weight.T if transpose else self.weight).to(x.dtype)
        y = (x.movedim(dim, -1).unflatten(-1, (-1, self.order)) @ r).flatten(-2).movedim(-1, dim)
        return y if out is None else out.copy_(y)

    def dual(self) -> "Moving":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the current rotation."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """The description of the current rotation."""
        return self.frozen().describe()

    def frozen(self) -> Orthogonal:
        """The current rotation as an immutable value: the nearest orthogonal matrix in float64."""
        return Orthogonal(nearest_orthogonal(self.weight.detach().double().cpu()))


@dataclass(frozen=True, eq=False)
class MovingScales:
    """Channel scales d = exp(sign * logs) that are being learned.

    Attributes:
        logs: log d, (n,); changes in place.
        shift: the leaf that receives gradients: those of the loss with respect to `logs`.
        range_gradient: as in `Moving`.
        tally: as in `Moving`.
        sign: -1 for the dual, which divides.
    """

    logs: Tensor
    shift: Tensor
    range_gradient: bool = True
    tally: Tally | None = None
    sign: int = 1

    @classmethod
    def starting(cls, scale: Tensor, *, range_gradient: bool = True, tally: Tally | None = None) -> "MovingScales":
        """Scales that start at positive numbers, (n,)."""
        return cls(scale.log(), torch.zeros_like(scale).requires_grad_(), range_gradient, tally)

    @property
    def order(self) -> int:
        """Number of scales."""
        return len(self.logs)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Transform.apply`, without gradients for the scales."""
        check_blocks(x, self.order, dim)
        scale = (self.sign * self.logs).exp().to(x.dtype)
        y = (x.movedim(dim, -1).unflatten(-1, (-1, self.order)) * scale).flatten(-2).movedim(-1, dim)
        return y if out is None else out.copy_(y)

    def dual(self) -> "MovingScales":
        """The inverse scales, which are learned with these."""
        return replace(self, sign=-self.sign)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the current scales."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """The description of the current scales."""
        return self.frozen().describe()

    def frozen(self) -> Diagonal:
        """The current scales as an immutable value."""
        return Diagonal((self.sign * self.logs.detach().double().cpu()).exp())


def leaf_of(transform: Moving | MovingScales) -> Tensor:
    """The leaf that receives the gradient of a transform."""
    return transform.skew if isinstance(transform, Moving) else transform.shift
