"""What `learn` with a budget tries: random rotations, closed form, local, end-to-end learning, each if it ends in time.

The transforms that depend on the rotations come last, and their time is set aside before anything else is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spinquant.learning.budget import Budget
from spinquant.learning.end_to_end import EndToEndOptions
from spinquant.learning.free_transforms import Kind, free_spaces
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.step_times import StepTimes

LEAST_LOCAL, LEAST_END_TO_END = 40, 8  # steps below which learning is not started


@dataclass
class Allowed:
    """The decisions of one run, each made when it is asked for. Without a budget everything is allowed.

    Attributes:
        budget: The time.
        times: Estimates.
        last: Kinds of transforms that are computed after learning; none if they are not wanted.
    """

    budget: Budget
    times: StepTimes
    last: Sequence[Kind] = ()

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return self.budget.seconds is not None

    def baselines(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """As many of the random rotations as can be scored in time, and always one."""
        times = self.times
        fixed = lambda: times.baselines - times.scoring  # noqa: E731
        what = "random rotations"
        count = self.budget.steps(what, len(wanted), 1, lambda: times.scoring, fixed)
        if not count:
            self.budget.left_out[what] = f"1 of {len(wanted)}: the budget is too short to score one in time"
        return dict(list(wanted.items())[: max(1, count)])

    def closed_form(self, kinds: Sequence[Kind]) -> bool:
        """Whether transforms of some kinds can be computed and tried in time."""
        if not self._spaces(kinds):
            return True
        name = "closed form after learning" if kinds == self.last else "closed form"
        return self.budget.fits(name, lambda: self._transforms(kinds), self.times.least_closed_form)

    def local(self, options: LocalOptions) -> LocalOptions | None:
        """The options of local learning with as many steps as end in time; None if it is left out."""
        times = self.times
        rest = lambda: times.judging() + self._transforms(self.last)  # noqa: E731
        fixed = lambda: times.capturing() + times.local_rest + rest()  # noqa: E731
        steps = self.budget.steps(
            "local", options.steps, min(LEAST_LOCAL, options.steps), lambda: times.local_step, fixed, rest
        )
        return replace(options, steps=steps) if steps else None

    def end_to_end(self, options: EndToEndOptions) -> EndToEndOptions | None:
        """The options of end-to-end learning with as many steps as end in time; None if it is left out."""
        times = self.times
        rest = lambda: times.judging() + self._transforms(self.last)  # noqa: E731
        fixed = lambda: times.end_to_end_rest + rest()  # noqa: E731
        steps = self.budget.steps(
            "end-to-end",
            options.steps,
            min(LEAST_END_TO_END, options.steps),
            lambda: times.end_to_end_step,
            fixed,
            rest,
        )
        return replace(options, steps=steps) if steps else None

    def _spaces(self, kinds: Sequence[Kind]) -> dict[Kind, list[str]]:
        times = self.times
        found = free_spaces(times.plan, times.rotations, times.scheme)
        return {kind: spaces for kind, spaces in found.items() if kind in kinds}

    def _transforms(self, kinds: Sequence[Kind]) -> float:
        return self.times.closed_form(self._spaces(kinds))
