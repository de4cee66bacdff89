"""Rotate LoRA adapters (peft) to match a rotated base model.

An update s B A of a weight W becomes s B' A' (see `plan.py`); s, ranks and their patterns do not change. An input that
is rotated online (R4, online R1) is rotated by a hook of the linear, inside the layer that peft wraps around it, so A
reads the unrotated input. For embeddings, A has an axis of tokens and B one of channels. A bias, or a whole module in
the adapter, is rotated like the tensor of the model that it replaces. Updates of stacked experts: `moe.py`.

DoRA stores a magnitude m and divides by norms of rows, y = diag(m / n) (W + s B A) x with n_i = ||(W + s B A)_i||. If
outputs are rotated there is no equivalent: diag(m / n) R is not R diag(m / n). A rotated input keeps n; a gain g or
another transform T of the input changes it, so

    m'_i = m_i ||(W + s B A)_i diag(g) T^-T|| / ||(W + s B A)_i||
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel as PydanticModel
from pydantic import Field
from torch import Tensor

from spinquant.adapters.base_model import BaseModel
from spinquant.adapters.moe import stacked_counterpart
from spinquant.adapters.plan import Counterpart, adapter_plan
from spinquant.compute.patterns import check_name, check_pattern
from spinquant.compute.values import validated
from spinquant.errors import RotationError
from spinquant.plan import Axis
from spinquant.rotations.fuse import transform, transform_axis
from spinquant.rotations.transforms import Diagonal

PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?:weight|bias))?"
)
_STACKED = re.compile(r"\.experts(\.base_layer)?\.lora_[AB]\b")
# Trained embeddings of single tokens, under peft's two names for them.
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_(?:delta|original)")

# Initializations that do not change the model's weights when the adapter is loaded.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Config fields that do not affect which spaces the adapter's tensors are in.
HARMLESS = frozenset(
    "alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config "
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters task_type trainable_token_indices use_dora use_rslora".split()
)
REASONS = {
    "use_qalora": "its A reads sums over groups of channels, which a rotation mixes",
    "use_bdlora": "its A or B is block-diagonal, and a rotation fills the blocks",
    "layer_replication": "it repeats layers of the model, so layer names no longer match",
    "velora_config": "its compression is trained in the channels of the unrotated input",
}


_Rank = Annotated[int, Field(ge=1)]


class _Config(PydanticModel):
    """The values of an adapter's config that are used here, or by peft to find the adapter's modules."""

    r: _Rank = 8  # peft's defaults
    lora_alpha: float = 8
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    task_type: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    lora_dropout: float | None = None


@dataclass(frozen=True)
class Magnitude:
    """DoRA magnitudes of one linear: its tensor in the plan, its module in the adapter, and the scaling s."""

    tensor: str
    module: str
    scaling: float


@torch.no_grad()
def rotate_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseModel) -> dict[str, Tensor]:
    """Rotate the tensors of an adapter for a rotated base model; same names.

    config: from adapter_config.json. Raises RotationError, with the reason, for what cannot be rotated.
    """
    check_config(config, base)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim > 3:
            raise RotationError(
                f"tensor {name!r} of the adapter has dtype {tensor.dtype} and shape {tuple(tensor.shape)}: expected "
                "floating-point numbers along at most three axes"
            )
    counterparts: dict[str, Counterpart] = {}
    magnitudes: dict[str, Magnitude] = {}
    for name in tensors:
        found = _counterpart(name, config, tensors, base)
        if isinstance(found, Counterpart):
            if not _STACKED.search(name):  # those are matched by their shapes
                _check_fits(name, tensors[name], found, base)
                _check_rank(name, tensors[name], found, config, base)
            counterparts[name] = found
        else:
            magnitudes[name] = found
    plan = adapter_plan(base.plan, counterparts)
    rotated = {n: transform(n, t, plan, base.gains, base.rotations) for n, t in tensors.items()}
    for name, scaled in magnitudes.items():
        rotated[name] = _magnitude(name, scaled, tensors, base)
    return rotated


def _check_fits(name: str, tensor: Tensor, counterpart: Counterpart, base: BaseModel) -> None:
    """Raise RotationError for a tensor whose axis is not as long as the rotated one of the model's that it shares."""
    shape = base.shape(counterpart.tensor)
    for axis in base.plan.axes_of.get(counterpart.tensor, ()):
        own = {**counterpart.dims, **counterpart.before}.get(axis.dim)
        if own is not None and (own >= tensor.ndim or tensor.shape[own] != shape[axis.dim]):
            raise RotationError(
                f"tensor {name!r} of the adapter has shape {tuple(tensor.shape)}, and axis {own} of it belongs to axis "
                f"{axis.dim} of {counterpart.tensor!r}, {tuple(shape)}: the adapter belongs to another model"
            )


