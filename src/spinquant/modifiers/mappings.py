"""Which module plays which part, as llm-compressor's users write it down; `mapped_plan.py` makes a plan of it.

A mapping names modules by role (embedding, attention, q, k, v, o, MLP, head); norm mappings name the linears that
read each norm. A target is a module's name, the name of its class, or `re:` and a regular expression that the name
must match from its start. Where a table knows the model, a mapping may leave parts out (they are inferred) and is
held against the table; where none does, complete mappings take its place.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from spinquant.errors import ArchitectureError, RotationError
from spinquant.plan import Plan


class SpinQuantMapping(BaseModel):
    """Targets of every role; a role that is left out is inferred.

    attn_head_dim: size of a head, by default what the config says.
    """

    model_config = ConfigDict(extra="forbid")

    embedding: str | None = None
    attn: str | None = None
    attn_q: str | None = None
    attn_k: str | None = None
    attn_v: str | None = None
    attn_o: str | None = None
    attn_head_dim: int | None = Field(default=None, gt=0)
    mlp_in: list[str] | None = None
    mlp_out: list[str] | None = None
    lm_head: str | None = None

    @field_validator("mlp_in", "mlp_out", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class NormMapping(BaseModel):
    """A norm and the linears that read it; linears that are left out are inferred."""

    model_config = ConfigDict(extra="forbid")

    norm: str
    linears: list[str] | None = None

    @field_validator("linears", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


ROLES = tuple(name for name in SpinQuantMapping.model_fields if name != "attn_head_dim")


def matching(model: nn.Module, targets: Iterable[str], what: str, ignore: Sequence[str] = ()) -> list[str]:
    """Names of the modules that match any of the targets and none of `ignore`, in the model's order.

    Raises RotationError, naming `what`, for a target that matches nothing or is not a regular expression.
    """
    found: dict[str, None] = {}
    modules = [(name, module) for name, module in model.named_modules() if name]
    for target in targets:
        names = [name for name, module in modules if _matches(name, module, target, what)]
        if not names:
            raise RotationError(
                f"{what}: the target {target!r} matches no module of {type(model).__name__}. Expected the name of a "
                f"module (such as {modules[-1][0]!r}), of a class, or 're:' and a regular expression"
            )
        found.update(dict.fromkeys(names))
    ignored = {name for name, module in modules for target in ignore if _matches(name, module, target, what)}
    return [name for name, _ in modules if name in found and name not in ignored]


def _matches(name: str, module: nn.Module, target: str, what: str) -> bool:
    if not target.startswith("re:"):
        return name == target or any(kind.__name__ == target for kind in type(module).__mro__)
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise RotationError(f"{what}: the target {target!r} is not a regular expression: {error}") from None


def infer_mapping(plan: Plan) -> SpinQuantMapping:
    """The roles of a plan's modules. Raises ArchitectureError where a role has none, as in fused projections."""
    side = {(axis.tensor, axis.dim): plan.space[axis.space].rotation for axis in plan.axes}
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    linears = {name for group in plan.linears for name in group}
    head = plan.head.removesuffix(".weight")
    for group in plan.linears:
        values = [name for name in group if side.get((f"{name}.weight", 0)) == "R2"]
        if values:
            queries_and_keys = [name for name in group if name not in values]
            for role, name in zip(("attn_q", "attn_k", "attn_v"), [*queries_and_keys, *values], strict=False):
                roles[role].append(name)
            continue
        for name in group:
            sides = (side.get((f"{name}.weight", 0)), side.get((f"{name}.weight", 1)))
            role = {("R1", "R2"): "attn_o", ("R1", "R4"): "mlp_out", (None, "R1"): "mlp_in"}.get(sides)
            if role:
                roles[role].append(name)
    roles["attn"], roles["lm_head"] = list(plan.attentions), [head]
    residual = [axis.tensor.removesuffix(".weight") for axis in plan.axes if axis.tensor.endswith(".weight")]
    roles["embedding"] = [name for name in residual if name not in linears and name != head]
    for role, names in roles.items():
        if not names:
            raise ArchitectureError(f"{plan.family} has no module that is {role} alone: no mapping describes it")
    single: dict[str, Any] = {role: _one_target(names) for role, names in roles.items() if not role.startswith("mlp")}
    head_dim = next((space.size for space in plan.spaces_of("R2")), None)
    return SpinQuantMapping(
        **single, mlp_in=_targets(roles["mlp_in"]), mlp_out=_targets(roles["mlp_out"]), attn_head_dim=head_dim
    )


