"""Compare transforms: perplexity of quantized models, as the share of the gap that random Hadamards leave.

A row is a way to find transforms, most of them a method of `spinquant learn`. For every row, seed and scheme they are
learned from the Python manual and scored on its end, in one process; in others the model is quantized with them, by
round-to-nearest (rtn), GPTQ or GPTAQ, calibrated on the manual with clip ratios searched, and evaluated on texts of
other sources. Every figure is written to OUT/figures.json as soon as it is measured: rerun to resume, or to see the
tables. The share of a seed is

    log(P_random / P) / log(P_random / P_16)

with P_random of the best random Hadamard of the same seed (row `random`, of --baselines), which its other rows are
compared with and start from. 0 is no better than random, 100 % is the model at 16 bits.

    python benchmarks/transforms.py --rows random local --seeds 1      # SmolLM2-135M, W4A4KV4
    python benchmarks/transforms.py --model gemma-3-270m --rows random local --schemes W4A16 W4A8KV8 W4A4KV4 \\
        --weights rtn gptaq --out gemma

Three seeds of all rows take hours. Models and texts: `benchmarks/models.py`.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANDOM, EXACT = "random", "16-bit"


@dataclass(frozen=True)
class Row:
    """A set of transforms.

    method: of `spinquant learn`; None for the first random Hadamard of the seed, without learning. transforms: those in
    closed form, before rotations are learned; None for the default of the method. start: the row whose result learning
    starts from. rotations: those of them that the model's architecture allows are used. local, end_to_end: options of
    `LocalOptions` and `EndToEndOptions` that are not the defaults.
    """

    method: str | None
    transforms: bool | None = None
    start: str | None = None
    rotations: str = "R1,R2,R3,R4"
    local: Mapping[str, Any] = field(default_factory=dict)
    end_to_end: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    "none": Row(None, rotations=""),
    "hadamard": Row(None),
    RANDOM: Row("random", transforms=False),
    "closed-form": Row("closed-form"),
    "scales-values": Row("random", transforms=True),
    "local-no-transforms": Row("local", transforms=False),
    "local": Row("local"),
    "local-R1-R2": Row("local", rotations="R1,R2"),
    "end-to-end-no-transforms": Row("end-to-end", transforms=False),
    "end-to-end": Row("end-to-end"),
    "end-to-end-40": Row("end-to-end", end_to_end={"steps": 40}),
    "local+end-to-end": Row("end-to-end", start="local", end_to_end={"steps": 20}),
}
# What figures depend on besides their keys: a rerun into the same folder with other settings is refused.
SETTINGS = ("samples", "baselines", "held_out", "dtype", "calibration", "windows", "length")


def learn(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Learn in this process; return what was kept, scores, seconds and peak resident bytes, or why it was refused."""
    import spinquant
    from spinquant.calibration.data import CalibrationText
    from spinquant.entrypoints.learn import LearnText
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions

    row, seed, scheme = ROWS[job["row"]], job["seed"], spinquant.parse_scheme(job["scheme"])
    rotations = possible(job["folder"], row.rotations)
    baselines = settings["baselines"] if job["best"] is None else 1
    spec = spinquant.RotationSpec(rotations, seed=first_seed(seed) + (job["best"] or 0))
    # With weights alone, learning compares nothing unless it rounds them.
    weights = {"weights": True} if scheme.activations is None and scheme.kv is None else {}
    options = spinquant.LearnOptions(
        row.method,  # pyright: ignore[reportArgumentType]
        baselines=baselines,
        transforms=row.transforms,
        seed=seed,
        local=LocalOptions(**row.local),
        end_to_end=EndToEndOptions(**{**weights, **row.end_to_end}),
    )
    text = LearnText(
        CalibrationText("manual", settings["samples"], settings["length"], seed), windows=settings["held_out"]
    )
    begun = time.perf_counter()
    try:
        learned = spinquant.learn_folder(
            job["folder"],
            job["place"],
            scheme,
            spec,
            options,
            text=text,
            start=job["start"],
            device=job["device"],
            dtype=settings["dtype"],
            force=True,
        )
    except spinquant.LearningError as error:
        return {"refused": str(error)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {key: learned.record[key] for key in ("kept", "scores", "seconds")}
    return {**about, "rotations": rotations, "total_seconds": time.perf_counter() - begun, "peak_bytes": peak}


def first_seed(seed: int) -> int:
    """Seed of the first random Hadamard: every seed of the benchmark has its own, up to 100 of them."""
    return 100 * seed


def possible(folder: str, rotations: str) -> tuple[str, ...]:
    """Those of these rotations that the model's architecture allows."""
    from spinquant.architectures import make_plan
    from spinquant.checkpoint.folder import load_config, read_headers

    plan = make_plan(load_config(folder), {name: info.shape for name, info in read_headers(folder).items()})
    refused = dict(plan.refused)
    return tuple(name for name in rotations.split(",") if name not in refused and plan.spaces_of(name))


def use(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Perplexity on every text, of the quantized model, or without a row of the model at 16 bits."""
    import spinquant
    from models import TEXTS

    tokenizer, begun = spinquant.load_tokenizer(job["folder"]), time.perf_counter()
    model: Any = spinquant.load(job["folder"]).to(job["device"])

    def windows(text: str, count: int) -> Any:
        return spinquant.token_windows(tokenizer, TEXTS[text](), length=settings["length"], count=count)

    if job["row"] is not None:
        scheme = spinquant.parse_scheme(job["scheme"])
        clips = scheme.activations is not None or scheme.kv is not None
        rounding, _, tuned = job["weights"].partition("+tune")
        calibrated = clips or rounding != "rtn" or bool(tuned)
        if ROWS[job["row"]].method is None:
            names = possible(job["folder"], ROWS[job["row"]].rotations)
            spec, rotations = spinquant.RotationSpec(names, seed=first_seed(job["seed"])), None
        else:
            learned = spinquant.read_learned(job["place"])
            spec, rotations = learned.spec, learned.rotations
        spinquant.quantize(
            model,
            scheme,
            spec,
            rotations=rotations,
            method=rounding,
            # Tuning is judged on eight windows, with one as a gap.
            tokens=windows("manual", settings["calibration"] + (9 if tuned else 0)) if calibrated else None,
            calibration=spinquant.Calibration(clips=clips) if calibrated else None,
            options=spinquant.Options(prove=False),
            tune=spinquant.TuneOptions(steps=int(tuned)) if tuned else None,
        )
    quantized = time.perf_counter() - begun
    found = {text: spinquant.evaluate(model, windows(text, settings["windows"])).perplexity for text in job["texts"]}
    return {"perplexity": found, "quantize_seconds": quantized, "total_seconds": time.perf_counter() - begun}


class Figures:
    """Figures by name, kept in a file; measured in a process of their own where they are missing."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        known = json.loads(path.read_text()) if path.exists() else {"settings": settings, "figures": {}}
        if known["settings"] != settings:
            raise SystemExit(
                f"{path} has figures with {known['settings']}, and this run asks for {settings}: use its settings, or "
                "another --out"
            )
        self.found: dict[str, dict[str, Any]] = known["figures"]

    def measure(self, key: str, kind: str, job: dict[str, Any]) -> dict[str, Any]:
        texts = [text for text in job.get("texts", ()) if text not in self.found.get(key, {}).get("perplexity", {})]
        if key not in self.found or texts:
            work = json.dumps([kind, {**job, "texts": texts}, self.settings])
            done = subprocess.run([sys.executable, __file__, "--worker", work], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{key} failed:\n{done.stderr[-3000:]}")
            new = json.loads(done.stdout.splitlines()[-1])
            if texts:
                new["perplexity"] |= self.found.get(key, {}).get("perplexity", {})
            self.found[key] = new
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"settings": self.settings, "figures": self.found}, indent=1))
            partial.replace(self.path)
        shown = ("kept", "rotations", "refused", "perplexity", "total_seconds")
        print(f"{key:44} {json.dumps({k: v for k, v in self.found[key].items() if k in shown})}", flush=True)
        return self.found[key]


