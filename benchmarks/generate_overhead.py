"""Time generation with the checks that every online rotation and quantizer ran, as a ratio to generation without them.

One model generates, and the checks are on in every second step. The wall and the processor time of each of these steps
is divided by the mean of those of its two neighbours, so that what slows the machine for longer than a step slows both.
Printed are the median of the ratios and its standard error. `--control` leaves the checks as they are, which shows what
such a median is off by.

    python benchmarks/generate_overhead.py
    python benchmarks/generate_overhead.py --control
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor

import spinquant
from spinquant.demo.model import demo_model
from spinquant.online.attachment import Attachment

CASES = (("A8", "none"), ("KV4", "none"), ("A4KV4", "R3,R4"))


class Turns(LogitsProcessor):
    """Called after each step of `generate`: takes its times, and turns the checks off or on for the next one."""

    def __init__(self, attachment: Attachment, *, control: bool):
        handles = [] if control else attachment._checks
        self.hooks = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
        self.taken: list[Any] = []
        self.steps: list[tuple[bool, float, float]] = []
        self.checked = True
        self.start = time.perf_counter(), time.process_time()

    def turn(self) -> None:
        self.checked = not self.checked
        if self.checked:
            for (found, key), hook in zip(self.hooks, self.taken, strict=True):
                found[key] = hook
        else:
            self.taken = [found.pop(key) for found, key in self.hooks]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wall, processor = time.perf_counter(), time.process_time()
        self.steps.append((self.checked, wall - self.start[0], processor - self.start[1]))
        self.turn()
        self.start = time.perf_counter(), time.process_time()
        return scores


def ratios_of(steps: list[tuple[bool, float, float]], clock: int) -> list[float]:
    """The times of steps with checks in those of their neighbours without; the first step reads the prompt."""
    around = zip(steps[1:], steps[2:], steps[3:], strict=False)
    return [2 * step[clock] / (before[clock] + after[clock]) for before, step, after in around if step[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--control", action="store_true", help="time pairs without any difference")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.model or demo_model()
    model = spinquant.load(folder)
    plan = spinquant.plan_of(model)
    _, text = spinquant.load_text("manual")
    tokens = spinquant.token_windows(spinquant.load_tokenizer(folder), text, length=arguments.prompt, count=1)
    given = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    given["attention_mask"] = torch.ones_like(tokens)

    results = {}
    for scheme, rotations in CASES:
        # Weights are left alone: what is timed does not depend on their values.
        made = spinquant.make_rotations(plan, spinquant.RotationSpec(rotations))
        found: dict[str, list[float]] = {"wall": [], "processor": []}
        with spinquant.attach(model, plan, made, spinquant.parse_scheme(scheme)) as attachment:
            for _ in range(arguments.repeats):
                turns = Turns(attachment, control=arguments.control)
                model.generate(tokens, logits_processor=[turns], **given)
                for clock, kind in enumerate(found, start=1):
                    found[kind] += ratios_of(turns.steps, clock)
                if not turns.checked:
                    turns.turn()
        label = f"{scheme} {rotations}".replace("none", "").strip()
        results[label] = found
        for kind, ratios in found.items():
            spread = statistics.quantiles(ratios, n=4)
            error = 0.93 * (spread[2] - spread[0]) / len(ratios) ** 0.5  # of a median of normal errors
            median = f"{statistics.median(ratios):.4f} +- {error:.4f}"
            print(f"{label:12} {kind:9} {median} x without checks, {len(ratios)} steps")
    if arguments.json:
        sizes = {"prompt": arguments.prompt, "tokens": arguments.tokens, "control": arguments.control}
        arguments.json.write_text(json.dumps({**sizes, "ratios": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
