"""Output shards of streaming: which files are written, and the source tensor that each stored tensor comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spinquant.checkpoint.folder import SINGLE
from spinquant.checkpoint.reader import Source
from spinquant.checkpoint.safetensors_io import in_order
from spinquant.plan import Plan
from spinquant.rotations.rotation import Transform

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Packing(Protocol):
    """Protocol of an output format: how the tensors of the rotated model are stored in the folder."""

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Tensors of the folder that are not computed from a tensor of the model."""
        ...

    def is_whole(self, name: str) -> bool:
        """Whether a tensor cannot be packed by rows."""
        ...

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Layout:
        """Stored tensors of a tensor, as (dtype, shape) by name; a row of it is a row, or several, of each of them."""
        ...

    def is_made(self, name: str) -> bool:
        """Whether the stored tensors are known already, as after a calibration."""
        ...

    def made(self, name: str) -> dict[str, Tensor]:
        """The stored tensors that are known already."""
        ...

    def pack(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """The stored tensors of rows of a tensor."""
        ...


class Plain:
    """Packing that stores tensors unchanged."""

    extras: Mapping[str, Tensor] = {}

    def is_whole(self, name: str) -> bool:
        return False

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Layout:
        return {name: (dtype, shape)}

    def is_made(self, name: str) -> bool:
        return False

    def made(self, name: str) -> dict[str, Tensor]:
        raise KeyError(name)

    def pack(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        return {name: rows}


@dataclass(frozen=True)
class Job:
    """One tensor of the rotated model: its name, the source tensor it is computed from, and its stored tensors."""

    name: str
    source: str
    dtype: torch.dtype
    stored: Layout


@dataclass(frozen=True)
class Shard:
    """An output file, with the tensors that it holds."""

    file: str
    jobs: tuple[Job, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Dtypes and shapes of all tensors of the file."""
        found: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.extras.items()}
        for job in self.jobs:
            found |= job.stored
        return found

    @property
    def order(self) -> list[str]:
        """Names of the tensors in the order of the file."""
        return in_order(self.layout)


@dataclass(frozen=True)
class Change:
    """How source tensors are transformed and stored; see `fuse.transform` for plan, rotations, gains and precision.

    dtype: of floating tensors; None keeps the source's, with `fp8_dtype` for tensors that are FP8 there.
    """

    plan: Plan
    rotations: Mapping[str, Transform]
    gains: Mapping[str, Tensor]
    packing: Packing = field(default_factory=Plain)
    dtype: torch.dtype | None = None
    fp8_dtype: torch.dtype = torch.bfloat16
    precision: torch.dtype | None = None
    device: torch.device | str = "cpu"


def make_shards(
    source: Source, change: Change, *, untied: Sequence[tuple[str, str]] = (), max_shard_size: int | None = None
) -> list[Shard]:
    """The output files: one for each file of the source, or files of at most `max_shard_size` bytes.

    untied: (name, source) of tensors that the checkpoint lacks because they are tied; they come last.
    """
    by_file: dict[str, list[Job]] = {file: [] for file in source.files}
    for name, stored in source.tensors.items():
        by_file[stored.file].append(job_of(source, change, name, name))
    last = source.files[-1]
    by_file[last] += [job_of(source, change, name, origin) for name, origin in untied if name not in source.tensors]
    extras = change.packing.extras
    if max_shard_size is None:
        return [Shard(file, tuple(jobs), extras if file == last else {}) for file, jobs in by_file.items()]
    parts: list[list[Job]] = [[]]
    room = max_shard_size
    for job in (job for jobs in by_file.values() for job in jobs):
        size = layout_bytes(job.stored)
        if parts[-1] and size > room:
            parts.append([])
            room = max_shard_size
        parts[-1].append(job)
        room -= size
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = [SINGLE] if len(parts) == 1 else names
    return [
        Shard(name, tuple(jobs), extras if name == names[-1] else {}) for name, jobs in zip(names, parts, strict=True)
    ]


def job_of(source: Source, change: Change, name: str, origin: str) -> Job:
    """The job of the tensor `name` of the rotated model, which is computed from `origin` of the source."""
    stored = source.tensors[origin]
    dtype = change.fp8_dtype if stored.scale else stored.dtype
    if change.dtype is not None and dtype.is_floating_point:
        dtype = change.dtype
    return Job(name, origin, dtype, change.packing.layout(name, dtype, stored.entry.shape))


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
