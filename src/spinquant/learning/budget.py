"""The time that `learn` with method auto may take: each method runs only if it ends in time, with its steps cut to fit.

Times are estimated from measured ones (`step_times.py`). What was decided is kept with the run, so that a rerun decides
alike, and the time spent before an interruption counts.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.learning.options import Watch

clock: Callable[[], float] = time.monotonic  # the only clock of a budget
PIECE = "budget"  # name of the saved state (`Pieces`)
SAVED = 5.0  # seconds between two saves of the time spent
MARGIN = 1.15  # estimates are multiplied by it: steps vary, and scores differ in how many clip ratios they try
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str | None) -> float | None:
    """Seconds of a duration such as 90s, 10m or 1h. Raises LearningError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise LearningError(f"cannot read the budget {text!r}: expected a time such as 90s, 10m or 1h (--budget)")
    return float(match.group(1)) * UNITS[match.group(2)]


def duration(seconds: float) -> str:
    """Seconds for people: 2.5 s, 12 s, 3.5 min, 2.1 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass
class Budget:
    """The time of one call of `learn`, and what was decided by it.

    Attributes:
        seconds: What the user gives; None for no limit.
        pieces: Where the state is saved.
        decided: Steps (or 1) by what was asked for, 0 for what was left out.
        left_out: Why, by what was left out or cut.
        before: Seconds spent by interrupted runs.
    """

    seconds: float | None = None
    pieces: Pieces | None = None
    decided: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    before: float = 0.0
    begun: float = field(default_factory=lambda: clock())
    saved: float = -math.inf

    def __post_init__(self):
        kept = self.pieces.load(PIECE) if self.pieces and self.seconds is not None else None
        if kept is not None:
            self.before, self.decided, self.left_out = (kept[1][name] for name in ("spent", "decided", "left_out"))

    @property
    def spent(self) -> float:
        """Seconds spent so far, with those of interrupted runs."""
        return self.before + clock() - self.begun

    @property
    def left(self) -> float:
        """Seconds left."""
        return math.inf if self.seconds is None else self.seconds - self.spent

    def fits(self, what: str, needed: Callable[[], float], least: Callable[[], float] = lambda: 0.0) -> bool:
        """Whether something ends in time. needed: estimates its seconds. least: the same, from what is measured."""
        return self.steps(what, 1, 1, lambda: 0.0, needed, least) > 0

    def steps(
        self,
        what: str,
        wanted: int,
        least: int,
        each: Callable[[], float],
        fixed: Callable[[], float],
        least_fixed: Callable[[], float] = lambda: 0.0,
        *,
        share: float = 1.0,
        unit: str = "steps",
    ) -> int:
        """The number of steps that end in time: at most `wanted`; 0 if fewer than `least` do.

        Args:
            what: what the steps are of, as it is named to the user.
            wanted: number of steps without a limit.
            least: number of steps below which it is not worth starting.
            each: estimates the seconds of a step.
            fixed: estimates the seconds of everything else, such as scoring the result.
            least_fixed: the same, without what has to be measured first.
            share: part of the whole budget that they may take.
            unit: what is counted, as it is named to the user.
        """
        if self.seconds is None:
            return wanted
        if what not in self.decided:
            left, found, why = min(self.left, share * self.seconds), 0, "left out: no time was left"
            rest = MARGIN * least_fixed() if _agreed(int(left > 0)) else math.inf  # measuring takes time, too
            if rest < math.inf:
                why = f"left out: it takes about {duration(rest)} or more, and {duration(left)} were left"
            if _agreed(int(left > rest)):
                need, step = MARGIN * fixed(), MARGIN * each()
                most = wanted if step <= 0 else math.floor((left - need) / step)
                found = _agreed(0 if need > left or most < least else min(wanted, most))
                why = f"left out: it takes about {duration(need + least * step)}, and {duration(left)} were left"
            if found < wanted:
                cut = f"{found} of {wanted} {unit}: {duration(left)} were left"
                self.left_out[what] = cut if found else why
            self.decided[what] = found
            self._save()
        return self.decided[what]

    def watching(self, watch: Watch) -> Watch:
        """The progress callbacks, which now and then save the time spent as well."""
        if self.seconds is None or self.pieces is None:
            return watch

        def stage(name: str, done: int, total: int) -> None:
            self._tick()
            watch.stage(name, done, total)

        def step(name: str, one: Any, steps: int) -> None:
            self._tick()
            watch.step(name, one, steps)

        return Watch(stage, step)

    def to_record(self) -> Mapping[str, Any]:
        """The budget for a record: {} without one."""
        if self.seconds is None:
            return {}
        self._save()
        return {"budget": {"seconds": self.seconds, "spent": round(self.spent, 1), "left_out": self.left_out}}

    def _tick(self) -> None:
        if clock() - self.saved >= SAVED:
            self._save()

    def _save(self) -> None:
        self.saved = clock()
        if self.pieces is not None:
            about = {"spent": self.spent, "decided": self.decided, "left_out": self.left_out}
            self.pieces.save(PIECE, {}, about)


def _agreed(number: int) -> int:
    """The number that the first of several processes has found."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(number, device=device)
    dist.broadcast(tensor, 0)
    return int(tensor)
