"""Working memory that outlives a call: on a CPU, the pages of new tensors cost as much as the arithmetic on them."""

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Bytes kept per thread and slot. Larger requests get memory of their own, which goes when they do.
_KEPT = 8 << 20


class _Local(threading.local):
    def __init__(self):
        self.slots: dict[int, Tensor] = {}
        self.largest: float = _KEPT


_local = _Local()


def workspace(slot: int, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor on the device of `like`; the next call with the slot overwrites it.

    Slots 0 and 1 belong to `kronecker`, slot 2 to `fuse`.
    """
    size = math.prod(shape) * dtype.itemsize
    # Fake tensors and their kind allocate in a way of their own.
    if like.device.type != "cpu" or size > _local.largest or type(like) not in (Tensor, nn.Parameter):
        return torch.empty(shape, dtype=dtype, device=like.device)
    kept = _local.slots.get(slot)
    if kept is None or len(kept) < size:
        # A tensor made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            kept = _local.slots[slot] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(shape)


@contextmanager
def kept_whole() -> Iterator[None]:
    """Within the block this thread keeps working memory of any size: of tensor after tensor that cannot be cut."""
    before, _local.largest = _local.largest, math.inf
    try:
        yield
    finally:
        _local.largest = before
        _local.slots = {slot: kept for slot, kept in _local.slots.items() if len(kept) <= before}


def give_back() -> None:
    """Give free memory back to the operating system, where the C library has a call for it (glibc).

    Blocks of a model that come and go leave holes of their sizes behind: 10 blocks of 28 MB left 150 MB in a
    calibration from disk, and leave none with this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
