"""From a family's table to a plan.

A table is data: for every tensor that the family may have, the space in which each of its axes lives. `{i}`
stands for the layer; a trailing `?` marks a tensor that some members of the family lack. Building a plan
checks the table against the names and shapes at hand, and refuses by name whatever the table does not explain.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinquant.errors import ArchitectureError
from spinquant.plan import Axis, Gain, Online, Plan, Site, Space, Tie

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Family:
    """What one family of architectures looks like.

    tensors: name pattern -> the space of each axis, None where an axis lives in no space.
    spaces: space pattern -> (rotation, the config attribute that holds its size).
    gains: norm tensor pattern -> linear modules that read it; the norm normalises the residual space.
    onlines: module pattern -> (site, space pattern).
    linears: groups of module patterns that read one activation, in order of execution.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: Mapping[str, tuple[str | None, ...]]
    spaces: Mapping[str, tuple[str, str]]
    gains: Mapping[str, tuple[str, ...]]
    onlines: Mapping[str, tuple[Site, str]]
    linears: tuple[tuple[str, ...], ...]
    attention: str
    block: str
    embedding: str
    head: str
    refused: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    ignored: tuple[str, ...] = field(default=())


def build_plan(family: Family, config: Any, shapes: Shapes) -> Plan:
    """The plan of a model, from its config and the names and shapes of its tensors alone.

    Raises ArchitectureError for a tensor that the table does not know, lacks, or that has another shape than
    the config promises.
    """
    layers = range(config.num_hidden_layers)
    tied = family.head not in shapes
    if tied and not getattr(config, "tie_word_embeddings", False):
        raise ArchitectureError(
            f"{family.name}: tensor {family.head!r} is missing and the config does not tie it to the embedding; "
            "the checkpoint is incomplete"
        )
    # A module holds a tied head under both names, a checkpoint under one: the plan is the same for both.
    shapes = {**shapes, family.head: shapes.get(family.head, shapes.get(family.embedding, ()))}
    spaces = _spaces(family, config, layers)
    axes = _axes(family, config, shapes, spaces, layers)
    gains = tuple(
        Gain(norm, "residual", tuple((f"{reader}.weight", 1) for reader in readers), family.norm_offset)
        for pattern, readers in family.gains.items()
        for norm, readers in _expand(pattern, readers, layers)
    )
    onlines = tuple(
        Online(module, site, space)
        for pattern, (site, space_pattern) in family.onlines.items()
        for module, (space,) in _expand(pattern, (space_pattern,), layers)
    )
    linears = tuple(
        group for i in layers for group in (tuple(name.format(i=i) for name in names) for names in family.linears)
    )
    ties = (Tie(family.head, family.embedding),) if getattr(config, "tie_word_embeddings", False) else ()
    return Plan(
        family=family.name,
        spaces=tuple(spaces.values()),
        axes=axes,
        gains=gains,
        onlines=onlines,
        ties=ties,
        linears=linears,
        attentions=tuple(family.attention.format(i=i) for i in layers),
        blocks=tuple(family.block.format(i=i) for i in layers),
        head=family.head,
        refused=family.refused,
    )


def _expand(pattern: str, others: Sequence[str], layers: range) -> list[tuple[str, tuple[str, ...]]]:
    if "{i}" not in pattern:
        return [(pattern, tuple(others))]
    return [(pattern.format(i=i), tuple(other.format(i=i) for other in others)) for i in layers]


def _spaces(family: Family, config: Any, layers: range) -> dict[str, Space]:
    found = {}
    for pattern, (rotation, attribute) in family.spaces.items():
        size = space_size(config, attribute)
        for name, _ in _expand(pattern, (), layers):
            found[name] = Space(name, rotation, size)
    # Order of execution: the residual space, then layer by layer.
    return dict(sorted(found.items(), key=lambda item: _layer_of(item[0])))


def _layer_of(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def space_size(config: Any, attribute: str) -> int:
    """The size that a config states, with `head_dim` derived where the config leaves it out.

    Raises ArchitectureError when the config lacks the attribute.
    """
    size = getattr(config, attribute, None)
    if size is None and attribute == "head_dim":
        size = config.hidden_size // config.num_attention_heads
    if not isinstance(size, int) or size <= 0:
        raise ArchitectureError(f"the config gives {attribute} = {size!r}: expected a positive integer")
    return size


def _axes(family: Family, config: Any, shapes: Shapes, spaces: Mapping[str, Space], layers: range) -> tuple[Axis, ...]:
    explained: dict[str, tuple[str | None, ...]] = {}
    for pattern, living in family.tensors.items():
        optional, pattern = pattern.endswith("?"), pattern.removesuffix("?")
        for name, _ in _expand(pattern, (), layers):
            i = _layer_of(name)
            explained[name] = tuple(space.format(i=i) if space else None for space in living)
            if name not in shapes and not optional:
                raise ArchitectureError(
                    f"{family.name}: tensor {name!r} is missing; the config promises {len(layers)} layers of "
                    f"model_type {config.model_type!r}. The checkpoint is incomplete or not of this family."
                )
    for name, shape in shapes.items():
        if name not in explained and not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise ArchitectureError(
                f"tensor {name!r} (shape {tuple(shape)}) is not explained by the table of {family.name!r}: "
                "rotating around it could change the model. The table knows the tensors of transformers' own classes."
            )
    return tuple(
        axis
        for name, living in explained.items()  # in the order of the table, whatever the order of the file
        if name in shapes
        for axis in _axes_of_tensor(family, name, shapes[name], living, spaces)
    )


def _axes_of_tensor(
    family: Family, name: str, shape: Sequence[int], living: Sequence[str | None], spaces: Mapping[str, Space]
) -> list[Axis]:
    if len(living) != len(shape):
        raise ArchitectureError(f"tensor {name!r} has shape {tuple(shape)}: {family.name} expects {len(living)} axes")
    axes = [Axis(name, dim, space) for dim, space in enumerate(living) if space is not None]
    for axis in axes:
        size, length = spaces[axis.space].size, shape[axis.dim]
        if length % size or (axis.space == "residual" and length != size):
            raise ArchitectureError(
                f"axis {axis.dim} of {name!r} has length {length}, which does not fit the space {axis.space!r} of "
                f"size {size} that the config promises"
            )
    return axes