def _check_rank(
    name: str, tensor: Tensor, counterpart: Counterpart, config: Mapping[str, Any], base: BaseModel
) -> None:
    """Raise RotationError for an A or B that does not have the shape that the model and the config's rank give it."""
    match, shape = _NAME.fullmatch(name.removeprefix(PREFIX)), base.shape(counterpart.tensor)
    if match is None or match["part"] == "lora_magnitude_vector" or name.endswith(".bias") or len(shape) != 2:
        return
    rank = _rank(match["module"], config)
    embedding = match["part"].startswith("lora_embedding")
    outputs, inputs = shape[::-1] if embedding or base.family.transposed else shape
    expected = (rank, inputs) if match["part"].endswith("_A") else (outputs, rank)
    if tuple(tensor.shape) != expected:
        raise RotationError(
            f"tensor {name!r} of the adapter has shape {tuple(tensor.shape)}, and the model and the rank in the "
            f"adapter's config give {expected}: one of the three is not of this adapter"
        )


def check_config(config: Mapping[str, Any], base: BaseModel) -> None:
    """Raise RotationError for an adapter that is not LoRA, or has an option that no rotation preserves."""
    about: _Config = validated(_Config, config, "the adapter's config", RotationError)
    for pattern in (*(about.rank_pattern or ()), *(about.alpha_pattern or ())):
        check_pattern(pattern, "the adapter's config", RotationError)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RotationError(
            f"the adapter has peft_type {kind!r}: only LORA can be rotated (others scale or mix channels in the "
            "unrotated basis). Merge it into the model, and rotate that"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in PLAIN_STARTS:
        raise RotationError(
            f"the adapter has init_lora_weights {start!r}: when it is loaded, peft recomputes the base weights from "
            "the current ones, and rotated ones give other results. Convert it to plain LoRA "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) and rotate that"
        )
    for key, value in config.items():
        if value in (None, False, [], {}) or key in HARMLESS:
            continue
        reason = REASONS.get(key, "this version of spinquant does not know this option")
        raise RotationError(f"the adapter has {key} = {value!r}: {reason}. Merge it into the model, and rotate that")
    if base.plan.unties(base.rotations):
        for key in ("ensure_weight_tying", "trainable_token_indices"):
            if config.get(key):
                raise RotationError(
                    f"the adapter has {key}, so embedding and head share its weights, and R1 unties them (the gain of "
                    "the last norm is fused into the head). Merge it into the model, and rotate that"
                )


def _counterpart(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseModel
) -> Counterpart | Magnitude:
    inside = name.removeprefix(PREFIX)
    if match := _NAME.fullmatch(inside):
        module, part = match["module"], match["part"]
    elif match := _TOKENS.fullmatch(inside):
        return Counterpart(_tensor(name, f"{match['module']}.weight", base), {1: 1})
    else:
        return _whole(name, inside, base)
    if module.endswith((".experts", ".experts.base_layer")) and part in ("lora_A", "lora_B"):
        return stacked_counterpart(name, module.removesuffix(".base_layer"), tensors, base)
    weight = _tensor(name, f"{module}.weight", base)
    outputs, inputs = (1, 0) if base.family.transposed else (0, 1)
    if part == "lora_A":
        online = _reads_online(module, base)
        return Counterpart(weight, {} if online else {inputs: 1}, {inputs: 1} if online else {})
    if part == "lora_B":
        # A bias of B has the output axis of the linear, like the rows of B.
        return Counterpart(weight, {outputs: 0})
    if part == "lora_embedding_A":
        return Counterpart(weight, {0: 1})
    if part == "lora_embedding_B":
        return Counterpart(weight, {1: 0})
    if _reads_online(module, base):
        raise RotationError(
            f"{name} is a DoRA magnitude of {module}, whose input is rotated at run time: peft divides by the norm of "
            "rotated weights with an update that is not. Merge the adapter into the model and rotate that, or leave "
            "out R4 and online R1"
        )
    if _is_rotated(weight, 1 if weight == _embedding(base) else outputs, base):
        raise RotationError(
            f"{name} is a DoRA magnitude, which scales single outputs of {module}, and these outputs are rotated: "
            "diag(m) R is not R diag(m). Merge the adapter into the model and rotate that, or leave the rotation out"
        )
    return Magnitude(weight, f"{name[: name.index(module)]}{module}", _scaling(module, config))


