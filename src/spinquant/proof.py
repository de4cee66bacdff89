"""Proof that rotating changed nothing, before real weights are touched and after.

Before: the plan is tried on a *twin*, the same model class from the same config shrunk to a few layers and small
sizes, in float64, with random weights, non-zero biases and non-unit gains. Its logits, and those of greedy
generation through a KV cache, must not move by more than rounding. After: real tokens go through the real model
before and after it is fused, and the logits must agree to what the dtype allows. When they do not, the first module
whose output departs is named: outputs are compared in execution order, each rotated as its space is.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from spinquant.architectures import FamilyLike, family_of, use_family
from spinquant.architectures.table import Named, size_of
from spinquant.calibrate import captured, device_of
from spinquant.errors import ProofError
from spinquant.fuse import rotate_axis, scales_of
from spinquant.module import fuse_module, model_class, plan_of
from spinquant.online import attach
from spinquant.plan import Axis, Plan
from spinquant.rotation import Rotation, RotationSpec, make_rotations

# Relative error ||logits' - logits|| / ||logits|| that rounding explains; see docs/design.md for the measurement.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# A model that is ill conditioned may move by so many times what rounding alone does to it (`disk_rounding.py`), but
# never by more than this: then a comparison says nothing. Rotated models of the tests' families, where they go beyond
# the tolerance, move by 0.3 to 1.4 times as much as rounding alone moves them.
MARGIN, MOST = 4.0, 0.3

TWIN_HIDDEN, TWIN_INTERMEDIATE, TWIN_VOCABULARY, TWIN_BLOCK = 48, 80, 96, 16
INTERMEDIATES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
# What else a twin has less of; a config that has less already keeps it.
TWIN_SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "decoder_sparse_step"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    "prefix_dense_intermediate_size": TWIN_INTERMEDIATE,
    # Hybrids: a period of layers, and recurrent heads of 16 that fill twice the hidden size.
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "mamba_n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "linear_head_dim": 16,
    "mamba_n_heads": 2 * TWIN_HIDDEN // 16,
    "mamba_d_ssm": 2 * TWIN_HIDDEN,
    "mamba_num_heads": 8,
    "moe_shared_expert_intermediate_size": 32,
    "num_heads": 2 * TWIN_HIDDEN // 16,
    "lru_width": TWIN_HIDDEN,
    **dict.fromkeys(("n_mamba_heads", "mamba_ngroups"), 2),
    "adapter_rank": 16,
    # Latents, and parts of an attention that chooses or compresses.
    **dict.fromkeys(("o_groups", "hc_mult", "index_n_heads"), 2),
    **dict.fromkeys(("o_lora_rank", "index_head_dim"), 16),
    "index_topk": 4,
}
# What a class computes from the rest of its config, and keeps there.
DERIVED = ("attention_hidden_size", "mamba_headdim", "kv_channels", "num_query_groups")


@dataclass(frozen=True)
class Deviation:
    """How far logits moved: largest and mean absolute difference, relative error, and where the departure began."""

    max_abs: float
    mean_abs: float
    relative: float
    module: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Snapshot:
    """What a model computed on some tokens: logits, and the outputs of the modules that a plan knows."""

    tokens: Tensor
    logits: Tensor
    outputs: Mapping[str, Tensor]


class Float64Arithmetic(TorchFunctionMode):
    """Within it, model code that asks for float32 (norms and softmax do) gets float64.

    Without it a float64 model is exact to 1e-7 only, and an error of that size could not be told from rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        function: Any = torch.Tensor.double if func is torch.Tensor.float else func
        widened = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        # Filled tensors are float32 unless told; XGLM fills with float64's lowest.
        if func is torch.full and isinstance(named.get("fill_value", args[1] if len(args) > 1 else None), float):
            named.setdefault("dtype", torch.float64)
        return function(*widened, **named)


@torch.no_grad()
def snapshot(model: nn.Module, plan: Plan, tokens: Tensor) -> Snapshot:
    """Run the tokens, (batch, length), through the model and keep what `compare` needs."""
    names = computing_modules(plan)
    embeddings = sorted({axis.tensor.removesuffix(".weight") for axis in plan.axes if axis.space == "residual"})
    modules = dict.fromkeys([*names, *embeddings])
    present = {name for name, _ in model.named_modules()}
    training = model.training
    model.eval()  # dropout would look like a departure
    arithmetic = Float64Arithmetic() if model.dtype == torch.float64 else nullcontext()
    try:
        with arithmetic, captured(model, [name for name in modules if name in present]) as outputs:
            logits = model(input_ids=tokens.to(device_of(model)), use_cache=False).logits
    finally:
        model.train(training)
    return Snapshot(tokens, logits, dict(outputs))


