"""Family files: user-written TOML descriptions of an architecture, validated and converted into a family table.

A file states either how the family differs from a built-in one (`like`), or which module plays which role: embedding,
norms and what reads them, attention, MLP, head. In names `*` stands for the layer and `#` for an expert; `-` stands for
an axis in no space. See docs/reference/family-files.md.
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from spinquant.architectures.family import AxisPart, Family, Living, Norm, Refusal
from spinquant.errors import ArchitectureError
from spinquant.plan import OnlineSite

RESIDUAL, NOWHERE = "residual", "-"
VALUE, QUERY_KEY, HIDDEN = (f"layers.{{i}}.{name}" for name in ("value", "query_key", "hidden"))
FROM_THE_START = ("layer", "embedding", "head", "attention", "mlp")


def _checked(name: str) -> str:
    if name.count("*") > 1 or name.count("#") > 1:
        raise ValueError("expected at most one *, which stands for the layer's number, and one #, for the expert's")
    return name


Name = Annotated[str, Field(min_length=1), AfterValidator(_checked)]
Size = Annotated[str, Field(min_length=1, description="an attribute of the config, or a formula of several")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SpanEntry(_Part):
    """The part of an axis that belongs to a space: `length` elements from `start` on, in every `period` elements.

    Without a period, that is the whole axis.
    """

    space: Name
    start: Size
    length: Size
    period: Size | None = None


class ValueRows(_Part):
    """The rows of a fused linear that are the values, as in `SpanEntry`."""

    start: Size
    length: Size
    period: Size | None = None


class SpaceEntry(_Part):
    """The rotation of a space, and the number of elements that it mixes."""

    rotation: Literal["R1", "R2", "R3", "R4"]
    size: Size


class NormEntry(_Part):
    """The readers of a norm of another space than the residual one."""

    readers: list[Name]
    space: Name


class OnlineEntry(_Part):
    """A module that rotates a space at run time."""

    site: OnlineSite
    space: Name


class RefusalEntry(_Part):
    """A rotation that is impossible for the family, with the reason; `when` limits it to some configs."""

    rotation: Literal["R1", "R2", "R3", "R4"]
    reason: str = Field(min_length=1)
    when: str | None = None


class AttentionRoles(_Part):
    """The attention module of a layer and its linears: q, k, v, or fused ones (`qkv`, `kv`), and o.

    A fused linear needs `values`, its rows that are values. `head_size` is the size of a head, which R2 and R3 rotate.
    """

    module: Name
    o: Name
    q: Name | None = None
    k: Name | None = None
    v: Name | None = None
    qkv: Name | None = None
    kv: Name | None = None
    values: ValueRows | None = None
    head_size: Size = "head_dim"

    @model_validator(mode="after")
    def _complete(self) -> "AttentionRoles":
        given = {name for name in ("q", "k", "v", "qkv", "kv") if getattr(self, name) is not None}
        if given not in ({"q", "k", "v"}, {"q", "kv"}, {"qkv"}):
            raise ValueError(f"expected q, k and v, or q and kv, or qkv; found {', '.join(sorted(given)) or 'none'}")
        if self.v is not None and self.values is not None:
            raise ValueError("values is for a fused qkv or kv, and there is a separate linear v: leave one of them out")
        return self

    def inputs(self) -> tuple[str, ...]:
        """The linears that read the attention's input."""
        return tuple(name for name in (self.q, self.k, self.v, self.qkv, self.kv) if name is not None)


class MlpRoles(_Part):
    """The MLP of a layer: input linears (gate, up), output linear (down), and the intermediate size."""

    inputs: list[Name] = Field(alias="in", min_length=1)
    out: Name
    size: Size = "intermediate_size"


