"""Measure the CPU time of `--help` and `--version`, against `python -c pass` and importing typer only.

    python benchmarks/startup.py [--runs 10]

Every command runs in a process of its own with files in the page cache; the figure is the least CPU time (user and
system) of the runs. The limit is three times `python -c pass` plus 0.3 s. Time beyond typer with its help (rich) is
ours.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version

COMMANDS = ("plan", "rotate", "quantize", "learn", "evaluate", "verify", "rotate-adapter", "demo")
LIMIT = 0.3  # seconds beyond three times `python -c pass`


def cpu_time(arguments: list[str], runs: int) -> float:
    """Least CPU seconds of a Python process with these arguments."""
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def main() -> None:
    """Print a table of CPU times and their ratios to the two baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()},")
    print(f"typer {version('typer')}, rich {version('rich')}; least of {runs} runs")
    plain = cpu_time(["-c", "pass"], runs)
    typer = cpu_time(["-c", "import typer"], runs)
    cases = {
        "python -c pass": plain,
        "import typer": typer,
        "import typer, typer.rich_utils": cpu_time(["-c", "import typer, typer.rich_utils"], runs),
        "import spinquant": cpu_time(["-c", "import spinquant"], runs),
        "spinquant --version": cpu_time(["-m", "spinquant", "--version"], runs),
        "spinquant --help": cpu_time(["-m", "spinquant", "--help"], runs),
        **{f"spinquant {name} --help": cpu_time(["-m", "spinquant", name, "--help"], runs) for name in COMMANDS},
    }
    limit = 3 * plain + LIMIT
    print(f"\n{'':32}{'CPU s':>8}{'/ pass':>9}{'/ typer':>9}   limit {limit:.2f} s")
    for name, seconds in cases.items():
        print(f"{name:32}{seconds:8.3f}{seconds / plain:9.1f}{seconds / typer:9.1f}", end="")
        print("" if seconds <= limit else "   over the limit")


if __name__ == "__main__":
    main()