def computing_modules(plan: Plan) -> list[str]:
    """The modules whose outputs are compared: linears, and experts of a layer as a whole."""
    return [*(name for group in plan.linears for name in group), *(experts.module for experts in plan.experts)]


def compare(before: Snapshot, model: nn.Module, plan: Plan, rotations: Mapping[str, Rotation]) -> Deviation:
    """How far the rotated model departs from the snapshot, and at which module the departure begins."""
    after = snapshot(model, plan, before.tokens)
    tolerance = TOLERANCE.get(after.logits.dtype, TOLERANCE[torch.float32])
    deviation = difference(before.logits, after.logits)
    if deviation.relative <= tolerance:
        return deviation
    for name, output in before.outputs.items():
        expected = expected_output(model, plan, rotations, name, output)
        if not difference(expected, after.outputs[name]).relative <= tolerance:
            return replace(deviation, module=name)
    return replace(deviation, module=plan.head.removesuffix(".weight"))


def expected_output(
    model: nn.Module, plan: Plan, rotations: Mapping[str, Rotation], name: str, output: Tensor
) -> Tensor:
    """What a module gives in the rotated model that gave the output before."""
    for scale, dim in scales_of(f"{name}.weight", plan, rotations):
        if dim == _output_dim(model, name):
            output = output * scale.to(output.device, output.dtype)
    axis = output_axis(model, plan, name)
    if axis is None or axis.space not in rotations:
        return output
    return rotate_axis(output, -1, rotations[axis.space], axis.span)


def output_axis(model: nn.Module, plan: Plan, name: str) -> Axis | None:
    """The axis of a module's weight that its output has, where it lives in a space."""
    stack = next((experts for experts in plan.experts if experts.module == name), None)
    if stack is not None:
        # (experts, out, in), or (experts, in, out)
        axes = plan.axes_of.get(stack.second[0], ())
        return next((axis for axis in axes if axis.dim == (2 if stack.transposed else 1)), None)
    dim = _output_dim(model, name)
    axes = [axis for axis in plan.axes_of.get(f"{name}.weight", ()) if axis.dim == dim]
    return axes[0] if axes else None


def _output_dim(model: nn.Module, name: str) -> int | None:
    """The axis of a module's weight that its output has."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return None
    # An embedding's is the last of its weight, and so is that of Conv1D, which stores (in, out); a linear's the first.
    return 0 if isinstance(module, nn.Linear) else 1


def difference(expected: Tensor, found: Tensor) -> Deviation:
    """How far one tensor is from another."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected, found = expected.to(wide), found.to(wide)
    delta = (found - expected).abs()
    norm = expected.norm().item() or 1.0
    return Deviation(delta.max().item(), delta.mean().item(), delta.norm().item() / norm)


def allowed(dtype: torch.dtype, rounding: float = 0.0) -> float:
    """How far logits may move, relative, in a dtype.

    rounding: how far rounding alone moves those of the original, where that is known (`disk_rounding.py`).
    """
    return max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]), min(MARGIN * rounding, MOST))


def check(deviation: Deviation, dtype: torch.dtype, *, what: str, rounding: float = 0.0) -> None:
    """Raise ProofError when logits moved by more than rounding explains (NaN included); see `allowed`."""
    tolerance = allowed(dtype, rounding)
    if not deviation.relative <= tolerance:
        where = f"The first module that departs is {deviation.module!r}. " if deviation.module else ""
        if MARGIN * rounding > MOST:
            raise ProofError(
                f"whether rotating changed {what} cannot be told in {dtype}: logits moved by {deviation.relative:.3g} "
                f"(relative), and rounding alone moves the original's by {rounding:.3g}. {where}Nothing was saved; "
                "compare in a wider dtype (--dtype float32 or float64), or say --allow-inexact."
            )
        raise ProofError(
            f"rotating changed {what}: logits moved by {deviation.max_abs:.3g} at most, relative error "
            f"{deviation.relative:.3g}, where {dtype} explains {tolerance:.3g}. {where}Nothing was saved; "
            "please report this with the model's config."
        )


