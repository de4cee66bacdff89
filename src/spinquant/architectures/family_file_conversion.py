"""Convert a family file into a family table, and check that the names in it fit together.

In family tables `{i}` stands for the layer index and `{e}` for the expert index, where users write `*` and `#`.
"""

from collections.abc import Iterable
from typing import Any

from spinquant.architectures.family import AxisPart, AxisSpace, Family, Norm, Refusal
from spinquant.architectures.family_file import FamilyFile, NormEntry, SpanEntry
from spinquant.errors import ArchitectureError
from spinquant.plan import OnlineSite

RESIDUAL, NOWHERE = "residual", "-"
VALUE, QUERY_KEY, HIDDEN = (f"layers.{{i}}.{name}" for name in ("value", "query_key", "hidden"))


def to_family(file: FamilyFile, tables: Iterable[Family]) -> Family:
    """Convert a family file into a family table.

    Raises:
        ArchitectureError: `like` names no table, or the names in the file do not fit together.
    """
    if file.like is None:
        base = _from_roles(file)
    else:
        known = {table.name: table for table in tables}
        if file.like not in known:
            raise ArchitectureError(
                f"family {file.name!r}: key like: no built-in family is called {file.like!r}. Known: "
                f"{', '.join(sorted(known))}"
            )
        base = known[file.like]
    changes: dict[str, Any] = {
        "tensors": {_layered(name): _axis_spaces(axes) for name, axes in file.tensors.items()},
        "gains": {_layered(name): _norm(norm) for name, norm in file.norms.items()},
        "spaces": {
            _layered(name): (space.rotation, space.size, *([space.allows] if space.allows else []))
            for name, space in file.spaces.items()
        },
        "onlines": {_layered(name): (online.site, _layered(online.space)) for name, online in file.onlines.items()},
        "scaled": {_layered(name): _axis_spaces([space])[0] for name, space in file.scaled.items()},
        "names": file.config,
    }
    if file.refused is not None:
        changes["refused"] = tuple(Refusal(r.rotation, r.reason, r.when) for r in file.refused)
    if file.linears is not None:
        changes["linears"] = tuple(tuple(_layered(name) for name in group) for group in file.linears)
    if file.choices is not None:
        changes["choices"] = tuple(
            tuple(tuple(_layered(name) for name in alternative) for alternative in choice) for choice in file.choices
        )
    for key in ("ignored", "when"):
        if getattr(file, key) is not None:
            changes[key] = tuple(getattr(file, key))
    if file.stored is not None:
        changes["stored"] = tuple(file.stored)
    for key in ("norm_offset", "centred", "filled", "transposed", "heads", "experts"):
        if getattr(file, key) is not None:
            changes[key] = getattr(file, key)
    rename = {_layered(old): _layered(new) for old, new in file.rename.items()}
    without = tuple(_layered(part) for part in file.without)
    family = base.like(file.name, *file.model_types, rename=rename, without=without, **changes)
    _check_names(family)
    _check_experts(family)
    return family


def _check_names(family: Family) -> None:
    """Raise ArchitectureError for a name that one part of a family uses and no other part defines."""
    known = {name.removesuffix("?") for name in family.tensors}
    for module in (module for group in family.linears for module in group):
        if f"{module}.weight" not in known:
            raise ArchitectureError(
                f"family {family.name!r}: linear {_starred(module)!r} has no weight among its tensors"
            )
    for name, spaces in family.tensors.items():
        for where in spaces:
            space = where.space if isinstance(where, AxisPart) else where
            if space is not None and space not in family.spaces:
                raise ArchitectureError(
                    f"family {family.name!r}: tensor {_starred(name)!r} is in space {_starred(space)!r}, expected - or "
                    f"one of {', '.join(_starred(space) for space in family.spaces)}"
                )
    for name, norm in family.gains.items():
        space = norm.space if isinstance(norm, Norm) else RESIDUAL
        for reader in family.readers(name):
            spaces = family.tensors.get(f"{reader}.weight", family.tensors.get(f"{reader}.weight?"))
            spaces = family.tensors.get(reader) if spaces is None else spaces
            if spaces is None or space not in {
                where.space if isinstance(where, AxisPart) else where for where in spaces
            }:
                raise ArchitectureError(
                    f"family {family.name!r}: norm {_starred(name)!r} is read by {_starred(reader)!r}, which has no "
                    f"axis in {_starred(space)!r}"
                )
    for module, where in family.scaled.items():
        space = where.space if isinstance(where, AxisPart) else where
        if space not in family.spaces:
            raise ArchitectureError(
                f"family {family.name!r}: scaled {_starred(module)!r} names {_starred(str(space))!r}, which is not "
                "one of its spaces"
            )
    for module, (_, space) in family.onlines.items():
        if space not in family.spaces:
            raise ArchitectureError(
                f"family {family.name!r}: online {_starred(module)!r} rotates {_starred(space)!r}, which is not one of "
                "its spaces"
            )


