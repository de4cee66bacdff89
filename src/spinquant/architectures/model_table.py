"""What a family's table says of one model: the names that its patterns stand for, and the spaces of their axes.

A tensor that the table does not describe is an error that names it.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spinquant.architectures.family import AxisPart, AxisSpace, Family, Norm, holds, size_of
from spinquant.architectures.foreign import foreign_among, layers_beyond
from spinquant.architectures.shared_blocks import owners
from spinquant.errors import ArchitectureError
from spinquant.plan import Allows, Experts, Gain, Online, Space

Shapes = Mapping[str, Sequence[int]]
# What the space of a rotation allows, unless its table says otherwise, or a norm stands on the way. What is rotated at
# run time, and the values of a head, are only read linearly.
ALLOWS: Mapping[str, Allows] = {"R1": "orthogonal", "R2": "any", "R3": "any", "R4": "any"}


@dataclass(frozen=True)
class ModelTable:
    """A family table with the config and tensor shapes of one model."""

    family: Family
    config: Any
    shapes: Shapes

    @cached_property
    def layers(self) -> range:
        return range(self.config.num_hidden_layers)

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.shapes)

    @cached_property
    def _owners(self) -> Mapping[int, int]:
        return owners(self.family.shared, self.config, self._names)

    def in_layer(self, axis_space: AxisSpace, i: int | None) -> AxisSpace:
        """The space of an axis in layer i; a shared block uses the spaces of the first layer that has it."""
        at = str(self._owners.get(i, i) if i is not None else i)
        if isinstance(axis_space, AxisPart):
            return AxisPart(axis_space.space.replace("{i}", at), axis_space.start, axis_space.length, axis_space.period)
        return axis_space.replace("{i}", at) if axis_space else None

    def exists(self, prefix: str) -> bool:
        """Whether some tensor's name starts with the prefix."""
        at = bisect_left(self._names, prefix)
        return at < len(self._names) and self._names[at].startswith(prefix)

    def has(self, module: str, pattern: str | None = None) -> bool:
        """Whether the model has a module; by default, an attention module."""
        part = self.family.attention_part if pattern in (None, self.family.attention) else ""
        return self.exists(f"{module}.{part}")

    def each(self, pattern: str) -> Iterator[tuple[str, int | None]]:
        """Names that a pattern stands for, each with its layer (None if it has none)."""
        for i in self.layers if "{i}" in pattern else [None]:
            name = pattern.replace("{i}", str(i))
            if "{e}" in name:
                assert self.family.experts is not None
                for e in range(size_of(self.config, self.family.experts)):
                    yield name.replace("{e}", str(e)), i
            else:
                yield name, i

    def each_layer(self, pattern: str) -> list[str]:
        return [name for name, _ in self.each(pattern)]

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """Spaces by name, in order of execution: the residual space, then layer by layer."""
        found: dict[str, tuple[int, Space]] = {}
        for pattern, (rotation, size, *stated) in self.family.spaces.items():
            order = size_of(self.config, size) if self._is_known(size) else 0
            allows = ALLOWS[rotation] if not stated else "any" if stated[0] == "any" else "orthogonal"
            for name, i in self.each(pattern):
                kind: Allows = "mean-preserving" if self.family.centred and name == "residual" else allows
                found[name] = (-1 if i is None else i, Space(name, rotation, order, kind))
        return {name: space for name, (_, space) in sorted(found.items(), key=lambda item: item[1][0])}

    def _is_known(self, size: str) -> bool:
        # A member of the family may lack a size together with its space: dense models have no experts.
        try:
            size_of(self.config, size)
        except ArchitectureError:
            return False
        return True

    @cached_property
    def axis_spaces(self) -> dict[str, tuple[AxisSpace, ...]]:
        """Spaces of the axes of every tensor in the model. Raises ArchitectureError for a missing or unknown tensor."""
        found: dict[str, tuple[AxisSpace, ...]] = {}
        for pattern, spaces in self._patterns().items():
            optional, pattern = pattern.endswith("?"), pattern.removesuffix("?")
            for name, i in self.each(pattern):
                if name in self.shapes:
                    found[name] = tuple(self.in_layer(space, i) for space in spaces)
                elif not optional and self._is_needed(name, i):
                    if reason := foreign_among(self.shapes):
                        raise ArchitectureError(f"{self.family.name}: {reason}")
                    raise ArchitectureError(
                        f"{self.family.name}: tensor {name!r} is missing; the config has {len(self.layers)} layers of "
                        f"model_type {self.config.model_type!r}. The checkpoint is incomplete or not of this family."
                    )
        for name, shape in self.shapes.items():
            whole = self.family.causal_name(name)  # patterns are those of the causal LM
            if name not in found and not any(re.fullmatch(pattern, whole) for pattern in self.family.ignored):
                if reason := layers_beyond(self.family, self.config, self.shapes) or foreign_among([name]):
                    raise ArchitectureError(f"{self.family.name}: {reason}")
                raise ArchitectureError(
                    f"tensor {name!r} (shape {tuple(shape)}) is not described by the table of {self.family.name!r}: "
                    "rotating the model without it could change its outputs. A table covers one model class; a class "
                    "that differs needs a family file (--family)."
                )
        return found

    def _patterns(self) -> dict[str, tuple[AxisSpace, ...]]:
        """The table's tensors and those that it implies: norm weights, biases."""
        family = self.family
        stated = {key.removesuffix("?") for key in family.tensors}
        implied: dict[str, tuple[AxisSpace, ...]] = {}
        for name, norm in family.gains.items():
            implied[name] = (None,)
            if family.centred:
                implied[f"{name.removesuffix('weight')}bias?"] = (space_of(norm),)
        for module in (module for group in family.linears for module in group):
            weight = family.tensors.get(f"{module}.weight") or family.tensors[f"{module}.weight?"]
            implied[f"{module}.bias?"] = (weight[-1 if family.transposed else 0],)
        if family.head:
            implied[f"{family.head.removesuffix('weight')}bias?"] = (None,)
        return {**family.tensors, **{k: v for k, v in implied.items() if k.removesuffix("?") not in stated}}

    def _is_needed(self, name: str, i: int | None) -> bool:
        """Whether an absent tensor is an error: not if it belongs to absent alternatives alone."""
        if i is None:
            return True
        absent, present = self._alternatives[i]
        return not absent.match(name) or bool(present.match(name))

    @cached_property
    def _alternatives(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        """Per layer, patterns for the prefixes of names in absent alternatives, and in present ones."""
        found = []
        for i in self.layers:
            prefixes: dict[bool, list[str]] = {True: [], False: []}
            for choice in self.family.choices:
                here = [tuple(p.replace("{i}", str(i)) for p in alternative) for alternative in choice]
                present = [self.exists(alternative[0].replace("{e}", "0")) for alternative in here]
                if not any(present):
                    raise ArchitectureError(
                        f"{self.family.name}: layer {i} has none of "
                        f"{', '.join(repr(alternative[0]) for alternative in here)}. The checkpoint is incomplete or "
                        "not of this family."
                    )
                for alternative, is_present in zip(here, present, strict=True):
                    prefixes[is_present].extend(re.escape(p).replace(r"\{e\}", r"\d+") for p in alternative)
            # An empty alternation would match every name.
            absent, present = ("|".join(prefixes[there]) or "(?!)" for there in (False, True))
            found.append((re.compile(absent), re.compile(present)))
        return found

    def gains(self) -> tuple[Gain, ...]:
        """The gains of all norms that the model has."""
        found = []
        for pattern, norm in self.family.gains.items():
            for name, i in self.each(pattern):
                if name not in self.shapes:
                    continue
                readers = norm.readers if isinstance(norm, Norm) else norm
                space = str(self.in_layer(space_of(norm), i))
                pairs = tuple(pair for reader in readers for pair in self._read(reader, i, space))
                bias = f"{name.removesuffix('weight')}bias"
                bias = bias if bias in self.shapes else None
                found.append(Gain(name, space, pairs, self.family.norm_offset, bias))
        return tuple(found)

    def _read(self, reader: str, i: int | None, space: str) -> Iterator[tuple[str, int]]:
        """The existing tensors of a reader, each with its axis in the space."""
        for name, layer in self.each(reader):
            if layer != i and i is not None:
                continue
            tensor = name if name in self.shapes else f"{name}.weight"
            if tensor in self.shapes:
                yield tensor, _axis_in(self.axis_spaces[tensor], space)

    def onlines(self) -> tuple[Online, ...]:
        """The online rotations of all modules that the model has."""
        return tuple(
            Online(name, site, str(self.in_layer(space, i)))
            for pattern, (site, space) in self.family.onlines.items()
            for name, i in self.each(pattern)
            if self.has(name, pattern)
        )

    def experts(self) -> Iterator[Experts]:
        """The expert weights of all mixture-of-experts modules that the model has."""
        for online in self.onlines():
            if online.site != "experts":
                continue
            start, end = (bisect_left(self._names, online.module + after) for after in "./")  # "/" is next after "."
            first, second = [], []
            for name in self._names[start:end]:
                spaces = self.axis_spaces.get(name, ())
                if online.space in spaces:
                    second.append((name, spaces.index(online.space)))
                elif spaces and not name.endswith("bias"):
                    # If the table gives no space, the input axis is the last one.
                    first.append((name, spaces.index("residual") if "residual" in spaces else len(spaces) - 1))
            last = {dim == len(self.shapes[name]) - 1 for name, dim in first + second}
            if len(last) != 1:
                raise ArchitectureError(
                    f"{online.module}: the weights of its experts mix the layouts (out, in) and (in, out)"
                )
            yield Experts(online.module, _names(first), _names(second), transposed=not last.pop())

    def linears(self) -> tuple[tuple[str, ...], ...]:
        """Groups of linears, layer by layer, without those that the model lacks."""
        return tuple(self.owners_of_linears())

    def owners_of_linears(self) -> dict[tuple[str, ...], str]:
        """Groups of linears, each with the name that the first has in the first layer that shares it."""
        found = {}
        for i in self.layers:
            for group in self.family.linears:
                names = [module.replace("{i}", str(i)) for module in group]
                present = tuple(name for name in names if f"{name}.weight" in self.shapes)
                if present:
                    pattern = group[names.index(present[0])]
                    found[present] = pattern.replace("{i}", str(self._owners.get(i, i)))
        return found

    def uncalled(self) -> tuple[str, ...]:
        """Linears whose weights the model uses without calling them."""
        return tuple(
            name
            for pattern, condition in self.family.uncalled.items()
            if holds(condition, self.config)
            for name in self.each_layer(pattern)
        )


def _names(pairs: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(name for name, _ in pairs)


def space_of(norm: tuple[str, ...] | Norm) -> str:
    """The space that a norm normalizes."""
    return norm.space if isinstance(norm, Norm) else "residual"


def _axis_in(spaces: Sequence[AxisSpace], space: str) -> int:
    """The axis that belongs to a space."""
    return [where.space if isinstance(where, AxisPart) else where for where in spaces].index(space)
