"""Prove that a rotated model computes the same function as the original, before its weights are changed and after.

Before: the rotations are applied to a *tiny model*, the same model class from the same config shrunk to a few layers
and small sizes, in float64, with random weights, non-zero biases and non-unit gains. Its logits, and those of greedy
generation through a KV cache, must not move by more than rounding. After: real tokens go through the real model
before and after it is fused, and the logits must agree within the tolerance of the dtype. If they do not, the first
module whose output deviates is named: outputs are compared in execution order, each rotated as its space is.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from spinquant.architectures import FamilyLike, use_family
from spinquant.errors import ProofError
from spinquant.evaluation.tiny_model import TINY_VOCABULARY, make_tiny_model, tiny_spec
from spinquant.models.cache_names import cache_parameter
from spinquant.models.capture import captured, device_of
from spinquant.models.modules import config_errors, in_eval_mode, output_of
from spinquant.online.hooks import attach
from spinquant.plan import Axis, Plan
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse import transform_axis
from spinquant.rotations.fuse_module import fuse_module, plan_of
from spinquant.rotations.random_transforms import random_transforms
from spinquant.rotations.rotation import Transform

# Relative error ||logits' - logits|| / ||logits|| that floating-point rounding explains,
# measured in docs/explanation/design.md.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# The logits of an ill-conditioned model may move by MARGIN times what rounding noise alone moves them
# (`streaming/rounding_noise.py`), but never by more than MOST, beyond which a comparison is meaningless. Rotated models
# of the tests' families, where they exceed the tolerance, move by 0.3 to 1.4 times as much as rounding moves them.
MARGIN, MOST = 4.0, 0.3


@dataclass(frozen=True)
class Deviation:
    """Difference of two models' logits: largest and mean absolute, relative error, and the first deviating module."""

    max_abs: float
    mean_abs: float
    relative: float
    module: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Snapshot:
    """Logits (without a head, hidden states) of a model on some tokens, and the outputs of the modules in its plan."""

    tokens: Tensor
    logits: Tensor
    outputs: Mapping[str, Tensor]


class Float64Arithmetic(TorchFunctionMode):
    """Context in which model code that casts to float32 (norms and softmax do) gets float64 instead.

    Without it a float64 model is exact to 1e-7 only, and an error of that size could not be told from rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        function: Any = torch.Tensor.double if func is torch.Tensor.float else func
        widened = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        # torch.full gives float32 by default; XGLM fills with float64's lowest value, which float32 cannot hold.
        if func is torch.full and isinstance(named.get("fill_value", args[1] if len(args) > 1 else None), float):
            named.setdefault("dtype", torch.float64)
        return function(*widened, **named)


@torch.no_grad()
def snapshot(model: nn.Module, plan: Plan, tokens: Tensor) -> Snapshot:
    """Run tokens, (batch, length), through a model and record what `compare` needs."""
    names = computing_modules(plan)
    embeddings = sorted({axis.tensor.removesuffix(".weight") for axis in plan.axes if axis.space == "residual"})
    modules = dict.fromkeys([*names, *embeddings])
    present = {name for name, _ in model.named_modules()}
    arithmetic = Float64Arithmetic() if model.dtype == torch.float64 else nullcontext()
    with in_eval_mode(model), arithmetic, captured(model, [name for name in modules if name in present]) as outputs:
        logits = output_of(model(input_ids=tokens.to(device_of(model)), use_cache=False))
    return Snapshot(tokens, logits, dict(outputs))


def computing_modules(plan: Plan) -> list[str]:
    """The modules whose outputs are compared: linears, and the experts of a layer as a whole."""
    return [*(name for group in plan.linears for name in group), *(experts.module for experts in plan.experts)]


def compare(before: Snapshot, model: nn.Module, plan: Plan, rotations: Mapping[str, Transform]) -> Deviation:
    """Compare a rotated model's logits with a snapshot of the original; name the first module that deviates."""
    after = snapshot(model, plan, before.tokens)
    tolerance = TOLERANCE.get(after.logits.dtype, TOLERANCE[torch.float32])
    deviation = difference(before.logits, after.logits)
    if deviation.relative <= tolerance:
        return deviation
    for name, output in before.outputs.items():
        expected = expected_output(model, plan, rotations, name, output)
        if not difference(expected, after.outputs[name]).relative <= tolerance:
            return replace(deviation, module=name)
    return replace(deviation, module=last_module(plan))


def last_module(plan: Plan) -> str:
    """What computes a model's output, as an error names it: the head, or without one the last norm."""
    return plan.heads[0] if plan.heads else "the last norm"


def expected_output(
    model: nn.Module, plan: Plan, rotations: Mapping[str, Transform], name: str, output: Tensor
) -> Tensor:
    """The output (.., out) that a module should have in the rotated model, from its output in the original.

    name: of a linear, an embedding or a module of experts, whose output is transformed as its spaces are.
    """
    for axis in output_axes(model, plan, name):
        if axis.space in rotations:
            output = transform_axis(output, axis, rotations[axis.space], dim=output.ndim - 1)
    return output


def output_axes(model: nn.Module, plan: Plan, name: str) -> tuple[Axis, ...]:
    """The weight axes that are a module's output axis, one for each space that it is in."""
    stack = next((experts for experts in plan.experts if experts.module == name), None)
    if stack is not None:
        # (experts, out, in), or (experts, in, out)
        axes = plan.axes_of.get(stack.second[0], ())
        return tuple(axis for axis in axes if axis.dim == (2 if stack.transposed else 1))
    dim = _output_dim(model, name)
    return tuple(axis for axis in plan.axes_of.get(f"{name}.weight", ()) if axis.dim == dim)


