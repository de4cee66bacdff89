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
    """The threads, while somebody is `single_threaded`; they outlive it, and their working memory with them."""

    def __init__(self):
        self.lock, self.depth, self.threads = threading.Lock(), 0, 1
        self.pool: ThreadPoolExecutor | None = None
        self.of: tuple[int, int] | None = None

    def enter(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.threads = torch.get_num_threads()
                torch.set_num_threads(1)

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                torch.set_num_threads(self.threads)

    def members(self) -> ThreadPoolExecutor:
        """Threads that were started for this number of them, in this process: a fork has none of its parent's."""
        with self.lock:
            if self.pool is None or self.of != (os.getpid(), self.threads):
                self.of = os.getpid(), self.threads
                # Numbers of threads are kept by thread: a new one must not take them from the environment.
                self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
            return self.pool


_crew = _Crew()
_local = threading.local()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within the block every operation of torch on the CPU takes one thread, in all threads of the process."""
    _crew.enter()
    try:
        yield
    finally:
        _crew.leave()


def one_of_several() -> None:
    """Say that this thread works beside others on pieces of its own: its pieces of pieces follow each other."""
    _local.piece = True


def each(function: Callable[[Piece], object], pieces: Iterable[Piece]) -> None:
    """Take all pieces through a function: side by side within `single_threaded`, else one after the other.

    Pieces of a piece follow each other. Raises what the first failing piece raised, when none is at work any more.
    """
    pieces = list(pieces)
    if len(pieces) < 2 or _crew.depth == 0 or _crew.threads == 1 or getattr(_local, "piece", False):
        for piece in pieces:
            function(piece)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(piece: Piece) -> None:
        one_of_several()
        # Both are settings of a thread.
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            function(piece)

    futures = [_crew.members().submit(alone, piece) for piece in pieces]
    wait(futures)
    for future in futures:
        future.result()
