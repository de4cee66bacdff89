"""Read and write safetensors files by rows of tensors, in bounded memory.

    8 bytes: length n of the header | n bytes of JSON: name -> dtype, shape, offsets | the numbers of all tensors

The safetensors library maps whole files into memory (pages count as resident once touched), and saves only tensors that
are all in memory. Here the byte range of each tensor is taken from the header, and a file is written header first, then
in any order; its bytes are those of the library's `save_file`. Streaming a checkpoint of 0.77 GB peaks at 0.14 GB above
its start this way, and at 0.90 GB if `safetensors.safe_open(...).get_slice` reads the tensors
(`python benchmarks/checkpoint_io.py --layers 2 --only stream`).
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spinquant.checkpoint.atomic import first_line
from spinquant.checkpoint.direct_io import DirectWriter, put
from spinquant.checkpoint.positional_io import BINARY, read_at
from spinquant.checkpoint.untrusted import check_regular, json_object
from spinquant.errors import CheckpointError

# In the order of the library's layout: wide dtypes first, so that all tensors are aligned.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}
_LONGEST_HEADER = 100_000_000  # as in the library
_CHUNK = 1 << 23
_BEHIND = 1 << 27  # bytes in the page cache on their way to disk


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: dtype, shape, and the range of bytes from `start` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries of all tensors of a file, by name, from its header.

    Raises CheckpointError, naming the file, if it is not a safetensors file or is shorter than its header states.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is corrupted: {size} bytes cannot hold its header. Download it again.")
            header = json_object(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found: dict[str, Entry] = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
            start, end = (8 + length + offset for offset in about["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} describes tensor {name!r} as {about!r}: expected a dtype among {', '.join(DTYPES)}, a shape "
                "and two offsets"
            ) from None
        if end - start != math.prod(shape) * dtype.itemsize or start < 8 + length:
            raise CheckpointError(f"{path} is corrupted: tensor {name!r} has {end - start} bytes for shape {shape}")
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end}, the file at {size}. Download it again."
            )
        found[name] = Entry(dtype, shape, start, end)
    return found


def place_of(entry: Entry, first: int, last: int) -> tuple[int, int]:
    """(offset in the file, number of bytes) of rows first .. last of a tensor."""
    row = (entry.end - entry.start) // max(1, entry.rows)
    return entry.start + first * row, (last - first) * row


def rows_in(piece: Tensor, entry: Entry) -> Tensor:
    """Rows of a tensor as a view of their bytes."""
    row = (entry.end - entry.start) // max(1, entry.rows)
    count = len(piece) // row if row else entry.rows
    return piece.view(entry.dtype).view((count, *entry.shape[1:]) if entry.shape else ())


def in_order(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Names of tensors in the order of a file."""
    order = list(DTYPES)
    return sorted(tensors, key=lambda name: (order.index(NAMES[tensors[name][0]]), name.encode()))


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """(header bytes, entries) of a file with these tensors, given as (dtype, shape) by name."""
    names = in_order(tensors)
    header: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {}
    for name in names:
        dtype, shape = tensors[name]
        first, last = header[name]["data_offsets"]  # pyright: ignore[reportIndexIssue]
        entries[name] = Entry(dtype, shape, start + first, start + last)
    return len(text).to_bytes(8, "little") + text, entries


class TensorFile:
    """Writer of a safetensors file: header first (`begin`), then rows in any order, complete after `finish`.

    `follow` hashes rows that come in the order of the file, in a thread that the caller chooses; the others are read
    again for the hash. Writes go past the page cache (`direct_io.py`). If they cannot, written pages are sent to disk
    and dropped while the next rows are computed: 1.6 GB take 1.5 s this way, and 2.8 to 9 s if one fsync at the end
    writes all (on a virtual machine whose host is slow to provide pages).
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path = path
        self.beginning, self.entries = lay_out(tensors)
        self.size = max((entry.end for entry in self.entries.values()), default=len(self.beginning))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        self._hash, self._hashed = hashlib.sha256(self.beginning), len(self.beginning)
        self._behind: deque[tuple[int, int]] = deque()
        self._direct = DirectWriter(path, self._file)

    def begin(self) -> None:
        """Write the header and set the full length of the file; contents from a previous run are dropped."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self.size)
        put(self._file, self.beginning, 0)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Write rows of a tensor, contiguous and of its dtype, from row `first` on."""
        place, data = self._place(name, first, rows)
        self._direct.write(data, place)
        if self._direct.is_direct:
            return
        self._behind.append((place, len(data)))
        if sum(length for _, length in self._behind) >= 2 * _BEHIND:
            self._let_go()

    def follow(self, name: str, first: int, rows: Tensor) -> None:
        """Hash rows that are being written, if they come next in the file."""
        place, data = self._place(name, first, rows)
        if place == self._hashed:
            self._hash.update(data.numpy().data)
            self._hashed += len(data)

    def _place(self, name: str, first: int, rows: Tensor) -> tuple[int, Tensor]:
        entry = self.entries[name]
        assert rows.dtype == entry.dtype and rows.is_contiguous(), name
        return place_of(entry, first, first)[0], rows.reshape(-1).view(torch.uint8)

    def _let_go(self) -> None:
        """Start writing cached pages to disk, and drop those that are there already."""
        if not hasattr(os, "posix_fadvise"):
            self._behind.clear()
            return
        for place, length in self._behind:
            os.posix_fadvise(self._file, place, length, os.POSIX_FADV_DONTNEED)
        # The newest pages are being written now, and are dropped the next time.
        while sum(length for _, length in self._behind) > _BEHIND:
            self._behind.popleft()

    def sync(self) -> None:
        """Sync to disk what was written so far."""
        self._direct.flush()
        os.fsync(self._file)

    def finish(self) -> str:
        """Sync the file to disk and close it; returns its SHA-256."""
        self.sync()
        buffer = bytearray(_CHUNK)
        while count := read_at(self._file, buffer, self._hashed):
            self._hash.update(memoryview(buffer)[:count])
            self._hashed += count
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file, complete or not."""
        self._direct.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises CheckpointError, naming the file, if it is missing, is not a regular file, or is corrupted.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is corrupted or unreadable: {first_line(error)}. Download or write it again."
        ) from None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
