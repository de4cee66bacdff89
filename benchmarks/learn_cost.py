"""Estimate the cost of local learning for larger models from one decoder layer of their shapes.

For every shape a model of one random layer is built. Three things are timed: `sample`, one sample of 512 tokens through
the layer while activations are sampled; `rows`, one step on the rows of this layer's quantizers; and `map`, the part of
a step that runs once per model, the Cayley map of R1. The total is computed from them:

    layers * (samples * sample + steps * rows) + steps * map

    python benchmarks/learn_cost.py                      # 1B, 7B; some minutes
    python benchmarks/learn_cost.py --shapes 70B --repeats 1
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import transformers

import spinquant
from spinquant.learning.activations import collect
from spinquant.learning.cayley import Descent
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.layerwise import LocalOptions, learn_locally
from spinquant.learning.rows import ROWS_PER_SAMPLE

SHAPES = {  # layers, and the config of one
    "1B": (16, {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "7B": (32, {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}),
    "70B": (80, {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}),
}
LENGTH = 512


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Median time of a step, after one warm-up step."""
    step()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(shape: str, repeats: int) -> dict[str, float]:
    layers, sizes = SHAPES[shape]
    config = transformers.LlamaConfig(**sizes, vocab_size=512, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    plan, scheme = spinquant.plan_of(model), learning_scheme(spinquant.parse_scheme("A4KV4"), weights=False)
    made = spinquant.make_rotations(plan, spinquant.RotationSpec("R1,R2,R3"))
    fuse_gains(model, plan, made)
    options = LocalOptions()
    tokens = torch.randint(0, 512, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)

    def sample():
        return collect(model, plan, [*made], scheme, tokens, rows=options.rows, generator=generator, device=None)

    per_sample = seconds(sample, repeats) / len(tokens)
    sites = sample()
    order = config.hidden_size

    def learn(names: set[str], count: int) -> float:
        own = [site for site in sites if (site.space == "residual") == ("residual" in names)]
        ended: dict[str, list[float]] = {}

        def report(space: str, step: int, losses: list[float]) -> None:
            ended.setdefault(space, []).append(time.perf_counter())

        learn_locally(own, made, LocalOptions(steps=1 + repeats * count, rows=options.rows), report=report)
        # From the end of one step to that of the next, so without what is done once.
        return sum(statistics.median(b - a for a, b in pairwise(times)) for times in ended.values())

    descent = Descent({"r": torch.eye(order)}, "adam")
    gradient = torch.randn(order, order, generator=generator)
    once = seconds(lambda: descent.step({"r": gradient}, 0.1), repeats)
    rows = max(0.0, learn({"residual"}, 2) - once) + learn({"others"}, 4)
    samples = options.rows // ROWS_PER_SAMPLE
    total = layers * (samples * per_sample + options.steps * rows) + options.steps * once
    return {"layers": layers, "sample": per_sample, "rows": rows, "map": once, "hours": total / 3600}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "7B"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}")
    figures = {}
    for shape in arguments.shapes:
        found = figures[shape] = measure(shape, arguments.repeats)
        print(
            f"{shape:4} a layer: {found['sample']:.2f} s per sample, {found['rows']:.3f} s per step; "
            f"once: {found['map']:.2f} s per step; all {found['layers']} layers, {LocalOptions().steps} steps, "
            f"{LocalOptions().rows} rows: {found['hours']:.2f} h",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