def _check_experts(family: Family) -> None:
    """Raise ArchitectureError if tensors of experts are named but their number is not given."""
    named = next((name for name in (*family.tensors, *family.gains) if "{e}" in name), None)
    if named is not None and family.experts is None:
        raise ArchitectureError(
            f"family {family.name!r}: tensor {_starred(named)!r} belongs to an expert, and key experts is missing: "
            "expected the config attribute with the number of experts"
        )


def _from_roles(file: FamilyFile) -> Family:
    """The family table that follows from the roles of the modules."""
    assert file.layer is not None and file.embedding is not None and file.head is not None
    embeddings = [_layered(name) for name in _listed(file.embedding)]
    head = _layered(file.head)
    tensors: dict[str, tuple[AxisSpace, ...]] = {f"{name}.weight": (None, RESIDUAL) for name in (*embeddings, head)}
    spaces = {RESIDUAL: ("R1", file.hidden_size)}
    onlines: dict[str, tuple[OnlineSite, str]] = {}
    linears: list[tuple[str, ...]] = []

    def linear(name: str, rows: AxisSpace, columns: AxisSpace) -> None:
        tensors[f"{_layered(name)}.weight"] = (columns, rows) if file.transposed else (rows, columns)

    attention = file.attention
    if attention is not None:
        values = attention.values and AxisPart(
            VALUE, attention.values.start, attention.values.length, attention.values.period
        )
        rows: AxisSpace = VALUE if attention.v is not None else values
        for name in attention.inputs():
            linear(name, rows if name in (attention.v, attention.qkv, attention.kv) else None, RESIDUAL)
        linear(attention.o, RESIDUAL, VALUE if rows is not None else None)
        allows = [attention.allows] if attention.allows else []
        spaces |= {VALUE: ("R2", attention.head_size, *allows), QUERY_KEY: ("R3", attention.head_size)}
        onlines[_layered(attention.module)] = ("query_key", QUERY_KEY)
        linears += [tuple(_layered(name) for name in attention.inputs()), (_layered(attention.o),)]
    if file.mlp is not None:
        for name in file.mlp.inputs:
            linear(name, None, RESIDUAL)
        linear(file.mlp.out, RESIDUAL, HIDDEN)
        spaces[HIDDEN] = ("R4", file.mlp.size)
        onlines[_layered(file.mlp.out)] = ("input", HIDDEN)
        linears += [tuple(_layered(name) for name in file.mlp.inputs), (_layered(file.mlp.out),)]
    return Family(
        name=file.name,
        model_types=tuple(file.model_types),
        tensors=tensors,
        spaces=spaces,
        gains={},
        onlines=onlines,
        linears=tuple(linears),
        attention=_layered(attention.module) if attention is not None else "",
        block=_layered(file.layer),
        embedding=f"{embeddings[0]}.weight",
        head=f"{head}.weight",
    )


def _layered(name: str) -> str:
    """The name with `{i}` and `{e}`, as in family tables."""
    return name.replace("*", "{i}").replace("#", "{e}")


def _starred(name: str) -> str:
    """The name with `*` and `#`, as in family files."""
    return name.replace("{i}", "*").replace("{e}", "#")


def _axis_spaces(axes: list[str | SpanEntry]) -> tuple[AxisSpace, ...]:
    return tuple(
        AxisPart(_layered(axis.space), axis.start, axis.length, axis.period)
        if isinstance(axis, SpanEntry)
        else None
        if axis == NOWHERE
        else _layered(axis)
        for axis in axes
    )


def _norm(norm: list[str] | NormEntry) -> tuple[str, ...] | Norm:
    if isinstance(norm, NormEntry):
        return Norm(tuple(_layered(name) for name in norm.readers), _layered(norm.space))
    return tuple(_layered(name) for name in norm)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
