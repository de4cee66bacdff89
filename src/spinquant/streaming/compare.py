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

from spinquant.calibration.sequential import after_blocks, block_calls, check_finite_output, run_block
from spinquant.evaluation.equivalence import (
    Deviation,
    Float64Arithmetic,
    computing_modules,
    difference,
    expected_output,
)
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.capture import captured
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.rotations.rotation import Rotation
from spinquant.streaming.offloaded_model import OnDisk, Weights


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

    plan: of the checkpoints. tolerance: relative error beyond which a module departs. online: rotations of `after`
    that are applied at run time. Raises CalibrationError, naming it, for a weight of `before` that is not finite.
    """
    walks = [_Walk(config, plan, source, tokens, dtype, plain=source is before) for source in (before, after)]
    model, plan = walks[0].home.model, walks[0].home.plan
    if online:
        attach(walks[1].home.model, plan, online)
    compared = computing_modules(plan)
    departed: str | None = None
    total = len(plan.blocks) + 1
    for done, block in enumerate(plan.blocks):
        names = [name for name in compared if name.startswith(f"{block}.")]
        first, second = (walk.step(block, names) for walk in walks)
        for name in first if departed is None else ():
            expected = expected_output(model, plan, rotations, name, first[name])
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
    """Hidden states on their way through one checkpoint. plain: the one that is not rotated."""

    def __init__(self, config: Any, plan: Plan, source: Weights, tokens: Tensor, dtype: torch.dtype, *, plain: bool):
        self.home, self.dtype, self.plain = OnDisk(config, plan, source, dtype), dtype, plain
        self.plan = self.home.plan
        if dtype == torch.float64:
            exact_experts(self.home.model)
            self.home.widen()
        with self.home.outside(tokens), self._arithmetic():
            calls = block_calls(self.home.model, plan.blocks, tokens)
        self.states, self.arguments = calls.hidden[0], calls.arguments

    def step(self, block: str, names: list[str]) -> dict[str, Tensor]:
        """Move the states through a block; outputs of the modules in it, in order of execution."""
        model = self.home.model
        with self.home.block(block), self._arithmetic(), captured(model, names) as outputs:
            module, before = model.get_submodule(block), self.states
            self.states = run_block(module, before, self.arguments[block])
            if self.plain:  # it is no rotation that spoils a model which is spoilt already
                check_finite_output(module, block, before, self.arguments[block], self.states)
        return outputs

    def logits(self) -> Tensor:
        """What the head makes of the states."""
        model = self.home.model
        with self.home.outside(torch.zeros(1, 1, dtype=torch.int64)), self._arithmetic():
            states = after_blocks(model, self.plan.blocks, self.states)
        with self.home.head(), self._arithmetic():
            head = model.get_submodule(self.plan.head.removesuffix(".weight"))
            return head(states.to(head.weight.dtype))  # Mamba's residual stream is wider than its weights

    def _arithmetic(self) -> AbstractContextManager[object]:
        return Float64Arithmetic() if self.dtype == torch.float64 else nullcontext()
