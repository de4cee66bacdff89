"""Compare transforms: perplexity of quantized models, as the share of the gap that random Hadamards leave.

A row is a way to find transforms, most of them a method of `spinquant learn`. For every row, seed and scheme they are
learned from the Python manual and scored on its end, in one process; in others the model is quantized with them, by
round-to-nearest (rtn), GPTQ or GPTAQ, calibrated on the manual with clip ratios searched, and evaluated on texts of
other sources. Every figure is a line of OUT/figures.jsonl as soon as it is measured: rerun to resume, or to see the
tables. The share of a seed is

    log(P_random / P) / log(P_random / P_16)

with P_random of the best random Hadamard of the same seed (row `random`, of --baselines), which its other rows are
compared with and start from. 0 is no better than random, 100 % is the model at 16 bits.

    python benchmarks/transforms.py --rows random local --seeds 1      # SmolLM2-135M, W4A4KV4
    python benchmarks/transforms.py --rows random flatquant --device cuda
    python benchmarks/transforms.py --model gemma-3-270m --rows random local --schemes W4A16 W4A8KV8 W4A4KV4 \\
        --weights rtn gptaq --out gemma
    python benchmarks/transforms.py --device cuda --jobs 8 --minutes 10  # what fits into the time

Three seeds of all rows take hours on a CPU. Models and texts: `benchmarks/models.py`.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from measuring import Figures, Pool

RANDOM, EXACT, FLATQUANT = "random", "16-bit", "flatquant"
ONLINE = "online-R1,R2,R3,R4"
SPINQUANT = {
    "loss": "cross-entropy",
    "optimizer": "sgd",
    "lr": 1.5,
    "schedule": "linear",
    "batch": 8,
    "range_gradient": False,
}
OSTQUANT = {"loss": "kl", "top_tokens": 1000, "weights": True, "batch": 8, "range_gradient": False}


@dataclass(frozen=True)
class Row:
    """A set of transforms.

    method: of `spinquant learn`; None for the first random Hadamard of the seed, without learning; `flatquant` for the
    transforms of `flatquant.py`, from 128 samples, whose other settings are those of its paper. transforms: those in
    closed form, before rotations are learned; None for the default of the method. start: the row whose result learning
    starts from. rotations: those of them that the model's architecture allows are used. learned: those that are
    learned; None for the default. rounding: how weights will be rounded; None for the default. local, end_to_end:
    options of `LocalOptions` and `EndToEndOptions` that are not the defaults.
    """

    method: str | None
    transforms: bool | None = None
    start: str | None = None
    rotations: str = "R1,R2,R3,R4"
    learned: tuple[str, ...] | None = None
    rounding: str | None = None
    local: Mapping[str, Any] = field(default_factory=dict)
    end_to_end: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    "none": Row(None, rotations=""),
    "hadamard": Row(None),
    RANDOM: Row("random", transforms=False),
    "closed-form": Row("closed-form"),
    "closed-form-rtn": Row("closed-form", rounding="rtn"),
    "online-random": Row("random", transforms=False, rotations=ONLINE),
    "online-closed-form": Row("closed-form", rotations=ONLINE),
    "scales-values": Row("random", transforms=True),
    "local-no-transforms": Row("local", transforms=False),
    "local": Row("local"),
    "local-rtn": Row("local", rounding="rtn"),
    "local-R1-R2": Row("local", rotations="R1,R2"),
    "end-to-end-no-transforms": Row("end-to-end", transforms=False),
    "end-to-end": Row("end-to-end"),
    "end-to-end-40": Row("end-to-end", end_to_end={"steps": 40}),
    "local+end-to-end": Row("end-to-end", start="local", end_to_end={"steps": 20}),
    # As in arXiv 2405.16406: R1 and R2, cross-entropy with the straight-through estimator, weights at 16 bits.
    "spinquant": Row("end-to-end", transforms=False, learned=("R1", "R2"), end_to_end=SPINQUANT),
    # As in arXiv 2501.13987: R1, R2 and scales, KL on 1000 tokens, weights quantized; from where `local` ends.
    "ostquant": Row("end-to-end", start="local", learned=("R1", "R2"), end_to_end=OSTQUANT),
    FLATQUANT: Row(FLATQUANT),
}
# What figures depend on besides their keys: a rerun into the same folder with other settings is refused.
SETTINGS = ("samples", "baselines", "held_out", "dtype", "calibration", "windows", "length")


def learn(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Learn in this process; return what was kept, scores, seconds and peak resident bytes, or why it was refused."""
    import spinquant
    from models import text_file
    from spinquant.calibration.data import CalibrationText
    from spinquant.entrypoints.learn import LearnText
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions

    row, seed, scheme = ROWS[job["row"]], job["seed"], spinquant.parse_scheme(job["scheme"])
    if row.method == FLATQUANT:
        return learn_flat(job, settings)
    rotations = possible(job["folder"], row.rotations)
    baselines = settings["baselines"] if job["best"] is None else 1
    spec = spinquant.RotationSpec(rotations, seed=first_seed(seed) + (job["best"] or 0))
    # With weights alone, learning compares nothing unless it rounds them.
    weights = {"weights": True} if scheme.activations is None and scheme.kv is None else {}
    options = spinquant.LearnOptions(
        row.method,  # pyright: ignore[reportArgumentType]
        rotations=row.learned and tuple(name for name in row.learned if name in rotations),
        baselines=baselines,
        rounding=row.rounding,  # pyright: ignore[reportArgumentType]
        transforms=row.transforms,
        seed=seed,
        local=LocalOptions(**row.local),
        end_to_end=EndToEndOptions(**{**weights, **row.end_to_end}),
    )
    text = LearnText(
        CalibrationText(str(text_file("manual")), settings["samples"], settings["length"], seed),
        windows=settings["held_out"],
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
    about = {key: learned.record[key] for key in ("kept", "scores", "seconds")}
    return {
        **about,
        "rotations": rotations,
        "total_seconds": time.perf_counter() - begun,
        "peak_bytes": peak(job["device"]),
    }


def peak(device: str) -> int:
    """Peak bytes of a device's memory; on a CPU, of what is resident."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    return torch.get_device_module(device).max_memory_allocated(device)


def learn_flat(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """As `learn`, of row `flatquant`."""
    import spinquant
    from flatquant import Job, learn_folder
    from flatquant_block import FlatOptions
    from spinquant.calibration.data import CalibrationText

    text, scheme = CalibrationText("manual", 128, settings["length"]), spinquant.parse_scheme(job["scheme"])
    work = Job(job["folder"], scheme, text, FlatOptions(seed=job["seed"]), job["device"])
    learned = learn_folder(work, job["place"], processes=1 if job["device"] == "cpu" else 4)
    about = {key: learned.record[key] for key in ("kept", "scores", "seconds")}
    total = sum(learned.record["seconds"].values())
    return {
        **about,
        "rotations": learned.spec.rotations,
        "total_seconds": total,
        "peak_bytes": peak(job["device"]),
    }


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

    def windows(text: str, count: int) -> Any:
        return windows_of(job["folder"], text, settings["length"], count)

    begun = time.perf_counter()
    model: Any = spinquant.load(job["folder"], device=job["device"])

    if job["row"] is not None:
        scheme = spinquant.parse_scheme(job["scheme"])
        clips = scheme.activations is not None or scheme.kv is not None
        rounding, _, tuned = job["weights"].partition("+tune")
        rounding, _, asymmetry = rounding.partition("@")
        gptq = spinquant.GPTQOptions(asymmetry=float(asymmetry)) if asymmetry else spinquant.GPTQOptions()
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
            calibration=spinquant.Calibration(gptq, clips=clips) if calibrated else None,
            options=spinquant.Options(prove=False),
            tune=spinquant.TuneOptions(steps=int(tuned)) if tuned else None,
        )
    quantized = time.perf_counter() - begun
    found = {text: spinquant.evaluate(model, windows(text, settings["windows"])).perplexity for text in job["texts"]}
    return {"perplexity": found, "quantize_seconds": quantized, "total_seconds": time.perf_counter() - begun}


@cache
def windows_of(folder: str, text: str, length: int, count: int) -> Any:
    """Windows of a text, int64 (windows, length)."""
    import spinquant
    from models import text_file

    tokenizer = spinquant.load_tokenizer(folder)
    return spinquant.token_windows(tokenizer, text_file(text).read_text("utf-8"), length=length, count=count)


@dataclass(frozen=True)
class Unit:
    """What is measured in one process: a row of one seed and scheme, learned once; without a row the model itself."""

    row: str | None
    seed: int
    scheme: str
    folder: str
    arguments: argparse.Namespace

    @property
    def key(self) -> str:
        """The beginning of the names of its figures."""
        return EXACT if self.row is None else f"{self.row}/{self.seed}/{self.scheme}"

    @property
    def before(self) -> list[str]:
        """Keys of the units whose results it starts from."""
        if self.row is None or self.row == RANDOM or ROWS[self.row].method is None:
            return []
        return [f"{row}/{self.seed}/{self.scheme}" for row in (RANDOM, ROWS[self.row].start) if row]

    def tasks(self, figures: Figures) -> Iterator[tuple[str, str, Any]]:
        """(name, kind, job) of its figures that are missing."""
        arguments = self.arguments
        job: dict[str, Any] = {"folder": self.folder, "row": self.row, "device": arguments.device}
        if self.row is None:
            if texts := figures.lacks(EXACT, arguments.texts):
                yield EXACT, "use", {**job, "texts": texts}
            return
        learned = arguments.learned or arguments.out
        job |= {"seed": self.seed, "scheme": self.scheme}
        job["place"] = str(learned / f"{self.row}-{self.seed}-{self.scheme}")
        if ROWS[self.row].method is not None:
            best = figures.found.get(f"{RANDOM}/{self.seed}/{self.scheme}/learn", {}).get("kept")
            start = ROWS[self.row].start and learned / f"{ROWS[self.row].start}-{self.seed}-{self.scheme}"
            if start and not start.is_dir():
                raise SystemExit(f"row {self.row} starts from row {ROWS[self.row].start}: name it in --rows too")
            job["start"] = start and str(start)
            job["best"] = None if best is None or self.row == RANDOM else int(best.split()[-1])
            found = figures.found.get(f"{self.key}/learn")
            if found is None:
                yield f"{self.key}/learn", "learn", job
            elif "refused" in found:
                return
        for weights in arguments.weights:
            if texts := figures.lacks(f"{self.key}/{weights}", arguments.texts):
                yield f"{self.key}/{weights}", "use", {**job, "weights": weights, "texts": texts}


def work(tasks: Sequence[tuple[str, str, Any]], settings: dict[str, Any]) -> None:
    """Measure the figures of a unit in this process, and print each as JSON."""
    for key, kind, job in tasks:
        figure = (learn if kind == "learn" else use)(job, settings)
        print(json.dumps({"key": key, "figure": figure}), flush=True)
        if "refused" in figure:
            return


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
        work(*json.loads(sys.argv[2]))
        return
    from models import MODELS, TEXTS, model_folder, text_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODELS[0], help=f"{', '.join(MODELS)}, or a folder (default: %(default)s)")
    usual = [row for row in ROWS if row != FLATQUANT]  # which takes hours without a GPU
    parser.add_argument("--rows", nargs="+", default=usual, choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--schemes", nargs="+", default=["W4A4KV4"])
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["rtn", "gptaq"],
        help="rtn, gptq or gptaq (gptaq@0.1: with this asymmetry), and with +tune64 tuned for so many steps",
    )
    parser.add_argument("--texts", nargs="+", default=["docstrings", "fortunes"], choices=TEXTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("transforms"))
    parser.add_argument("--learned", type=Path, help="folder for what is learned (default: that of --out)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--minutes", type=float, help="measure no longer than this, and show the tables")
    parser.add_argument("--baselines", type=int, default=5, help="random Hadamards of a seed")
    parser.add_argument("--samples", type=int, default=64, help="samples that are learned from")
    parser.add_argument("--held-out", type=int, default=8, help="windows that candidates are scored on while learning")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype while learning")
    parser.add_argument("--calibration", type=int, default=32, help="samples of GPTQ, GPTAQ and the search for clips")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text that is evaluated on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample or window")
    arguments = parser.parse_args()
    for text in ("manual", *arguments.texts):
        text_file(text)  # a text that cannot be had is noticed before anything is measured
    folder = str(model_folder(arguments.model) if arguments.model in MODELS else Path(arguments.model).resolve())
    import torch
    import transformers

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.device}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    arguments.out.mkdir(exist_ok=True, parents=True)
    settings = {"model": Path(folder).name, **{name: getattr(arguments, name) for name in SETTINGS}}
    figures = Figures(arguments.out / "figures.jsonl", settings)
    units = [Unit(None, 0, "", folder, arguments)]
    rows = sorted(arguments.rows, key=lambda name: (name != RANDOM, bool(ROWS[name].start)))  # first what others need
    for scheme in arguments.schemes:
        for seed in range(arguments.seeds):
            units += [Unit(row, seed, scheme, folder, arguments) for row in rows]
    pool = Pool(figures, __file__, jobs=arguments.jobs, minutes=arguments.minutes)
    pool.run(units)
    if EXACT in figures.found:
        print_tables(figures.found, arguments)
    if pool.failed:
        raise SystemExit("\n\n".join(pool.failed))


def print_tables(figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a table for every scheme and way to round weights."""
    print(f"\n{arguments.model}; mean over seeds (lowest to highest)\n")
    for scheme in arguments.schemes:
        for weights in arguments.weights:
            print(table(figures, scheme, weights, arguments.rows, arguments.texts))


if __name__ == "__main__":
    main()
