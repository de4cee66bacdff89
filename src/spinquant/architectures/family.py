"""The language of tables: what one family of architectures looks like, as data.

For every tensor that the family may have, a table says in which space each of its axes lives. In names, `{i}` stands
for the layer and `{e}` for the expert; a trailing `?` marks a tensor that some members of the family lack. Sizes are
written in the words of the config, as in `num_key_value_heads*head_dim` (see `size_of`).

What follows from the rest is left out: the scale of a norm, the bias of a linear (it lives where the rows of the weight
live) and of a norm, the bias of the head. A family that is like another says what differs: `LLAMA.like(...)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from spinquant.errors import ArchitectureError
from spinquant.plan import OnlineSite


@dataclass(frozen=True)
class AxisPart:
    """The part of an axis that lives in a space: `length` elements from `start` in every `period`, else in the axis."""

    space: str
    start: str
    length: str
    period: str | None = None


Living = str | AxisPart | None

# Where the axes of a tensor live whose every axis is inside a module: nowhere, however many there are.
INSIDE: tuple[Living, ...] = ()


@dataclass(frozen=True)
class Norm:
    """The linears (or tensors) that read a norm, where what it normalises is not the residual space."""

    readers: tuple[str, ...]
    space: str


@dataclass(frozen=True)
class Shared:
    """A module whose weights layers share: those that have a tensor `marker`; the first `blocks` of them have one each,
    which the next have again, in turn."""

    module: str
    marker: str
    blocks: str


@dataclass(frozen=True)
class Refusal:
    """A rotation that the architecture rules out, and why; under a condition, for configs of which it holds."""

    rotation: str
    reason: str
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """What one family of architectures looks like.

    tensors: name pattern -> where each axis lives, None for an axis in no space.
    spaces: space pattern -> (rotation, its size). centred: norms subtract the mean of the residual space.
    gains: scale of a norm -> the linears, or tensors, that read it.
    onlines: module pattern -> (site, space pattern).
    scaled: linears whose outputs are one factor of a product that makes up a space, or a part of whose outputs is, as
        up_proj in act(gate) * up: scaling them scales the space.
    linears: groups of module patterns that read one activation, in order of execution; absent ones are skipped.
    attention_part: what the names of an attention's tensors begin with where other modules have its name.
    when: conditions on the config under which the table holds, see `holds`.
    filled: heads times their size is so many times the hidden size, whatever the config says of the size of a head; 0
        where that is as the config says.
    heads: the number of heads is a multiple of this one, as far as a small model is concerned.
    transposed: weights of linears are stored as (in, out), as Conv1D does.
    choices: alternatives of which every layer has at least one, each as the prefixes of its tensors, the first of
        which marks it. What belongs to an absent alternative alone is not missing.
    names: what the config calls a size whose usual name it lacks.
    ignored: names, as regular expressions, of tensors that live in no space and may be there or not.
    stored: (regular expression, replacement) pairs that turn names in checkpoints into names in modules.
    uncalled: linear -> the condition under which the class multiplies by its weight without calling it, so that nothing
        can be done to its input at run time.
    shared: the module that layers share, tied by the switch that ties embedding and head.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: Mapping[str, tuple[Living, ...]]
    spaces: Mapping[str, tuple[str, str]]
    gains: Mapping[str, tuple[str, ...] | Norm]
    onlines: Mapping[str, tuple[OnlineSite, str]]
    linears: tuple[tuple[str, ...], ...]
    attention: str
    block: str
    embedding: str
    head: str
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
    scaled: Mapping[str, Living] = field(default_factory=dict)
    uncalled: Mapping[str, str] = field(default_factory=dict)

    def readers(self, norm: str) -> tuple[str, ...]:
        """What reads a norm of the residual space."""
        found = self.gains[norm]
        return found.readers if isinstance(found, Norm) else found

    def like(
        self,
        name: str,
        *model_types: str,
        rename: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        **changes: Any,
    ) -> "Family":
        """A family that differs from this one as said.

        rename: parts of names, replaced everywhere. without: whatever has one of these in its name is dropped. changes:
        of fields; those of mappings are entries, None to drop one.
        """

        def renamed(text: str) -> str:
            for old, new in (rename or {}).items():
                text = text.replace(old, new)
            return text

        def kept(text: str) -> bool:
            return not any(part in text for part in without)

        found = {f.name: _mapped(getattr(self, f.name), renamed, kept) for f in fields(self)}
        for key, change in changes.items():
            found[key] = _merged(found[key], change) if isinstance(change, Mapping) else change
        return replace(self, **{**found, "name": name, "model_types": model_types})


def _mapped(value: Any, renamed: Callable[[str], str], kept: Callable[[str], bool]) -> Any:
    if isinstance(value, str):
        return renamed(value)
    if isinstance(value, Mapping):
        return {renamed(k): _mapped(v, renamed, kept) for k, v in value.items() if kept(k)}
    if isinstance(value, tuple):
        items = tuple(_mapped(item, renamed, kept) for item in value if not isinstance(item, str) or kept(item))
        return tuple(item for item in items if item != ())  # a group that lost all its members
    if isinstance(value, AxisPart | Norm | Shared):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), renamed, kept) for f in fields(value)})
    return value


def _merged(old: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of both, the optional mark of a name not counting as part of it."""
    changed = {key.removesuffix("?") for key in change}
    kept = {key: value for key, value in old.items() if key.removesuffix("?") not in changed}
    return {**kept, **{key: value for key, value in change.items() if value is not None}}


class Named:
    """A config under the usual names of its sizes, where a family says what they are called."""

    def __init__(self, config: Any, names: Mapping[str, str]):
        self._config, self._names = config, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, self._names.get(name, name))


def holds(condition: str, config: Any) -> bool:
    """Whether an attribute of a config is on, or is what stands behind `=`; after "not", whether it is not.

    Dots lead into configs inside it.
    """
    path, _, expected = condition.removeprefix("not ").partition("=")
    value = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return (str(value) == expected if expected else bool(value)) != condition.startswith("not ")


def size_of(config: Any, expression: str) -> int:
    """The number that a config gives an expression: sums of products of attributes, their quotients, and integers.

    After `|` stands what holds where an attribute is missing or None. Raises ArchitectureError when nothing does.
    """
    for option in expression.split("|"):
        terms = [[_number(config, factor.strip()) for factor in term.split("*")] for term in option.split("+")]
        if not any(value is None for factors in terms for value in factors):
            return sum(_product(factors) for factors in terms)
    raise ArchitectureError(f"the config gives no {expression!r}: expected positive integers")


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
    if name.isdigit():
        return int(name)
    value = getattr(config, name, None)
    if value is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and name == "num_key_value_heads":
        return config.num_attention_heads
    if value is None:
        return None
    if not isinstance(value, int) or value <= 0:
        raise ArchitectureError(f"the config gives {name} = {value!r}: expected a positive integer")
    return value
