"""Measure streaming of a checkpoint: wall time against `cp` and against the matrix products, and peak memory.

A bf16 Llama with random weights is generated shard by shard. In the same run, each in a process of its own: `cp -r` of
the folder and `sync`; R1+R2 and R1+R2+R4 with Hadamard rotations; R1 dense. Logits are not compared on real tokens,
which would take two forward passes. Two limits are measured on matrices of the same shapes: the time of the Hadamard
transforms alone, and that of a dense product. Nothing of the source is in the page cache when a command starts.

    python benchmarks/stream.py                       # 1B shape, 2.5 GB
    python benchmarks/stream.py --shape 8b            # 16 GB, and as much again for the result
    python benchmarks/stream.py --peer PYTHON         # llm-compressor too, in its environment
    python benchmarks/stream.py --layers 4 16 48 --plot memory.png   # peak memory against the size of the model

Cases that the machine cannot hold are skipped with a message: a shape that does not fit the disk twice, and the peer if
the model alone exceeds the available memory. A peer that the system kills for memory is reported as killed.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from spinquant.calibration.hidden_states import available_memory
from spinquant.checkpoint.safetensors_io import TensorFile
from spinquant.rotations.hadamard import hadamard_transform

SHAPES = {
    "1b": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8, "vocabulary": 128256, "tied": True},
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv": 8, "vocabulary": 128256, "tied": False},
}
SHARD = 2_000_000_000  # bytes


def tensor_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = shape["hidden"], shape["inner"], shape["hidden"] // shape["heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocabulary"], hidden)}
    for i in range(shape["layers"]):
        layer = f"model.layers.{i}"
        found |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (shape["kv"] * head, hidden),
            f"{layer}.self_attn.v_proj.weight": (shape["kv"] * head, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    found["model.norm.weight"] = (hidden,)
    return found if shape["tied"] else {**found, "lm_head.weight": (shape["vocabulary"], hidden)}


def generate(folder: Path, shape: dict) -> int:
    """Write a checkpoint of a shape; return its bytes."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for name, size in tensor_shapes(shape).items():
        nbytes = 2 * torch.Size(size).numel()
        if shards[-1] and nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = size
        room -= nbytes
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator).mul_(0.02).to(torch.bfloat16)  # repeated: no number matters
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        writer = TensorFile(folder / file, {name: (torch.bfloat16, size) for name, size in tensors.items()})
        writer.begin()
        for name in writer.entries:
            size = tensors[name]
            rows = max(1, len(pool) // torch.Size(size[1:]).numel())
            for first in range(0, size[0], rows):
                part = torch.Size((min(rows, size[0] - first), *size[1:]))
                writer.write(name, first, pool[: part.numel()].view(part))
            weight_map[name] = file
        writer.finish()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "vocab_size": shape["vocabulary"],
        "tie_word_embeddings": shape["tied"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


class Killed(Exception):
    """A command was killed by the system. seconds: run time until then. peak: resident bytes."""

    def __init__(self, seconds: float, peak: int):
        super().__init__(f"killed after {seconds:.0f} s with {peak / 1e6:.0f} MB")
        self.seconds, self.peak = seconds, peak


def first_to_go() -> None:
    """Make the out-of-memory killer choose this process first."""
    if (place := Path("/proc/self/oom_score_adj")).exists():
        place.write_text("1000")


def timed(command: list[str], *, begin=None) -> tuple[float, float, int, str]:
    """Seconds, CPU seconds, peak resident bytes, and standard output of a command. begin: called in it first."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=begin)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == -signal.SIGKILL:
        raise Killed(time.perf_counter() - start, usage.ru_maxrss * 1024)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, cpu, usage.ru_maxrss * 1024, output


def forget(folder: Path) -> None:
    """Drop a folder from the page cache, as if the model were larger than memory."""
    os.sync()
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def copy(folder: Path, out: Path) -> tuple[float, float, float]:
    """Seconds of `cp -r` and `sync` (a stream flushes too), CPU seconds, and seconds of `cp` alone."""
    forget(folder)
    alone, cpu, _, _ = timed(["cp", "-r", str(folder), str(out)])
    start = time.perf_counter()
    subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    seconds = alone + time.perf_counter() - start
    shutil.rmtree(out)
    return seconds, cpu, alone


def stream(folder: Path, out: Path, *options: str) -> tuple[float, float, int, dict]:
    """Seconds, CPU seconds, peak memory and phases of a spinquant command, without the comparison on real tokens."""
    forget(folder)
    base = [sys.executable, "-m", "spinquant", options[0], str(folder), str(out), "--no-compare", "--json"]
    seconds, cpu, peak, output = timed([*base, *options[1:]])
    shutil.rmtree(out)
    return seconds, cpu, peak, json.loads(output)["seconds"]


def peer(python: Path, folder: Path, out: Path, nbytes: int) -> tuple[float, float, int, dict] | None:
    """The same for llm-compressor, which loads the model; None, with a printed reason, if it cannot run."""
    if available_memory() < 1.1 * nbytes:
        print(
            f"  llm-compressor skipped: it loads {nbytes / 1e9:.1f} GB, and {available_memory() / 1e9:.1f} GB are free"
        )
        return None
    forget(folder)
    script = Path(__file__).parent / "stream_peer.py"
    try:
        command = [str(python), str(script), str(folder), str(out)]
        seconds, cpu, peak, output = timed(command, begin=first_to_go)
    except Killed as killed:
        print(f"  llm-compressor was {killed}: the machine has {available_memory() / 1e6:.0f} MB free without it")
        shutil.rmtree(out, ignore_errors=True)
        return None
    start = time.perf_counter()
    subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    seconds += time.perf_counter() - start
    shutil.rmtree(out)
    return seconds, cpu, peak, json.loads(output.splitlines()[-1])["seconds"]


def multiplied(shape: dict, *, online: bool) -> dict[str, int]:
    """Numbers of elements rotated by R1, and by R4."""
    hidden = shape["hidden"]
    names = tensor_shapes(shape) | {"lm_head.weight": (shape["vocabulary"], hidden)}
    residual = sum(torch.Size(size).numel() for size in names.values() if len(size) == 2)
    inner = sum(torch.Size(size).numel() for name, size in names.items() if "down_proj" in name)
    return {"R1": residual, "R4": inner if online else 0}


def product_speed(order: int, rows: int) -> float:
    """Operations per second of a product (rows, order) x (order, order) in float32."""
    a, b = torch.randn(rows, order), torch.randn(order, order)
    out = torch.empty(rows, order)
    torch.mm(a, b, out=out)
    best = min(_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))
    return 2 * rows * order * order / best


def _seconds(step) -> float:
    # Of the CPU, by thread: what others do on the same cores does not count.
    start = time.process_time()
    step()
    return (time.process_time() - start) / torch.get_num_threads()


def transform_seconds(elements: int, order: int) -> float:
    """Seconds of a Hadamard transform of this many elements on all threads, in pieces that fit the cache."""
    x, repeats = torch.randn((1 << 20) // order, order), 100
    hadamard_transform(x, order, out=x)
    found = _seconds(lambda: [hadamard_transform(x, order, out=x) for _ in range(repeats)])
    return elements * found / (repeats * x.numel())


def run(scratch: Path, shape: dict, repeats: int, only: list[str], python: Path | None = None) -> dict:
    folder, out = scratch / "model", scratch / "out"
    nbytes = generate(folder, shape)
    elements = multiplied(shape, online=True)
    gemm = product_speed(shape["hidden"], 4096)
    products = transform_seconds(elements["R1"], shape["hidden"])
    limits = {
        "R1,R2": products,
        "R1,R2,R4": products + transform_seconds(elements["R4"], shape["inner"]),
        "dense R1": elements["R1"] * 2 * shape["hidden"] / gemm,
    }
    commands = {
        "R1,R2": ("rotate", "--rotations", "R1,R2"),
        "R1,R2,R4": ("quantize", "--scheme", "none", "--rotations", "R1,R2,R4"),
        "dense R1": ("rotate", "--rotations", "R1", "--type", "random-matrix"),
    }
    commands = {name: options for name, options in commands.items() if name in only}
    runs: dict[str, list] = {name: [] for name in commands}
    copies, peers = [], []
    for _ in range(repeats):  # in turn, so that drift of the machine's speed hits all
        copies.append(copy(folder, out))
        for name, options in commands.items():
            runs[name].append(stream(folder, out, *options))
        if python is not None and (found := peer(python, folder, out, nbytes)) is not None:
            peers.append(found)
    shutil.rmtree(folder)
    started = timed([sys.executable, "-m", "spinquant", "--help"])[1]
    best = {name: min(found) for name, found in runs.items()}
    cp = min(copies)
    largest = 4 * max(torch.Size(size).numel() for size in tensor_shapes(shape).values())
    print(
        f"\n{shape['layers']} layers, {nbytes / 1e9:.2f} GB; cp and sync: {cp[0]:.2f} s ({cp[2]:.2f} s without sync), "
        f"{cp[1]:.2f} CPU-s"
    )
    print(f"  starting Python with torch and transformers: {started:.2f} CPU-s, in all figures of ours")
    print(f"  products: dense {gemm / 1e9:.0f} Gflop/s; bound on memory {(3 * largest + 5e8) / 1e6:.0f} MB")
    for name, (seconds, cpu, peak, phases) in best.items():
        print(
            f"  {name:9} {seconds:7.2f} s = {seconds / cp[0]:5.2f} x cp, {cpu:6.2f} CPU-s; arithmetic alone "
            f"{limits[name]:6.2f} s ({seconds / limits[name]:.2f} x, CPU once started "
            f"{(cpu - started) / limits[name]:.2f} x); computing "
            f"{phases['compute']:.2f} s, reading {phases['read']:.2f} s, writing {phases['write']:.2f} s, hashing "
            f"{phases['check']:.2f} and {phases['hash']:.2f} s; peak {peak / 1e6:.0f} MB"
        )
    if peers:
        seconds, cpu, peak, phases = min(peers)
        print(f"  llm-compressor, R1 and R2: {seconds:.2f} s, {cpu:.2f} CPU-s, {phases}; peak {peak / 1e6:.0f} MB")
        if "R1,R2" in best:
            ours = best["R1,R2"]
            print(f"    = {seconds / ours[0]:.2f} x our time, {cpu / ours[1]:.2f} x CPU, {peak / ours[2]:.2f} x memory")
    return {
        "peer": peers,
        "bytes": nbytes,
        "cp_seconds": copies,
        "runs": runs,
        "limits": limits,
        "gemm": gemm,
        "largest": largest,
    }


def plot(results: list[dict], path: Path) -> None:
    """Peak memory against the size of the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    sizes = [result["bytes"] / 1e9 for result in results]
    for name in results[0]["runs"]:
        peaks = [max(one[2] for one in result["runs"][name]) / 1e9 for result in results]
        axes.plot(sizes, peaks, marker="o", label=name)
    axes.plot(sizes, sizes, linestyle="--", color="gray", label="the model itself")
    axes.set(xlabel="checkpoint, GB", ylabel="peak resident memory, GB", ylim=(0, max(sizes)))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, instead of that of the shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["R1,R2", "R1,R2,R4", "dense R1"], help="which of the three runs")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured")
    parser.add_argument("--peer", type=Path, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape, results = SHAPES[arguments.shape], []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{platform.processor() or platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {resource.getpagesize()} byte pages"
    )
    with tempfile.TemporaryDirectory(prefix="spinquant-bench-", dir=arguments.scratch) as scratch:
        for layers in arguments.layers or [shape["layers"]]:
            chosen = {**shape, "layers": layers}
            need = 5 * sum(torch.Size(size).numel() for size in tensor_shapes(chosen).values())
            free = shutil.disk_usage(scratch).free
            if free < need:
                print(f"skipped {layers} layers: {need / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} GB are free")
                continue
            results.append(run(Path(scratch), chosen, arguments.repeats, arguments.only, arguments.peer))
    if arguments.plot and results:
        plot(results, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
