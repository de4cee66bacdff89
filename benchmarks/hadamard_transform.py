"""Time the fast Hadamard transform against its limit, a copy of the same tensor.

    python benchmarks/hadamard_transform.py [--quick] [--json FILE] [--plot FILE.png]

Everything is a ratio to `target.copy_(source)` of the same tensor, which is larger than the last-level
cache, timed in turn in one run; the figure is the fastest round. "New tensor" includes the page
faults of the result, which the copy does not pay. The peers are `hadamard_transform`
from PyPI where it can be imported (powers of two, float32) and the dense product.
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

from spinquant.rotations.fast_transform import Factor, Sylvester
from spinquant.rotations.hadamard import construct, factors_for, hadamard_matrix, hadamard_transform

ORDERS = (512, 4096, 8192, 14336, 11008)
GROWTH = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE_ROWS = 256  # the dense product does not depend on the cache, so fewer rows give the same time per row


def hardware() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def fastest(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each task, run in turn so that other load affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def measure(order: int, dtype: torch.dtype, megabytes: int, rounds: int, dense: bool) -> dict[str, float]:
    """Return time per row relative to a copy."""
    rows = megabytes * 2**20 // (order * dtype.itemsize)
    x = torch.randn(rows, order, dtype=torch.float32).to(dtype)
    target = torch.empty_like(x)
    tasks: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(x),
        "ours": lambda: hadamard_transform(x, order, out=target),
        "ours, new tensor": lambda: hadamard_transform(x, order),
    }
    scale = {"ours": 1.0, "ours, new tensor": 1.0}
    if dense:
        matrix = (hadamard_matrix(order) / order**0.5).to(dtype)
        few = min(rows, DENSE_ROWS)
        tasks["dense product"] = lambda: torch.mm(x[:few], matrix, out=target[:few])
        scale["dense product"] = rows / few
    if order & (order - 1) == 0 and dtype == torch.float32 and (peer := find_peer()) is not None:
        tasks["PyPI hadamard_transform"] = lambda: peer(x)
        scale["PyPI hadamard_transform"] = 1.0
    times = fastest(tasks, rounds)
    ratios = {name: times[name] * factor / times["copy"] for name, factor in scale.items()}
    return {"copy (ns per element)": times["copy"] / x.numel() * 1e9, **ratios}


def find_peer() -> Callable[[Tensor], Tensor] | None:
    """Return the peer's function; this script has the peer's name, so its own folder is not searched."""
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("hadamard_transform", [p for p in sys.path if Path(p).resolve() != here])
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hadamard_transform


def print_table(rows: list[dict]) -> None:
    names = ["ours", "ours, new tensor", "dense product", "PyPI hadamard_transform"]
    print("| n | construction | factors | dtype | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    for row in rows:
        cells = [f"{row[name]:.1f}" if name in row else "-" for name in names]
        print(f"| {row['order']} | {row['construction']} | {row['factors']} | {row['dtype']} | {' | '.join(cells)} |")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for dtype in DTYPES:
        points = [(row["order"], row["ours"]) for row in rows if row["dtype"] == dtype]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=dtype)
    axes.set(xscale="log", xlabel="order n", ylabel="time / copy of the same tensor", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="gray", linestyle=":", label="copy")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def described(factor: Factor) -> str:
    return f"butterflies {factor.order}" if isinstance(factor, Sylvester) else str(len(factor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller tensors, fewer rounds, no growth curve")
    parser.add_argument("--orders", type=int, nargs="+", metavar="N", help="measure these orders only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the cost against n (needs matplotlib)")
    options = parser.parse_args()
    megabytes, rounds = (64, 3) if options.quick else (128, 7)

    machine = hardware()
    print(", ".join(f"{key}: {value}" for key, value in machine.items()), f"\n{megabytes} MB per tensor\n")
    table = []
    growth = () if options.quick and not options.plot else GROWTH
    for order in dict.fromkeys(options.orders or (*ORDERS, *growth)):
        for name, dtype in DTYPES.items():
            row = {"order": order, "dtype": name, "construction": str(construct(order))}
            row["factors"] = " x ".join(map(described, factors_for(torch.empty(1, order, dtype=dtype), order)))
            table.append(row | measure(order, dtype, megabytes, rounds, dense=order in ORDERS))
    print_table(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "megabytes": megabytes, "rows": table}, indent=2))
    if options.plot:
        plot(table, options.plot)


if __name__ == "__main__":
    main()
