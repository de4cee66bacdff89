"""Rounding of weights on SmolLM2-135M: what part of its error counts, what it is expected to cost, what helps.

    python benchmarks/rounded_weights.py share       # part of the squared error of RTN with the KL of GPTQ and GPTAQ
    python benchmarks/rounded_weights.py cost        # expected and measured cost of rounding one kind of linear
    python benchmarks/rounded_weights.py transforms --rounding rtn --kinds none scales values norms scales,values

share: R1, R2 and R4 (random Hadamards, seed 0), W4A16; GPTQ and GPTAQ calibrated on 32 samples of the manual. A part a
of the squared error is W + a^1/2 (Q(W) - W). cost: a tenth of the squared error, on the text whose moments are taken.
transforms: learned from 16 samples of the manual with all of the error (--share), on the docstrings. Texts:
`benchmarks/models.py`; windows of 512 tokens.
"""

import argparse
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import transformers

import spinquant
from models import MODELS, model_folder, text_file
from spinquant.learning.closed_form import Moments
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import closed_form_transforms, composed, kind_of
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.rounded_weights import rows_of, weight_gradient
from spinquant.learning.sensitivity import backward_own_predictions
from spinquant.models.capture import watching_calls
from spinquant.quantization.clip_search import relative_error
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Transform

UNPROVED = spinquant.Options(prove=False)


@cache
def folder() -> str:
    return str(model_folder(MODELS[0]))


def windows(text: str, count: int, *, last: bool = False) -> torch.Tensor:
    """Windows of a text, int64 (windows, 512): the first ones, or of 400 the last ones."""
    tokenizer = spinquant.load_tokenizer(folder())
    wanted = 400 if last else count
    found = spinquant.token_windows(tokenizer, text_file(text).read_text("utf-8"), length=512, count=wanted)
    return found[-count:] if last else found


@cache
def exact() -> Any:
    return spinquant.load(folder())


def quantized(scheme: str, spec: spinquant.RotationSpec, method: Any, transforms: Any = None) -> Any:
    """The model, quantized; GPTQ and GPTAQ, and activations and KV cache, are calibrated on the manual."""
    model, parsed = spinquant.load(folder()), spinquant.parse_scheme(scheme)
    clips = parsed.activations is not None or parsed.kv is not None
    calibrated = method != "rtn" or clips
    tokens = windows("manual", 32) if calibrated else None
    how = spinquant.Calibration(clips=clips) if calibrated else None
    given: dict[str, Any] = {"rotations": transforms, "method": method, "tokens": tokens, "calibration": how}
    spinquant.quantize(model, parsed, spec, options=UNPROVED, **given)
    return model


def rotated(spec: spinquant.RotationSpec, transforms: Mapping[str, Transform] | None = None) -> Any:
    """The model with weights at 16 bits."""
    model = spinquant.load(folder())
    spinquant.rotate(model, spec, rotations=transforms, options=UNPROVED)
    return model


@torch.no_grad()
def move(model: Any, start: Mapping[str, torch.Tensor], end: Any, part: float, wanted: str = "") -> None:
    """Give the weights whose names match a part of the squared error of the other model's, and others none."""
    there = dict(end.named_parameters())
    for name, weight in model.named_parameters():
        there_too = name in there and there[name].shape == weight.shape and re.search(wanted, name)
        weight.copy_(start[name] + part**0.5 * (there[name] - start[name]) if there_too else start[name])


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def share(arguments: argparse.Namespace) -> None:
    """KL by text with parts of the error of RTN, and with GPTQ and GPTAQ."""
    texts = {"manual": windows("manual", 4, last=True)}
    texts |= {name: windows(name, 4) for name in ("docstrings", "fortunes")}

    def show(what: str, model: Any) -> None:
        found = {name: spinquant.evaluate(model, rows, reference=exact()).kl for name, rows in texts.items()}
        print(what, {name: f"{kl:.4f}" for name, kl in found.items()}, flush=True)

    spec = spinquant.RotationSpec(("R1", "R2", "R4"))
    nearest, model = quantized("W4A16", spec, "rtn"), rotated(spec)
    start = weights_of(model)
    for part in (1.0, 0.5, 0.25, 0.125):
        move(model, start, nearest, part)
        show(f"{part} of the error of RTN", model)
    for method in ("gptq", "gptaq"):
        show(method, quantized("W4A16", spec, method))


