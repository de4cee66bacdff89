"""Demo: quantize one real model with and without rotation, and report it as an HTML page with plots.

For every part of a scheme (weights, activations, KV cache) and for all of it: the perplexity of the plain and of the
rotated model, on the same tokens. Plots of the linears' inputs and weights before and after rotation show why. Nothing
is hard-coded; every number and every claim on the page comes from the run.
"""

import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.calibration.data import load_text, token_windows
from spinquant.checkpoint.atomic import check_free
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.checkpoint.folder import is_local, load_config, load_tokenizer
from spinquant.compute.dtypes import named
from spinquant.demo.model import demo_model
from spinquant.demo.page import Activation, DemoResult, page
from spinquant.entrypoints.arithmetic import load_to_compute
from spinquant.entrypoints.in_memory import rotate
from spinquant.entrypoints.result import Options
from spinquant.entrypoints.stream_run import SAMPLE_TOKENS
from spinquant.errors import SchemeError
from spinquant.evaluation.equivalence import prove
from spinquant.evaluation.metrics import evaluate
from spinquant.evaluation.plots import (
    plot_activations,
    plot_kurtosis,
    plot_perplexities,
    plot_weights,
    relative_magnitude,
    require_matplotlib,
)
from spinquant.formats.native import unmark
from spinquant.models.capture import captured, device_of
from spinquant.models.context import fitting_length
from spinquant.models.modules import tensor_shapes
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.rtn import quantize_weight, round_weights
from spinquant.quantization.scheme import Quantizer, Scheme, parse_scheme
from spinquant.quantization.targets import check_fits, weights_of
from spinquant.rotation_names import USUAL
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.rotation import Transform

Progress = Callable[[str, int, int], None]

PICTURES = ("activations_first.png", "activations_last.png", "kurtosis.png", "weights.png", "perplexity.png")


@dataclass(frozen=True)
class _Side:
    """Measurements of the plain or the rotated model; tensors and kurtosis by the name of a linear."""

    perplexities: list[float]
    inputs: Mapping[str, Tensor]
    kurtosis: Mapping[str, float]
    weight_kurtosis: Mapping[str, float]


