"""Transform configs in the format of compressed-tensors: made from mappings, and translated into a plan and rotations.

A config is a set of named groups; each has a type of matrix, its order, and the places where it is applied: the input
or output side of weights, online the input of linears, queries and keys. With y = x W^T and a group's matrix R

    weight_output: R^T W      weight_input, inverse: W R      input: x R      q_attn, k_cache: q R, k R

and the inverse with R^T, since R is orthogonal. A config that would change the function of a model (a writer rotated
and its reader not) is rejected, with the names of both.

The pydantic models have the fields of compressed-tensors' own, and are defined here because a recipe must work without
that library (`tests/modifiers/test_modifier.py::test_compressed_tensors_need_not_be_installed`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from torch import nn

from spinquant.errors import RotationError
from spinquant.modifiers.mappings import SpinQuantMapping, Targets, matching
from spinquant.plan import Axis, Online, Plan, Space
from spinquant.rotation_names import ONLINE_R1
from spinquant.rotations.factory import RotationSpec, make_rotation
from spinquant.rotations.rotation import Orthogonal, Rotation, Transform, matrix

Location = Literal["input", "weight_input", "weight_output", "output", "k_cache", "q_attn"]
TransformType = Literal["hadamard", "random-hadamard", "random-matrix"]


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{value!r} is not a floating-point dtype of torch: expected one such as 'float32'")
    return found


TorchDtype = Annotated[torch.dtype, BeforeValidator(_dtype), PlainSerializer(str)]


class TransformArgs(BaseModel):
    """Where a group's matrix is applied, and whether inverted.

    Attributes:
        targets: Targets of modules, see `mappings.py`; one or a list.
        location: The side of the module's weight, or the activation.
        inverse: Apply the inverse of the matrix. Default: False.
        ignore: Targets of modules to leave out; one or a list. Default: none.
    """

    model_config = ConfigDict(extra="forbid")

    targets: Targets
    location: Location
    inverse: bool = False
    ignore: Targets = Field(default_factory=list)


class TransformScheme(BaseModel):
    """A group: its type of matrix and where it is applied.

    Attributes:
        type: Type of the matrix.
        apply: Where it is applied. Default: nowhere.
        randomize: A different matrix for every layer. Default: False.
        requires_grad: Train the matrix. Default: False.
        head_dim: Order of the matrix. Default: the length of the axis.
        precision: Dtype in which the matrix is applied online. Default: float32.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    type: TransformType
    apply: list[TransformArgs] = Field(default_factory=list)
    randomize: bool = False
    requires_grad: bool = False
    head_dim: int | None = Field(default=None, gt=0)
    precision: TorchDtype = torch.float32


class TransformConfig(BaseModel):
    """Groups by name; converts from and to compressed-tensors' own `TransformConfig` through `model_dump`."""

    model_config = ConfigDict(extra="forbid")

    config_groups: dict[str, TransformScheme]


def transform_config(mapping: SpinQuantMapping, rotations: Sequence[str], **scheme: Any) -> TransformConfig:
    """Make the config of some of R1 to R4 from a complete mapping, one group for each.

    scheme: fields of `TransformScheme` for every group; `head_dim` is required.
    """
    m: Any = mapping
    places = {
        "R1": [
            ([m.embedding, m.attn_o, *m.mlp_out], "weight_output", False),
            ([m.attn_q, m.attn_k, m.attn_v, *m.mlp_in, m.lm_head], "weight_input", True),
        ],
        "R2": [([m.attn_v], "weight_output", False), ([m.attn_o], "weight_input", True)],
        "R3": [([m.attn], "q_attn", False), ([m.attn], "k_cache", False)],
        "R4": [([*m.mlp_out], "input", False), ([*m.mlp_out], "weight_input", True)],
    }
    groups: dict[str, TransformScheme] = {}
    for name in rotations:
        # A matrix as long as the axis would mix heads.
        order = scheme["head_dim"] or (m.attn_head_dim if name in ("R2", "R3") else None)
        args = [TransformArgs(targets=t, location=where, inverse=i) for t, where, i in places[name]]  # pyright: ignore
        groups[name] = TransformScheme(**{**scheme, "head_dim": order}, apply=args)
    return TransformConfig(config_groups=groups)