def _output_dim(model: nn.Module, name: str) -> int | None:
    """The dimension of a module's weight that is its output; None for a module that is no linear or embedding."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return None
    # nn.Linear stores (out, in); Conv1D stores (in, out), and an embedding (tokens, out).
    return 0 if isinstance(module, nn.Linear) else 1


def difference(expected: Tensor, found: Tensor) -> Deviation:
    """Absolute and relative difference of two tensors."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected, found = expected.to(wide), found.to(wide)
    delta = (found - expected).abs()
    norm = expected.norm().item() or 1.0
    return Deviation(delta.max().item(), delta.mean().item(), delta.norm().item() / norm)


def allowed(dtype: torch.dtype, rounding: float = 0.0) -> float:
    """Allowed relative error of the logits in a dtype.

    rounding: relative error that rounding noise alone causes in the original model, if it was measured
    (`streaming/rounding_noise.py`).
    """
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]), min(MARGIN * rounding, MOST))


def check(deviation: Deviation, dtype: torch.dtype, *, what: str, rounding: float = 0.0) -> None:
    """Raise ProofError if the logits moved by more than `allowed`, or are NaN."""
    tolerance = allowed(dtype, rounding)
    if not deviation.relative <= tolerance:
        where = f"The first module that deviates is {deviation.module!r}. " if deviation.module else ""
        if MARGIN * rounding > MOST:
            raise ProofError(
                f"whether rotating changed {what} cannot be told in {dtype}: logits moved by {deviation.relative:.3g} "
                f"(relative), and rounding alone moves the original's by {rounding:.3g}. {where}Nothing was saved; "
                "compare in a wider dtype (--dtype float32 or float64), or pass --allow-inexact."
            )
        raise ProofError(
            f"rotating changed {what}: logits moved by {deviation.max_abs:.3g} at most, relative error "
            f"{deviation.relative:.3g}, more than rounding in {dtype} explains ({tolerance:.3g}). {where}Nothing "
            "was saved; please report this with the model's config."
        )


Planner = Callable[[Any], tuple[Plan, Mapping[str, Transform]]]


def prove(
    config: Any,
    spec: RotationSpec,
    *,
    seed: int = 0,
    kinds: Collection[str] = (),
    planner: Planner | None = None,
    family: FamilyLike | None = None,
) -> Deviation:
    """Prove on a tiny float64 model that rotations leave the function of an architecture unchanged.

    The tiny model has the class and config of the real one, with a few small layers and random weights. It needs no
    checkpoint and takes a second or so. `rotate` and `quantize` call this before they change a model.

    Args:
        config: A config of transformers.
        spec: Which rotations; block sizes are replaced by ones that fit the tiny model.
        seed: Of the tiny model's weights and tokens.
        kinds: Spaces that get a random transform that is no rotation, by kind: "R2", "R3", "R4", or "scales of R1" for
            the scales of norms, "scales of R4" for those of factors of products.
        planner: Function of the tiny model that returns its plan and rotations, in place of `plan_of` and the spec.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.

    Returns:
        How far the logits moved: the larger deviation of whole sequences and of generation through a KV cache.

    Raises:
        ProofError: The logits moved by more than float64 rounding; the first deviating module is named.
        ArchitectureError: The architecture is unknown.
        RotationError: A rotation is not possible in it.

    Example:
        >>> import spinquant
        >>> from transformers import LlamaConfig
        >>> spec = spinquant.RotationSpec(("R1", "R2", "R3", "R4"), "auto")
        >>> spinquant.prove(LlamaConfig(), spec).relative < 1e-9
        True
    """
    use_family(config, family)
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):  # a model's initialisation draws from the global state
        tiny = make_tiny_model(config, seed=seed)
        if planner is None:
            plan = plan_of(tiny)
            rotations = {**make_rotations(plan, tiny_spec(spec)), **random_transforms(plan, kinds, seed)}
        else:
            plan, rotations = planner(tiny)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, TINY_VOCABULARY - 1, (2, 12), generator=generator)
        with config_errors(config):
            before, generated = snapshot(tiny, plan, tokens), greedy_logits(tiny, tokens)
        fuse_module(tiny, plan, rotations)
        with attach(tiny, plan, rotations):
            deviation = compare(before, tiny, plan, rotations)
            check(deviation, torch.float64, what="a tiny model of this architecture (yours was not touched)")
            cached = difference(generated, greedy_logits(tiny, tokens))
            check(cached, torch.float64, what="generation through a KV cache in a tiny model of this architecture")
    return deviation if deviation.relative > cached.relative else cached


@torch.no_grad()
def greedy_logits(model: Any, tokens: Tensor, *, steps: int = 6) -> Tensor:
    """Logits of greedy generation through the model's KV cache, (steps, batch, vocabulary).

    A class that cannot generate is given the last `steps` tokens one by one: its outputs, (steps, batch, ..).
    """
    if not model.can_generate():
        return _cached_outputs(model, tokens, steps)
    result = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(result.logits)


def _cached_outputs(model: Any, tokens: Tensor, steps: int) -> Tensor:
    name, _ = cache_parameter(type(model).forward) or ("", 0)
    if not name:
        return output_of(model(input_ids=tokens))[None]
    cache, found = DynamicCache(config=model.config), []
    for part in (tokens[:, :-steps], *tokens[:, -steps:].split(1, dim=1)):
        output = model(input_ids=part, use_cache=True, **{name: cache})
        found.append(output_of(output)[:, -1:] if output_of(output).ndim > 2 else output_of(output))
    return torch.stack(found[1:])