def measure_seed(figures: Figures, folder: str, seed: int, scheme: str, arguments: argparse.Namespace) -> None:
    """All rows of one seed and scheme, `random` first."""
    for row in sorted(arguments.rows, key=lambda name: name != RANDOM):
        key, place = f"{row}/{seed}/{scheme}", arguments.out / f"{row}-{seed}-{scheme}"
        job: dict[str, Any] = {"folder": folder, "row": row, "seed": seed, "scheme": scheme, "place": str(place)}
        job["device"] = arguments.device
        learned: dict[str, Any] = {}
        if ROWS[row].method is not None:
            best = figures.found.get(f"{RANDOM}/{seed}/{scheme}/learn", {}).get("kept") if row != RANDOM else None
            start = ROWS[row].start and arguments.out / f"{ROWS[row].start}-{seed}-{scheme}"
            if start and not start.is_dir():
                raise SystemExit(f"row {row} starts from row {ROWS[row].start}: name it before in --rows, or run it")
            job |= {"best": None if best is None else int(best.split()[-1]), "start": start and str(start)}
            learned = figures.measure(f"{key}/learn", "learn", job)
        if "refused" not in learned:
            for weights in arguments.weights:
                figures.measure(f"{key}/{weights}", "use", {**job, "weights": weights, "texts": arguments.texts})