@dataclass(frozen=True)
class Touch:
    """A rotation of one side of a module by a group: by R as in the formulas above if `straight`, otherwise by R^T."""

    group: str
    straight: bool


Touches = dict[tuple[str, str], Touch]


@dataclass(frozen=True)
class Translation:
    """A plan, its rotations by space, and the group of each space."""

    plan: Plan
    rotations: Mapping[str, Transform]
    group_of: Mapping[str, str]


def translate(model: nn.Module, base: Plan, config: TransformConfig, *, seed: int) -> Translation:
    """Translate a config into a plan and rotations.

    Args:
        model: A causal language model of transformers.
        base: Where it can be rotated.
        config: The config.
        seed: Seed of random rotations.

    Returns:
        The plan, with a space of its own for every linear whose input is rotated online; the rotations; the groups.

    Raises:
        RotationError: A target matches nothing, a side is rotated twice, a space is rotated only in part, or a
            location is not supported. The message names group and module.
    """
    touches = _touches(model, config)
    plan, spaces = _private_spaces(model, base, touches)
    for (module, location), touch in touches.items():
        if location in ("weight_input", "weight_output") and (module, location) not in spaces:
            spaces[module, location] = _space_of(model, plan, module, location, touch)
        elif location in ("q_attn", "k_cache"):
            spaces[module, location] = _query_key_space(plan, module, touches, touch)
    by_space: defaultdict[str, dict[tuple[str, str], Touch]] = defaultdict(dict)
    for place, space in spaces.items():
        by_space[space][place] = touches[place]
    found = {
        space.name: _whole(model, plan, space, by_space[space.name]) for space in plan.spaces if by_space[space.name]
    }
    rotations = _rotations(plan, config, found, seed)
    return Translation(_regrouped(plan, rotations), rotations, {space: touch.group for space, touch in found.items()})


def _touches(model: nn.Module, config: TransformConfig) -> Touches:
    found: Touches = {}
    for group, scheme in config.config_groups.items():
        for args in scheme.apply:
            for module in matching(model, args.targets, f"transform_config {group!r}, {args.location}", args.ignore):
                place = (module, args.location)
                if place in found:
                    raise RotationError(
                        f"transform_config: {args.location} of {module!r} is rotated by {found[place].group!r} and by "
                        f"{group!r}, but only one rotation is possible: leave one out"
                    )
                if args.location == "output":
                    raise RotationError(
                        f"transform_config {group!r}: location 'output' of {module!r} is not supported: online "
                        "rotations run at the input of linears and on queries and keys. Rotate weight_output instead, "
                        "or the input of the modules that read it"
                    )
                found[place] = Touch(group, args.inverse == (args.location == "weight_input"))
    return found


def _private_spaces(model: nn.Module, base: Plan, touches: Touches) -> tuple[Plan, dict[tuple[str, str], str]]:
    """The plan with a space of its own for every linear whose input is rotated online, and these spaces by place."""
    base = base.without(ONLINE_R1)  # linears that share an input need not be rotated alike
    known = {online.module: online.space for online in base.onlines if online.site == "input"}
    spaces, axes, onlines = list(base.spaces), list(base.axes), list(base.onlines)
    places: dict[tuple[str, str], str] = {}
    for (module, location), touch in touches.items():
        if location != "input":
            continue
        linear = model.get_submodule(module)
        if not isinstance(linear, nn.Linear):
            raise RotationError(
                f"transform_config {touch.group!r}: {module!r} is a {type(linear).__name__}; online rotations need an "
                "nn.Linear"
            )
        if touches.get((module, "weight_input")) != touch:
            raise RotationError(
                f"transform_config {touch.group!r}: the input of {module!r} is rotated online, but its weight does not "
                "undo it: add the location weight_input for it, with the opposite `inverse`, in the same group"
            )
        space = known.get(module)
        if space is None:
            space = f"{module}.input"
            spaces.append(Space(space, touch.group, linear.in_features))
            axes.append(Axis(f"{module}.weight", 1, space, reads=True))
            onlines.append(Online(module, "input", space))
        places[module, "input"] = places[module, "weight_input"] = space
    return replace(base, spaces=tuple(spaces), axes=tuple(axes), onlines=tuple(onlines)), places


