"""Measure figures in processes of their own, several at a time, and keep each in a file as soon as it is there."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol


class Figures:
    """Figures by name, kept in a file: a line with the settings, then a line for each figure."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings, self.lock = path, settings, threading.Lock()
        self.found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            path.write_text(json.dumps({"settings": settings}) + "\n")
        known, *lines = (json.loads(line) for line in path.read_text().splitlines())
        if known["settings"] != settings:
            raise SystemExit(
                f"{path} has figures with {known['settings']}, and this run asks for {settings}: use its settings, or "
                "another --out"
            )
        for line in lines:
            self.found[line["key"]] = line["figure"]

    def add(self, key: str, figure: dict[str, Any]) -> None:
        """Add a figure; perplexities of other texts are kept."""
        with self.lock:
            if "perplexity" in figure:
                figure["perplexity"] |= self.found.get(key, {}).get("perplexity", {})
            self.found[key] = figure
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "figure": figure}) + "\n")
            shown = ("kept", "rotations", "refused", "perplexity", "total_seconds")
            print(f"{key:44} {json.dumps({k: v for k, v in figure.items() if k in shown})}", flush=True)

    def lacks(self, key: str, texts: Sequence[str]) -> list[str]:
        """The texts that a figure was not measured on."""
        return [text for text in texts if text not in self.found.get(key, {}).get("perplexity", {})]


class Unit(Protocol):
    """What is measured in one process.

    key: the beginning of the names of its figures. before: keys of units whose first figure has to be there. tasks:
    (name, kind, job) of its figures that are missing; what comes before it is measured by then.
    """

    @property
    def key(self) -> str: ...

    @property
    def before(self) -> Sequence[str]: ...

    def tasks(self, figures: Figures) -> Iterable[tuple[str, str, Any]]: ...


class Pool:
    """Measures units, several at a time, each in a process of its own, until the time is over.

    script: run as `python SCRIPT --worker WORK`, WORK being tasks of a unit and the settings as JSON; prints figures as
    JSON, {"key": .., "figure": ..}, one a line. minutes: None for no limit.
    """

    def __init__(self, figures: Figures, script: str, *, jobs: int, minutes: float | None):
        self.figures, self.script, self.jobs, self.minutes = figures, script, jobs, minutes
        self.learned: dict[str, threading.Event] = {}
        self.running: set[subprocess.Popen[str]] = set()
        self.over = threading.Event()
        self.failed: list[str] = []

    def run(self, units: Sequence[Unit]) -> None:
        """Measure units in this order."""
        self.learned = {unit.key: threading.Event() for unit in units}
        timer = threading.Timer(60 * self.minutes, self._stop) if self.minutes else None
        if timer:
            timer.start()
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._measure, units))
        if timer:
            timer.cancel()

    def _stop(self) -> None:
        self.over.set()
        for event in self.learned.values():
            event.set()
        for process in list(self.running):
            process.kill()

    def _measure(self, unit: Unit) -> None:
        try:
            for other in unit.before:  # they come earlier, so they are running or done
                if other in self.learned:
                    self.learned[other].wait()
            if not self.over.is_set():
                self._work(unit)
        except SystemExit as error:
            self.failed.append(f"{unit.key}: {error}")
        finally:
            self.learned[unit.key].set()

    def _work(self, unit: Unit) -> None:
        tasks = list(unit.tasks(self.figures))
        if not tasks:
            return
        if tasks[0][1] != "learn":
            self.learned[unit.key].set()
        work = json.dumps([tasks, self.figures.settings])
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, self.script, "--worker", work]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            self.running.add(process)
            if self.over.is_set():
                process.kill()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"key"') and line.endswith("\n"):
                    self.figures.add(**json.loads(line))
                    self.learned[unit.key].set()
            self.running.discard(process)
            if process.wait() and not self.over.is_set():
                errors.seek(0)
                raise SystemExit(f"failed:\n{errors.read()[-3000:]}")
