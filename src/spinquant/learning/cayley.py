"""Cayley SGD and Adam: gradient descent on the orthogonal group.

    R <- R (I + A/2)^-1 (I - A/2)          A skew-symmetric

The Cayley transform of a skew-symmetric A is orthogonal whatever A is, so a step leaves the group by rounding error
only, which one Newton step of the polar decomposition corrects. I + A/2 is normal with eigenvalues 1 + i t, hence well
conditioned as long as A is of moderate size. The derivative at A = 0 is dR = -R A: the gradient G of the loss with
respect to A gives the skew-symmetric (G - G^T) / 2, and the step goes against it. The learning rate is the length of a
step, ||A|| = lr, whatever the length of the gradient. The reference (arXiv 2405.16406) clips gradients to norm one,
which is equivalent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["sgd", "adam"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam")
BETAS, EPSILON = (0.9, 0.95), 1e-8


def cayley(start: Tensor, skew: Tensor, *, centred: bool = False) -> Tensor:
    """R0 (I + A/2)^-1 (I - A/2), with A = L - L^T, L the strict lower triangle of `skew`; all matrices are (.., n, n).

    centred: A is projected so that A 1 = 0; the product then preserves the mean if R0 does.
    """
    lower = skew.tril(-1)
    half = (lower - lower.mT) / 2
    if centred:
        half = mean_preserving(half)
    one = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
    return start @ torch.linalg.solve(one + half, one - half)


def mean_preserving(skew: Tensor) -> Tensor:
    """The nearest skew-symmetric matrix A with A 1 = 0, (.., n, n): its Cayley transform preserves the mean."""
    return skew - skew.mean(-2, keepdim=True) - skew.mean(-1, keepdim=True) + skew.mean((-2, -1), keepdim=True)


def newton_step(r: Tensor) -> Tensor:
    """One Newton step towards the nearest orthogonal matrix; it squares the error."""
    return 1.5 * r - 0.5 * r @ (r.mT @ r)


@dataclass
class Descent:
    """Optimizer of orthogonal matrices, float32 or float64, which it changes in place.

    Those of one size may be stacked, (count, n, n): each then makes steps of its own.

    With adam the direction comes from elementwise moments of the skew-symmetric gradient, with sgd from the gradient
    and `momentum`. Moments need no vector transport, since A is expressed relative to R.

    Attributes:
        matrices: The matrices by name, (.., n, n).
        optimizer: `sgd` or `adam`.
        momentum: Of sgd, in [0, 1).
        centred: Names of matrices that have to preserve the mean, R 1 = 1, at every step.
        steps: Number of steps so far.
        first: First moments by name.
        second: Second moments by name, of adam.
    """

    matrices: Mapping[str, Tensor]
    optimizer: Optimizer = "sgd"
    momentum: float = 0.0
    centred: frozenset[str] = frozenset()
    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Step by ||A|| = lr every matrix that has a gradient, (.., n, n): of the loss with respect to A at A = 0."""
        self.steps += 1
        for name, gradient in gradients.items():
            r = self.matrices[name]
            direction = self._direction(name, (gradient - gradient.mT) / 2)
            direction = mean_preserving(direction) if name in self.centred else direction
            length = torch.linalg.matrix_norm(direction, keepdim=True)
            # Against the gradient; `cayley` reads the strict lower triangle.
            made = newton_step(cayley(r, direction * (-lr / length.clamp(min=torch.finfo(r.dtype).tiny))))
            r.copy_(torch.where(length > 0, made, r))

    def _direction(self, name: str, skew: Tensor) -> Tensor:
        if self.optimizer == "sgd" and not self.momentum:
            return skew
        first = self.first.setdefault(name, torch.zeros_like(skew))
        if self.optimizer == "sgd":
            return first.mul_(self.momentum).add_(skew)
        second = self.second.setdefault(name, torch.zeros_like(skew))
        first.lerp_(skew, 1 - BETAS[0])
        second.lerp_(skew.square(), 1 - BETAS[1])
        mean = first / (1 - BETAS[0] ** self.steps)
        return mean / ((second / (1 - BETAS[1] ** self.steps)).sqrt() + EPSILON)

    def tensors(self) -> dict[str, Tensor]:
        """State of the optimizer: matrices and moments, by name, for `restore`."""
        parts = {"matrix": self.matrices, "first": self.first, "second": self.second}
        return {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load the state that `tensors` returned after `steps` steps."""
        self.steps = steps
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            if part == "matrix":
                self.matrices[name].copy_(tensor)
            else:
                held = self.first if part == "first" else self.second
                held[name] = tensor.to(self.matrices[name].device)