def found_moments(
    spec: spinquant.RotationSpec, scheme: spinquant.Scheme, part: float
) -> tuple[Any, dict[str, Transform], dict[str, list[str]], dict[str, list[list[Moments]]]]:
    """(plan, rotations, spaces by kind, moments) from 16 samples of the manual."""
    model = spinquant.load(folder())
    plan, full = spinquant.plan_of(model), learning_scheme(scheme, weights=True)
    rotations = spinquant.make_rotations(plan, spec)
    fuse_gains(model, plan, rotations)
    kinds: dict[str, list[str]] = {}
    for space in plan.spaces:
        kind = kind_of(space)
        if kind is not None and (kind != "keys" or (scheme.kv is not None and space.name in rotations)):
            kinds.setdefault(kind, []).append(space.name)
    sites = sites_of(plan, [name for names in kinds.values() for name in names], full, rotations)
    how: dict[str, Any] = {"generator": generator_for(0, "moments"), "share": part}
    return plan, rotations, kinds, collect_moments(model, plan, sites, full, windows("manual", 16), **how)


def cost(arguments: argparse.Namespace) -> None:
    """Expected KL per token of rounding the weights of a kind, and the KL of a tenth of their error, times ten."""
    spec, rows = spinquant.RotationSpec(("R1", "R2", "R4")), windows("docstrings", 4)
    model = spinquant.load(folder())
    plan, full = spinquant.plan_of(model), learning_scheme(spinquant.parse_scheme("W4A16"), weights=True)
    fuse_gains(model, plan, spinquant.make_rotations(plan, spec))
    linears = [name for group in plan.linears for name in group]
    found: dict[str, list[float]] = {name: [0.0, 0.0] for name in linears}

    def watch(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        x = x.detach()

        def add(gradient: torch.Tensor) -> None:
            w, n = rows_of(model.get_submodule(name).weight, transposed=False).square().sum(1), x.shape[-1]
            factor = relative_error(n, full.weights) / n / 2 / rows.numel()
            apart = gradient[0].square().T @ x[0].square().sum(1)
            together = weight_gradient(x, gradient).square().sum(1)
            for number, h in enumerate((apart, together)):
                found[name][number] += factor * float(h @ w)

        output.register_hook(add)

    how: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "checkpointing": False, "progress": None}
    with watching_calls(model, linears, watch):
        backward_own_predictions(model, plan, full, rows, lambda attachment: None, **how)
    nearest, rounded = quantized("W4A16", spec, "rtn"), rotated(spec)
    start = weights_of(rounded)
    for wanted in ("v_proj", "[qk]_proj", "o_proj", "(gate|up)_proj", "down_proj", "_proj"):
        move(rounded, start, nearest, 0.1, wanted)
        measured = spinquant.evaluate(rounded, rows, reference=exact()).kl
        assert measured is not None
        apart, together = (sum(found[name][i] for name in linears if re.search(wanted, name)) for i in (0, 1))
        print(f"{wanted}: by token {apart:.4f}, by sample {together:.4f}, measured {10 * measured:.4f}", flush=True)


def transforms(arguments: argparse.Namespace) -> None:
    """KL and perplexity on the docstrings with some kinds of closed-form transforms."""
    rows = windows("docstrings", 8)
    for seed in arguments.seeds:
        spec = spinquant.RotationSpec(tuple(arguments.rotations.split(",")), seed=seed)
        scheme = spinquant.parse_scheme(arguments.scheme)
        plan, rotations, kinds, moments = found_moments(spec, scheme, arguments.share)
        free = closed_form_transforms(plan, moments)
        for wanted in arguments.kinds:
            names = [name for kind in wanted.split(",") for name in kinds.get(kind, ())]
            used = composed(rotations, {name: free[name] for name in names if name in free})
            model = quantized(arguments.scheme, spec, arguments.rounding, used)
            found = spinquant.evaluate(model, rows, reference=exact())
            line = (
                f"{arguments.scheme} {arguments.rotations} {arguments.rounding} seed {seed} {wanted}: KL {found.kl:.4f}"
            )
            line += f", perplexity {found.perplexity:.2f}"
            if arguments.rounding == "rtn" and arguments.part:
                there = rotated(spec, used)
                move(there, weights_of(there), model, arguments.part)
                found = spinquant.evaluate(there, rows, reference=exact())
                line += f"; at {arguments.part} of the error KL {found.kl:.4f}, perplexity {found.perplexity:.2f}"
            print(line, flush=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"share": share, "cost": cost, "transforms": transforms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--rotations", default="R1,R2,R4")
    parser.add_argument("--rounding", default="rtn", choices=["rtn", "gptq", "gptaq"])
    parser.add_argument("--share", type=float, default=1.0, help="part of the error of weights that counts")
    parser.add_argument(
        "--part", type=float, default=0.22, help="with rtn, part of the error to measure at too; 0: none"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the random Hadamards")
    parser.add_argument("--kinds", nargs="+", default=["none", "scales", "values", "norms", "scales,values,norms"])
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    arguments = parser.parse_args()
    COMMANDS[arguments.what](arguments)


if __name__ == "__main__":
    main()
