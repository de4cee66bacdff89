"""Pieces of arithmetic side by side: as many threads as torch may use, one for each piece.

A product of matrices that several threads share ends in other last bits than that of one. Here each piece is computed
by a single thread, so the number of threads decides how long it takes and nothing else. On cores that other threads
keep busy too (reading, hashing, writing) it also saves time: threads that share an operation wait for each other at its
end.
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
    """The threads, while one thread is `single_threaded`; they outlive it, and their working memory with them."""

    def __init__(self):
        # How many threads torch takes is partly a setting of the thread, partly of the process: whoever changes it
        # changes it back before another may.
        self.lock, self.threads = threading.Lock(), 1
        self.leader: int | None = None
        self.pool: ThreadPoolExecutor | None = None
        self.of: tuple[int, int] | None = None

    def is_led(self) -> bool:
        """Whether this thread is the one that is `single_threaded`."""
        return self.leader == threading.get_ident()

    def members(self) -> ThreadPoolExecutor:
        """Threads that were started for this number of them, in this process: a fork has none of its parent's."""
        if self.pool is None or self.of != (os.getpid(), self.threads):
            self.of = os.getpid(), self.threads
            self.pool = ThreadPoolExecutor(self.threads, initializer=one_of_several)
        return self.pool


_crew = _Crew()
_local = threading.local()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within the block every operation of torch on the CPU takes one thread, and `each` takes pieces side by side.

    One thread at a time is in such a block; threads that are `one_of_several` are in one anyhow.
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
    """Within `single_threaded`: an operation that cannot be cut takes all threads, while no pieces are at work."""
    if not _crew.is_led():
        yield
        return
    torch.set_num_threads(_crew.threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def one_of_several() -> None:
    """Say that this thread works beside others on pieces of its own: in one thread, pieces of pieces in order."""
    if not getattr(_local, "piece", False):
        _local.piece = True
        torch.set_num_threads(1)


def each(function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
    """Take all pieces through a function: side by side within `single_threaded`, else one after the other.

    Pieces of a piece follow each other. Raises what the first failing piece raised, when none is at work any more.
    """
    pieces = list(pieces)
    if len(pieces) < 2 or not _crew.is_led() or _crew.threads == 1:
        for piece in pieces:
            function(piece)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(piece: Piece) -> None:
        # Both are settings of a thread.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            function(piece)

    futures = [_crew.members().submit(alone, piece) for piece in pieces]
    wait(futures)
    for future in futures:
        future.result()
