"""Time the parts of closed-form transforms: the pass for moments, against plain passes, and choosing the damping.

- plain: forward and back through the 16-bit model, weights frozen, as often as there are samples
- gradients, weights: the pass that collects the moments of all four kinds, `--moments gradients` and `weights`
- solving: damping and the best transform of every space, from the moments of gradients

Seconds of the wall, and of all cores in brackets, which other work on the machine disturbs less.

    python benchmarks/closed_form.py                                  # SmolLM2-135M, 4 samples of 512 tokens
    OMP_NUM_THREADS=1 python benchmarks/closed_form.py --samples 16
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import spinquant
from spinquant.demo.model import demo_model
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import closed_form_transforms, free_spaces
from spinquant.learning.learn import MOMENT_SAMPLES
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.weight_moments import collect_weight_moments


def seconds(action: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What an action returns, and its seconds: of the wall, and of all cores."""
    wall, cores = time.perf_counter(), time.process_time()
    result = action()
    return result, (time.perf_counter() - wall, time.process_time() - cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--scheme", default="W4A4KV4")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    folder = arguments.model or demo_model()
    _, text = spinquant.load_text("manual")
    tokens = spinquant.token_windows(
        spinquant.load_tokenizer(folder), text, length=arguments.length, count=arguments.samples
    )
    model = spinquant.load(folder, dtype=arguments.dtype)
    plan, scheme = spinquant.plan_of(model), spinquant.parse_scheme(arguments.scheme)
    made = spinquant.make_rotations(plan, spinquant.RotationSpec("R1,R2,R3,R4"))
    fuse_gains(model, plan, made)
    model.requires_grad_(False)
    learning = learning_scheme(scheme, weights=False)
    names = [name for spaces in free_spaces(plan, made, learning).values() for name in spaces]
    what = (model, plan, sites_of(plan, names, learning, made), replace(learning, weights=scheme.weights))

    def plain() -> None:
        for row in tokens.split(1):
            embedded = model.get_input_embeddings()(row).requires_grad_()
            model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()

    generator = torch.Generator().manual_seed(0)
    model(input_ids=tokens[:1], use_cache=False)
    found = {"plain": seconds(plain)[1]}
    moments, found["gradients"] = seconds(lambda: collect_moments(*what, tokens, generator=generator))
    _, found["weights"] = seconds(lambda: collect_weight_moments(*what, tokens))
    _, found["solving"] = seconds(lambda: closed_form_transforms(plan, moments))
    for part, (wall, cores) in found.items():
        whole = (
            "" if part == "solving" else f"; {wall * MOMENT_SAMPLES / len(tokens):.0f} s for {MOMENT_SAMPLES} samples"
        )
        print(f"{part:10} {wall:6.1f} s ({cores:.1f} s){whole}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
