"""Invertible transforms that are no rotations."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinquant.rotations.rotation import check_blocks


@dataclass(frozen=True, eq=False)
class Diagonal:
    scale: Tensor
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.scale.shape[-1]

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        dim %= x.ndim
        scale = self.scale.to(x.device, torch.promote_types(x.dtype, torch.float32)).reshape(-1, self.order)
        blocks = x.shape[dim] // self.order
        factors = scale.repeat_interleave(blocks // len(scale), 0).reshape(-1)
        y = (x * factors.view(-1, *[1] * (x.ndim - dim - 1))).to(x.dtype)
        return y if out is None else out.copy_(y)

    def dual(self) -> "Diagonal":
        return Diagonal(1 / self.scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def describe(self) -> dict[str, Any]:
        return {"kind": "diagonal", "order": self.order, "construction": "diagonal"}
