"""Who takes what of a stream: bands of tensors, and their spread over processes by size.

A tensor is cut into bands of rows where its first axis lies in no rotated space, and taken as a whole where it does.
Pieces (bands that follow each other in one tensor) go, the largest first, to the process that has least to do; a shard
of which one process would have too much is thereby taken by several, each writing its pieces to their places.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spinquant.checkpoint.reader import Source
from spinquant.rotations import fuse
from spinquant.streaming.shards import Change, Job, Shard, layout_bytes

# Pieces of one shard for each process, so that they can be spread evenly.
PIECES = 4


@dataclass(frozen=True)
class Band:
    """Rows of one tensor that are worked on at once. nbytes: of the source."""

    job: Job
    first: int
    last: int
    nbytes: int


def bands_of(source: Source, change: Change, job: Job, size: int) -> Iterator[Band]:
    """The bands of a tensor, of about `size` bytes where it can be cut."""
    entry, nbytes = source.tensors[job.source].entry, source.tensors[job.source].nbytes
    if change.packing.is_made(job.name):
        yield Band(job, 0, entry.rows, 0)
        return
    rows, step = entry.rows, entry.rows
    whole = change.packing.is_whole(job.name)
    slice_rows = fuse.rows_at_once(job.name, entry.shape, change.plan, change.rotations) if entry.shape else None
    if not whole and slice_rows:
        # Whole slices: the products are then those of the module backend, to the last bit.
        step = max(1, size * rows // max(1, nbytes) // slice_rows) * slice_rows
    for first in range(0, max(1, rows), max(1, step)):
        last = min(first + step, rows)
        yield Band(job, first, last, nbytes * (last - first) // max(1, rows))


def bands_in_order(source: Source, change: Change, shard: Shard, size: int) -> list[Band]:
    """The bands of a shard in the order of its file, or of the source's, whichever is larger.

    That one can be hashed while it goes by; the two orders are one where a tensor is stored under its name and dtype.
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
    """The bands that each process takes, by shard; those of shards that are done are nobody's."""
    taken: list[dict[str, list[Band]]] = [{file: [] for file in bands} for _ in range(processes)]
    loads = [0] * processes
    for file, inside in bands.items():
        if done[file]:
            continue
        most = sum(band.nbytes for band in inside) // (PIECES * processes)
        pieces = sorted(_pieces(inside, most), key=lambda piece: -_nbytes(piece))  # stable: the same everywhere
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
