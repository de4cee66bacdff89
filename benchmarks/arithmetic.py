"""Time a half-precision model in its own dtype and in float32: forward, and forward and backward.

Both run in turn in one process, and the ratio is that of the least times of the process on its processor cores. On a
processor with instructions for bfloat16, oneDNN can be kept from using them:

    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/arithmetic.py
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import spinquant
from spinquant.compute.dtypes import HALVES, arithmetic, named
from spinquant.demo.model import demo_model


def least(work: Callable[[], object], repeats: int) -> float:
    """The least time in seconds that this process has spent on the work, over all its threads."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL")
    print(f"{platform.processor() or platform.machine()}, ONEDNN_MAX_CPU_ISA {limit}, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.model or demo_model()
    _, text = spinquant.load_text("manual")
    rows = spinquant.token_windows(spinquant.load_tokenizer(folder), text, length=arguments.length, count=1)
    found = {}
    for half in HALVES:
        chosen = arithmetic(str(folder), half, spinquant.load(folder, dtype=half).num_parameters(), "cpu")
        times = {}
        for dtype in (half, torch.float32):
            model = spinquant.load(folder, dtype=dtype)
            model.requires_grad_(False)
            model.get_input_embeddings().weight.requires_grad_(True)
            with torch.no_grad():
                forward = least(lambda model=model: model(rows), arguments.repeats)
            both = least(lambda model=model: model(rows).logits.float().square().mean().backward(), arguments.repeats)
            times[named(dtype)] = {"forward": forward, "forward and backward": both}
        ratios = {what: times[named(half)][what] / times["float32"][what] for what in times["float32"]}
        found[named(half)] = {"chosen": chosen.to_dict(), "seconds": times, "ratio to float32": ratios}
        for what, ratio in ratios.items():
            print(f"{named(half)}, {what}: {ratio:.2f} times as long as float32; chosen: {chosen}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
