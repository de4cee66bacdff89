"""Build the plan of a model from its family table, its config, and the names and shapes of its tensors.

A tensor that the table does not describe is an error that names it. Tensor names may be those of a module or of a
checkpoint, which can differ: a module stacks experts that a checkpoint stores one by one. A table lists both. The plan
uses the tensor names that it was given, and always the module's names for modules.
"""

import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from spinquant.architectures.family import INSIDE, AxisPart, AxisSpace, Family, Named, Norm, holds, size_of
from spinquant.architectures.foreign import foreign_among, layers_beyond, missing_head
from spinquant.architectures.shared_blocks import owners, with_shared_blocks
from spinquant.compute.patterns import check_name
from spinquant.errors import ArchitectureError
from spinquant.plan import CHANNELS, Allows, Axis, Experts, Gain, Online, Plan, Space, Span, Tie

Shapes = Mapping[str, Sequence[int]]
PATIENCE = 30.0  # seconds
# What the space of a rotation allows, unless its table says otherwise, or a norm stands on the way. What is rotated at
# run time, and the values of a head, are only read linearly.
ALLOWS: Mapping[str, Allows] = {"R1": "orthogonal", "R2": "any", "R3": "any", "R4": "any"}


def build_plan(family: Family, config: Any, shapes: Shapes) -> Plan:
    """Build the plan of a model.

    Args:
        family: the table of its architecture.
        config: its transformers config.
        shapes: shape by tensor name, of a module or a checkpoint.

    Raises:
        ArchitectureError: a tensor is unknown or missing, or has another shape than the config implies.
    """
    stored = module_names(family, shapes)
    shapes = {name: shapes[origin] for name, origin in stored.items()}
    tie = bool(getattr(config, "tie_word_embeddings", False))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = Named(text, family.names)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise ArchitectureError(
            f"{family.name}: the config has {layers} layers and the checkpoint {len(shapes)} tensors; "
            "the checkpoint is incomplete"
        )
    if family.head and family.head not in shapes and not tie:
        raise ArchitectureError(f"{family.name}: {foreign_among(shapes) or missing_head(family.head)}")
    if family.head:
        # A module has a tied head under both names, a checkpoint under one: the plan is the same for both.
        shapes = {**shapes, family.head: shapes.get(family.head, shapes.get(family.embedding, ()))}
    head = family.head or next((name for name in family.heads_instead if name in shapes), "")
    if family.heads_instead and not head:
        raise ArchitectureError(
            f"{family.name}: the head of {config.architectures[0]} is missing (expected "
            f"{' or '.join(map(repr, family.heads_instead))}); the checkpoint is incomplete, or that of another class"
        )
    shapes, shared = with_shared_blocks(family.shared, named, shapes, tied=tie)
    tied = {**({family.head: family.embedding} if family.head else {}), **shared} if tie else {}
    build = _Build(family, named, shapes)
    gains, onlines = build.gains(), build.onlines()
    spaces, axes = build.spaces_and_axes(gains, onlines)

    def origin(name: str) -> str:
        return stored.get(name, name)

    return Plan(
        family=family.name,
        spaces=spaces,
        axes=tuple(replace(axis, tensor=origin(axis.tensor)) for axis in axes),
        gains=tuple(
            replace(
                gain,
                norm=origin(gain.norm),
                readers=tuple((origin(name), dim) for name, dim in gain.readers),
                bias=gain.bias and origin(gain.bias),
            )
            for gain in gains
        ),
        onlines=onlines,
        ties=tuple(Tie(origin(name), origin(source)) for name, source in tied.items()),
        linears=build.linears(),
        attentions=tuple(name for name in build.each_layer(family.attention) if build.has(name)),
        blocks=tuple(build.each_layer(family.block)),
        head=head,
        experts=tuple(
            replace(stack, first=tuple(map(origin, stack.first)), second=tuple(map(origin, stack.second)))
            for stack in build.experts()
        ),
        transposed=family.transposed,
        renamed=tuple(
            (weight, origin(weight))
            for weight in (*(f"{name}.weight" for group in build.linears() for name in group), family.head)
            if origin(weight) != weight
        ),
        uncalled=tuple(
            name
            for pattern, condition in family.uncalled.items()
            if holds(condition, build.config)
            for name in build.each_layer(pattern)
        ),
        refused=tuple((r.rotation, r.reason) for r in family.refused if r.applies(build.config)),
    )