def share(figures: dict[str, Any], row: str, seed: int, scheme: str, weights: str, text: str) -> float | None:
    """Share of the gap in log-perplexity between the best random Hadamard and 16 bits; None without its figure."""
    keys = (f"{RANDOM}/{seed}/{scheme}/{weights}", f"{row}/{seed}/{scheme}/{weights}", EXACT)
    if any(text not in figures.get(key, {}).get("perplexity", {}) for key in keys):
        return None
    base, found, exact = (math.log(figures[key]["perplexity"][text]) for key in keys)
    return (base - found) / (base - exact)


def spread(values: Sequence[float], form: str) -> str:
    """Mean and range, or the number alone if there is one."""
    if not values:
        return ""
    mean, low, high = (format(v, form) for v in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def table(figures: dict[str, Any], scheme: str, weights: str, rows: Sequence[str], texts: Sequence[str]) -> str:
    """Markdown: a line per row with the mean over its seeds, lowest and highest, for every text."""
    heads = [cell for text in texts for cell in (f"{text}: perplexity", "of the gap")]
    lines = [f"**{scheme}, {weights}**", "", " | ".join(("| transforms", *heads, "seeds", "seconds to learn |"))]
    lines.append("|---" * (len(heads) + 3) + "|")
    exact = [cell for text in texts for cell in (f"{figures[EXACT]['perplexity'][text]:.2f}", "100%")]
    for row in rows:
        known = sorted({int(key.split("/")[1]) for key in figures if key.startswith(f"{row}/")})
        names = {seed: f"{row}/{seed}/{scheme}/{weights}" for seed in known}
        seeds = [s for s, name in names.items() if set(texts) <= set(figures.get(name, {}).get("perplexity", {}))]
        if not seeds:
            refused = any("refused" in figures.get(f"{row}/{seed}/{scheme}/learn", {}) for seed in known)
            lines.append(f"| {row} | {'refused' if refused else 'not measured'}" + " | " * (len(heads) + 1) + "|")
            continue
        cells = []
        for text in texts:
            values = [figures[names[seed]]["perplexity"][text] for seed in seeds]
            shares = [s for seed in seeds if (s := share(figures, row, seed, scheme, weights, text)) is not None]
            cells += [spread(values, ".2f"), spread(shares, ".0%")]
        seconds = [s for seed in seeds if (s := figures.get(f"{row}/{seed}/{scheme}/learn", {}).get("total_seconds"))]
        lines.append(f"| {row} | {' | '.join(cells)} | {len(seeds)} | {spread(seconds, '.0f')} |")
    return "\n".join([*lines, f"| 16 bits | {' | '.join(exact)} | | |", ""])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, job, settings = json.loads(sys.argv[2])
        print(json.dumps((learn if kind == "learn" else use)(job, settings)))
        return
    from models import MODELS, TEXTS, model_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS[0], help=f"{', '.join(MODELS)}, or a folder (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--schemes", nargs="+", default=["W4A4KV4"])
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["rtn", "gptaq"],
        help="rtn, gptq or gptaq, and with +tune64 tuned for so many steps",
    )
    parser.add_argument("--texts", nargs="+", default=["docstrings", "fortunes"], choices=TEXTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("transforms"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--baselines", type=int, default=5, help="random Hadamards of a seed")
    parser.add_argument("--samples", type=int, default=64, help="samples that are learned from")
    parser.add_argument("--held-out", type=int, default=8, help="windows that candidates are scored on while learning")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype while learning")
    parser.add_argument("--calibration", type=int, default=32, help="samples of GPTQ, GPTAQ and the search for clips")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text that is evaluated on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample or window")
    arguments = parser.parse_args()
    for text in arguments.texts:
        TEXTS[text]()  # a text that cannot be read is noticed before anything is measured
    folder = str(model_folder(arguments.model) if arguments.model in MODELS else Path(arguments.model).resolve())
    import torch
    import transformers

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.device}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    arguments.out.mkdir(exist_ok=True, parents=True)
    settings = {"model": Path(folder).name, **{name: getattr(arguments, name) for name in SETTINGS}}
    figures = Figures(arguments.out / "figures.json", settings)
    about = {"folder": folder, "row": None, "device": arguments.device, "texts": arguments.texts}
    figures.measure(EXACT, "use", about)
    for seed in range(arguments.seeds):
        for scheme in arguments.schemes:
            measure_seed(figures, folder, seed, scheme, arguments)
    print(f"\n{arguments.model}; mean over seeds (lowest to highest)\n")
    for scheme in arguments.schemes:
        for weights in arguments.weights:
            print(table(figures.found, scheme, weights, arguments.rows, arguments.texts))


if __name__ == "__main__":
    main()
