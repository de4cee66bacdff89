"""Reusable working memory: on a CPU, the memory pages of new tensors cost as much as the arithmetic on them."""

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Bytes kept per thread and slot. Larger requests are allocated anew and freed after use.
_KEPT = 8 << 20


class _Local(threading.local):
    def __init__(self):
        self.slots: dict[int, Tensor] = {}
        self.largest: float = _KEPT


_local = _Local()


def workspace(slot: int, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialized contiguous tensor on the device of `like`; the next call with the same slot reuses its memory.

    Slots 0 and 1 are for `rotations/fast_transform.py`, slot 2 for `rotations/fuse.py`.
    """
    size = math.prod(shape) * dtype.itemsize
    # Fake tensors and other subclasses allocate in their own way.
    if like.device.type != "cpu" or size > _local.largest or type(like) not in (Tensor, nn.Parameter):
        return torch.empty(shape, dtype=dtype, device=like.device)
    kept = _local.slots.get(slot)
    if kept is None or len(kept) < size:
        # A tensor created in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            kept = _local.slots[slot] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(shape)


@contextmanager
def kept_whole() -> Iterator[None]:
    """Within the block, this thread keeps working memory of any size, for consecutive tensors that cannot be cut."""
    before, _local.largest = _local.largest, math.inf
    try:
        yield
    finally:
        _local.largest = before
        _local.slots = {slot: kept for slot, kept in _local.slots.items() if len(kept) <= before}


def give_back() -> None:
    """Return free memory to the operating system, if the C library has a call for it (glibc).

    Blocks of a model that are loaded and freed fragment the heap: 10 blocks of 28 MB left 150 MB in a calibration from
    disk, and none with this call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
