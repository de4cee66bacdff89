"""Mappings from roles to modules (`SpinQuantMapping`, `NormMapping`), as in llm-compressor: matched and inferred.

A mapping names modules by role (embedding, attention, q, k, v, o, MLP, head); norm mappings name the linears that
read each norm. A target is a module's name, the name of its class, or `re:` and a regular expression that the name
must match from its start. For a known architecture, roles may be left out (they are inferred), and a mapping is checked
against the built-in table; for an unknown one, complete mappings replace the table. `mapping_plan.py` turns complete
mappings into a plan.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import nn

from spinquant.errors import ArchitectureError, RotationError
from spinquant.plan import Plan


def listed(value: Any) -> Any:
    """A single target as a list; anything else unchanged."""
    return [value] if isinstance(value, str) else value


Targets = Annotated[list[str], BeforeValidator(listed)]


class SpinQuantMapping(BaseModel):
    """The modules of each role in a model, for `SpinQuantModifier`; roles that are left out are inferred.

    A target is a module's name, the name of its class, or `re:` and a regular expression that the name must match from
    its start. For an unknown architecture every role is required.

    Attributes:
        embedding: The token embedding.
        attn: The attention modules.
        attn_q: The query projections.
        attn_k: The key projections.
        attn_v: The value projections.
        attn_o: The output projections of the attentions.
        attn_head_dim: Size of a head. Default: that of the config.
        mlp_in: The input projections of the MLPs (gate and up); one target or a list.
        mlp_out: The output projections of the MLPs (down); one target or a list.
        lm_head: The language model head.

    Example:
        >>> import spinquant
        >>> mapping = spinquant.SpinQuantMapping(mlp_in=["re:.*gate_proj$", "re:.*up_proj$"], mlp_out="re:.*down_proj$")
        >>> mapping.mlp_out
        ['re:.*down_proj$']
        >>> modifier = spinquant.SpinQuantModifier(mappings=mapping)
    """

    model_config = ConfigDict(extra="forbid")

    embedding: str | None = None
    attn: str | None = None
    attn_q: str | None = None
    attn_k: str | None = None
    attn_v: str | None = None
    attn_o: str | None = None
    attn_head_dim: int | None = Field(default=None, gt=0)
    mlp_in: Targets | None = None
    mlp_out: Targets | None = None
    lm_head: str | None = None


class NormMapping(BaseModel):
    """The linears that read a norm's output, for `SpinQuantModifier`; the norm's weight is fused into them.

    Attributes:
        norm: Target of the norms, usually one per layer.
        linears: Targets of the linears that read them; each belongs to the nearest norm. Default: inferred.

    Example:
        >>> import spinquant
        >>> final = spinquant.NormMapping(norm="model.norm", linears="lm_head")
        >>> final.linears
        ['lm_head']
        >>> modifier = spinquant.SpinQuantModifier(norm_mappings=[final])
    """

    model_config = ConfigDict(extra="forbid")

    norm: str
    linears: Targets | None = None


ROLES = tuple(name for name in SpinQuantMapping.model_fields if name != "attn_head_dim")


def matching(model: nn.Module, targets: Iterable[str], what: str, ignore: Sequence[str] = ()) -> list[str]:
    """Names of the modules that match any of the targets and none of `ignore`, in the model's order.

    Raises RotationError, naming `what`, for a target that matches nothing or is an invalid regular expression.
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
        raise RotationError(f"{what}: the target {target!r} is an invalid regular expression: {error}") from None


def infer_mapping(plan: Plan) -> SpinQuantMapping:
    """Infer the mapping of a plan. Raises ArchitectureError if a role has no module, as with fused projections."""
    side = {(axis.tensor, axis.dim): plan.space[axis.space].rotation for axis in plan.rotated_axes}
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    linears = {name for group in plan.linears for name in group}
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
    roles["attn"], roles["lm_head"] = list(plan.attentions), list(plan.heads)
    residual = [axis.tensor.removesuffix(".weight") for axis in plan.rotated_axes if axis.tensor.endswith(".weight")]
    roles["embedding"] = [name for name in residual if name not in linears and name not in plan.heads]
    for role, names in roles.items():
        if not names:
            raise ArchitectureError(
                f"{plan.family} has no module for the role {role} (its projections may be fused): mappings cannot "
                "describe it"
            )
    single: dict[str, Any] = {role: _one_target(names) for role, names in roles.items() if not role.startswith("mlp")}
    head_dim = next((space.size for space in plan.spaces_of("R2")), None)
    return SpinQuantMapping(
        **single, mlp_in=_targets(roles["mlp_in"]), mlp_out=_targets(roles["mlp_out"]), attn_head_dim=head_dim
    )


def infer_norm_mappings(plan: Plan) -> list[NormMapping]:
    """Infer the norm mappings of a plan; one mapping covers all layers."""
    found: dict[str, list[str]] = {}
    for gain in plan.gains:
        linears = found.setdefault(_targets([gain.norm.removesuffix(".weight")])[0], [])
        for target in _targets([tensor.removesuffix(".weight") for tensor, _ in gain.readers]):
            if target not in linears:
                linears.append(target)
    return [NormMapping(norm=norm, linears=linears) for norm, linears in found.items()]


def _targets(names: Sequence[str]) -> list[str]:
    """One target per group of modules that differ only in the layer index: a pattern of the suffix, or the name."""
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
    """Fill the missing roles of a mapping from the built-in table. reason: why there is no table.

    Raises ArchitectureError if a role is missing and there is no table.
    """
    given = given or SpinQuantMapping()
    missing = [role for role in ROLES if getattr(given, role) is None]
    if table is None:
        if missing:
            raise ArchitectureError(
                f"{reason} A complete mapping can replace the built-in table; it lacks {', '.join(missing)}"
            )
        return given
    inferred = infer_mapping(table)
    wanted = [*missing, "attn_head_dim"] if given.attn_head_dim is None else missing
    return given.model_copy(update={role: getattr(inferred, role) for role in wanted})


def complete_norms(
    model: nn.Module, given: Sequence[NormMapping] | None, table: Plan | None, reason: str = ""
) -> list[NormMapping]:
    """Fill missing norm mappings from the built-in table. Raises as `complete_mapping` and `matching` do."""
    if table is None:
        if not given or any(mapping.linears is None for mapping in given):
            raise ArchitectureError(
                f"{reason} Norm mappings can replace the built-in table if every norm has its linears: "
                + ("none are given" if not given else "some lack their linears")
            )
        return list(given)
    known = {gain.norm.removesuffix(".weight"): gain for gain in table.gains}
    covered: set[str] = set()
    for mapping in given or ():
        norms = matching(model, [mapping.norm], "norm_mappings")
        unknown = [norm for norm in norms if norm not in known and mapping.linears is None]
        if unknown:
            raise RotationError(
                f"norm_mappings: {unknown[0]!r} is not a norm in the table of {table.family}: give its linears"
            )
        covered.update(norms if mapping.linears is not None else ())
    found = [mapping for mapping in given or () if mapping.linears is not None]
    for mapping in infer_norm_mappings(table):
        norms = matching(model, [mapping.norm], "norm_mappings")
        if not covered & set(norms):
            found.append(mapping)
            continue
        # The given mappings cover some layers; the norms of the others are mapped by name.
        for gain in (known[norm] for norm in norms if norm not in covered):
            linears = [tensor.removesuffix(".weight") for tensor, _ in gain.readers]
            found.append(NormMapping(norm=gain.norm.removesuffix(".weight"), linears=linears))
    return found
