"""Coordinate the processes of a torchrun job, and end all of them with a clear error when one of them ends.

torchrun starts the processes, on one machine or several. They coordinate through the key-value store of
torch.distributed and never wait inside a collective, which would not return once a process is gone. Each process holds
a lock on its own file beside the result. The operating system releases it however the process ends, and a process that
waits checks the locks of the others. torch.distributed has no such check: `store.wait` notices the end of a
process only by its timeout, and `monitored_barrier`, for gloo only, names that process to rank 0 only.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from spinquant import errors
from spinquant.compute.torchrun import is_alone as is_alone
from spinquant.compute.torchrun import is_first as is_first
from spinquant.errors import ProcessError, SpinquantError

_POLLED = 0.05  # seconds between two polls while waiting
_LOST = 5.0  # seconds after which a process that the others have lost has ended completely
# Others wait while the first process works; the locks, not this timeout, show that one has ended.
LONGEST = timedelta(days=7)
_LOOKED = 1.0  # seconds between two checks of the others' locks while working


@contextmanager
def joined(device: str = "cpu", *, timeout: timedelta | None = None) -> Iterator["Processes"]:
    """Within the block, join the other processes of a torchrun job; a process started alone works alone.

    Args:
        device: device to work on; under torchrun with "cuda", every process takes its own GPU.
        timeout: timeout of torch's own collectives.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield _here(device)
        return
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local := int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
    try:
        yield _here(device)
    finally:
        dist.destroy_process_group()


def _here(device: str) -> "Processes":
    if not dist.is_initialized():
        return Processes(0, 1, device)
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    # A process may take part in several jobs, one after the other.
    turn = store.add(f"spinquant/turns/{rank}", 1)
    return Processes(rank, dist.get_world_size(), device, dist.PrefixStore(f"spinquant/{turn}", store))  # pyright: ignore


