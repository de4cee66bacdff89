"""Family tables: the data that describes one family of architectures (tensors, spaces, norms, online rotations).

For every tensor that the family may have, a table gives the space of each axis. In names, `{i}` stands for the layer
index and `{e}` for the expert index; a trailing `?` marks a tensor that some members of the family lack. Sizes are
expressions of config attributes, such as `num_key_value_heads*head_dim` (see `size_of`).

Entries that follow from others are left out: the scale of a norm, the bias of a linear (in the space of the weight's
rows), the bias of a norm, the bias of the head. A family that is similar to another is derived from it by its
differences: `LLAMA.like(...)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from spinquant.compute.releases import release_of
from spinquant.errors import ArchitectureError
from spinquant.plan import OnlineSite


@dataclass(frozen=True)
class AxisPart:
    """The part of an axis that belongs to a space: `length` elements from `start` on, in every `period` elements.

    All three are expressions, see `size_of`. Without a period, that is the whole axis.
    """

    space: str
    start: str
    length: str
    period: str | None = None


# The space of an axis: all of it, a part of it, or none.
AxisSpace = str | AxisPart | None

# For a tensor that is used inside one module only: none of its axes (of any number) belongs to a space.
INSIDE: tuple[AxisSpace, ...] = ()


@dataclass(frozen=True)
class Norm:
    """The linears (or tensors) that read a norm of another space than the residual one."""

    readers: tuple[str, ...]
    space: str


@dataclass(frozen=True)
class Shared:
    """A module with shared (weight-tied) weights, in all layers that have a tensor `marker`.

    The first `blocks` of these layers own one block each; the layers after them reuse the blocks cyclically.
    """

    module: str
    marker: str
    blocks: str


@dataclass(frozen=True)
class Refusal:
    """A rotation that is impossible for the architecture, with the reason.

    Attributes:
        rotation: R1 to R4.
        reason: for the error.
        when: condition on the config; None: always.
        before: release of transformers (major, minor) whose class allows the rotation; None: no release does.
    """

    rotation: str
    reason: str
    when: str | None = None
    before: tuple[int, int] | None = None

    @property
    def is_past(self) -> bool:
        """Whether the transformers that is installed allows the rotation."""
        return self.before is not None and (release_of("transformers") or self.before) >= self.before

    def applies(self, config: Any) -> bool:
        """Whether the rotation is impossible for this config, under the transformers that is installed."""
        return not self.is_past and (self.when is None or holds(self.when, config))


@dataclass(frozen=True)
class Family:
    """Table of one family of architectures.

    Attributes:
        name: name of the family, unique among the tables.
        model_types: values of `config.model_type` that the table supports.
        tensors: name pattern -> the space of each axis, None for an axis in no space.
        spaces: space pattern -> (rotation, size expression), and what the space allows if that does not follow from the
            rotation and the norms (`ALLOWS` in `build.py`).
        gains: weight of a norm -> the linears, or tensors, that read the norm.
        onlines: module pattern -> (site, space pattern).
        linears: groups of module patterns that read one activation, in order of execution; absent ones are skipped.
        attention: pattern of the attention modules.
        block: pattern of the decoder layers.
        embedding: the embedding's weight.
        head: the output head's weight; "" for a class without that head (`model_classes.py`).
        heads_instead: weights of which such a class has one in the head's place; none for a body alone.
        prefix: prefix of the causal LM's tensor names that the class's own lack, or have another one for.
        own_prefix: that other prefix.
        attention_part: prefix of the attention's tensors within its module, if other modules have the same name.
        when: conditions on the config under which the table holds, see `holds`.
        refused: rotations that are impossible.
        norm_offset: norms multiply by `norm_offset + weight`.
        centred: norms subtract the mean of the residual space.
        filled: number of heads times head size is this multiple of the hidden size, and the config's head size is
            ignored; 0 if the config's head size applies. Used to make tiny models, like `heads`.
        heads: the number of heads has to be a multiple of this.
        transposed: weights of linears are stored as (in, out), as in Conv1D.
        experts: expression for the number of experts.
        choices: sets of alternatives of which every layer has at least one. Each alternative lists prefixes of its
            tensors, the first of which marks it. Tensors of absent alternatives alone are not missing.
        names: usual name of a size -> its name in this config, where the two differ.
        ignored: regular expressions for names of optional tensors that belong to no space.
        stored: (regular expression, replacement) pairs that turn names in checkpoints into names in modules.
        shared: the shared (weight-tied) module, which `tie_word_embeddings` ties like embedding and head.
        scaled: linears whose outputs (or a part of them) are one factor of a product that is a space, such as up_proj
            in act(gate) * up. Scaling them scales the space.
        uncalled: linear -> the condition under which the class multiplies by its weight without calling the module, so
            that no hook can change its input.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: Mapping[str, tuple[AxisSpace, ...]]
    spaces: Mapping[str, tuple[str, ...]]
    gains: Mapping[str, tuple[str, ...] | Norm]
    onlines: Mapping[str, tuple[OnlineSite, str]]
    linears: tuple[tuple[str, ...], ...]
    attention: str
    block: str
    embedding: str
    head: str
    heads_instead: tuple[str, ...] = ()
    prefix: str = ""
    own_prefix: str = ""
    attention_part: str = ""
    when: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    norm_offset: float = 0.0
    centred: bool = False
    filled: int = 0
    heads: int = 1
    transposed: bool = False
    experts: str | None = None
    choices: tuple[tuple[tuple[str, ...], ...], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    shared: Shared | None = None
    scaled: Mapping[str, AxisSpace] = field(default_factory=dict)
    uncalled: Mapping[str, str] = field(default_factory=dict)

    def readers(self, norm: str) -> tuple[str, ...]:
        """The linears (or tensors) that read a norm."""
        found = self.gains[norm]
        return found.readers if isinstance(found, Norm) else found

    def causal_name(self, name: str) -> str:
        """The causal LM's name of a tensor, by the class's own."""
        if not self.own_prefix:
            return f"{self.prefix}{name}"
        return self.prefix + name[len(self.own_prefix) :] if name.startswith(self.own_prefix) else name

    def own_name(self, name: str) -> str:
        """The class's own name of a tensor, by the causal LM's."""
        if not name.startswith(self.prefix):
            return name
        return self.own_prefix + name.removeprefix(self.prefix)

    def like(
        self,
        name: str,
        *model_types: str,
        rename: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        **changes: Any,
    ) -> "Family":
        """A family that differs from this one in some fields.

        Args:
            name: name of the new family.
            *model_types: its model types.
            rename: parts of names to replace everywhere.
            without: everything with one of these in its name is dropped.
            **changes: new values of fields. For mappings they are entries to add or replace; None drops an entry.
        """

        def renamed(text: str) -> str:
            for old, new in (rename or {}).items():
                text = text.replace(old, new)
            return text

        def kept(text: str) -> bool:
            return not any(part in text for part in without)

        found = {f.name: mapped(getattr(self, f.name), renamed, kept) for f in fields(self)}
        for key, change in changes.items():
            found[key] = _merged(found[key], change) if isinstance(change, Mapping) else change
        return replace(self, **{**found, "name": name, "model_types": model_types})


def mapped(value: Any, renamed: Callable[[str], str], kept: Callable[[str], bool] = lambda text: True) -> Any:
    """A value of a table with all names in it renamed, without those that are not kept."""
    if isinstance(value, str):
        return renamed(value)
    if isinstance(value, Mapping):
        return {renamed(k): mapped(v, renamed, kept) for k, v in value.items() if kept(k)}
    if isinstance(value, tuple):
        items = tuple(mapped(item, renamed, kept) for item in value if not isinstance(item, str) or kept(item))
        return tuple(item for item in items if item != ())  # drop groups without members
    if isinstance(value, AxisPart | Norm | Shared):
        return replace(value, **{f.name: mapped(getattr(value, f.name), renamed, kept) for f in fields(value)})
    return value


def _merged(old: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of both; the trailing `?` of a name does not count as part of it."""
    changed = {key.removesuffix("?") for key in change}
    kept = {key: value for key, value in old.items() if key.removesuffix("?") not in changed}
    return {**kept, **{key: value for key, value in change.items() if value is not None}}


class Named:
    """A config with the usual attribute names of its sizes, mapped by `Family.names`."""

    def __init__(self, config: Any, names: Mapping[str, str]):
        self._config, self._names = config, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, self._names.get(name, name))


def holds(condition: str, config: Any) -> bool:
    """Whether a condition on a config holds.

    A condition is "attribute" (it is truthy) or "attribute=value"; "not " in front negates it. Dots lead into nested
    configs.
    """
    path, _, expected = condition.removeprefix("not ").partition("=")
    value = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return (str(value) == expected if expected else bool(value)) != condition.startswith("not ")


def size_of(config: Any, expression: str) -> int:
    """Evaluate a size expression: sums of products of config attributes, quotients of them, and integers.

    `a|b` falls back to b if an attribute of a is missing or None.

    Raises:
        ArchitectureError: no alternative can be evaluated, or an attribute is not a positive integer.
    """
    for option in expression.split("|"):
        terms = [[_number(config, factor.strip()) for factor in term.split("*")] for term in option.split("+")]
        if not any(value is None for factors in terms for value in factors):
            return sum(_product(factors) for factors in terms)
    raise ArchitectureError(f"the config does not define {expression!r}: expected positive integers")


def _product(factors: list[int | None]) -> int:
    result = 1
    for factor in factors:
        assert factor is not None
        result *= factor
    return result


def _number(config: Any, name: str) -> int | None:
    if "/" in name:
        above, below = (_number(config, part) for part in name.split("/"))
        return above // below if above and below else None
    if name.isdecimal() and name.isascii():
        return int(name)
    value = getattr(config, name, None)
    if value is None and name == "head_dim":
        hidden, heads = (_number(config, part) for part in ("hidden_size", "num_attention_heads"))
        return hidden // heads if hidden and heads else None
    if value is None and name == "num_key_value_heads":
        return config.num_attention_heads
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ArchitectureError(f"the config has {name} = {value!r}: expected a positive integer")
    return value