def _space_of(model: nn.Module, plan: Plan, module: str, location: str, touch: Touch) -> str:
    written = isinstance(model.get_submodule(module), nn.Embedding)
    dim = {"weight_output": 1} if written else {"weight_output": 0, "weight_input": 1}
    for axis in plan.axes_of.get(f"{module}.weight", ()):
        if axis.dim == dim.get(location) and plan.space[axis.space].rotation:
            return axis.space
    raise RotationError(
        f"transform_config {touch.group!r}: {location} of {module!r} is in no space that {plan.family} can rotate: "
        "nothing would undo the rotation"
    )


def _query_key_space(plan: Plan, module: str, touches: Touches, touch: Touch) -> str:
    if touches.get((module, "q_attn")) != touches.get((module, "k_cache")):
        raise RotationError(
            f"transform_config {touch.group!r}: queries and keys of {module!r} are not rotated alike: put q_attn and "
            "k_cache for it in one group, with the same `inverse`"
        )
    for online in plan.onlines:
        if online.site == "query_key" and online.module == module:
            return online.space
    raise RotationError(f"transform_config {touch.group!r}: {module!r} is not an attention of {plan.family}")


def _whole(model: nn.Module, plan: Plan, space: Space, touched: dict[tuple[str, str], Touch]) -> Touch:
    """The rotation of a space. Raises RotationError if a part of it is not rotated, or rotated differently."""
    needed = [(online.module, online.site) for online in plan.onlines if online.space == space.name]
    for axis in plan.axes:
        if axis.space == space.name and axis.tensor.endswith(".weight"):
            module = axis.tensor.removesuffix(".weight")
            written = axis.dim == 0 or isinstance(model.get_submodule(module), nn.Embedding)
            needed.append((module, "weight_output" if written else "weight_input"))
    place, touch = next(iter(touched.items()))
    for module, location in needed:
        for name in ("q_attn", "k_cache") if location == "query_key" else (location,):
            other = touched.get((module, name))
            if other != touch:
                how = "is not" if other is None else f"is rotated differently (by {other.group!r}, or by the inverse)"
                raise RotationError(
                    f"transform_config {touch.group!r}: {place[1]} of {place[0]!r} is rotated, but {name} of "
                    f"{module!r} {how}, and both are in the space {space.name!r}: the function of the model would "
                    "change"
                )
    return touch


def _rotations(plan: Plan, config: TransformConfig, found: Mapping[str, Touch], seed: int) -> dict[str, Transform]:
    made: dict[tuple[str, bool], Rotation] = {}
    rotations: dict[str, Transform] = {}
    for space in plan.spaces:
        if space.name not in found:
            continue
        touch = found[space.name]
        scheme = config.config_groups[touch.group]
        if scheme.randomize and scheme.type == "hadamard" and space.name != "residual":
            raise RotationError(
                f"transform_config {touch.group!r}: randomize has no effect on type hadamard: use random-hadamard"
            )
        spec = RotationSpec((), scheme.type, scheme.head_dim, scheme.randomize, seed)
        # The same random numbers as in `make_rotations`, if the group is called R1, R2, R3 or R4.
        label = space.name if scheme.randomize else f"{touch.group}/{space.size}"
        if (label, True) not in made:
            made[label, True] = make_rotation(space, spec, label)
        if not touch.straight and (label, False) not in made:
            made[label, False] = Orthogonal(matrix(made[label, True]).T.contiguous())
        rotations[space.name] = made[label, touch.straight]
    return rotations


def _regrouped(plan: Plan, rotations: Mapping[str, Transform]) -> Plan:
    """Split the groups of linears that read one activation but rotate it differently online."""
    online = {o.module: id(rotations[o.space]) for o in plan.onlines if o.site == "input" and o.space in rotations}
    groups = []
    for group in plan.linears:
        kinds = dict.fromkeys(online.get(name) for name in group)
        groups += [tuple(name for name in group if online.get(name) == kind) for kind in kinds]
    return replace(plan, linears=tuple(groups))
