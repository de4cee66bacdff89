"""The format of family files: user-written TOML descriptions of an architecture, read and validated by pydantic.

A file states either how the family differs from a built-in one (`like`), or which module plays which role: embedding,
norms and their readers, attention, MLP, head. In names, `*` stands for the layer index and `#` for the expert index;
`-` stands for an axis in no space. See docs/reference/family-files.md. `family_file_conversion.py` turns a file into a
family table.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from spinquant.compute.patterns import check_pattern
from spinquant.compute.values import validated
from spinquant.errors import ArchitectureError
from spinquant.plan import OnlineSite

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
    allows: Literal["orthogonal", "any"] | None = None


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
    `allows` states which transforms the values may have: `orthogonal`, rotations alone, or `any` invertible matrix (the
    default), where nothing but the attention's sum and o read them.
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
    allows: Literal["orthogonal", "any"] | None = None

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
        filled: number of heads times head size is the hidden size; the config's head size is ignored.
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
                    f"{given[0]} describes a family from scratch, but like derives it from {self.like!r}: state the "
                    "differences with rename, without, norms, tensors, ..."
                )
            return self
        lacking = [key for key in ("layer", "embedding", "head") if getattr(self, key) is None]
        if lacking:
            raise ValueError(f"{lacking[0]} is missing: expected it, or like = the name of a built-in family")
        if self.rename or self.without:
            raise ValueError("rename and without change the family that like names: expected like too")
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
    except RecursionError:
        raise ArchitectureError(f"the family file {path} is nested too deeply") from None
    except OSError as error:
        raise ArchitectureError(f"cannot read the family file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArchitectureError(f"the family file {path} is not TOML: {error}") from None
    return family_from(data, str(path))


def family_from(data: Mapping[str, Any], origin: str) -> FamilyFile:
    """Validate a family given as data. Raises ArchitectureError that names the origin of the data and the key."""
    found: FamilyFile = validated(FamilyFile, data, origin, ArchitectureError)
    for pattern in (*(found.ignored or ()), *(pattern for pattern, _ in found.stored or ())):
        check_pattern(pattern, origin, ArchitectureError)
    return found
