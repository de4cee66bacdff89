"""Parallel arithmetic with results that do not depend on the number of threads: one thread for each piece of work.

A matrix product that several threads share has other last bits than that of one thread. Here each piece is computed by
a single thread, so the number of threads changes the time only. On cores that other threads keep busy too (reading,
hashing, writing) it is also faster, because threads that share an operation wait for each other at its end.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


class _Crew:
    """Thread pool for the thread that is in `single_threaded`; it outlives the block, as does its working memory."""

    def __init__(self):
        # The number of threads of torch is partly a setting of the thread, partly of the process. The lock makes sure
        # that one thread restores it before another changes it.
        self.lock, self.threads = threading.Lock(), 1
        self.leader: int | None = None
        self.pool: ThreadPoolExecutor | None = None
        self.of: tuple[int, int] | None = None

    def is_led(self) -> bool:
        """Whether this thread is the one in `single_threaded`."""
        return self.leader == threading.get_ident()

    def members(self) -> ThreadPoolExecutor:
        """The pool for this process and number of threads; a forked process has none of its parent's threads."""
        if self.pool is None or self.of != (os.getpid(), self.threads):
            self.of = os.getpid(), self.threads
            self.pool = ThreadPoolExecutor(self.threads, initializer=one_of_several)
        return self.pool


_crew = _Crew()
_local = threading.local()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within the block, each torch operation on the CPU uses one thread, and `each` runs its pieces in parallel.

    Only one thread at a time can be in such a block; for threads marked by `one_of_several` it does nothing.
    """
    if getattr(_local, "piece", False) or _crew.is_led():
        yield
        return
    with _crew.lock:
        _crew.threads, _crew.leader = torch.get_num_threads(), threading.get_ident()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            _crew.leader = None
            torch.set_num_threads(_crew.threads)


@contextmanager
def all_threads() -> Iterator[None]:
    """Within `single_threaded`, let an operation that cannot be cut use all threads; no pieces may be running."""
    if not _crew.is_led():
        yield
        return
    torch.set_num_threads(_crew.threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def one_of_several() -> None:
    """Mark this thread as one of several workers: torch uses one thread in it, and `each` runs pieces in order."""
    if not getattr(_local, "piece", False):
        _local.piece = True
        torch.set_num_threads(1)


def each(function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
    """Call a function on all pieces: in parallel within `single_threaded`, else one after the other.

    Nested calls run in order. The error of the first failing piece is raised after all pieces have ended.
    """
    pieces = list(pieces)
    if len(pieces) < 2 or not _crew.is_led() or _crew.threads == 1:
        for piece in pieces:
            function(piece)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(piece: Piece) -> None:
        # Both are per-thread settings.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            function(piece)

    futures = [_crew.members().submit(alone, piece) for piece in pieces]
    wait(futures)
    for future in futures:
        future.result()
