"""Compare the logits of a rotated checkpoint with the original's on real tokens, one decoder block at a time.

Hidden states of both models advance together; one block is in memory at a time, first with the original's weights, then
with the rotated ones. Outputs of the plan's modules are compared on the way, each rotated as its space is, so that the
first module that deviates can be named.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinquant.calibration.sequential import after_blocks, block_calls, check_finite_output, run_block
from spinquant.evaluation.equivalence import (
    Deviation,
    Float64Arithmetic,
    computing_modules,
    difference,
    expected_output,
    last_module,
)
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.capture import captured
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.rotations.rotation import Transform
from spinquant.streaming.offloaded_model import OnDisk, Weights


@torch.no_grad()
def compare_on_disk(
    config: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    before: Weights,
    after: Weights,
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    tolerance: float,
    online: Mapping[str, Transform] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Deviation:
    """Difference of two checkpoints' logits, and the first module that deviates.

    Args:
        config: config of the model.
        plan: plan of the checkpoints.
        rotations: rotations by space, by which `after` differs from `before`.
        before: the original checkpoint.
        after: the rotated one.
        tokens: int64, (1, length).
        dtype: dtype of the arithmetic.
        tolerance: relative error of a module's output beyond which it deviates.
        online: rotations of `after` that run online.
        progress: called with (blocks done, blocks in all), the head counted as a block.

    Raises:
        CalibrationError: a weight of `before` is not finite; the message names it.
    """
    walks = [_Walk(config, plan, source, tokens, dtype, plain=source is before) for source in (before, after)]
    model, plan = walks[0].home.model, walks[0].home.plan
    if online:
        attach(walks[1].home.model, plan, online)
    compared = computing_modules(plan)
    deviating: str | None = None
    total = len(plan.blocks) + 1
    for done, block in enumerate(plan.blocks):
        names = [name for name in compared if name.startswith(f"{block}.")]
        first, second = (walk.step(block, names) for walk in walks)
        for name in first if deviating is None else ():
            expected = expected_output(model, plan, rotations, name, first[name])
            if not difference(expected, second[name]).relative <= tolerance:
                deviating = name
                break
        if progress:
            progress(done + 1, total)
    deviation = difference(*(walk.logits() for walk in walks))
    if progress:
        progress(total, total)
    if deviation.relative <= tolerance:
        return deviation
    return replace(deviation, module=deviating or last_module(plan))


class _Walk:
    """Hidden states of one checkpoint, advanced block by block. plain: the original, not the rotated one."""

    def __init__(self, config: Any, plan: Plan, source: Weights, tokens: Tensor, dtype: torch.dtype, *, plain: bool):
        self.home, self.dtype, self.plain = OnDisk(config, plan, source, dtype), dtype, plain
        self.plan = self.home.plan
        if dtype == torch.float64:
            exact_experts(self.home.model)
            self.home.widen()
        with self.home.outside(tokens), self._arithmetic():
            calls = block_calls(self.home.model, plan.blocks, tokens)
        self.states = calls.hidden[0]
        self.arguments = {block: found[0] for block, found in calls.arguments.items()}

    def step(self, block: str, names: list[str]) -> dict[str, Tensor]:
        """Advance the states through a block; returns outputs of its modules in order of execution."""
        model = self.home.model
        with self.home.block(block), self._arithmetic(), captured(model, names) as outputs:
            module, before = model.get_submodule(block), self.states
            self.states = run_block(module, before, self.arguments[block])
            if self.plain:  # an error in the original is not blamed on the rotation
                check_finite_output(module, block, before, self.arguments[block], self.states)
        return outputs

    def logits(self) -> Tensor:
        """The logits of the states; without a head, the states after the last norm."""
        model = self.home.model
        with self.home.outside(torch.zeros(1, 1, dtype=torch.int64)), self._arithmetic():
            states = after_blocks(model, self.plan.blocks, self.states)
        if not self.plan.heads:
            return states
        with self.home.head(), self._arithmetic():
            head = model.get_submodule(self.plan.heads[0])
            return head(states.to(head.weight.dtype))  # Mamba's residual stream is wider than its weights

    def _arithmetic(self) -> AbstractContextManager[object]:
        return Float64Arithmetic() if self.dtype == torch.float64 else nullcontext()