def module_names(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Map names in the module to names in the checkpoint, for the tensors of a checkpoint.

    Raises ArchitectureError for patterns of a family file that cannot be applied, or take more than `PATIENCE`.
    """
    start, found = time.monotonic(), {}
    for name in names:
        found[_in_module(name, family)] = name
        if time.monotonic() - start > PATIENCE:
            raise ArchitectureError(
                f"the patterns in `stored` of {family.name!r} take too long to match: simplify them"
            )
    return found


def _in_module(name: str, family: Family) -> str:
    name = family.causal_name(name)  # patterns are those of the causal LM
    for pattern, replacement in family.stored:
        check_name(name, family.name, ArchitectureError)
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, IndexError) as error:
            raise ArchitectureError(
                f"{family.name}: cannot replace {pattern!r} by {replacement!r} in {name!r}: {error}"
            ) from None
    return family.own_name(name)


@dataclass(frozen=True)
class _Build:
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
                implied[f"{name.removesuffix('weight')}bias?"] = (_space_of(norm),)
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

    def spaces_and_axes(
        self, gains: Sequence[Gain], onlines: Sequence[Online]
    ) -> tuple[tuple[Space, ...], tuple[Axis, ...]]:
        """The spaces that some tensor or module uses, and their axes, in the order of the table (not of the file)."""
        axes = tuple(axis for name, spaces in self.axis_spaces.items() for axis in self._axes_of(name, spaces))
        read = {tensor for gain in gains for tensor, _ in gain.readers}
        axes = tuple(replace(axis, reads=self._reads(axis, read)) for axis in axes)
        used = {axis.space for axis in axes} | {online.space for online in onlines}
        normed = {gain.space for gain in gains}
        heads: dict[str, int] = {}
        for axis in axes:
            copies = self._length(axis) // self.spaces[axis.space].size
            heads[axis.space] = min(copies, heads.get(axis.space, copies))
        spaces = [
            replace(
                space,
                allows="orthogonal" if space.allows == "any" and name in normed else space.allows,
                # Query heads that share a key-value head share its transform; there are as many keys as values.
                heads=heads.get(_values_beside(name), 1) if space.rotation in ("R2", "R3") else 1,
            )
            for name, space in self.spaces.items()
            if name in used
        ]
        # The scales of a factor come before the rotation of the product, those of a norm after the residual space's.
        factors, factor_axes = self._factors(axes)
        outputs, output_axes = self._norm_outputs(gains)
        return (*spaces, *factors, *outputs), (*factor_axes, *axes, *output_axes)

    def _reads(self, axis: Axis, read: Set[str]) -> bool:
        """Whether a tensor reads a space. It makes no difference where the space allows rotations alone.

        read: tensors that read a norm.
        """
        if self.spaces[axis.space].rotation == "R4":
            return True  # what writes it is not linear
        dims = len(self.shapes[axis.tensor])
        linear = axis.tensor in self._linear_weights
        reading = linear or axis.tensor in read or axis.tensor == self.family.head
        if dims == 2 and axis.space == "residual" and not reading:
            return False  # embeddings of tokens and positions write along their last axis
        if dims > 2:
            return axis.dim == dims - (2 if axis.tensor in self._transposed_stacks else 1)
        return dims == 2 and axis.dim == (0 if self.family.transposed and linear else 1)

    @cached_property
    def _transposed_stacks(self) -> Set[str]:
        return {name for stack in self.experts() if stack.transposed for name in (*stack.first, *stack.second)}

    @cached_property
    def _linear_weights(self) -> Set[str]:
        return {f"{name}.weight" for group in self.linears() for name in group}

    def _length(self, axis: Axis) -> int:
        length = self.shapes[axis.tensor][axis.dim]
        return length if axis.span is None else length // axis.span.period * axis.span.length

    def _norm_outputs(self, gains: Sequence[Gain]) -> tuple[list[Space], list[Axis]]:
        """The spaces of the outputs of norms, which take channel scales: the norm's weight writes them."""
        spaces, axes = [], []
        for gain in gains:
            if not gain.readers or len(self.shapes[gain.norm]) != 1:
                continue
            name = gain.norm.removesuffix(".weight")
            beside = self.spaces[gain.space].rotation
            spaces.append(Space(name, "", self.shapes[gain.norm][0], "diagonal", beside=beside))
            axes.append(Axis(gain.norm, 0, name, offset=gain.offset))
            axes += [Axis(gain.bias, 0, name)] if gain.bias else []
            axes += [Axis(tensor, dim, name, reads=True) for tensor, dim in gain.readers]
        return spaces, axes

    def _axes_of(self, name: str, spaces: Sequence[AxisSpace]) -> Iterator[Axis]:
        shape = self.shapes[name]
        if spaces == INSIDE:
            return
        if len(spaces) != len(shape):
            raise ArchitectureError(
                f"tensor {name!r} has shape {tuple(shape)}: {self.family.name} expects {len(spaces)} axes"
            )
        for dim, where in enumerate(spaces):
            if where is None:
                continue
            part = where if isinstance(where, AxisPart) else None
            space = self.spaces[part.space if part else str(where)]
            span = self._span(name, dim, part) if part else None
            size, length = space.size, span.length if span else shape[dim]
            if span and (span.start, span.length) == (0, span.period):
                span = None  # adjacent copies of the space: a rotation is repeated along its axis anyway
            if size == 0 or length % size or (space.name == "residual" and length != size):
                raise ArchitectureError(
                    f"axis {dim} of {name!r} has length {length}, which does not fit the space {space.name!r}, of "
                    f"size {size} by the config"
                )
            yield Axis(name, dim, space.name, span)

    def _span(self, name: str, dim: int, part: AxisPart) -> Span:
        length = self.shapes[name][dim]
        period = size_of(self.config, part.period) if part.period else length
        span = Span(size_of(self.config, part.start), size_of(self.config, part.length), period)
        if length % period or span.start + span.length > period:
            raise ArchitectureError(
                f"axis {dim} of {name!r} has length {length}: by the config, expected a multiple of {period} with "
                f"{span.length} elements from {span.start} on"
            )
        return span

    def gains(self) -> tuple[Gain, ...]:
        """The gains of all norms that the model has."""
        found = []
        for pattern, norm in self.family.gains.items():
            for name, i in self.each(pattern):
                if name not in self.shapes:
                    continue
                readers = norm.readers if isinstance(norm, Norm) else norm
                space = str(self.in_layer(_space_of(norm), i))
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

    def _factors(self, axes: Sequence[Axis]) -> tuple[list[Space], list[Axis]]:
        """The spaces of factors of products, which take channel scales, for spaces that the table lists as scaled."""
        writers: dict[str, dict[Axis, None]] = {}
        for pattern, axis_space in self.family.scaled.items():
            for name, i in self.each(pattern):
                where = self.in_layer(axis_space, i)
                for tensor, dim in ((f"{name}.weight", int(self.family.transposed)), (f"{name}.bias", 0)):
                    if tensor in self.shapes and where is not None:
                        part = where if isinstance(where, AxisPart) else None
                        span = self._span(tensor, dim, part) if part else None
                        space = part.space if part else str(where)
                        writers.setdefault(space, {})[Axis(tensor, dim, space + CHANNELS, span)] = None
        spaces, found = [], []
        for space, writing in writers.items():
            reading = [replace(axis, space=space + CHANNELS, reads=True) for axis in axes if axis.space == space]
            if reading:
                product = self.spaces[space]
                spaces.append(Space(space + CHANNELS, "", product.size, "diagonal", beside=product.rotation))
                found += [*writing, *reading]
        return spaces, found

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
        groups = (
            tuple(name for module in group if f"{(name := module.replace('{i}', str(i)))}.weight" in self.shapes)
            for i in self.layers
            for group in self.family.linears
        )
        return tuple(group for group in groups if group)


def _values_beside(space: str) -> str:
    """The space of the values of the attention whose queries and keys are in a space; other spaces themselves."""
    return f"{space.removesuffix('.query_key')}.value" if space.endswith(".query_key") else space


def _names(pairs: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(name for name, _ in pairs)


def _space_of(norm: tuple[str, ...] | Norm) -> str:
    return norm.space if isinstance(norm, Norm) else "residual"


def _axis_in(spaces: Sequence[AxisSpace], space: str) -> int:
    """The axis that belongs to a space."""
    return [where.space if isinstance(where, AxisPart) else where for where in spaces].index(space)
