"""Rounding noise: how far weight rounding alone moves a model's logits, to set the tolerance of ill-conditioned models.

A rotated weight is rounded once more, and sums have other terms. The effect on the logits depends on the model: in most
models errors stay small; in the recurrence of a Mamba 2 with large steps they grow by a factor of a thousand. So the
original is compared with a copy of itself in which every number of the weights is moved to a neighbour in the dtype, up
or down at random, which is as accurate a model as the original. The distance of their logits sets the tolerance for the
rotated model (`evaluation.equivalence.allowed`). It does not depend on the rotated model, so a wrong fusion cannot
widen it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from spinquant.checkpoint.reader import Stored
from spinquant.plan import Plan
from spinquant.streaming.compare import compare_on_disk
from spinquant.streaming.offloaded_model import Weights


@dataclass(frozen=True)
class Neighbours:
    """A checkpoint with every number of its weights moved to a neighbour in a dtype, up or down at random."""

    source: Weights
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.source.tensors

    def whole(self, name: str) -> Tensor:
        return self._moved(name, 0, self.source.whole(name))

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for first, rows in self.source.parts(name):
            yield first, self._moved(name, first, rows)

    def _moved(self, name: str, first: int, rows: Tensor) -> Tensor:
        if not rows.is_floating_point():
            return rows
        generator = torch.Generator().manual_seed(crc32(f"{name} {first}".encode()))
        down = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.uint8).bool()
        step = max(torch.finfo(self.dtype).eps, torch.finfo(rows.dtype).eps)
        below, above = (torch.tensor(factor, dtype=rows.dtype) for factor in (1 - step, 1 + step))
        return rows * torch.where(down, below, above)


def rounding_on_disk(
    config: Any, plan: Plan, source: Weights, tokens: Tensor, *, dtype: torch.dtype, written: torch.dtype
) -> float:
    """Relative change of the logits when every number of the weights is moved to a neighbour.

    Args:
        config: config of the model.
        plan: plan of the checkpoint.
        source: the original checkpoint.
        tokens: int64, (1, length).
        dtype: dtype of the arithmetic.
        written: the narrowest dtype that the rotated weights are stored in.
    """
    neighbours = Neighbours(source, written)
    return compare_on_disk(config, plan, {}, source, neighbours, tokens, dtype=dtype, tolerance=inf).relative