def run_demo(
    out: str | Path,
    *,
    model: str | Path | None = None,
    text: str = "manual",
    windows: int = 8,
    length: int | None = None,
    seed: int = 0,
    scheme: str | Scheme = "W4A4KV4",
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Measure a model plain and rotated; write a folder with plots, demo.json and a self-contained index.html.

    model: a folder or hub id, by default a real 135M model. text, windows, length: the tokens on which perplexity is
    measured. dtype: to compute in, by default that of the model, or float32 where a CPU is faster in it than in half
    precision. Raises PlotError without matplotlib, CheckpointError if `out` exists and `force` is off, SchemeError for
    a scheme that quantizes nothing, and what `load` and `rotate` raise.
    """
    start = time.perf_counter()
    check_free(out, force=force)
    require_matplotlib()
    variants = variants_of(parse_scheme(scheme))
    source = demo_model() if model is None else model
    tokenizer = load_tokenizer(source)
    text_name, content = load_text(text, tokenizer)
    length = fitting_length(load_config(source), length, 512, "give a shorter --length")
    tokens = token_windows(tokenizer, content, length=length, count=windows)
    (loaded,), (computed,) = load_to_compute(source, device="cpu", wanted=dtype)
    plan = plan_of(loaded)
    check_fits(plan, tensor_shapes(loaded), parse_scheme(scheme))
    refused = dict(plan.refused)
    possible = tuple(name for name in USUAL if plan.spaces_of(name) and name not in refused)
    spec = RotationSpec(possible, "auto", seed=seed)
    tiny = prove(loaded.config, spec)

    before = _measure(loaded, plan, {}, variants, tokens, _stage(progress, "plain"))
    weight = max(before.weight_kurtosis, key=lambda name: before.weight_kurtosis[name])
    weight_before = loaded.get_submodule(weight).weight.detach().clone()
    rotated = rotate(loaded, spec, sample=tokens[:1, :SAMPLE_TOKENS], options=Options(prove=False, progress=progress))
    assert rotated.real is not None  # since a sample was given
    unmark(loaded)  # every variant attaches its own rotations and quantizers
    after = _measure(loaded, plan, rotated.rotations, variants, tokens, _stage(progress, "rotated"))
    weight_after = loaded.get_submodule(weight).weight.detach()

    kinds = _kinds(plan)
    layer, drawn = _most_peaked(kinds, before.kurtosis)
    pairs = {readers: (before.inputs[name], after.inputs[name]) for readers, name in drawn.items()}
    result = DemoResult(
        model=Path(source).absolute().name if is_local(source) else str(source),
        dtype=named(computed.dtype),
        arithmetic=computed.to_dict(),
        text=text_name,
        windows=tokens.shape[0],
        length=tokens.shape[1],
        seed=seed,
        scheme=variants[-1][0],
        rotations=_constructions(plan, rotated.rotations),
        rows=tuple(zip((label for label, _ in variants), before.perplexities, after.perplexities, strict=True)),
        twin=tiny,
        real=rotated.real,
        layer=layer,
        activations=tuple(_activation(readers, *pair, variants[-1][1]) for readers, pair in pairs.items()),
        kurtosis={k: ([before.kurtosis[n] for n in v], [after.kurtosis[n] for n in v]) for k, v in kinds.items()},
        weight=weight,
        weight_kurtosis=(_mean(before.weight_kurtosis.values()), _mean(after.weight_kurtosis.values())),
        pictures=PICTURES,
        seconds=time.perf_counter() - start,
        versions={name: version(name) for name in ("spinquant", "torch", "transformers")}
        | {"python": platform.python_version()},
    )
    with atomic_folder(out, force=force) as folder:
        _draw(result, list(pairs.values()), (weight_before, weight_after), variants[-1][1].weights, folder)
        data = json.dumps(result.to_dict(), indent=1, allow_nan=False)
        (folder / "demo.json").write_text(data + "\n", encoding="utf-8")
        images = {name: (folder / name).read_bytes() for name in PICTURES}
        (folder / "index.html").write_text(page(result, images), encoding="utf-8")
    return result


def variants_of(scheme: Scheme) -> list[tuple[str, Scheme]]:
    """(label, scheme) of 16 bits, of each part alone, and of all. Raises SchemeError if nothing is quantized."""
    nothing = replace(scheme, weights=None, activations=None, kv=None)
    alone = [replace(nothing, **{p: q}) for p in ("weights", "activations", "kv") if (q := getattr(scheme, p))]
    if not alone:
        raise SchemeError("the demo needs a scheme that quantizes something, such as W4A4KV4 or W4A16")
    parts = alone if len(alone) == 1 else [*alone, scheme]
    return [("16-bit", nothing), *((re.sub(r"(W|A|KV)16", "", str(part)), part) for part in parts)]


def token_kurtosis(x: Tensor) -> float:
    """Kurtosis over channels, mean over the tokens (or rows) of (.., channels); 3 for a normal distribution."""
    x = x.float()
    x = x - x.mean(dim=-1, keepdim=True)
    square = x.square()
    # The clamp avoids 0 / 0 for a token of equal numbers.
    return (square.square().mean(-1) / square.mean(-1).square().clamp(min=1e-30)).mean().item()


def _measure(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    variants: Sequence[tuple[str, Scheme]],
    tokens: Tensor,
    progress: Callable[[int, int], None],
) -> _Side:
    found: dict[str, float] = {}
    total = len(variants) * len(tokens)

    def run(label: str, scheme: Scheme) -> None:
        offset = len(found) * len(tokens)
        with attach(model, plan, rotations, scheme):
            evaluation = evaluate(model, tokens, progress=lambda done, _: progress(offset + done, total))
        found[label] = evaluation.perplexity

    names = [group[0] for group in plan.linears]
    with torch.inference_mode(), attach(model, plan, rotations), captured(model, names, inputs=True) as seen:
        # Captured after `attach`, so that inputs include R4.
        model(input_ids=tokens[:1].to(device_of(model)), use_cache=False)
    inputs = {name: x[0].cpu() for name, x in seen.items()}
    kurtosis = {name: token_kurtosis(x) for name, x in inputs.items()}
    linears = (name for group in plan.linears for name in group)
    weight_kurtosis = {name: token_kurtosis(model.get_submodule(name).weight.detach()) for name in linears}
    for label, scheme in variants:
        if scheme.weights is None:
            run(label, scheme)
    rounding = [(label, scheme) for label, scheme in variants if scheme.weights is not None]
    if rounding:
        with _rounded(model, plan, rounding[0][1]):
            for label, scheme in rounding:
                run(label, scheme)
    return _Side([found[label] for label, _ in variants], inputs, kurtosis, weight_kurtosis)


@contextmanager
def _rounded(model: nn.Module, plan: Plan, scheme: Scheme) -> Iterator[None]:
    """Within the `with` block the weights are quantized (RTN); afterwards they are restored."""
    kept = [(weight, weight.matrices(model).clone()) for weight in weights_of(plan, scheme)]
    try:
        round_weights(model, plan, scheme)
        yield
    finally:
        for weight, numbers in kept:
            weight.matrices(model).copy_(numbers)
            weight.forget_grid(model)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None]:
    return Options(progress=progress).stage(f"perplexity, {name}")


def _kinds(plan: Plan) -> dict[str, list[str]]:
    # One linear of every group that shares an input, by layer: {"q, k, v": ["model.layers.0.self_attn.q_proj", ..]}
    found: dict[str, list[str]] = {}
    for group in plan.linears:
        kind = ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in group)
        found.setdefault(kind, []).append(group[0])
    return found


def _most_peaked(kinds: Mapping[str, list[str]], kurtosis: Mapping[str, float]) -> tuple[int, dict[str, str]]:
    # The layer with the largest product of kurtosis of the inputs of the first and last kind (q, k, v and down).
    first, *_, last = kinds
    pairs = list(zip(kinds[first], kinds[last], strict=False))
    layer = max(range(len(pairs)), key=lambda i: kurtosis[pairs[i][0]] * kurtosis[pairs[i][1]])
    return layer, dict(zip((first, last), pairs[layer], strict=True))


def _activation(readers: str, before: Tensor, after: Tensor, scheme: Scheme) -> Activation:
    def zeros(x: Tensor, quantizer: Quantizer) -> float:
        return (fake_quantize(x, quantizer) == 0).float().mean().item()

    def peak(x: Tensor) -> float:
        return relative_magnitude(x).amax(dim=-1).median().item()

    grid = scheme.activations
    rounded = None if grid is None else (zeros(before, grid), zeros(after, grid))
    return Activation(readers, before.shape[-1], (peak(before), peak(after)), rounded)


def _constructions(plan: Plan, rotations: Mapping[str, Transform]) -> dict[str, str]:
    found = {plan.space[name].rotation: rotation.describe() for name, rotation in rotations.items()}
    made = {name: f"{d['kind']}, order {d['order']}: {d['construction']}" for name, d in found.items()}
    return {name: made[name] for name in USUAL if name in made}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _draw(
    result: DemoResult,
    activations: Sequence[tuple[Tensor, Tensor]],
    weights: tuple[Tensor, Tensor],
    quantizer: Quantizer | None,
    folder: Path,
) -> None:
    first, last, kurtosis, histogram, bars = (folder / name for name in PICTURES)
    for path, pair, activation in zip((first, last), activations, result.activations, strict=True):
        plot_activations(*pair, path, title=f"Input of {activation.readers} in layer {result.layer}")
    sides = [{kind: values[side] for kind, values in result.kurtosis.items()} for side in (0, 1)]
    plot_kurtosis(sides[0], sides[1], kurtosis, title="Kurtosis of the inputs of linears")
    grids = None if quantizer is None else (_reach(weights[0], quantizer), _reach(weights[1], quantizer))
    bits = quantizer.bits if quantizer else None
    plot_weights(*weights, histogram, title=f"Weights of {result.weight}", bits=bits, grids=grids)
    _, reference, _ = result.rows[0]
    plot_perplexities(result.rows[1:], reference, bars, title=f"Perplexity of {result.model} by what is rounded")


def _reach(weight: Tensor, quantizer: Quantizer) -> float:
    # Half the width of the grid over the root mean square of the row: the median row's.
    half = quantize_weight(weight, quantizer).scale.float().mean(dim=-1) * quantizer.top / 2
    return (half / weight.float().square().mean(dim=-1).sqrt().clamp(min=1e-30)).median().item()