def infer_norm_mappings(plan: Plan) -> list[NormMapping]:
    """The norms of a plan and the linears that read them, one mapping for all layers."""
    found: dict[str, list[str]] = {}
    for gain in plan.gains:
        linears = found.setdefault(_targets([gain.norm.removesuffix(".weight")])[0], [])
        for target in _targets([tensor.removesuffix(".weight") for tensor, _ in gain.readers]):
            if target not in linears:
                linears.append(target)
    return [NormMapping(norm=norm, linears=linears) for norm, linears in found.items()]


def _targets(names: Sequence[str]) -> list[str]:
    """Targets for modules that differ in the layer alone: what stands behind the layer's number, or the name."""
    found = []
    for name in names:
        layer = re.match(r".*\.\d+\.", name)
        found.append(rf"re:.*\.{re.escape(name[layer.end() :])}$" if layer else name)
    return list(dict.fromkeys(found))


def _one_target(names: Sequence[str]) -> str:
    targets = _targets(names)
    if len(targets) == 1:
        return targets[0]
    return "re:(" + "|".join(t.removeprefix("re:") if t.startswith("re:") else f"{t}$" for t in targets) + ")"


def complete_mapping(given: SpinQuantMapping | None, table: Plan | None, reason: str = "") -> SpinQuantMapping:
    """The given roles, the others as the table says. reason: why there is no table.

    Raises ArchitectureError when a role is left out and there is no table.
    """
    given = given or SpinQuantMapping()
    missing = [role for role in ROLES if getattr(given, role) is None]
    if table is None:
        if missing:
            raise ArchitectureError(
                f"{reason} A mapping may take the place of a table, if it is complete: {', '.join(missing)} missing"
            )
        return given
    inferred = infer_mapping(table)
    wanted = [*missing, "attn_head_dim"] if given.attn_head_dim is None else missing
    return given.model_copy(update={role: getattr(inferred, role) for role in wanted})


def complete_norms(
    model: nn.Module, given: Sequence[NormMapping] | None, table: Plan | None, reason: str = ""
) -> list[NormMapping]:
    """The given norm mappings, the other norms as the table says. Raises as `complete_mapping`, and `matching`."""
    if table is None:
        if not given or any(mapping.linears is None for mapping in given):
            raise ArchitectureError(
                f"{reason} Norm mappings may take the place of a table, if every norm has its linears: "
                + ("none are given" if not given else "some leave their linears out")
            )
        return list(given)
    known = {gain.norm.removesuffix(".weight"): gain for gain in table.gains}
    covered: set[str] = set()
    for mapping in given or ():
        norms = matching(model, [mapping.norm], "norm_mappings")
        unknown = [norm for norm in norms if norm not in known and mapping.linears is None]
        if unknown:
            raise RotationError(f"norm_mappings: {unknown[0]!r} is no norm that {table.family} knows: name its linears")
        covered.update(norms if mapping.linears is not None else ())
    found = [mapping for mapping in given or () if mapping.linears is not None]
    for mapping in infer_norm_mappings(table):
        norms = matching(model, [mapping.norm], "norm_mappings")
        if not covered & set(norms):
            found.append(mapping)
            continue
        for gain in (known[norm] for norm in norms if norm not in covered):  # some layers are the user's: by name
            linears = [tensor.removesuffix(".weight") for tensor, _ in gain.readers]
            found.append(NormMapping(norm=gain.norm.removesuffix(".weight"), linears=linears))
    return found
