"""What the command line shows: tables and JSON on standard output, progress and errors on standard error."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spinquant.compute.distributed import is_first
from spinquant.entrypoints.stream import STREAMED
from spinquant.learning.end_to_end import Step

out_console, err_console = Console(), Console(stderr=True)


@contextmanager
def stages() -> Iterator[Any]:
    """A progress display: a function of (stage, done, total, more words), one bar per stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, transient=True, disable=not is_first()) as bars:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def report_stage(stage: str, done: int, total: int, more: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, amount="")
                begun[stage] = time.monotonic(), done
            start, first = begun[stage]
            amount = _amount(stage, done, total, (done - first) / max(time.monotonic() - start, 1e-3))
            description = f"{stage} {more}".rstrip()
            bars.update(tasks[stage], completed=done, total=total, amount=amount, description=description)

        yield report_stage


def _amount(stage: str, done: int, total: int, speed: float) -> str:
    """How much of a stage is done: a count, or bytes and how many of them in a second."""
    if stage != STREAMED:
        return f"{done}/{total}"
    return f"{done / 1e9:.2f}/{total / 1e9:.2f} GB, {speed / 1e6:.0f} MB/s"


def print_result(as_json: bool, data: dict[str, Any], table: Any) -> None:
    """The table, or the data as JSON; of several processes the first one prints."""
    if not is_first():
        return
    if as_json:
        print_json(data)
    else:
        out_console.print(table)


def print_json(data: dict[str, Any]) -> None:
    """Data as JSON, null where a number is not finite."""
    print(json.dumps(_finite(data), indent=1, default=dict))


def _finite(data: Any) -> Any:
    """The same data with null where a number is not finite, which JSON cannot say."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def step_report(progress: Any) -> Callable[[str, Step, int], None]:
    """What a progress display shows of the steps of learning end to end."""

    def report_step(name: str, step: Step, steps: int) -> None:
        speed = f"{step.tokens_per_second:.0f} tokens/s, off orthogonal by {step.orthogonality:.0e}"
        progress(f"learn {name}", step.number, steps, f"loss {step.loss:.4f}, {speed}")

    return report_step
