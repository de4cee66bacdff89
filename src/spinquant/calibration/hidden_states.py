"""Store the hidden states of calibration samples in memory, and spill to an unnamed file beyond a limit.

Samples are appended and replaced one at a time. The file has no name, so its disk space is free again however the
process ends. It is read and written rather than memory-mapped, since pages of a mapped file would count as resident.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spinquant.checkpoint.positional_io import read_at, write_at
from spinquant.compute.memory import available_memory
from spinquant.errors import CalibrationError

# Default share of the available memory that hidden states may take.
SHARE = 1 / 4


class HiddenStates:
    """Mutable sequence of tensors that spills to a file.

    room: limit in bytes of what is kept in memory, None for no limit; states beyond it are in a file in `folder`. With
    a limit, states are kept in main memory, without one on the device they come from. A copy has a limit of its own.
    """

    def __init__(self, room: int | None = None, folder: Path | None = None):
        self.room, self._folder = room, folder
        self._kept: list[Tensor] = []
        self._file = -1
        self._spilt: list[tuple[int, torch.dtype, tuple[int, ...]]] = []  # place in the file, dtype and shape
        self._length = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._spilt)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index < len(self._kept):
            return self._kept[index]
        place, dtype, shape = self._spilt[index - len(self._kept)]
        found = torch.empty(shape, dtype=dtype)
        view = memoryview(found.reshape(-1).view(torch.uint8).numpy().data)
        while len(view):
            count = read_at(self._file, view, place)
            if count == 0:
                raise CalibrationError(f"the file of hidden states in {self._folder} is truncated")
            view, place = view[count:], place + count
        return found

    def __setitem__(self, index: int, state: Tensor) -> None:
        if index < len(self._kept):
            self._kept[index] = state if self.room is None else state.cpu()
            return
        place, dtype, shape = self._spilt[index - len(self._kept)]
        if state.nbytes != torch.Size(shape).numel() * dtype.itemsize:
            place, self._length = self._length, self._length + state.nbytes
        self._spilt[index - len(self._kept)] = place, state.dtype, tuple(state.shape)
        self._write(state, place)

    def append(self, state: Tensor) -> None:
        """Append a state."""
        if self.room is None:
            self._kept.append(state)
            return
        taken = sum(kept.nbytes for kept in self._kept)
        if not self._spilt and taken + state.nbytes <= self.room:
            self._kept.append(state.cpu())
            return
        self._spilt.append((self._length, state.dtype, tuple(state.shape)))
        self._write(state, self._length)
        self._length += state.nbytes

    @property
    def spilt(self) -> int:
        """Number of states in the file."""
        return len(self._spilt)

    def copy(self) -> "HiddenStates":
        """A copy of all states, with the same limit."""
        found = HiddenStates(self.room, self._folder)
        for state in self:
            found.append(state.clone())
        return found

    def close(self) -> None:
        """Drop all states and free the file's disk space."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._kept.clear()
        self._spilt.clear()

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def _write(self, state: Tensor, place: int) -> None:
        if self._file < 0:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
        view = memoryview(state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        while len(view):
            count = write_at(self._file, view, place)
            view, place = view[count:], place + count


def room_by_default() -> int:
    """Default limit in bytes: a share of the memory available now to the machine and to the container."""
    return int(SHARE * available_memory())