class Processes:
    """This process among `size` processes, and its communication with the others; a single process never waits."""

    def __init__(self, rank: int, size: int, device: str = "cpu", store: Any = None):
        self.rank, self.size, self.device = rank, size, device
        self._store, self._met, self._asked = store, 0, 0
        self._locks: Path | None = None
        self._gone: set[int] = set()
        self._looked = time.monotonic()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which does what only one process may do."""
        return self.rank == 0

    def add(self, name: str, amount: int) -> int:
        """Add to a counter that all processes share; returns the new value."""
        if self._store is None:
            return amount
        try:
            return self._store.add(name, amount)
        except RuntimeError:
            self._raise_fate(final=True)
            raise

    def meet(self) -> None:
        """Barrier: wait for every process. Raises ProcessError, or the error of a process that ended before."""
        if self.size == 1:
            return
        self._met += 1
        name = f"met/{self._met}"
        here = self.add(name, 1)
        while here < self.size:
            time.sleep(_POLLED)
            dead = self._dead()
            here = self.add(name, 0)  # a process that arrived may have ended since
            if dead and here < self.size:
                self._raise_fate(final=True)
            self._raise_error()

    def gather(self, value: Any) -> list[Any]:
        """Collect a JSON value from every process, in order of ranks."""
        if self._store is None:
            return [value]
        self._asked += 1
        self._store.set(f"value/{self._asked}/{self.rank}", json.dumps(value))
        self.meet()
        return [json.loads(self._store.get(f"value/{self._asked}/{rank}")) for rank in range(self.size)]

    def agree(self, value: Any) -> Any:
        """Broadcast: the value of rank 0."""
        return self.gather(value)[0]

    def look(self) -> None:
        """Raise ProcessError, or the error of another process, if one has ended; checks at most once a second."""
        if self.size > 1 and time.monotonic() - self._looked > _LOOKED:
            self._looked = time.monotonic()
            self._raise_fate(final=False)

    def find_loss(self) -> None:
        """After a failed collective, raise ProcessError, or the error of another process, if one has ended.

        Returns if none has ended within a few seconds: the collective then failed for another reason.
        """
        deadline = time.monotonic() + _LOST
        while self.size > 1 and time.monotonic() < deadline:
            self._raise_fate(final=False)
            time.sleep(_POLLED)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block, an error or the end of one process is raised in all of them."""
        if self.size == 1:
            yield
            return
        with self._terminated():
            try:
                yield
            except ProcessError:
                raise
            except BaseException as error:
                self._raise_error()  # this failure may be a consequence of another process's error
                self._tell(error)
                raise

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Within the block, hold a lock in `folder`, shared by all processes, as a sign that this process is alive."""
        if self.size == 1:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / str(self.rank)):
            try:
                self.meet()
                self._locks, self._gone = folder, set()
                yield
            except ProcessError:
                raise
            except BaseException as error:
                self._tell(error)  # while the lock shows that this process is alive
                raise
            finally:
                self._locks = None

    @contextmanager
    def _terminated(self) -> Iterator[None]:
        # torchrun terminates the others as soon as one has ended: they raise the reason first.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            self._raise_fate(final=False)
            raise ProcessError(f"the job was terminated ({signal.Signals(number).name}). {_AGAIN}")

        after = signal.signal(signal.SIGTERM, end)
        try:
            yield
        except ProcessError:
            after = signal.SIG_IGN  # torchrun's signal may come only now, while the reason is being raised
            raise
        finally:
            signal.signal(signal.SIGTERM, after)

    def _tell(self, error: BaseException) -> None:
        known = isinstance(error, SpinquantError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        about = {"rank": self.rank, "kind": type(error).__name__ if known else "", "message": message}
        try:
            if self._store.add("errors", 1) == 1:
                self._store.set("error", json.dumps(about))
        except RuntimeError:  # the store has ended, and with it the processes that could read the error
            return

    def _raise_error(self) -> None:
        """Raise the error that another process has published."""
        try:
            about: Mapping[str, Any] | None = None
            if self._store.check(["error"]):
                about = json.loads(self._store.get("error"))
        except RuntimeError:
            raise ProcessError(self._ended([0])) from None
        if about is None or about["rank"] == self.rank:
            return
        kind = getattr(errors, about["kind"], None)
        if kind is not None:
            raise kind(f"{self._called(about['rank'])}: {about['message']}")
        raise ProcessError(f"{self._called(about['rank'])} failed: {about['message']}. {_AGAIN}")

    def _raise_fate(self, *, final: bool) -> None:
        dead = self._dead()
        self._raise_error()  # published before the lock was released
        if dead:
            raise ProcessError(self._ended(dead))
        if final:
            raise ProcessError(f"the processes of this job lost their connection. {_AGAIN}")

    def _dead(self) -> list[int]:
        """Ranks whose locks are free; a rank that was found dead stays in the list."""
        for rank in set(range(self.size)) - {self.rank, *self._gone} if self._locks else ():
            path = self._locks / str(rank) if self._locks else None
            if path is None or not path.exists():  # the folder is gone, because the result is complete
                continue
            with suppress(Timeout), FileLock(path, timeout=0):
                self._gone.add(rank)
        return sorted(self._gone)

    def _called(self, rank: int) -> str:
        return f"process {rank} of {self.size}"

    def _ended(self, ranks: list[int]) -> str:
        return f"{', '.join(map(self._called, ranks))} ended before its work was done. {_AGAIN}"


_AGAIN = "Rerun the same command to resume"


def check_same(settings: Mapping[str, Any], processes: Processes) -> None:
    """Raise ProcessError if the processes have different settings, or have learned different rotations."""
    # Each machine may have its own copy of the model, with another path and other modification times.
    found = processes.gather({name: value for name, value in settings.items() if name not in ("model", "files")})
    names = sorted({name for one in found for name in one if one[name] != found[0][name]})
    if names:
        raise ProcessError(
            f"the processes of this job differ in {', '.join(names)}: start all of them with the same command, on the "
            "same files. Rotations learned on different machines may differ in the last bits: run `spinquant learn` "
            "first, and pass its output with --learned"
        )
