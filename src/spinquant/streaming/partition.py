"""Partition the work of streaming: cut tensors into bands of rows, and distribute the bands over processes by size.

A tensor whose first axis is not rotated is cut into bands of rows; any other is processed as a whole. Runs of
consecutive bands of one tensor are assigned, the largest first, to the process with the least work so far. So several
processes share a large shard, each writing its rows in place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spinquant.checkpoint.reader import Source
from spinquant.rotations import fuse
from spinquant.streaming.shards import Change, Job, Shard, layout_bytes

# Pieces per shard and process, so that the work can be distributed evenly.
PIECES = 4


@dataclass(frozen=True)
class Band:
    """Rows of one tensor that are processed at once. nbytes: of the source."""

    job: Job
    first: int
    last: int
    nbytes: int


def bands_of(source: Source, change: Change, job: Job, size: int) -> Iterator[Band]:
    """The bands of a tensor, of about `size` bytes if it can be cut."""
    entry, nbytes = source.tensors[job.source].entry, source.tensors[job.source].nbytes
    if change.packing.is_made(job.name):
        yield Band(job, 0, entry.rows, 0)
        return
    rows, step = entry.rows, entry.rows
    whole = change.packing.is_whole(job.name)
    slice_rows = fuse.rows_at_once(job.name, entry.shape, change.plan, change.rotations) if entry.shape else None
    if not whole and slice_rows:
        # Whole slices: results are then bit-identical to those of fusing in memory.
        step = max(1, size * rows // max(1, nbytes) // slice_rows) * slice_rows
    for first in range(0, max(1, rows), max(1, step)):
        last = min(first + step, rows)
        yield Band(job, first, last, nbytes * (last - first) // max(1, rows))


def bands_in_order(source: Source, change: Change, shard: Shard, size: int) -> list[Band]:
    """The bands of a shard, in the order of the written file or of the source file, whichever is larger.

    That file can then be hashed on the way. The two orders are the same if tensors keep their names and dtypes.
    """
    order = {name: i for i, name in enumerate(shard.order)}
    places = {job.name: (source.tensors[job.source].file, source.tensors[job.source].entry.start) for job in shard.jobs}
    read, written = (sum(sizes) for sizes in zip(*(_sizes(source, job) for job in shard.jobs), strict=True))
    if written >= read:
        jobs = sorted(shard.jobs, key=lambda job: order[next(iter(job.stored))])
    else:
        jobs = sorted(shard.jobs, key=lambda job: places[job.name])
    return [band for job in jobs for band in bands_of(source, change, job, size)]


def _sizes(source: Source, job: Job) -> tuple[int, int]:
    return source.tensors[job.source].nbytes, layout_bytes(job.stored)


def shared(
    bands: Mapping[str, Sequence[Band]], processes: int, done: Mapping[str, bool]
) -> list[dict[str, list[Band]]]:
    """The bands of each process, by shard, without the shards that are done."""
    taken: list[dict[str, list[Band]]] = [{file: [] for file in bands} for _ in range(processes)]
    loads = [0] * processes
    for file, inside in bands.items():
        if done[file]:
            continue
        most = sum(band.nbytes for band in inside) // (PIECES * processes)
        pieces = sorted(_pieces(inside, most), key=lambda piece: -_nbytes(piece))  # stable: the same in every process
        for piece in pieces:
            least = loads.index(min(loads))
            loads[least] += _nbytes(piece)
            taken[least][file] += piece
        places = {id(band): i for i, band in enumerate(inside)}
        for mine in taken:
            mine[file].sort(key=lambda band: places[id(band)])
    return taken


def _pieces(bands: Sequence[Band], most: int) -> list[list[Band]]:
    pieces: list[list[Band]] = []
    for band in bands:
        if pieces and pieces[-1][0].job is band.job and _nbytes(pieces[-1]) + band.nbytes <= most:
            pieces[-1].append(band)
        else:
            pieces.append([band])
    return pieces


def _nbytes(bands: Sequence[Band]) -> int:
    return sum(band.nbytes for band in bands)
