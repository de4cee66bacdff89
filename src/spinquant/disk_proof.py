"""Real tokens through two checkpoints at once, decoder block by decoder block: did rotating change the function?

One block is in memory at a time, first with the weights of the original, then with those of the rotated model. Outputs
of the plan's modules are compared on the way, each rotated as its space is, so that the first to depart can be named.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinquant.blocks import after_blocks, block_calls, run_block
from spinquant.calibrate import captured
from spinquant.disk_model import Weights, filled, hollow_model
from spinquant.fuse import rotate_axis
from spinquant.online import attach
from spinquant.plan import Plan
from spinquant.proof import TOLERANCE, Deviation, Float64Arithmetic, difference, output_axis
from spinquant.rotation import Rotation


@torch.no_grad()
def compare_on_disk(
    config: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    before: Weights,
    after: Weights,
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    tolerance: float,
    online: Mapping[str, Rotation] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Deviation:
    """How far logits of the tokens, (1, length), move from one checkpoint to the other, computed in `dtype`.

    tolerance: relative error beyond which a module departs. online: rotations of `after` that are applied at run time.
    """
    ties = {tie.tensor: tie.source for tie in plan.ties}
    walks = [_Walk(config, plan, source, ties, tokens, dtype) for source in (before, after)]
    model = walks[0].model
    if online:
        attach(walks[1].model, plan, online)
    departed: str | None = None
    total = len(plan.blocks) + 1
    for done, block in enumerate(plan.blocks):
        names = [name for group in plan.linears for name in group if name.startswith(f"{block}.")]
        first, second = (walk.step(block, names) for walk in walks)
        for name in names if departed is None else ():
            if name not in first:
                continue
            axis, expected = output_axis(model, plan, name), first[name]
            if axis is not None and axis.space in rotations:
                expected = rotate_axis(expected, -1, rotations[axis.space], axis.span)
            if not difference(expected, second[name]).relative <= tolerance:
                departed = name
                break
        if progress:
            progress(done + 1, total)
    deviation = difference(*(walk.logits() for walk in walks))
    if progress:
        progress(total, total)
    if deviation.relative <= tolerance:
        return deviation
    return replace(deviation, module=departed or plan.head.removesuffix(".weight"))


class _Walk:
    """Hidden states on their way through one checkpoint."""

    def __init__(
        self, config: Any, plan: Plan, source: Weights, ties: Mapping[str, str], tokens: Tensor, dtype: torch.dtype
    ):
        self.plan, self.source, self.ties, self.dtype = plan, source, ties, dtype
        self.model = hollow_model(config, dtype)
        with self._filled(self._outside()), self._arithmetic():
            calls = block_calls(self.model, plan.blocks, tokens)
        self.states, self.arguments = calls.hidden[0], calls.arguments

    def step(self, block: str, names: list[str]) -> dict[str, Tensor]:
        """Move the states through a block; outputs of the modules in it, in order of execution."""
        weights = [name for name in self.model.state_dict() if name.startswith(f"{block}.")]
        with self._filled(weights), self._arithmetic(), captured(self.model, names) as outputs:
            self.states = run_block(self.model.get_submodule(block), self.states, self.arguments[block])
        return outputs

    def logits(self) -> Tensor:
        """What the head makes of the states."""
        with self._filled(self._outside()), self._arithmetic():
            states = after_blocks(self.model, self.plan.blocks, self.states)
        with self._filled([self.plan.head]), self._arithmetic():
            return self.model.get_submodule(self.plan.head.removesuffix(".weight"))(states)

    def _outside(self) -> list[str]:
        blocks = tuple(f"{block}." for block in self.plan.blocks)
        return [name for name in self.model.state_dict() if not name.startswith(blocks) and name != self.plan.head]

    def _filled(self, names: list[str]) -> AbstractContextManager[None]:
        return filled(self.model, names, self.source, self.ties, self.dtype)

    def _arithmetic(self) -> AbstractContextManager[object]:
        return Float64Arithmetic() if self.dtype == torch.float64 else nullcontext()


def tolerance_of(dtype: torch.dtype) -> float:
    """What rounding explains in a dtype."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])