class FamilyFile(BaseModel):
    """A family of architectures as users describe it in a TOML family file (docs/reference/family-files.md).

    Give either `like`, the name of a built-in family, and the differences; or `layer`, `embedding` and `head`, with
    `attention`, `mlp` and `norms`. Names contain `*` for the layer's number and `#` for the expert's.

    Attributes:
        name: name of the family.
        model_types: values of `config.model_type` that it is for.
        like: a built-in family that this one differs from.
        rename: with `like`, parts of names to replace.
        without: with `like`, drop everything with one of these in its name.
        layer: the decoder layer module, such as "model.layers.*".
        embedding: the token embedding module; further ones (positions) that are added to it may follow in a list.
        head: the output head module.
        attention: roles of the attention's linears.
        mlp: roles of the MLP's linears.
        norms: norm weight -> modules that read the norm.
        tensors: further tensors -> the space of each axis, "-" for none.
        spaces: further spaces -> rotation and size.
        onlines: further modules with an online rotation -> site and space.
        scaled: linears whose outputs are one factor of a product that is a space -> the space.
        linears: groups of linears that read one activation, in order of execution.
        refused: rotations that are impossible, with reasons.
        ignored: regular expressions for names of optional tensors that belong to no space.
        stored: (regular expression, replacement) pairs that turn names in checkpoints into names in modules.
        choices: sets of alternatives of which every layer has at least one, each as prefixes of tensor names.
        when: conditions on the config under which the family holds.
        config: usual name of a size (hidden_size, num_hidden_layers, ...) -> its name in this config.
        hidden_size: the config's hidden size, an attribute or a formula.
        norm_offset: norms multiply by `norm_offset + weight`; 1 for Gemma-like models.
        centred: norms subtract the mean (LayerNorm).
        filled: number of heads times head size is the hidden size, whatever the config says of the head size.
        transposed: weights of linears are (in, out), as in Conv1D.
        heads: the number of heads has to be a multiple of this.
        experts: the config's number of experts, an attribute or a formula.

    Example:
        >>> from spinquant import FamilyFile
        >>> family = FamilyFile(name="my-llama", model_types=["my_llama"], like="llama", rename={"o_proj": "out"})
        >>> family.recorded()
        {'name': 'my-llama', 'model_types': ['my_llama'], 'like': 'llama', 'rename': {'o_proj': 'out'}}
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    model_types: list[str] = Field(min_length=1)
    like: str | None = None
    rename: dict[str, str] = {}
    without: list[str] = []
    layer: Name | None = None
    embedding: Name | list[Name] | None = None
    head: Name | None = None
    attention: AttentionRoles | None = None
    mlp: MlpRoles | None = None
    norms: dict[Name, list[Name] | NormEntry] = {}
    tensors: dict[Name, list[Name | SpanEntry]] = {}
    spaces: dict[Name, SpaceEntry] = {}
    onlines: dict[Name, OnlineEntry] = {}
    scaled: dict[Name, Name | SpanEntry] = {}
    linears: list[list[Name]] | None = None
    refused: list[RefusalEntry] | None = None
    ignored: list[str] | None = None
    stored: list[tuple[str, str]] | None = None
    choices: list[list[list[Name]]] | None = None
    when: list[str] | None = None
    config: dict[str, str] = {}
    hidden_size: Size = "hidden_size"
    norm_offset: float | None = None
    centred: bool | None = None
    filled: bool | None = None
    transposed: bool | None = None
    heads: int | None = Field(default=None, gt=0)
    experts: Size | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "FamilyFile":
        if self.like is not None:
            given = [key for key in FROM_THE_START if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"{given[0]} describes a family from scratch, and like takes it from {self.like!r}: state the "
                    "differences with rename, without, norms, tensors, ..."
                )
            return self
        lacking = [key for key in ("layer", "embedding", "head") if getattr(self, key) is None]
        if lacking:
            raise ValueError(f"{lacking[0]} is missing: expected it, or like = the name of a built-in family")
        if self.rename or self.without:
            raise ValueError("rename and without change the family named by like: expected like beside them")
        return self

    def recorded(self) -> dict[str, Any]:
        """The fields that were given, as JSON; `family_from` reads it."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def read_family(path: str | Path) -> FamilyFile:
    """Read and validate a family file.

    Args:
        path: a TOML file, see docs/reference/family-files.md; `draft_text` writes drafts of them.

    Returns:
        The family, for `use_family` or the `family=` of other functions.

    Raises:
        ArchitectureError: the file cannot be read or is not valid; the message names the file, the key and what was
            expected.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from spinquant import read_family
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "mine.toml"
        ...     _ = file.write_text('name = "mine"\\nmodel_types = ["my_llama"]\\nlike = "llama"')
        ...     read_family(file).like
        'llama'
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchitectureError(f"cannot read the family file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArchitectureError(f"the family file {path} is not TOML: {error}") from None
    return family_from(data, str(path))


def family_from(data: Mapping[str, Any], origin: str) -> FamilyFile:
    """Validate a family given as data. Raises ArchitectureError that names the origin of the data and the key."""
    try:
        return FamilyFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("missing", "value_error") else f", found {first['input']!r}"
        what = first["msg"].removeprefix("Value error, ")
        raise ArchitectureError(f"{origin}: {f'key {key}: ' if key else ''}{what}{found}") from None


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
        "tensors": {_layered(name): _living(axes) for name, axes in file.tensors.items()},
        "gains": {_layered(name): _norm(norm) for name, norm in file.norms.items()},
        "spaces": {_layered(name): (space.rotation, space.size) for name, space in file.spaces.items()},
        "onlines": {_layered(name): (online.site, _layered(online.space)) for name, online in file.onlines.items()},
        "scaled": {_layered(name): _living([space])[0] for name, space in file.scaled.items()},
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
    _check_whole(family)
    _check_experts(family)
    return family


def _check_whole(family: Family) -> None:
    """Raise ArchitectureError for names that one part of a family uses and no other part defines."""
    known = {name.removesuffix("?") for name in family.tensors}
    for module in (module for group in family.linears for module in group):
        if f"{module}.weight" not in known:
            raise ArchitectureError(
                f"family {family.name!r}: linear {_starred(module)!r} has no weight among its tensors"
            )
    for name, living in family.tensors.items():
        for where in living:
            space = where.space if isinstance(where, AxisPart) else where
            if space is not None and space not in family.spaces:
                raise ArchitectureError(
                    f"family {family.name!r}: tensor {_starred(name)!r} is in space {_starred(space)!r}, expected - or "
                    f"one of {', '.join(_starred(space) for space in family.spaces)}"
                )
    for name, norm in family.gains.items():
        space = norm.space if isinstance(norm, Norm) else RESIDUAL
        for reader in family.readers(name):
            living = family.tensors.get(f"{reader}.weight", family.tensors.get(f"{reader}.weight?"))
            living = family.tensors.get(reader) if living is None else living
            if living is None or space not in {
                where.space if isinstance(where, AxisPart) else where for where in living
            }:
                raise ArchitectureError(
                    f"family {family.name!r}: norm {_starred(name)!r} is read by {_starred(reader)!r}, which has no "
                    f"axis in {_starred(space)!r}"
                )
    for module, where in family.scaled.items():
        space = where.space if isinstance(where, AxisPart) else where
        if space not in family.spaces:
            raise ArchitectureError(
                f"family {family.name!r}: scaled {_starred(module)!r} names {_starred(str(space))!r}, which is no space"
            )
    for module, (_, space) in family.onlines.items():
        if space not in family.spaces:
            raise ArchitectureError(
                f"family {family.name!r}: online {_starred(module)!r} rotates {_starred(space)!r}, which is no space"
            )


def _check_experts(family: Family) -> None:
    """Raise ArchitectureError if tensors of experts are named but their number is not given."""
    named = next((name for name in (*family.tensors, *family.gains) if "{e}" in name), None)
    if named is not None and family.experts is None:
        raise ArchitectureError(
            f"family {family.name!r}: tensor {_starred(named)!r} is an expert's, and key experts is missing: expected "
            "the config's name for the number of experts"
        )


def _from_roles(file: FamilyFile) -> Family:
    """The family table that follows from the roles of the modules."""
    assert file.layer is not None and file.embedding is not None and file.head is not None
    embeddings = [_layered(name) for name in _listed(file.embedding)]
    head = _layered(file.head)
    tensors: dict[str, tuple[Living, ...]] = {f"{name}.weight": (None, RESIDUAL) for name in (*embeddings, head)}
    spaces = {RESIDUAL: ("R1", file.hidden_size)}
    onlines: dict[str, tuple[OnlineSite, str]] = {}
    linears: list[tuple[str, ...]] = []

    def linear(name: str, rows: Living, columns: Living) -> None:
        tensors[f"{_layered(name)}.weight"] = (columns, rows) if file.transposed else (rows, columns)

    attention = file.attention
    if attention is not None:
        values = attention.values and AxisPart(
            VALUE, attention.values.start, attention.values.length, attention.values.period
        )
        rows: Living = VALUE if attention.v is not None else values
        for name in attention.inputs():
            linear(name, rows if name in (attention.v, attention.qkv, attention.kv) else None, RESIDUAL)
        linear(attention.o, RESIDUAL, VALUE if rows is not None else None)
        spaces |= {VALUE: ("R2", attention.head_size), QUERY_KEY: ("R3", attention.head_size)}
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
    """The name as family tables write it."""
    return name.replace("*", "{i}").replace("#", "{e}")


def _starred(name: str) -> str:
    """The name as users write it."""
    return name.replace("{i}", "*").replace("{e}", "#")


def _living(axes: list[str | SpanEntry]) -> tuple[Living, ...]:
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