@dataclass(frozen=True)
class Sizing:
    """What has to be known of a model's class for a small one to be made of it; see `Family` for the first three.

    each: layers of every kind. kv_heads, group: at most so many heads of keys, and of queries for each of them.
    head_dim: largest size of a head; by default it stays what it is.
    """

    filled: int = 0
    heads: int = 1
    names: Mapping[str, str] = field(default_factory=dict)
    each: int = 1
    kv_heads: int = 2
    group: int = 3
    head_dim: int | None = None
    hidden: int = TWIN_HIDDEN
    intermediate: int = TWIN_INTERMEDIATE


def twin_config(config: Any, sizing: Sizing | None = None) -> Any:
    """The same config with few small layers: one of every kind that the original has (more where it takes more for a
    block to be shared), at least two.

    sizing: by default as the model's family says.
    """
    if sizing is None:
        family = family_of(config)
        sizing = Sizing(family.filled, family.heads, family.names) if family else Sizing()
        if family and family.shared:  # so that layers do share a block
            sizing = replace(sizing, each=size_of(config, family.shared.blocks) + 1)
    return _twin(config, sizing)


def _twin(config: Any, sizing: Sizing) -> Any:
    text = config.get_text_config()
    if text is not config:
        return _twin_with_vision(config, _twin(text, sizing))
    data, original, names = copy.deepcopy(config.to_dict()), config, sizing.names
    config = Named(config, names)
    layers = config.num_hidden_layers
    per_layer = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == layers > 0}
    if getattr(config, "block_types", None):  # RecurrentGemma's, which it repeats
        per_layer["block_types"] = [config.block_types[i % len(config.block_types)] for i in range(layers)]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i in range(layers):
        kinds.setdefault(tuple(str(value[i]) for value in per_layer.values()), []).append(i)
    kept = sorted(i for same in kinds.values() for i in same[: sizing.each])
    kept = kept if len(kept) > 1 else [*kept, *kept]
    data.update({key: [value[i] for i in kept] for key, value in per_layer.items()})
    small: dict[str, Any] = {
        "num_hidden_layers": len(kept),
        **_small_heads(config, sizing),
        "vocab_size": TWIN_VOCABULARY,
    }
    small.update({name: sizing.intermediate for name in INTERMEDIATES if getattr(config, name, None)})
    small.update({name: size for name, size in TWIN_SIZES.items() if (getattr(config, name, None) or 0) > size})
    small.update({name: 16 for name in ("mamba_d_head",) if getattr(config, name, None)})
    expand, hidden = (getattr(config, name, None) for name in ("mamba_expand", "expand")), int(small["hidden_size"])
    width = next((int(factor * hidden) for factor in expand if factor), 0)  # of a recurrence, whose heads fill it
    fills = [] if getattr(config, "mamba_d_ssm", None) else ["mamba_n_heads"]
    fills += [] if hasattr(config, "num_attention_heads") else ["num_heads"]
    small.update({name: width // 16 for name in fills if width and getattr(config, name, None)})
    if getattr(config, "attn_layer_indices", None):
        small["attn_layer_indices"] = [1]
    if getattr(config, "hybrid_layer_ids", None):
        small["hybrid_layer_ids"] = [place for place, i in enumerate(kept) if i in config.hybrid_layer_ids]
    if getattr(config, "compress_rates", None):  # so that the tokens of a proof are compressed too
        small["compress_rates"] = dict.fromkeys(config.compress_rates, 4)
    for name in DERIVED:
        data.pop(name, None)
    if getattr(config, "attention_types", None):  # GPT-Neo's kinds of layers, and how often they are repeated
        small["attention_types"] = [[[config.attention_layers[i] for i in kept], 1]]
        small["window_size"] = 6
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = 6  # shorter than the tokens of the proof, so that the window matters
    # Some classes have names of their own for these.
    own = getattr(config, "attribute_map", {})
    data.update({own.get(named := names.get(name, name), named): size for name, size in small.items()})
    return _made(original, data)


def _twin_with_vision(config: Any, text: Any) -> Any:
    """The config with a small language part, and as little as it takes to write to it of what sees."""
    data = copy.deepcopy(config.to_dict())
    data["text_config"] = text.to_dict()
    vision, hidden = data["vision_config"], config.get_text_config().hidden_size
    vision.update({name: 2 for name in ("depth", "num_hidden_layers") if name in vision})
    vision.update({name: [0] for name in ("fullatt_block_indexes", "deepstack_visual_indexes") if name in vision})
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = text.hidden_size
    elif "embed_dim" in vision and vision["hidden_size"] == hidden:  # Qwen2-VL's name for what comes out
        vision["hidden_size"] = text.hidden_size
    # Tokens that stand for images are none of those that the proof uses.
    data.update({name: TWIN_VOCABULARY - 1 for name in data if name.endswith(("image_token_id", "image_token_index"))})
    return _made(config, data)


def _made(config: Any, data: dict[str, Any]) -> Any:
    for key in ("quantization_config", "dtype", "torch_dtype"):
        data.pop(key, None)
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    try:
        return type(config).from_dict({**data, **dict.fromkeys(tokens)})
    except StrictDataclassError:  # a class that insists on numbers
        return type(config).from_dict({**data, **dict.fromkeys(tokens, 0)})


def _small_heads(config: Any, sizing: Sizing) -> dict[str, int]:
    """Few heads of the size that the original's have, and a hidden size that they fill where the class wants it."""
    if not hasattr(config, "num_attention_heads"):  # no attention; heads of the recurrence
        own = {"head_dim": 16, "n_groups": 1} if hasattr(config, "n_groups") else {}
        return {"hidden_size": sizing.hidden, **own}
    names = [name for name in ("num_kv_heads", "num_key_value_heads") if getattr(config, name, None)]
    kv_heads = getattr(config, names[0]) if names else config.num_attention_heads
    few = min(max(sizing.kv_heads, sizing.heads), kv_heads)
    most = config.num_attention_heads // kv_heads
    group = min(most, sizing.group)
    group = next((g for g in range(group, most + 1) if few * g % sizing.heads == 0), group)
    heads = few * group
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_dim = min(head_dim, sizing.head_dim or head_dim)
    found = {**dict.fromkeys(names, few), "num_attention_heads": heads, "hidden_size": sizing.hidden}
    if not sizing.filled:
        return {**found, "head_dim": head_dim}
    own = {"head_dim": head_dim} if "head_dim" in config.to_dict() else {}
    return {**found, **own, "hidden_size": heads * head_dim // sizing.filled}


def make_twin(
    config: Any, *, seed: int = 0, attn_implementation: str | None = None, sizing: Sizing | None = None
) -> nn.Module:
    """A float64 model of `twin_config` with random weights, non-zero biases and non-unit gains."""
    model = model_class(config).from_config(
        twin_config(config, sizing), dtype=torch.float64, attn_implementation=attn_implementation
    )
    exact_experts(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.double()  # some classes ask for float32 here and there
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def exact_experts(model: Any) -> None:
    """Let experts be multiplied in float64, which grouped products cannot."""
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("batched_mm")


Planner = Callable[[Any], tuple[Plan, Mapping[str, Rotation]]]


def prove(
    config: Any,
    spec: RotationSpec,
    *,
    seed: int = 0,
    planner: Planner | None = None,
    family: FamilyLike | None = None,
) -> Deviation:
    """Try the rotations of a spec on the twin of a config; or a plan and rotations, as `planner(twin)` gives them.

    family: a family file that explains the config, see `use_family`. Raises ProofError, naming the first module that
    departs, when logits (whole sequences, or token by token through a KV cache) move by more than float64 rounding.
    """
    use_family(config, family)
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):  # a model's initialisation draws from the global state
        twin = make_twin(config, seed=seed)
        if planner is None:
            plan = plan_of(twin)
            rotations = make_rotations(plan, twin_spec(spec))
        else:
            plan, rotations = planner(twin)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, TWIN_VOCABULARY - 1, (2, 12), generator=generator)
        before, generated = snapshot(twin, plan, tokens), greedy_logits(twin, tokens)
        fuse_module(twin, plan, rotations)
        with attach(twin, plan, rotations):
            deviation = compare(before, twin, plan, rotations)
            check(deviation, torch.float64, what="a small model of this architecture (before touching yours)")
            cached = difference(generated, greedy_logits(twin, tokens))
            check(cached, torch.float64, what="generation through a KV cache in a small model of this architecture")
    return deviation if deviation.relative > cached.relative else cached


def twin_spec(spec: RotationSpec) -> RotationSpec:
    """The spec for a twin, which keeps the head's size: R2 and R3 as they are, R1 and R4 with blocks that fit."""
    blocks = {name: block for name in spec.rotations if (block := spec.block_of(name)) is not None}
    return replace(spec, block_size={name: b if name in ("R2", "R3") else TWIN_BLOCK for name, b in blocks.items()})


@torch.no_grad()
def greedy_logits(model: Any, tokens: Tensor, *, steps: int = 6) -> Tensor:
    """Logits of greedy generation through the model's KV cache, (steps, batch, vocabulary)."""
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
