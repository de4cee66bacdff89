"""Adam on the logarithms of channel scales, within bounds, alone and together with the descent of rotations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinquant.learning.cayley import BETAS, EPSILON, Descent
from spinquant.rotations.transforms import LARGEST_CONDITION

SAVED = "scales "  # begins the names of saved tensors
SCALE_RATE = 0.06  # a step of log scales, as a fraction of that of the rotation before them, ||A||


def bounded(logs: Tensor) -> Tensor:
    """Log scales with mean zero, (.., n), of which the largest is at most `LARGEST_CONDITION` times the smallest."""
    logs = logs - logs.mean(-1, keepdim=True)
    most = math.log(LARGEST_CONDITION) / 2.02
    return logs.clamp(-most, most)


@dataclass
class ScaleDescent:
    """Optimizer of log scales, which it changes in place.

    Attributes:
        logs: Log scales by name, (n,).
        steps: Number of steps so far.
        first: First moments by name.
        second: Second moments by name.
    """

    logs: Mapping[str, Tensor]
    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """Step by up to about `rate` in every logarithm that has a gradient."""
        self.steps += 1
        for name, gradient in gradients.items():
            first = self.first.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient, 1 - BETAS[0])
            second = self.second.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient.square(), 1 - BETAS[1])
            mean = first / (1 - BETAS[0] ** self.steps)
            root = (second / (1 - BETAS[1] ** self.steps)).sqrt()
            self.logs[name].copy_(bounded(self.logs[name] - rate * mean / (root + EPSILON)))

    def tensors(self) -> dict[str, Tensor]:
        """State of the optimizer, by name, for `restore`."""
        parts = {"logs": self.logs, "first": self.first, "second": self.second}
        return {f"{SAVED}{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load the state that `tensors` returned after `steps` steps."""
        self.steps = steps
        for key, tensor in tensors.items():
            part, _, name = key.removeprefix(SAVED).partition("/")
            if part == "logs":
                self.logs[name].copy_(tensor)
            else:
                held = self.first if part == "first" else self.second
                held[name] = tensor.to(self.logs[name].device)


@dataclass
class JointDescent:
    """The optimizers of rotations and of the log scales that are learned with them, with one state.

    Attributes:
        rotations: Of the rotations.
        scales: Of the log scales.
    """

    rotations: Descent
    scales: ScaleDescent

    def step(self, gradients: Mapping[str, Tensor], slopes: Mapping[str, Tensor], length: float) -> None:
        """Step by `length` (`Descent.step`), and of log scales in proportion. slopes: gradients of log scales."""
        self.rotations.step(gradients, length)
        self.scales.step(slopes, SCALE_RATE * length)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name, for `restore`."""
        return {**self.rotations.tensors(), **self.scales.tensors()}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load the state that `tensors` returned after `steps` steps."""
        scales = {name: tensor for name, tensor in tensors.items() if name.startswith(SAVED)}
        self.rotations.restore({name: tensor for name, tensor in tensors.items() if name not in scales}, steps)
        self.scales.restore(scales, steps)
