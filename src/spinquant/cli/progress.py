"""Progress display on standard error: bars on a terminal, plain lines elsewhere (SLURM, CI, nohup).

The library reports with `report(stage, done, total, more)`. On a terminal every stage is a bar. Elsewhere a stage
prints a line when it begins, one when it ends, and one a minute in between with the amount done, the elapsed time and
the expected end; the line of each minute is printed even if the work has reported nothing since the last.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinquant.cli.output import err_console, note
from spinquant.compute.torchrun import is_first

if TYPE_CHECKING:
    from spinquant.learning.end_to_end import Step

INTERVAL = 60.0  # seconds between two lines of a stage
Report = Callable[..., None]  # (stage, done, total, more="")


@contextmanager
def stages(*, quiet: bool = False, out: Path | None = None) -> Iterator[Report]:
    """Display progress within the `with` block; yields the function report(stage, done, total, more="").

    out: the folder that the command writes atomically; a message names it when the user interrupts the command.
    """
    try:
        with _logged(quiet=quiet):
            if quiet or not is_first():
                yield lambda stage, done, total, more="": None
            elif err_console().is_terminal:
                with _bars() as report:
                    yield report
            else:
                with _lines() as report:
                    yield report
    except KeyboardInterrupt:
        if out is not None:
            note(f"interrupted: nothing was written to {out}; rerun the same command to resume")
        raise


class _Notes(logging.Handler):
    """Prints what the library logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def _logged(*, quiet: bool) -> Iterator[None]:
    """Within the block, the library's log of choices that it has made (level INFO) is printed as notes."""
    log, handler = logging.getLogger("spinquant"), _Notes(logging.INFO)
    before = log.level
    if not quiet:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@dataclass
class _Stage:
    """Last reported state of a stage. begun: time of the first report. first: amount done then, in a resumed run."""

    begun: float
    first: int
    done: int
    total: int
    more: str
    said: float
    ended: bool = False


class PlainProgress:
    """Progress as lines of text.

    write: prints a line. clock: seconds since the epoch; expected ends are shown in local time.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.time):
        self._write, self._clock = write, clock
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.Lock()  # reports come from the worker's thread, ticks from another

    def __call__(self, stage: str, done: int, total: int, more: str = "") -> None:
        """Report that `done` of `total` of a stage is done."""
        with self._lock:
            now = self._clock()
            state = self._stages.get(stage)
            if state is None or (state.ended and done < total):
                # The first report is usually that of the first finished piece.
                state = self._stages[stage] = _Stage(now, done, done, total, more, now)
                if done < total:
                    self._write(f"{stage}: started, {_amount(stage, done, total)} done{_words(more)}")
            state.done, state.total, state.more = done, total, more
            if done >= total and not state.ended:
                state.ended = True
                taken = now - state.begun
                self._write(f"{stage}: finished, {_amount(stage, done, total)} in {_duration(taken)}{_words(more)}")
        self.tick()

    def tick(self) -> None:
        """Write a line for every unfinished stage whose last line is a minute old."""
        with self._lock:
            now = self._clock()
            for name, state in self._stages.items():
                if not state.ended and now - state.said >= INTERVAL:
                    state.said = now
                    self._write(f"{name}: {self._status(name, state, now)}")

    def _status(self, name: str, state: _Stage, now: float) -> str:
        elapsed, gained = now - state.begun, state.done - state.first
        percent = 100 * state.done // state.total if state.total else 100
        speed = gained / elapsed if elapsed > 0 else 0.0
        text = f"{_amount(name, state.done, state.total, speed)} ({percent} %), {_duration(elapsed)} elapsed, "
        if gained <= 0:
            return f"{text}end unknown yet{_words(state.more)}"
        left = (state.total - state.done) / speed
        here, end = datetime.fromtimestamp(now), datetime.fromtimestamp(now) + timedelta(seconds=left)
        at = end.strftime("%H:%M" if end.date() == here.date() else "%Y-%m-%d %H:%M")
        return f"{text}{_duration(left)} left, expected end {at}{_words(state.more)}"


@contextmanager
def _lines() -> Iterator[PlainProgress]:
    console = err_console()
    progress = PlainProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL / 4):
            progress.tick()

    thread = threading.Thread(target=watch, name="spinquant-progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join()


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console(), transient=True) as bars:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def report(stage: str, done: int, total: int, more: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, amount="")
                begun[stage] = time.monotonic(), done
            start, first = begun[stage]
            amount = _amount(stage, done, total, (done - first) / max(time.monotonic() - start, 1e-3))
            description = f"{stage} {more}".rstrip()
            bars.update(tasks[stage], completed=done, total=total, amount=amount, description=description)

        yield report


def step_report(progress: Report) -> Callable[[str, "Step", int], None]:
    """Callback that reports the steps of end-to-end learning to a progress display."""

    def report_step(name: str, step: "Step", steps: int) -> None:
        speed = f"{step.tokens_per_second:.0f} tokens/s, off orthogonal by {step.orthogonality:.0e}"
        progress(f"learn {name}", step.number, steps, f"loss {step.loss:.4f}, {speed}")

    return report_step


def _amount(stage: str, done: int, total: int, speed: float = 0.0) -> str:
    """The amount done as text: a count, or for the stream bytes and bytes per second."""
    from spinquant.entrypoints.stream import STREAMED  # imported here since it imports torch

    if stage != STREAMED:
        return f"{done}/{total}"
    amount = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
    return f"{amount}, {speed / 1e6:.0f} MB/s" if speed else amount


def _duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _words(more: str) -> str:
    return f"; {more}" if more else ""
