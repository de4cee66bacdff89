"""Time a forward pass with fake quantization and online rotations, as a ratio to the plain one.

The same model, the same tokens, in turn in one process:

    python benchmarks/evaluate_overhead.py
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

import spinquant
from spinquant.demo.model import demo_model

CASES = (("A4", "none"), ("KV4", "none"), ("A4KV4", "none"), ("none", "R3"), ("none", "R4"), ("A4KV4", "R3,R4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.model or demo_model()
    model = spinquant.load(folder)
    plan = spinquant.plan_of(model)
    _, text = spinquant.load_text("manual")
    tokens = spinquant.token_windows(spinquant.load_tokenizer(folder), text, length=arguments.length, count=1)

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
        return time.perf_counter() - start

    seconds()
    results = {}
    for scheme, rotations in CASES:
        # Weights are left alone: what is timed does not depend on their values.
        made = spinquant.make_rotations(plan, spinquant.RotationSpec(rotations))
        ratios = []
        for _ in range(arguments.repeats):
            plain = seconds()
            with spinquant.attach(model, plan, made, spinquant.parse_scheme(scheme)):
                ratios.append(seconds() / plain)
        label = f"{scheme} {rotations}".replace("none", "").strip()
        results[label] = ratios
        print(f"{label:14} {statistics.median(ratios):.2f} x plain  ({min(ratios):.2f} - {max(ratios):.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"length": arguments.length, "ratios": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
