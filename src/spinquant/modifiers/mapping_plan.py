"""Turn complete mappings into a plan, and check it against the model's names, shapes and norms.

Mappings can be consistent and still incomplete: a linear that reads the residual stream and is not mapped would stay
unrotated. So every tensor with an axis of the hidden size has to be mapped, every reader of the residual stream needs
its norm, and for a known architecture the mappings have to agree with the built-in table. A rotation for which this
fails is listed in the plan's `refused`; the others still work.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spinquant.architectures.family import size_of
from spinquant.errors import RotationError
from spinquant.models.modules import named_tensor
from spinquant.modifiers.mappings import ROLES, NormMapping, SpinQuantMapping, listed, matching
from spinquant.plan import CHANNELS, Axis, Gain, Online, Plan, Space, Tie

NORM_TOLERANCE = 0.05  # relative error of a norm's output against the formula; bfloat16 rounds to 0.004


def plan_from_mappings(model: Any, mapping: SpinQuantMapping, norms: Sequence[NormMapping]) -> Plan:
    """Make a plan from complete mappings.

    Args:
        model: A causal language model of transformers.
        mapping: The modules of every role; none may be missing.
        norms: The linears that read each norm; none may be missing.

    Returns:
        The plan. Rotations that are impossible are in its `refused`, with the reason.

    Raises:
        RotationError: A target matches nothing, a module has two roles or the wrong class, or an attention does not
            have exactly one q, k, v and o.
    """
    roles = {role: matching(model, listed(getattr(mapping, role)), f"mappings.{role}") for role in ROLES}
    _check_roles(model, roles)
    embedding, head = (_single(roles[role], role) for role in ("embedding", "lm_head"))
    hidden = model.get_submodule(embedding).embedding_dim
    head_dim = mapping.attn_head_dim or size_of(model.config, "head_dim")
    spaces, onlines = [Space("residual", "R1", hidden)], []
    # The spaces of axes 0 and 1 of a module's weight: output and input of a linear; an embedding's output is axis 1.
    sides: dict[str, tuple[str | None, str | None]] = {embedding: (None, "residual"), head: (None, "residual")}
    sides.update({name: (None, "residual") for role in ("attn_q", "attn_k", "mlp_in") for name in roles[role]})
    groups: list[tuple[str, ...]] = []
    for attention in roles["attn"]:
        q, k, v, o = (_inside(attention, roles[role], role) for role in ("attn_q", "attn_k", "attn_v", "attn_o"))
        value, query_key = f"{_layer(model, attention)}.value", f"{_layer(model, attention)}.query_key"
        spaces += [Space(value, "R2", head_dim), Space(query_key, "R3", head_dim)]
        sides[v], sides[o] = (value, "residual"), ("residual", value)
        onlines.append(Online(attention, "query_key", query_key))
        groups += [(q, k, v), (o,)]
    for out in roles["mlp_out"]:
        space = f"{_layer(model, out.rpartition('.')[0])}.hidden"
        space = space if space not in {s.name for s in spaces} else f"{out}.hidden"
        spaces.append(Space(space, "R4", model.get_submodule(out).in_features))
        sides[out] = ("residual", space)
        onlines.append(Online(out, "input", space))
        groups.append((out,))
    outside = [name for role in ("attn_v", "attn_o") for name in roles[role] if name not in sides]
    if outside:
        raise RotationError(f"mappings: {outside[0]!r} is not inside any attention that mappings.attn matches")
    parents = dict.fromkeys(name.rpartition(".")[0] for name in roles["mlp_in"])
    groups += [tuple(n for n in roles["mlp_in"] if n.rpartition(".")[0] == parent) for parent in parents]
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    axes = tuple(axis for name in sorted(sides, key=position.__getitem__) for axis in _axes(model, name, sides[name]))
    _check_lengths(model, axes, {space.name: space.size for space in spaces})
    readers = [name for name, (_, space) in sides.items() if space == "residual" and name != embedding]
    gains = _gains(model, norms, readers)
    tied = model.get_submodule(head).weight is model.get_submodule(embedding).weight
    plan = Plan(
        family=f"{getattr(model.config, 'model_type', type(model).__name__)} (mapped)",
        spaces=tuple(spaces),
        axes=axes,
        gains=gains,
        onlines=tuple(onlines),
        ties=(Tie(f"{head}.weight", f"{embedding}.weight"),) if tied else (),
        linears=tuple(sorted(groups, key=lambda group: position[group[0]])),
        attentions=tuple(roles["attn"]),
        blocks=tuple(dict.fromkeys(name.rpartition(".")[0] for name in roles["attn"])),
        head=f"{head}.weight",
    )
    why = _why_not_r1(model, plan, readers, hidden)
    return replace(plan, refused=(("R1", why),)) if why else plan


def check_against_table(plan: Plan, table: Plan) -> Plan:
    """Check a plan made from mappings against that of the built-in table.

    Layers may be left out of R2, R3 and R4; the residual space has to be complete.

    Args:
        plan: The plan made from mappings.
        table: The plan of the built-in table.

    Returns:
        The table's plan, restricted to the spaces of `plan`, with rotations whose spaces differ in `refused`. It has
        the table's order, so that rotations are bit for bit those of the table.
    """
    refused = dict(plan.refused)
    for space in plan.spaces:
        size = table.space[space.name].size if space.name in table.space else space.size
        if size != space.size:
            refused[space.rotation] = f"the mapping gives {space.name} the size {space.size}, but the model has {size}"
        ours, theirs = _touched(plan, space.name), _touched(table, space.name)
        if ours != theirs and space.rotation not in refused:
            name = sorted(ours ^ theirs)[0][0]
            where = "is not in the mapping" if name in {t for t, _ in theirs} else f"is not in the space {space.name}"
            refused[space.rotation] = f"{name!r} {where}, so the function of the model would change"
    ours, theirs = ({g.norm: (g.offset, frozenset(g.readers)) for g in p.gains} for p in (plan, table))
    differing = sorted(norm for norm in ours | theirs if ours.get(norm) != theirs.get(norm))
    if differing:
        refused.setdefault("R1", f"the linears mapped to the norm {differing[0]!r} are not those that read it")
    mapped = {space.name for space in plan.spaces}
    scaled = (space.name for space in table.spaces if space.name.endswith(CHANNELS))
    mapped |= {name for name in scaled if name.removesuffix(CHANNELS) in mapped}
    return replace(
        table,
        spaces=tuple(space for space in table.spaces if space.name in mapped),
        axes=tuple(axis for axis in table.axes if axis.space in mapped),
        onlines=tuple(online for online in table.onlines if online.space in mapped),
        refused=tuple({**dict(table.refused), **refused}.items()),
    )


def _touched(plan: Plan, space: str) -> set[tuple[str, int]]:
    places = {(axis.tensor, axis.dim) for axis in plan.axes if axis.space == space}
    return places | {(online.module, -1) for online in plan.onlines if online.space == space}


def _check_roles(model: nn.Module, roles: dict[str, list[str]]) -> None:
    owner: dict[str, str] = {}
    for role, names in roles.items():
        for name in names:
            if name in owner:
                raise RotationError(
                    f"mappings: {name!r} is matched by {owner[name]} and by {role}, but a module has one role: make "
                    "one of the two targets narrower"
                )
            owner[name] = role
            kind = nn.Module if role == "attn" else nn.Embedding if role == "embedding" else nn.Linear
            module = model.get_submodule(name)
            if not isinstance(module, kind):
                raise RotationError(
                    f"mappings.{role}: {name!r} is a {type(module).__name__}, expected an nn.{kind.__name__}"
                )


def _single(names: list[str], role: str) -> str:
    if len(names) != 1:
        raise RotationError(f"mappings.{role} matches {len(names)} modules ({names[0]!r}, ...): expected one")
    return names[0]


def _inside(attention: str, names: list[str], role: str) -> str:
    found = [name for name in names if name.startswith(f"{attention}.")]
    if len(found) != 1:
        raise RotationError(
            f"mappings.{role} matches {len(found)} modules in the attention {attention!r}, expected one"
            + (f": {', '.join(found)}" if found else "")
        )
    return found[0]


def _layer(model: Any, name: str) -> str:
    """The name of a layer in plans, from the name of a module directly inside the layer."""
    return name.rpartition(".")[0].removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _axes(model: nn.Module, name: str, sides: tuple[str | None, str | None]) -> list[Axis]:
    reads = not isinstance(model.get_submodule(name), nn.Embedding)
    axes = [Axis(f"{name}.weight", dim, s, reads=reads and dim == 1) for dim, s in enumerate(sides) if s]
    if sides[0] and getattr(model.get_submodule(name), "bias", None) is not None:
        axes.append(Axis(f"{name}.bias", 0, sides[0]))
    return axes


def _check_lengths(model: nn.Module, axes: Sequence[Axis], sizes: dict[str, int]) -> None:
    for axis in axes:
        length, size = named_tensor(model, axis.tensor).shape[axis.dim], sizes[axis.space]
        if length % size or (axis.space == "residual" and length != size):
            raise RotationError(
                f"mappings: axis {axis.dim} of {axis.tensor!r} has length {length}, which does not fit the space "
                f"{axis.space!r} of size {size}: set attn_head_dim if the config's head size is not that of the model, "
                "or correct the role"
            )


def _gains(model: nn.Module, norms: Sequence[NormMapping], readers: Sequence[str]) -> tuple[Gain, ...]:
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for mapping in norms:
        modules = matching(model, [mapping.norm], "norm_mappings")
        for linear in matching(model, mapping.linears or [], f"norm_mappings, linears of {mapping.norm!r}"):
            nearest = max(_shared(norm, linear) for norm in modules)
            norm, *others = [norm for norm in modules if _shared(norm, linear) == nearest]
            if others:
                raise RotationError(
                    f"norm_mappings: {linear!r} is as near to the norm {norm!r} as to {others[0]!r}: name the norms in "
                    "mappings of their own"
                )
            if linear in owner:
                raise RotationError(f"norm_mappings: {linear!r} is matched for {owner[linear]!r} and for {norm!r}")
            if linear not in readers:
                raise RotationError(f"norm_mappings: {linear!r} reads {norm!r} but has no role in the mappings")
            owner[linear] = norm
            found.setdefault(norm, []).append(linear)
        unread = [norm for norm in modules if norm not in found]
        if unread:
            raise RotationError(f"norm_mappings: none of the linears of {mapping.norm!r} is near {unread[0]!r}")
    return tuple(
        Gain(f"{norm}.weight", "residual", tuple((f"{name}.weight", 1) for name in names), norm_offset(model, norm))
        for norm, names in found.items()
    )


def _shared(a: str, b: str) -> int:
    """Number of leading parts that two module names share."""
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


@torch.no_grad()
def norm_offset(model: nn.Module, name: str) -> float:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight; measured by running it.

    Raises RotationError for anything but an RMSNorm: subtracting the mean does not commute with a rotation.
    """
    norm = model.get_submodule(name)
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    if weight is not None and len(parameters) == 1 and weight.ndim == 1 and not weight.is_meta:
        # A large mean, so that subtracting it shows; large values, so that the norm's epsilon does not matter.
        x = torch.linspace(500.0, 1500.0, len(weight), device=weight.device).flip(0).unsqueeze(0)
        unit = x * x.square().mean().rsqrt()
        found = norm(x.to(weight.dtype)).float()
        for offset in (0.0, 1.0):
            expected = unit * (weight.float() + offset)
            if (found - expected).norm() <= NORM_TOLERANCE * expected.norm():
                return offset
    raise RotationError(
        f"norm_mappings: {name!r} ({type(norm).__name__}) does not compute x / rms(x) times weight, or 1 + weight: "
        "only an RMSNorm commutes with R1"
    )


def _why_not_r1(model: nn.Module, plan: Plan, readers: Sequence[str], hidden: int) -> str | None:
    with_gain = {tensor for gain in plan.gains for tensor, _ in gain.readers}
    for name in readers:
        if f"{name}.weight" not in with_gain:
            return f"{name!r} reads the residual stream, and no norm mapping names it"
    mapped = {axis.tensor for axis in plan.axes} | {gain.norm for gain in plan.gains}
    mapped |= {f"{name}.bias" for name in readers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in mapped and hidden in parameter.shape:
            return f"{name!r} (shape {tuple(parameter.shape)}) has an axis of the hidden size, and no mapping names it"
    return None
