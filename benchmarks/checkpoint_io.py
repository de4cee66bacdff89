"""Time reading, writing and streaming a checkpoint: O_DIRECT against buffered files and safetensors.

A bf16 Llama with random weights is generated (`stream.py`). Each case runs in a process of its own, in turn, with
nothing of the source in the page cache unless the case is called "warm". Measured are wall time, CPU time (of the
process, the kernel's share included), the growth of peak resident memory, and what the case leaves in the page cache.

- read: the bytes of every tensor, 2 MiB at a time, into one buffer. `direct`: ours. `plain`: `os.preadv`. `safe_open`:
  `safetensors.safe_open(...).get_slice(name)[first:last]`, copied into the buffer.
- hash: as read, and the SHA-256 of every file. `direct`: ours, which hashes the pieces while they are in memory
  (`checksums.SourceHash`). `apart`: `hashlib.file_digest` afterwards.
- write: a file of the same tensors, 2 MiB at a time, flushed to the disk. `direct`: ours. `behind`: ours without
  O_DIRECT, where pages are flushed while more is written. `plain`: `os.pwrite` and one `fsync`. `save_file`:
  `safetensors.torch.save_file` of tensors that are all in memory, and `fsync`.
- stream: `rotate_folder` with R1 and R2. `direct`: ours. `direct reads`: writes through the page cache. `plain`: reads
  too. `safe_open`: read by the library, written as `plain`.

    python benchmarks/checkpoint_io.py            # 1.3 GB
    python benchmarks/checkpoint_io.py --layers 16 --repeats 5
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stream import SHAPES, forget, generate

PIECE = 1 << 21
CASES = {
    "hash": ["direct", "apart"],
    "read": ["direct", "plain", "safe_open", "direct, warm", "plain, warm", "safe_open, warm"],
    "write": ["direct", "behind", "plain", "save_file"],
    "stream": ["direct", "direct reads", "plain", "safe_open"],
}


def pieces(folder: Path):
    """File, name, entry, first and last row of every piece of a checkpoint."""
    from spinquant.checkpoint.safetensors_io import read_entries

    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_entries(path).items():
            step = max(1, PIECE * entry.rows // max(1, entry.end - entry.start))
            for first in range(0, entry.rows, step):
                yield path, name, entry, first, min(first + step, entry.rows)


def read(folder: Path, way: str) -> Callable[[], None]:
    import torch
    from safetensors import safe_open

    from spinquant.checkpoint.safetensors_io import place_of

    found, buffer = list(pieces(folder)), torch.empty(PIECE + (1 << 14), dtype=torch.uint8)

    def direct() -> None:
        from spinquant.checkpoint.direct_io import DirectReader

        files = {path: DirectReader(path) for path in {one[0] for one in found}}
        for path, _, entry, first, last in found:
            files[path].read(*place_of(entry, first, last), buffer)

    def plain() -> None:
        files = {path: os.open(path, os.O_RDONLY) for path in {one[0] for one in found}}
        for path, _, entry, first, last in found:
            start, nbytes = place_of(entry, first, last)
            assert os.preadv(files[path], [buffer[:nbytes].numpy().data], start) == nbytes

    def library() -> None:
        for path in sorted({one[0] for one in found}):
            with safe_open(path, "pt") as file:
                for _, name, _, first, last in (one for one in found if one[0] == path):
                    piece = file.get_slice(name)[first:last].view(torch.uint8).reshape(-1)
                    buffer[: len(piece)].copy_(piece)

    return {"direct": direct, "plain": plain, "safe_open": library}[way]


def hashed(folder: Path, way: str) -> Callable[[], None]:
    import torch

    from spinquant.checkpoint.checksums import SourceHash
    from spinquant.checkpoint.direct_io import DirectReader
    from spinquant.checkpoint.safetensors_io import file_hash, place_of

    found, buffer = list(pieces(folder)), torch.empty(PIECE + (1 << 14), dtype=torch.uint8)
    paths = sorted({one[0] for one in found})

    def step() -> None:
        files, source = {path: DirectReader(path) for path in paths}, SourceHash(folder, [path.name for path in paths])
        for path, _, entry, first, last in found:
            start, nbytes = place_of(entry, first, last)
            piece = files[path].read(start, nbytes, buffer)
            if way == "direct":
                source.add(path.name, start, piece)
        if way == "direct":
            source.finish(list(source.files), {})
        else:
            for path in paths:
                file_hash(path)

    return step


def write(folder: Path, out: Path, way: str) -> Callable[[], None]:
    import torch
    from safetensors.torch import save_file

    from spinquant.checkpoint.safetensors_io import TensorFile, lay_out, place_of

    found = list(pieces(folder))
    layout = {name: (entry.dtype, entry.shape) for _, name, entry, _, _ in found}
    rows = torch.randn(PIECE // 2).to(torch.bfloat16)

    def ours() -> None:
        file = TensorFile(out, layout)
        file.begin()
        for _, name, entry, first, last in found:
            size = (last - first, *entry.shape[1:])
            file.write(name, first, rows[: torch.Size(size).numel()].view(size))
        file.sync()
        file.close()

    def plain() -> None:
        beginning, entries = lay_out(layout)
        file = os.open(out, os.O_WRONLY | os.O_CREAT, 0o666)
        os.pwrite(file, beginning, 0)
        memory = rows.view(torch.uint8).numpy().data
        for _, name, _, first, last in found:
            start, nbytes = place_of(entries[name], first, last)
            assert os.pwrite(file, memory[:nbytes], start) == nbytes
        os.fsync(file)

    def library() -> None:
        tensors = {name: torch.empty(shape, dtype=dtype).fill_(0.5) for name, (dtype, shape) in layout.items()}
        save_file(tensors, out, metadata={"format": "pt"})
        file = os.open(out, os.O_RDONLY)
        os.fsync(file)

    if way == "behind":
        del os.O_DIRECT
    return {"direct": ours, "behind": ours, "plain": plain, "save_file": library}[way]


def stream(folder: Path, out: Path, way: str) -> Callable[[], None]:
    import torch
    from safetensors import safe_open

    import spinquant
    from spinquant.checkpoint import direct_io
    from spinquant.checkpoint.reader import Source

    def piece(self, name: str, first: int, last: int, buffer):
        path = self.folder / self.tensors[name].file
        if path not in opened:
            opened.clear()  # the pages of one shard at a time
            opened[path] = safe_open(path, "pt")
        found = opened[path].get_slice(name)[first:last].reshape(-1).view(torch.uint8)
        return buffer[: len(found)].copy_(found)

    opened = {}
    if way == "direct reads":
        past = direct_io._open
        direct_io._open = lambda path, flags: past(path, flags) if flags == os.O_RDONLY else None
    elif way != "direct":
        del os.O_DIRECT
    if way == "safe_open":
        Source.piece = piece
    spec = spinquant.RotationSpec(rotations=("R1", "R2"))
    return lambda: void(spinquant.rotate_folder(folder, out, spec, text=None))


def void(_: object) -> None:
    """Accept any arguments and do nothing."""


def cached(folder: Path) -> float:
    """Share of a folder's files, or of one file, in the page cache; one page in every 4 MiB is checked."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    found = looked = 0
    for path in files:
        file, byte = os.open(path, os.O_RDONLY), bytearray(1)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # to look is not to have more read
        for offset in range(0, path.stat().st_size, 1 << 22):
            looked += 1
            try:
                found += os.preadv(file, [byte], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
        os.close(file)
    return found / max(1, looked)


def measured(case: str, way: str, folder: Path, out: Path) -> dict[str, float]:
    """Run a case in this process."""
    import torch

    way = way.partition(", ")[0]
    if case != "stream":
        torch.set_num_threads(
            1
        )  # as readers and writers of a stream are: threads that share a copy wait for each other
    if case in ("read", "hash"):
        step = (read if case == "read" else hashed)(folder, way)
    else:
        step = (write if case == "write" else stream)(folder, out, way)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": (after.ru_maxrss - before.ru_maxrss) * 1024,
        "cached": cached(folder if case in ("read", "hash") else out),
    }


