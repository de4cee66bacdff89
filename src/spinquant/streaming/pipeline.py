"""Stream a checkpoint: read, rotate, pack and write it tensor by tensor, without the model in memory.

Bands of rows pass through a pipeline: as many are computed at once as torch may use threads, while one thread reads,
one writes, and one each hashes what is read and what is written. The bytes in flight are bounded. Shards are finished
one after the other, so that a rerun resumes after the last finished one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinquant.checkpoint.checksums import Prefix, SourceHash
from spinquant.checkpoint.direct_io import room_for
from spinquant.checkpoint.reader import Source, _check_source, _described
from spinquant.checkpoint.run_directory import RunDirectory
from spinquant.checkpoint.safetensors_io import TensorFile, place_of
from spinquant.compute.distributed import Processes
from spinquant.compute.threads import all_threads, one_of_several, single_threaded
from spinquant.compute.workspace import kept_whole
from spinquant.errors import CheckpointError
from spinquant.rotations import fuse
from spinquant.streaming.partition import Band, bands_in_order, bands_of, shared
from spinquant.streaming.shards import Change, Job, Shard, job_of, layout_bytes

# Bytes of a band, for tensors that can be cut: one slice of `fuse` in half precision, which stays in cache while it is
# hashed, computed, hashed again and written.
BAND = 1 << 21
# Largest number of bytes in flight (read buffers and results to be written), which lets the other stages continue while
# the disk delays reads or writes. The limit is the size of the largest tensor in float32, within these two bounds; a
# single band may be larger.
# Measured on two cores with 2.3 GB past the page cache: 2^25 5.3 s, 2^26 5.1 s, 2^27 5.0 s, 2^28 4.9 s.
IN_FLIGHT, IN_FLIGHT_OF_SMALL = 1 << 26, 1 << 25


@dataclass
class Timing:
    """Seconds that each stage was busy, and bytes of the source processed."""

    read: float = 0.0
    check: float = 0.0
    compute: float = 0.0
    hash: float = 0.0
    write: float = 0.0
    nbytes: int = 0


def stream(
    source: Source,
    shards: Sequence[Shard],
    change: Change,
    out: RunDirectory,
    *,
    processes: Processes | None = None,
    hashes: SourceHash | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Timing:
    """Write the shards that are not finished yet.

    Args:
        source: the checkpoint to read.
        shards: the files to write, from `make_shards`.
        change: how tensors are transformed and stored.
        out: state of the run, which receives the files.
        processes: processes that share the work, each calling this with the same arguments. The result is complete
            after they have met.
        hashes: hashes the source as it is read, and is entered in the journal; for a single process only.
        progress: called with (done, total) bytes of the source.

    Returns:
        Busy times of the stages.

    Raises:
        CheckpointError: a tensor is not finite, or overflows; the message names it.
    """
    processes = processes or Processes(0, 1)
    bands = {shard.file: bands_in_order(source, change, shard, BAND) for shard in shards}
    total = sum(band.nbytes for inside in bands.values() for band in inside)
    finished = _finished(shards, out, processes)
    done = sum(band.nbytes for file, inside in bands.items() if finished[file] for band in inside)
    mine = shared(bands, processes.size, finished)[processes.rank]
    timing = Timing()
    left = [shard for shard in shards if not finished[shard.file]]
    # Threads that share an operation would wait for each other, on cores that reading and writing need.
    pipeline = _Pipeline(source, change, timing, hashes)
    with single_threaded(), ExitStack() as files, kept_whole(), pipeline:
        if processes.size > 1:
            # All processes write into files that exist with their full length.
            for shard in left if processes.first else ():
                with closing(TensorFile(out.unfinished(shard.file), shard.layout)) as file:
                    file.begin()
            processes.meet()
        for shard in left:
            file = TensorFile(out.unfinished(shard.file), shard.layout)
            files.callback(file.close)
            if processes.size == 1:
                pipeline.write(file.begin)
            for name, tensor in shard.extras.items() if processes.first else ():
                pipeline.put(file, {name: (0, tensor.contiguous())})
            for band in pipeline.run(file, mine[shard.file]):
                written = processes.add("bytes", band.nbytes) if processes.size > 1 else 0
                timing.nbytes += band.nbytes
                processes.look()
                if progress:
                    progress(done + (written or timing.nbytes), total)
            pipeline.finish(partial(_finish, out, shard.file, file, processes))
    return timing


def _finished(shards: Sequence[Shard], out: RunDirectory, processes: Processes) -> dict[str, bool]:
    """Which shards are finished; each process checks some of them."""
    mine = {shard.file: out.is_finished(shard.file) for shard in shards[processes.rank :: processes.size]}
    found = {file: done for part in processes.gather(mine) for file, done in part.items()}
    return {shard.file: found[shard.file] for shard in shards}


def _finish(
    out: RunDirectory, name: str, file: TensorFile, processes: Processes, read: Mapping[str, Prefix] | None
) -> None:
    """Finish a shard, in the process that is the last to have written its part."""
    file.sync()
    if processes.add(f"written/{name}", 1) == processes.size:
        out.finish(name, file.finish(), read)


class _Pipeline:
    """Reads ahead and writes behind the computation, in order, within bounded memory."""

    def __init__(self, source: Source, change: Change, timing: Timing, hashes: SourceHash | None):
        self.source, self.change, self.timing, self.hashes = source, change, timing, hashes
        self.reader, self.checker, self.writer, self.hasher = self.workers = tuple(_Worker() for _ in range(4))
        self.computers = ThreadPoolExecutor(torch.get_num_threads(), initializer=one_of_several)
        self.lock = threading.Lock()
        self.waiting: deque[tuple[Band, Tensor, int, Future[Any] | Callable[[], Any]]] = deque()
        self.written: deque[tuple[list[Future[Any]], int, Tensor | None]] = deque()
        self.in_flight = 0
        self.room = min(IN_FLIGHT, max(IN_FLIGHT_OF_SMALL, source.largest))
        self.free: list[Tensor] = []

    def __enter__(self) -> "_Pipeline":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._collect(all_=True)
        finally:
            for worker in self.workers:
                worker.failed = True  # skips its remaining steps
            for worker in self.workers:
                worker.close()
            self.computers.shutdown(cancel_futures=True)

    def write(self, step: Callable[[], object]) -> None:
        """Queue a step of the writer."""
        self.written.append(([self._have(self.writer, "write", step)], 0, None))

    def put(
        self, file: TensorFile, parts: Mapping[str, tuple[int, Tensor]], nbytes: int = 0, buffer: Tensor | None = None
    ) -> None:
        """Queue rows of tensors, (first row, rows) by name, to be written and hashed; then reuse their buffer."""
        steps = [
            (worker, phase, partial(_each, function, parts))
            for worker, phase, function in ((self.writer, "write", file.write), (self.hasher, "hash", file.follow))
        ]
        self.written.append(([self._have(*step) for step in steps], nbytes, buffer))

    def finish(self, step: Callable[[Mapping[str, Prefix] | None], object]) -> None:
        """Queue the last step on a file, after it is hashed; it is given the prefixes of the source read so far."""
        hashed = self.hasher.submit(lambda: None)
        read = None if self.hashes is None else self._have(self.checker, "check", self.hashes.prefixes)

        def last() -> None:
            hashed.result()
            found = None if read is None else read.result()
            self._timed("write", lambda: step(found))

        self.written.append(([self.writer.submit(last)], 0, None))

    def _have(self, worker: "_Worker", phase: str, step: Callable[[], Any]) -> Future[Any]:
        return worker.submit(partial(self._timed, phase, step))

    def run(self, file: TensorFile, bands: Sequence[Band]) -> Iterator[Band]:
        """Read, compute and write bands; yields each after it is computed."""
        waiting = self.waiting
        coming = deque(bands)
        while coming or waiting:
            self._collect()
            while coming:
                # An upper bound of the band's memory: as read, as dequantized (FP8), and as stored.
                stored = self.source.tensors[coming[0].job.source]
                need = coming[0].nbytes * (1 if stored.scale is None else 1 + stored.dtype.itemsize)
                share = coming[0].last - coming[0].first, max(1, stored.entry.rows)
                need += layout_bytes(coming[0].job.stored) * share[0] // share[1]
                if self.in_flight and self.in_flight + need > self.room + self._large(need):
                    break
                band = coming.popleft()
                buffer = self._buffer(band.nbytes)
                self.in_flight += need
                read = self._have(self.reader, "read", partial(self._read, band, buffer))
                checked = self.checker.submit(partial(self._check, band, read))
                # A large band is computed in this thread, whose working memory is kept, with its slices in parallel.
                large = need > self.room // 2
                compute = partial(self._computed, band, read, checked, large)
                waiting.append((band, buffer, need, compute if large else self.computers.submit(compute)))
            if not waiting:
                self._collect(one=True)
                continue
            band, buffer, need, computed = waiting.popleft()
            results = computed.result() if isinstance(computed, Future) else computed()
            del computed
            rows = max(1, self.source.tensors[band.job.source].entry.rows)
            parts = {name: (band.first * file.entries[name].rows // rows, part) for name, part in results.items()}
            self.put(file, parts, need, buffer)
            del results, parts
            yield band

    def _read(self, band: Band, buffer: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The stored bytes of a band and its rows, or its stored tensors if they are known already."""
        if self.change.packing.is_made(band.job.name):
            return self.change.packing.made(band.job.name)
        piece = self.source.piece(band.job.source, band.first, band.last, buffer)
        return piece, self.source.rows(band.job.source, band.first, piece)

    def _computed(self, band: Band, read: Future[Any], checked: Future[Any], large: bool) -> dict[str, Tensor]:
        checked.result()  # the result may overwrite the memory that is hashed
        found = read.result()
        return (
            found if isinstance(found, dict) else self._timed("compute", partial(self._changed, band, found[1], large))
        )

    @torch.no_grad()
    def _changed(self, band: Band, rows: Tensor, large: bool) -> dict[str, Tensor]:
        fused = _checked(self.source, self.change, band, rows) if rows.is_floating_point() else rows
        if large and len(band.job.stored) > 1:
            # Packing a tensor that cannot be cut is a series of operations, each of which may use all threads.
            wait([computed for *_, computed in self.waiting if isinstance(computed, Future)])
            with all_threads():
                return self._packed(band, fused)
        return self._packed(band, fused)

    def _packed(self, band: Band, fused: Tensor) -> dict[str, Tensor]:
        packed = self.change.packing.pack(band.job.name, fused)
        return {name: tensor.cpu().contiguous() for name, tensor in packed.items()}

    def _check(self, band: Band, read: Future[Any]) -> None:
        """Hash what was read."""
        found = read.result()
        if self.hashes is None or isinstance(found, dict):
            return
        stored = self.source.tensors[band.job.source]
        start, _ = place_of(stored.entry, band.first, band.last)
        self._timed("check", partial(self.hashes.add, stored.file, start, found[0]))

    def _collect(self, *, one: bool = False, all_: bool = False) -> None:
        """Reclaim the buffers of what is written; raises the errors of writing."""
        while self.written and (one or all_ or all(future.done() for future in self.written[0][0])):
            futures, nbytes, buffer = self.written.popleft()
            for future in futures:
                future.result()
            self.in_flight -= nbytes
            if buffer is not None:
                self.free.append(buffer)
            one = False

    def _large(self, need: int) -> int:
        """Additional bytes allowed for one band that is larger than half of the limit."""
        sizes = [need, *(one[2] for one in self.waiting), *(nbytes for _, nbytes, _ in self.written)]
        return max(0, max(sizes) - self.room // 2)

    def _buffer(self, nbytes: int) -> Tensor:
        size = room_for(max(nbytes, BAND))
        kind = [buffer for buffer in self.free if (len(buffer) > room_for(BAND)) == (nbytes > BAND)]
        fitting = [buffer for buffer in kind if len(buffer) >= size]
        # A buffer that is too small for a large band is freed before a larger one replaces it.
        gone = min(fitting, key=len) if fitting else next(iter(kind), None)
        self.free = [buffer for buffer in self.free if buffer is not gone]
        return gone if fitting and gone is not None else torch.empty(size, dtype=torch.uint8)

    def _timed(self, phase: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return step()
        finally:
            with self.lock:
                setattr(self.timing, phase, getattr(self.timing, phase) + time.perf_counter() - start)


def _each(function: Callable[[str, int, Tensor], object], parts: Mapping[str, tuple[int, Tensor]]) -> None:
    for name, (first, rows) in parts.items():
        function(name, first, rows)


class _Worker:
    """A thread that runs steps in order, and none after one has failed."""

    def __init__(self):
        self.pool, self.failed = ThreadPoolExecutor(1), False

    def submit(self, step: Callable[[], Any]) -> Future[Any]:
        return self.pool.submit(self._run, step)

    def close(self) -> None:
        self.failed = True
        self.pool.shutdown(cancel_futures=True)

    def _run(self, step: Callable[[], Any]) -> Any:
        if self.failed:
            raise CancelledError
        try:
            return step()
        except BaseException:
            self.failed = True
            raise


def _checked(source: Source, change: Change, band: Band, rows: Tensor) -> Tensor:
    """Rows of a tensor, fused, possibly in their own memory. Raises CheckpointError if they overflow."""
    fused = _fused(source, change, band.job, rows, band.first)
    # A finite sum proves that all numbers are finite. Otherwise it may have overflowed, so each number is checked.
    if not torch.isfinite(fused.sum()) and not torch.isfinite(fused).all():
        _refuse(source, band.job, band.first, len(rows) if rows.ndim else 1, fused)
    return fused


def _fused(source: Source, change: Change, job: Job, rows: Tensor, first: int = 0) -> Tensor:
    """Rows of a tensor from row `first` on, fused, in their own memory if the dtype does not change."""
    moved = rows.to(change.device)
    if job.dtype.itemsize > moved.dtype.itemsize:
        moved = moved.to(job.dtype)  # widened before anything is rounded
    shape = source.tensors[job.source].entry.shape
    given = change.plan, change.gains, change.rotations
    fuse.fuse_in_place(job.name, moved, *given, precision=change.precision, shape=shape, first=first)
    return moved.to(job.dtype)


class Rotated:
    """The rotated checkpoint of a source; its tensors are computed when they are read."""

    def __init__(self, source: Source, change: Change, untied: Sequence[tuple[str, str]] = ()):
        self.source, self.change, self.folder = source, change, source.folder
        names = {name: name for name in source.tensors}
        self._origins = names | {name: origin for name, origin in untied if name not in names}
        self.tensors = {name: source.tensors[origin] for name, origin in self._origins.items()}

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """A tensor of the rotated model, in memory of its own."""
        origin = self._origins[name]
        rows = self.source.whole(origin)
        if not rows.is_floating_point():
            return rows
        return _fused(self.source, self.change, job_of(self.source, self.change, name, origin), rows).cpu()

    @torch.no_grad()
    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Rows of a tensor of the rotated model in order, each part with the number of its first row."""
        job = job_of(self.source, self.change, name, self._origins[name])
        for band in bands_of(self.source, self.change, job, BAND):
            buffer = torch.empty(room_for(band.nbytes), dtype=torch.uint8)
            rows = self.source.read(job.source, band.first, band.last, buffer)
            if rows.is_floating_point():
                rows = _fused(self.source, self.change, job, rows, band.first).cpu()
            yield band.first, rows


def _refuse(source: Source, job: Job, first: int, count: int, fused: Tensor) -> None:
    stored = source.tensors[job.source]
    again = source.read(job.source, first, first + count, torch.empty(stored.nbytes, dtype=torch.uint8))
    _check_source(source, job.source, again)
    raise CheckpointError(
        f"{_described(source, job.source)} overflows {fused.dtype} when it is rotated: use --dtype bfloat16 or float32"
    )