def _whole(name: str, inside: str, base: BaseModel) -> Counterpart:
    """The tensor of the model that a whole tensor of the adapter replaces."""
    tensor = _tensor(name, inside, base)
    gain = base.plan.gain_of_norm.get(tensor)
    if gain is not None and gain.space in base.rotations:
        raise RotationError(
            f"{name} replaces the scale of a norm, which the rotated model has fused into the weights that read it. "
            "Merge the adapter into the model, and rotate that"
        )
    return Counterpart(tensor, {dim: dim for dim in range(3)})


def _tensor(name: str, inside: str, base: BaseModel) -> str:
    found = base.names.get(base.module_name(inside.replace(".base_layer.", ".")))
    if found is None:
        raise RotationError(
            f"tensor {name!r} of the adapter belongs to {inside!r}, and the model has no such tensor: the adapter "
            "belongs to another model, or to one with another layout of experts"
        )
    return found


def _embedding(base: BaseModel) -> str:
    return base.names[base.family.embedding]


def _reads_online(module: str, base: BaseModel) -> bool:
    """Whether a linear's input is rotated online."""
    name = base.module_name(f"{module}.weight").removesuffix(".weight")
    onlines = (o for o in base.plan.onlines if o.module == name and o.site == "input")
    return any(online.space in base.rotations for online in onlines)


def _is_rotated(tensor: str, dim: int, base: BaseModel) -> bool:
    """Whether an axis is mixed, and not only scaled element by element."""
    return any(not isinstance(base.rotations[axis.space], Diagonal) for axis in _axes(tensor, dim, base))


def _axes(tensor: str, dim: int, base: BaseModel) -> list[Axis]:
    """The transformed axes of one dim of a tensor, in order."""
    axes = base.plan.axes_of.get(tensor, ())
    return [axis for axis in axes if axis.dim == dim and axis.space in base.rotations]


def _scaling(module: str, config: Mapping[str, Any]) -> float:
    """s of s B A, as in peft."""
    rank, alpha = _rank(module, config), _chosen(module, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank(module: str, config: Mapping[str, Any]) -> int:
    return _chosen(module, config.get("rank_pattern"), config.get("r", 8))


def _chosen(module: str, patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    check_name(module, "the adapter", RotationError)
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _magnitude(name: str, scaled: Magnitude, tensors: Mapping[str, Tensor], base: BaseModel) -> Tensor:
    """The magnitude m' of the module docstring, in the dtype of m."""
    magnitude = tensors[name]
    gains = [g for g, _ in base.plan.gains_of.get(scaled.tensor, ()) if g.space in base.rotations]
    outputs, inputs = (1, 0) if base.family.transposed else (0, 1)
    written, read = (_axes(scaled.tensor, dim, base) for dim in (outputs, inputs))
    if not gains and not written and not read:
        return magnitude
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    a, b = (tensors.get(f"{scaled.module}.lora_{part}.weight") for part in "AB")
    weight = base.original(scaled.tensor).to(wide)
    weight = weight.T if base.family.transposed else weight
    if a is None or b is None or (len(b), *b.shape[1:], *a.shape[1:]) != (len(weight), len(a), weight.shape[1]):
        raise RotationError(f"the adapter has {name!r} without an A and B that fit the model's {scaled.tensor!r}")
    if magnitude.shape != (len(weight),):
        raise RotationError(f"{name!r} of the adapter has shape {tuple(magnitude.shape)}: expected {len(weight)}")
    updated = weight + scaled.scaling * (b.to(wide) @ a.to(wide))
    columns = updated
    for gain in gains:
        columns = columns * (base.gains[gain.norm].to(wide) + gain.offset)
    for axis in read:
        columns = transform_axis(columns, axis, base.rotations[axis.space], dim=1)
    rows = torch.ones(len(updated), dtype=wide)
    for axis in written:  # channel scales alone, see `_counterpart`
        rows = transform_axis(rows, axis, base.rotations[axis.space], dim=0)
    return (magnitude.to(wide) * rows * columns.norm(dim=1) / updated.norm(dim=1)).to(magnitude.dtype)
