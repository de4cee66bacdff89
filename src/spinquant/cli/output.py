"""Results, notes and errors: tables and JSON on standard output, everything else on standard error."""

import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinquant.compute.torchrun import is_first
from spinquant.errors import CheckpointError

if TYPE_CHECKING:  # rich takes a third of the time of `--version`
    from rich.console import Console


def out_console() -> "Console":
    """Standard output, for tables."""
    from rich.console import Console

    return Console()


def err_console() -> "Console":
    """Standard error, for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True)


def print_error(message: str) -> None:
    """One line on standard error."""
    console = err_console()
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def note(message: str, *, quiet: bool = False) -> None:
    """Print a line on standard error that needs no action; of several processes only the first prints it."""
    if is_first() and not quiet:
        err_console().print(message, markup=False, highlight=False, soft_wrap=True)


def print_result(as_json: bool, data: dict[str, Any], table: Any) -> None:
    """Print the table, or the data as JSON; of several processes only the first prints."""
    if not is_first():
        return
    if as_json:
        print_json(data)
    else:
        out_console().print(table)


def print_json(data: dict[str, Any]) -> None:
    """Print data as JSON, with null for numbers that are not finite."""
    print(json.dumps(_finite(data), indent=1, default=dict), flush=True)


class Output:
    """Standard output that may be closed, or full, or read by a process that has ended (such as `head`).

    `print`, typer and rich write to it. `write` and `flush` end the command with exit code 1 for a reader that has
    ended, and otherwise raise CheckpointError if nothing can be written.

    file: None if standard output is closed.
    """

    def __init__(self, file: Any):
        self._file: Any = file

    def write(self, text: str) -> int:
        return self._checked(lambda file: file.write(text))

    def flush(self) -> None:
        if self._file is not None:
            self._checked(lambda file: file.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_file"] or sys.__stderr__, name)

    def _checked(self, action: Callable[[Any], Any]) -> Any:
        file: Any = self._file
        try:
            if file is None:
                raise OSError(errno.EBADF, "it is closed")
            return action(file)
        except OSError as error:
            if file is not None:
                # Python flushes standard output once more at exit, and would fail again.
                with suppress(AttributeError, OSError, ValueError):  # a file of Python alone
                    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(1) from None
            raise CheckpointError(f"cannot write the result to standard output: {error.strerror or error}") from None


@contextmanager
def checked_output() -> Iterator[None]:
    """Within the block, standard output is an `Output`, and all that was printed is written at the end.

    Closed standard streams get the null device as their file: the next file that is opened, such as a file of weights,
    would take their number, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before, sys.stdout = sys.stdout, Output(sys.stdout)
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        sys.stdout = before


def command_line() -> str:
    """The command as the user typed it, for the model card."""
    return shlex.join(["spinquant", *sys.argv[1:]])


def push_to_hub(folder: Path, repo: str | None, *, quiet: bool = False) -> None:
    """Upload a finished folder if --push-to-hub names a repository; of several processes only the first does."""
    if repo is None or not is_first():
        return
    from spinquant.entrypoints.hub import push_folder

    note(f"pushed to {push_folder(folder, repo)}", quiet=quiet)


def _finite(data: Any) -> Any:
    """The same data with None for numbers that are not finite, which JSON cannot store."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
