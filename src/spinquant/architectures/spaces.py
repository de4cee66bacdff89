"""The spaces of a model and the axes that belong to them, in the order in which they are transformed.

The family's table states the spaces that R1 to R4 rotate. Three kinds of spaces follow from it: the factors of products
and the outputs of norms, which take channel scales, and the inputs of linears, where a transform may run online.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

from spinquant.architectures.family import INSIDE, AxisPart, AxisSpace, size_of
from spinquant.architectures.model_table import ModelTable
from spinquant.errors import ArchitectureError
from spinquant.plan import CHANNELS, Axis, Gain, Online, Space, Span
from spinquant.rotation_names import ONLINE_R1

RESIDUAL = "residual"
INPUT = ".input"  # ends the names of the spaces of online R1


@dataclass(frozen=True)
class Layout:
    """The spaces of a model, their axes, and where they are transformed at run time."""

    spaces: tuple[Space, ...]
    axes: tuple[Axis, ...]
    onlines: tuple[Online, ...]


def layout_of(table: ModelTable, gains: Sequence[Gain]) -> Layout:
    """The spaces that some tensor or module uses, and their axes, in the order of the table (not of the file).

    Raises:
        ArchitectureError: a tensor has another shape than the config implies.
    """
    return _Layout(table, gains).whole()


@dataclass(frozen=True)
class _Layout:
    table: ModelTable
    gains: Sequence[Gain]

    def whole(self) -> Layout:
        table, gains, onlines = self.table, self.gains, self.table.onlines()
        axes = tuple(axis for name, spaces in table.axis_spaces.items() for axis in self._axes_of(name, spaces))
        read = {tensor for gain in gains for tensor, _ in gain.readers}
        axes = tuple(replace(axis, reads=self._reads(axis, read)) for axis in axes)
        used = {axis.space for axis in axes} | {online.space for online in onlines}
        normed = {gain.space for gain in gains}
        heads: dict[str, int] = {}
        for axis in axes:
            copies = self._length(axis) // table.spaces[axis.space].size
            heads[axis.space] = min(copies, heads.get(axis.space, copies))
        spaces = [
            replace(
                space,
                allows="orthogonal" if space.allows == "any" and name in normed else space.allows,
                # Query heads that share a key-value head share its transform; there are as many keys as values.
                heads=heads.get(_values_beside(name), 1) if space.rotation in ("R2", "R3") else 1,
            )
            for name, space in table.spaces.items()
            if name in used
        ]
        factors, factor_axes = self._factors(axes)
        outputs, output_axes = self._norm_outputs()
        inputs, input_axes, input_onlines = self._inputs(axes)
        # The scales of a factor come before the rotation of the product, those of a norm after the residual space's
        # rotation and before that of the inputs of linears.
        return Layout(
            (*spaces, *factors, *outputs, *inputs),
            (*factor_axes, *axes, *output_axes, *input_axes),
            (*onlines, *input_onlines),
        )

    def _reads(self, axis: Axis, read: Set[str]) -> bool:
        """Whether a tensor reads a space. It makes no difference where the space allows rotations alone.

        read: tensors that read a norm.
        """
        table = self.table
        if table.spaces[axis.space].rotation == "R4":
            return True  # what writes it is not linear
        dims = len(table.shapes[axis.tensor])
        linear = axis.tensor in self._linear_weights
        reading = linear or axis.tensor in read or axis.tensor == table.family.head
        if dims == 2 and axis.space == RESIDUAL and not reading:
            return False  # embeddings of tokens and positions write along their last axis
        if dims > 2:
            return axis.dim == dims - (2 if axis.tensor in self._transposed_stacks else 1)
        return dims == 2 and axis.dim == (0 if table.family.transposed and linear else 1)

    @cached_property
    def _transposed_stacks(self) -> Set[str]:
        return {name for stack in self.table.experts() if stack.transposed for name in (*stack.first, *stack.second)}

    @cached_property
    def _linear_weights(self) -> Set[str]:
        return {f"{name}.weight" for group in self.table.linears() for name in group}

    def _length(self, axis: Axis) -> int:
        length = self.table.shapes[axis.tensor][axis.dim]
        return length if axis.span is None else length // axis.span.period * axis.span.length

    def _axes_of(self, name: str, spaces: Sequence[AxisSpace]) -> Iterator[Axis]:
        table, shape = self.table, self.table.shapes[name]
        if spaces == INSIDE:
            return
        if len(spaces) != len(shape):
            raise ArchitectureError(
                f"tensor {name!r} has shape {tuple(shape)}: {table.family.name} expects {len(spaces)} axes"
            )
        for dim, where in enumerate(spaces):
            if where is None:
                continue
            part = where if isinstance(where, AxisPart) else None
            space = table.spaces[part.space if part else str(where)]
            span = self._span(name, dim, part) if part else None
            size, length = space.size, span.length if span else shape[dim]
            if span and (span.start, span.length) == (0, span.period):
                span = None  # adjacent copies of the space: a rotation is repeated along its axis anyway
            if size == 0 or length % size or (space.name == RESIDUAL and length != size):
                raise ArchitectureError(
                    f"axis {dim} of {name!r} has length {length}, which does not fit the space {space.name!r}, of "
                    f"size {size} by the config"
                )
            yield Axis(name, dim, space.name, span)

    def _span(self, name: str, dim: int, part: AxisPart) -> Span:
        length, config = self.table.shapes[name][dim], self.table.config
        period = size_of(config, part.period) if part.period else length
        span = Span(size_of(config, part.start), size_of(config, part.length), period)
        if length % period or span.start + span.length > period:
            raise ArchitectureError(
                f"axis {dim} of {name!r} has length {length}: by the config, expected a multiple of {period} with "
                f"{span.length} elements from {span.start} on"
            )
        return span

    def _factors(self, axes: Sequence[Axis]) -> tuple[list[Space], list[Axis]]:
        """The spaces of factors of products, which take channel scales, for spaces that the table lists as scaled."""
        table = self.table
        writers: dict[str, dict[Axis, None]] = {}
        for pattern, axis_space in table.family.scaled.items():
            for name, i in table.each(pattern):
                where = table.in_layer(axis_space, i)
                for tensor, dim in ((f"{name}.weight", int(table.family.transposed)), (f"{name}.bias", 0)):
                    if tensor in table.shapes and where is not None:
                        part = where if isinstance(where, AxisPart) else None
                        span = self._span(tensor, dim, part) if part else None
                        space = part.space if part else str(where)
                        writers.setdefault(space, {})[Axis(tensor, dim, space + CHANNELS, span)] = None
        spaces, found = [], []
        for space, writing in writers.items():
            reading = [replace(axis, space=space + CHANNELS, reads=True) for axis in axes if axis.space == space]
            if reading:
                product = table.spaces[space]
                spaces.append(Space(space + CHANNELS, "", product.size, "diagonal", beside=product.rotation))
                found += [*writing, *reading]
        return spaces, found

    def _norm_outputs(self) -> tuple[list[Space], list[Axis]]:
        """The spaces of the outputs of norms, which take channel scales: the norm's weight writes them."""
        spaces, axes = [], []
        for gain in self.gains:
            if not gain.readers or len(self.table.shapes[gain.norm]) != 1:
                continue
            name = gain.norm.removesuffix(".weight")
            beside = self.table.spaces[gain.space].rotation
            spaces.append(Space(name, "", self.table.shapes[gain.norm][0], "diagonal", beside=beside))
            axes.append(Axis(gain.norm, 0, name, offset=gain.offset))
            axes += [Axis(gain.bias, 0, name)] if gain.bias else []
            axes += [Axis(tensor, dim, name, reads=True) for tensor, dim in gain.readers]
        return spaces, axes

    def _inputs(self, axes: Sequence[Axis]) -> tuple[list[Space], list[Axis], list[Online]]:
        """The inputs of linears and experts that read the residual stream, which online R1 transforms at run time."""
        table = self.table
        reading: dict[str, list[int]] = {}
        for axis in axes:
            if axis.space == RESIDUAL and axis.span is None:
                reading.setdefault(axis.tensor, []).append(axis.dim)
        uncalled = set(table.uncalled())
        spaces: dict[str, Space] = {}
        found: list[Axis] = []
        onlines: list[Online] = []

        def add(name: str, tensors: Sequence[str], dims: Sequence[int], sites: Sequence[Online]) -> None:
            spaces[name] = Space(name, ONLINE_R1, table.spaces[RESIDUAL].size, "any")
            found.extend(Axis(tensor, dim, name, reads=True) for tensor, dim in zip(tensors, dims, strict=True))
            onlines.extend(sites)

        for group, owner in table.owners_of_linears().items():
            tensors, dim = [f"{name}.weight" for name in group], 0 if table.family.transposed else 1
            if all(dim in reading.get(tensor, ()) for tensor in tensors) and not uncalled & set(group):
                space = owner + INPUT
                add(space, tensors, [dim] * len(tensors), [Online(name, "input", space) for name in group])
        for experts in table.experts():
            dims = [_input_dim(table, tensor, transposed=experts.transposed) for tensor in experts.first]
            if dims and all(dim in reading.get(name, ()) for name, dim in zip(experts.first, dims, strict=True)):
                space = experts.module + INPUT
                add(space, experts.first, dims, [Online(experts.module, "experts_input", space)])
        return list(spaces.values()), found, onlines


def _input_dim(table: ModelTable, tensor: str, *, transposed: bool) -> int:
    return len(table.shapes[tensor]) - (2 if transposed else 1)


def _values_beside(space: str) -> str:
    """The space of the values of the attention whose queries and keys are in a space; other spaces themselves."""
    return f"{space.removesuffix('.query_key')}.value" if space.endswith(".query_key") else space
