"""R1 learned together with the scales of norms: expected cost on held-out rows, and perplexity rounded to nearest.

Rows come from samples of the Python manual. The expected cost is on the last eighth of them, in nats per token, of
activations and of weights. Perplexity is that of W4A4KV4 rounded to nearest with clip ratios 0.9 and 0.95, on the
docstrings of the standard library, with random Hadamards for R2 and R4 and transforms in closed form for hidden
channels, values and keys.

    python benchmarks/joint.py --steps 0 150 400             # SmolLM2-135M; some 10 minutes on one core
    python benchmarks/joint.py --start random --steps 0 400
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import spinquant
from models import MODELS, docstrings, model_folder
from spinquant.learning import joint
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import closed_form_transforms, composed, free_spaces
from spinquant.learning.joint import closed_form_scales, held_out_costs, learn_jointly, sorted_start
from spinquant.learning.joint_sites import JointSite, collect_jointly
from spinquant.learning.joint_steps import transforms_of
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.models.modules import in_eval_mode
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Transform, matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--start", default="sorted", choices=("sorted", "random"))
    parser.add_argument("--block", type=int, default=joint.BLOCK, help="largest block of the sorted start")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, LocalOptions().steps])
    parser.add_argument("--lr", type=float, default=LocalOptions().lr)
    parser.add_argument("--batch", type=int, default=LocalOptions().batch)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--windows", type=int, default=6, help="of the evaluation; 0 for none")
    arguments = parser.parse_args()
    joint.BLOCK = arguments.block
    folder = str(model_folder(arguments.model))
    tokenizer = spinquant.load_tokenizer(folder)
    tokens = spinquant.token_windows(tokenizer, spinquant.load_text("manual")[1], length=512, count=arguments.samples)
    others, sites, size = captured(folder, tokens, spinquant.parse_scheme("W4A4KV4"))
    scheme = spinquant.parse_scheme("W4A4KV4", activation_clip=0.9, kv_clip=0.95)
    if arguments.windows:
        windows = spinquant.token_windows(tokenizer, docstrings(), length=512, count=arguments.windows)
        print(f"random R1: perplexity {perplexity(folder, scheme, others, windows):.2f}", flush=True)
    for steps in arguments.steps:
        start = sorted_start(sites, size, scheme.weights, centred=False) if arguments.start == "sorted" else None
        r = (matrix(others["residual"]) if start is None else start).float()
        scales = closed_form_scales(sites, r, scheme.weights)
        begun = time.perf_counter()
        options = LocalOptions(steps=max(1, steps), lr=arguments.lr, batch=arguments.batch)
        if steps:
            r, scales, _ = learn_jointly(sites, r, scales, scheme.weights, options)
        seconds = time.perf_counter() - begun
        costs = held_out_costs(sites, r, scales, scheme.weights)
        turned, scaled = transforms_of("residual", r, scales)
        line = f"{steps} steps: " + ", ".join(f"{what} {cost:.4f}" for what, cost in costs.items())
        if arguments.windows:
            line += f", perplexity {perplexity(folder, scheme, {**others, **turned, **scaled}, windows):.2f}"
        print(f"{line} ({seconds:.0f} s)", flush=True)


def captured(folder: str, tokens: torch.Tensor, scheme: Scheme) -> tuple[dict[str, Transform], list[JointSite], int]:
    """Random rotations with transforms in closed form, what is learned from, and the size of the residual stream."""
    model = spinquant.load(folder)
    plan = spinquant.plan_of(model)
    made = spinquant.make_rotations(plan, spinquant.RotationSpec(("R1", "R2", "R3", "R4")))
    fuse_gains(model, plan, made)
    spaces = free_spaces(plan, made, scheme)
    wanted = [space for kind, found in spaces.items() if kind != "norms" for space in found]
    how: dict[str, Any] = {"seed": 0, "weights": scheme.weights, "rows": 1024, "generator": generator_for(0, "rows")}
    with in_eval_mode(model):
        found = sites_of(plan, wanted, scheme, made)
        moments = collect_moments(model, plan, found, scheme, tokens, generator=generator_for(0, "moments"))
        learning = learning_scheme(scheme, weights=False)
        _, sites = collect_jointly(model, plan, ["residual"], ["residual"], learning, tokens, **how)
    others = composed(made, closed_form_transforms(plan, moments))
    return others, sites["residual"], plan.space["residual"].size


def perplexity(folder: str, scheme: Scheme, transforms: dict[str, Transform], windows: torch.Tensor) -> float:
    """Perplexity of the model, transformed and rounded to nearest."""
    model = spinquant.load(Path(folder))
    options = spinquant.Options(prove=False)
    spec = spinquant.RotationSpec(("R1", "R2", "R3", "R4"))
    spinquant.quantize(model, scheme, spec, rotations=transforms, method="rtn", options=options)
    return spinquant.evaluate(model, windows).perplexity


if __name__ == "__main__":
    main()