def run(case: str, way: str, folder: Path, out: Path) -> dict[str, float]:
    """Run a case in a process of its own."""
    forget(folder)
    if way.endswith("warm"):
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(PIECE):
                    pass
    command = [sys.executable, __file__, "--case", case, way, str(folder), str(out)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", help="ways to compare; direct always runs")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case, way, folder, out = arguments.case
        print(json.dumps(measured(case, way, Path(folder), Path(out))))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}")
    with tempfile.TemporaryDirectory(prefix="spinquant-bench-", dir=arguments.scratch) as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "out"
        nbytes = generate(folder, {**SHAPES["1b"], "layers": arguments.layers})
        for case in arguments.only:
            found: dict[str, list[dict[str, float]]] = {
                way: [] for way in CASES[case] if way == "direct" or way in (arguments.ways or CASES[case])
            }
            for i in range(arguments.repeats):  # in turn, so that drift of the machine's speed hits all
                order = list(found)
                for way in order[i % len(order) :] + order[: i % len(order)]:
                    found[way].append(run(case, way, folder, out))
            print(f"\n{case} {nbytes / 1e9:.2f} GB (best of {arguments.repeats}; ratios to direct)")
            ours = {key: min(one[key] for one in found["direct"]) for key in ("wall", "cpu", "peak", "cached")}
            for way, runs in found.items():
                best = {key: min(one[key] for one in runs) for key in ours}
                all_ = {key: " ".join(f"{one[key]:.2f}" for one in runs) for key in ("wall", "cpu")}
                print(
                    f"  {way:16} wall {best['wall']:6.2f} s = {best['wall'] / ours['wall']:5.2f} x ({all_['wall']}), "
                    f"CPU {best['cpu']:6.2f} s = {best['cpu'] / ours['cpu']:5.2f} x ({all_['cpu']}), peak memory "
                    f"+{best['peak'] / 1e6:5.0f} MB, {best['cached']:4.0%} of the file left in the page cache",
                    flush=True,
                )


if __name__ == "__main__":
    main()
