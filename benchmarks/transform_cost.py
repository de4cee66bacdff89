"""Time what transforms cost at run time, as a ratio to the model with random Hadamards in R3 and R4.

Variants take turns within every round, and a round's times are divided by that of `R3,R4`; printed are the medians of
the ratios over rounds. Transforms that are fused into weights cost nothing and are in no variant: closed
forms leave R3 as a matrix for each key-value head, which is `R3 of matrices`. Online R1 adds two transforms per layer.

    python benchmarks/transform_cost.py
    python benchmarks/transform_cost.py --device cuda --dtype bfloat16 --model FOLDER
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import spinquant
from spinquant.demo.model import demo_model
from spinquant.rotations.random_transforms import random_transforms

BASE = "R3,R4"
VARIANTS = {"no rotation": "none", BASE: BASE, "R3 of matrices": BASE, "online R1": "online-R1,R3,R4"}


def seconds(model, ids: torch.Tensor, repeats: int) -> float:
    """Wall time of one forward pass."""
    device = ids.device
    model(ids, use_cache=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        model(ids, use_cache=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--scheme", default="A4KV4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="tokens of a forward pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=4, help="forward passes of a variant in a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    model = spinquant.load(arguments.model or demo_model()).to(device, getattr(torch, arguments.dtype))
    plan = spinquant.plan_of(model)
    generator = torch.Generator().manual_seed(0)
    results: dict[str, dict[str, float]] = {}
    for count in arguments.tokens:
        ids = torch.randint(0, model.config.vocab_size, (1, count), generator=generator).to(device)
        found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.rounds):
            taken = {}
            for variant, rotations in VARIANTS.items():
                made = spinquant.make_rotations(plan, spinquant.RotationSpec(rotations.split(",")))
                if variant == "R3 of matrices":
                    made |= random_transforms(plan, ("R3",))
                with spinquant.attach(model, plan, made, arguments.scheme):
                    taken[variant] = seconds(model, ids, arguments.repeats)
            for variant, value in taken.items():
                found[variant].append(value / taken[BASE])
        results[str(count)] = {variant: statistics.median(ratios) for variant, ratios in found.items()}
        for variant, ratios in found.items():
            spread = statistics.quantiles(ratios, n=4)
            middle = statistics.median(ratios)
            print(f"{count:5} tokens  {variant:16} {middle:.3f} x {BASE} (quartiles {spread[0]:.3f}, {spread[2]:.3f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"scheme": arguments.scheme, "device": name, "ratios": results}) + "\n")


if __name__ == "__main__":
    main()
