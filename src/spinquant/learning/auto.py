"""What `learn` with a budget tries: random rotations, closed form, local, end-to-end learning, each if it ends in time.

Random rotations take a third of the time at most, since closed forms gain more. The transforms that depend on the
rotations come last, and their time is set aside before anything else is learned. Where the time is too short for
learning, all transforms are computed at once, from one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spinquant.learning.budget import Budget
from spinquant.learning.end_to_end import EndToEndOptions
from spinquant.learning.free_transforms import KINDS, Kind, free_spaces
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.step_times import StepTimes

FIRST: tuple[Kind, ...] = ("scales", "values", "keys")  # transforms that rotations are learned after
REST: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in FIRST)
LEAST_LOCAL, LEAST_END_TO_END = 40, 8  # steps below which learning is not started
LEAST_SAMPLES = 4  # samples for moments below which there is no closed form
RANDOM_SHARE = 1 / 3  # of the budget, for random rotations
CLOSED, LEARNING = "closed form", "learning after the closed form"  # decisions


@dataclass
class Allowed:
    """The decisions of one run, each made when it is asked for. Without a budget everything is allowed.

    Attributes:
        budget: The time.
        times: Estimates.
        last: Kinds of transforms that are computed after learning; none if they are not wanted, or do not depend on it.
    """

    budget: Budget
    times: StepTimes
    last: Sequence[Kind] = ()

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return self.budget.seconds is not None

    def baselines(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """As many of the random rotations as can be scored in a third of the time, and always one."""
        times = self.times
        fixed = lambda: times.baselines - times.scoring  # noqa: E731
        what = "random rotations"
        share: dict[str, Any] = {"share": RANDOM_SHARE, "unit": "rotations"}
        count = self.budget.steps(what, len(wanted), 1, lambda: times.scoring, fixed, **share)
        if not count:
            self.budget.left_out[what] = f"1 of {len(wanted)}: a third of the budget is too short to score one in time"
        return dict(list(wanted.items())[: max(1, count)])

    def first_kinds(self) -> Sequence[Kind]:
        """The kinds of transforms that are computed before learning: all if none depends on it, or it has no time."""
        if not self.last:
            return KINDS
        if not self.is_limited:
            return FIRST
        times = self.times

        def rest(forward: float, backward: float, transforms: float) -> float:
            captured = times.row_samples * (backward if times.options.differentiates else forward)
            through = LEAST_END_TO_END * times.options.end_to_end.batch * backward
            return min(captured, through) + times.judging() + transforms

        def least() -> float:
            return rest(times.window, times.window, 2 * times.least_closed_form(self._least_samples))

        def needed() -> float:
            return rest(times.window, times.backward, self._transforms(FIRST) + self._transforms(self.last))

        return FIRST if self.budget.fits(LEARNING, needed, least) else KINDS

    def closed_form(self, kinds: Sequence[Kind]) -> int:
        """The number of samples from which transforms of some kinds are computed and tried in time; 0 if none are."""
        times, spaces = self.times, self._spaces(kinds)
        if not spaces:
            return times.moment_samples
        return self.budget.steps(
            "closed form after learning" if kinds == self.last else CLOSED,
            times.moment_samples,
            self._least_samples,
            lambda: times.moments(spaces),
            lambda: times.closed_form(spaces, 0),
            lambda: times.least_closed_form(self._least_samples),
            unit="samples",
        )

    def own_clips(self, name: str) -> bool:
        """Whether clip ratios can be searched for a candidate with transforms, which has those of another one."""
        times = self.times  # with both ratios it may see all windows
        return self.budget.fits(f"clip ratios of {name}", lambda: times.judging() + times.all_windows)

    @property
    def is_over(self) -> bool:
        """Whether all transforms were computed at once, and nothing is learned after them."""
        decided = self.budget.decided
        return decided.get(LEARNING) == 0 and decided.get(CLOSED, 0) > 0

    def local(self, options: LocalOptions) -> LocalOptions | None:
        """The options of local learning with as many steps as end in time; None if it is left out."""
        if self.is_over:
            return None
        times = self.times
        fixed = lambda: times.capturing() + times.local_rest + self._after()  # noqa: E731
        steps = self.budget.steps(
            "local",
            options.steps,
            min(LEAST_LOCAL, options.steps),
            lambda: times.local_step,
            fixed,
            self._least_after,
        )
        return replace(options, steps=steps) if steps else None

    def end_to_end(self, options: EndToEndOptions) -> EndToEndOptions | None:
        """The options of end-to-end learning with as many steps as end in time; None if it is left out."""
        if self.is_over:
            return None
        times = self.times
        fixed = lambda: times.end_to_end_rest + self._after()  # noqa: E731
        steps = self.budget.steps(
            "end-to-end",
            options.steps,
            min(LEAST_END_TO_END, options.steps),
            lambda: times.end_to_end_step,
            fixed,
            self._least_after,
        )
        return replace(options, steps=steps) if steps else None

    def _spaces(self, kinds: Sequence[Kind]) -> dict[Kind, list[str]]:
        times = self.times
        found = free_spaces(times.plan, times.rotations, times.scheme)
        return {kind: spaces for kind, spaces in found.items() if kind in kinds}

    @property
    def _least_samples(self) -> int:
        return min(LEAST_SAMPLES, self.times.moment_samples)

    def _after(self) -> float:
        """Seconds of what follows learning: scoring the result, and the transforms that come last."""
        return self.times.judging() + self._transforms(self.last)

    def _least_after(self) -> float:
        """The same at least, from what is measured already."""
        last = self._spaces(self.last)
        return self.times.judging() + (self.times.least_closed_form(self._least_samples) if last else 0.0)

    def _transforms(self, kinds: Sequence[Kind]) -> float:
        """Seconds of computing transforms and trying them, from the least number of samples."""
        return self.times.closed_form(self._spaces(kinds), self._least_samples)
