"""How far rounding alone moves a model's logits: what a comparison has to allow a model that is ill conditioned.

A rotated weight is rounded once more, and sums are made of other numbers. What that does to logits is a matter of the
model: in most, errors stay as small as they begin; through the recurrence of a Mamba 2 with large steps they grow by a
factor of a thousand. So the original is held against itself with every number of its weights moved to a neighbour, up
or down at random: a model that is as good as the original in that dtype. How far its logits are from the original's is
the scale on which a rotated model is judged (`proof.allowed`). Nothing of it depends on the rotated model, so that a
wrong fusion cannot widen it.
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
    """How far, relative, logits of tokens move when the weights of a checkpoint are moved to neighbours.

    dtype: of the arithmetic; written: the narrowest that the rotated weights are stored in.
    """
    neighbours = Neighbours(source, written)
    return compare_on_disk(config, plan, {}, source, neighbours, tokens, dtype=dtype, tolerance=inf).relative
