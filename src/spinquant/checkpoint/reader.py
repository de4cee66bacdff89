"""Read the tensors of a checkpoint by rows, in bounded memory: the source of streaming.

FP8 checkpoints with block scales (DeepSeek's format: `X.weight` in 8 bits, `X.weight_scale_inv` a float32 per block)
are dequantized to float32 as they are read:  w[i, j] = q[i, j] scale_inv[i // rows, j // columns].
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.checkpoint.direct_io import DirectReader
from spinquant.checkpoint.folder import INDEX, read_headers, weight_files
from spinquant.checkpoint.safetensors_io import Entry, place_of, read_entries, rows_in
from spinquant.checkpoint.untrusted import read_json
from spinquant.errors import CheckpointError
from spinquant.plan import Plan

SCALE = "_scale_inv"
_PART = 1 << 23  # bytes
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its file and entry there, and for FP8 blocks the name of the tensor of scales."""

    file: str
    entry: Entry
    scale: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers as they are read."""
        return torch.float32 if self.scale else self.entry.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.entry.end - self.entry.start


class Source:
    """The tensors of a model folder. Raises CheckpointError, naming it, for a shard that is damaged.

    without: names of tensors to ignore; files that hold no other tensors are ignored too.
    """

    def __init__(self, folder: Path, config: Any, *, without: Collection[str] = ()):
        self.folder = folder
        files = weight_files(folder)
        read_headers(folder)  # checks the shards with safetensors, and the index
        self._open: dict[str, DirectReader] = {}
        self._scales: dict[str, Tensor] = {}
        self._block = fp8_block(config)
        found = {name: (file, entry) for file in files for name, entry in read_entries(folder / file).items()}
        self.tensors: dict[str, Stored] = {}
        for name, (file, entry) in found.items():
            if self._block and name.endswith(SCALE) and name.removesuffix(SCALE) in found:
                continue
            if name in without:
                continue
            scaled = entry.dtype in FP8
            if scaled and (not self._block or f"{name}{SCALE}" not in found):
                raise CheckpointError(
                    f"tensor {name!r} of {folder} is {entry.dtype} without block scales ({name}{SCALE}): only FP8 "
                    "checkpoints in DeepSeek's format can be read"
                )
            if scaled:
                self._check_blocks(name, entry, found[f"{name}{SCALE}"][1])
            self.tensors[name] = Stored(file, entry, f"{name}{SCALE}" if scaled else None)
        self._found = found
        kept = {stored.file for stored in self.tensors.values()}
        self.files = [file for file in files if file in kept]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, as a plan is made from."""
        return {name: stored.entry.shape for name, stored in self.tensors.items()}

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor in float32."""
        return max((4 * math.prod(stored.entry.shape) for stored in self.tensors.values()), default=0)

    @property
    def index_metadata(self) -> Mapping[str, Any]:
        """The `metadata` of the safetensors index; empty without an index."""
        path = self.folder / INDEX
        found = read_json(path).get("metadata") if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    def read(self, name: str, first: int, last: int, buffer: Tensor) -> Tensor:
        """Rows first .. last of a tensor, as a view of `buffer` unless they are FP8. Raises as `piece`."""
        return self.rows(name, first, self.piece(name, first, last, buffer))

    def piece(self, name: str, first: int, last: int, buffer: Tensor) -> Tensor:
        """The stored bytes of rows first .. last of a tensor, as a view of `buffer`, uint8.

        buffer: at least as long; with `room_for` the bytes, they are read past the page cache. Raises CheckpointError,
        naming the shard, if it cannot be read.
        """
        stored = self.tensors[name]
        return self._piece(stored.file, stored.entry, first, last, buffer)

    def rows(self, name: str, first: int, piece: Tensor) -> Tensor:
        """Rows of a tensor from row `first` on, from their bytes; a view of them unless they are FP8."""
        stored = self.tensors[name]
        rows = rows_in(piece, stored.entry)
        return rows if stored.scale is None else self._dequantized(rows, stored.scale, first)

    def whole(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        stored = self.tensors[name]
        buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
        return self.read(name, 0, stored.entry.rows, buffer)

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a tensor in parts, each with the number of its first row; the next part overwrites it."""
        stored = self.tensors[name]
        rows = stored.entry.rows
        step = max(1, _PART * rows // max(1, stored.nbytes))
        buffer = torch.empty(min(step, rows) * stored.nbytes // max(1, rows), dtype=torch.uint8)
        for first in range(0, rows, step):
            yield first, self.read(name, first, min(first + step, rows), buffer)

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _piece(self, file: str, entry: Entry, first: int, last: int, buffer: Tensor) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = DirectReader(self.folder / file)
            return self._open[file].read(*place_of(entry, first, last), buffer)
        except OSError as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}. Download it again.") from None

    def _dequantized(self, rows: Tensor, scale: str, first: int) -> Tensor:
        assert self._block is not None
        height, width = self._block
        if scale not in self._scales:
            file, entry = self._found[scale]
            buffer = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            # A weight is read row by row, so only the scales of the last weight are cached.
            piece = self._piece(file, entry, 0, entry.rows, buffer)
            self._scales = {scale: rows_in(piece, entry).to(torch.float32)}
        wide = rows.to(torch.float32)
        step = first
        while step < first + len(rows):
            end = min((step // height + 1) * height, first + len(rows))
            columns = self._scales[scale][step // height].repeat_interleave(width)[: rows.shape[1]]
            wide[step - first : end - first].mul_(columns)
            step = end
        return wide

    def _check_blocks(self, name: str, entry: Entry, scale: Entry) -> None:
        assert self._block is not None
        expected = tuple(math.ceil(n / b) for n, b in zip(entry.shape, self._block, strict=False))
        if len(entry.shape) != 2 or scale.shape != expected:
            raise CheckpointError(
                f"{name}{SCALE} of {self.folder} has shape {scale.shape}: blocks of {self._block} of a weight of shape "
                f"{entry.shape} need {expected}"
            )


def fp8_block(config: Any) -> tuple[int, int] | None:
    """(rows, columns) of the blocks of an FP8 checkpoint with block scales, from its config; None for others.

    config: a transformers config, or the dict in config.json.
    """
    values = config if isinstance(config, dict) else vars(config)
    found = values.get("quantization_config") or {}
    about = found if isinstance(found, dict) else found.to_dict()
    block = about.get("weight_block_size")
    return (block[0], block[1]) if about.get("quant_method") == "fp8" and block else None


def read_gains(source: Source, plan: Plan) -> dict[str, Tensor]:
    """Read the norm weights of a plan from all shards.

    Raises CheckpointError for a norm that is not finite; otherwise the linears that it is fused into would be blamed.
    """
    names = (gain.norm for gain in plan.gains)
    found = {name: source.whole(name if name in source.tensors else plan.tied[name]) for name in names}
    for name, gain in found.items():
        _check_source(source, name, gain)
    return found


def _check_source(source: Source, name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))).sum())
    if bad:
        raise CheckpointError(
            f"{_described(source, name)} holds {bad} values that are NaN or infinite: the checkpoint is broken, "
            "download it again"
        )


def _described(source: Source, name: str) -> str:
    stored = source.tensors[name]
    return f"tensor {name!r} of {source.folder / stored.file} (shape {stored.entry.shape})"
