"""A plan says where every rotation of a model goes. It is data: no tensors, no torch.

The one idea: every axis of every weight tensor lives in a named *space*, or in none, and a rotation belongs to
a space. To rotate a space is to contract each axis that lives in it with the same orthogonal matrix R, block by
block where the axis is longer than R:

    T'[.., j, ..] = sum_i T[.., i, ..] R[i, j]

Reader and writer of a space then cancel, so the function of the model is unchanged. Three facts complete a
plan: the *gains* of norms, which do not commute with R and are fused into the linears that read the norm; the
*spans* of fused tensors, where only a part of an axis lives in a space; and the *online* sites, where a space
has to be rotated at run time because its writer is not linear.

A plan describes the whole model. Which of its spaces are rotated is said by the rotations that go with it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from spinquant.errors import RotationError

ROTATION_NAMES = ("R1", "R2", "R3", "R4")
MERGEABLE = ("R1", "R2")  # fused into weights; R3 and R4 need work at run time

OnlineSite = Literal["input", "query_key", "experts"]


@dataclass(frozen=True)
class Space:
    """A vector space of the model; `size` is the number of elements that one rotation mixes (a head's, for R2, R3).

    centred: its norms subtract the mean, so its rotation has to keep the mean, R 1 = 1 (see `centred.py`).
    """

    name: str
    rotation: str
    size: int
    centred: bool = False


@dataclass(frozen=True)
class Span:
    """The part of an axis that lives in a space: `length` elements from `start` in every `period` elements."""

    start: int
    length: int
    period: int


@dataclass(frozen=True)
class Axis:
    """Axis `dim` of the tensor lives in the space."""

    tensor: str
    dim: int
    space: str
    span: Span | None = None


@dataclass(frozen=True)
class Gain:
    """A norm's elementwise scale, fused into axis `dim` of each reader when `space` is rotated.

    The model multiplies by `offset + weight`, so the norm is left with the weight `1 - offset`. A norm's `bias` is
    added after the scale, so it is divided by it where the scale moves into the readers, then rotated as the space is.
    """

    norm: str
    space: str
    readers: tuple[tuple[str, int], ...]
    offset: float = 0.0
    bias: str | None = None


@dataclass(frozen=True)
class Scaling:
    """A space that is written as one factor of a product: its channels may be scaled by any numbers but zero.

    Rows of the writers (tensor, dim, span of it) take the scales, and axis `dim` of each reader is divided by them.
    """

    space: str
    writers: tuple[tuple[str, int, Span | None], ...]
    readers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Online:
    """A space that is rotated at run time: at the input of a linear, on the queries and keys of an attention, or inside
    stacked experts, before their second product."""

    module: str
    site: OnlineSite
    space: str


@dataclass(frozen=True)
class Experts:
    """Weights of the experts of one module: `first` read what the module reads, `second` what stands between the two.

    A module has them stacked, (experts, out, in), or (experts, in, out) where `transposed`; a checkpoint may have one
    tensor for each expert.
    """

    module: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Tie:
    """A tensor that shares the memory of `source`, and cannot once the residual space is rotated: a head, or a tensor
    of a block that layers share, which the same switch in the config ties."""

    tensor: str
    source: str


@dataclass(frozen=True)
class Plan:
    """Where every rotation of one model goes.

    `linears` are groups of linear modules that read one activation, in order of execution, and `experts` those that are
    not modules of their own: the places where weights and activations are quantized. `attentions` are the modules whose
    keys and values are cached. `blocks` are the decoder layers, each of which reads the output of the one before.
    `transposed`: weights of `linears` are (in, out), as Conv1D has them; never that of the head. `renamed`: weights of
    linears that a checkpoint has under another name than the module.
    `refused` are rotations that the architecture rules out, with the mathematical reason.
    `predictors` are tensors of layers for multi-token prediction, which are in no space and in the checkpoint alone.
    `uncalled` are linears whose weights the class uses without calling them: their inputs cannot be rounded.
    `scalings` say which spaces may be scaled channel by channel, which costs nothing at run time.
    """

    family: str
    spaces: tuple[Space, ...]
    axes: tuple[Axis, ...]
    gains: tuple[Gain, ...]
    onlines: tuple[Online, ...]
    ties: tuple[Tie, ...]
    linears: tuple[tuple[str, ...], ...]
    attentions: tuple[str, ...]
    blocks: tuple[str, ...]
    head: str
    refused: tuple[tuple[str, str], ...] = ()
    experts: tuple[Experts, ...] = ()
    transposed: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    predictors: tuple[str, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    uncalled: tuple[str, ...] = ()

    @cached_property
    def space(self) -> Mapping[str, Space]:
        """Spaces by name."""
        return {space.name: space for space in self.spaces}

    @cached_property
    def axes_of(self) -> Mapping[str, tuple[Axis, ...]]:
        """Axes by tensor name; a tensor that is not there lives in no space."""
        found: defaultdict[str, list[Axis]] = defaultdict(list)
        for axis in self.axes:
            found[axis.tensor].append(axis)
        return {name: tuple(axes) for name, axes in found.items()}

    @cached_property
    def gains_of(self) -> Mapping[str, tuple[tuple[Gain, int], ...]]:
        """(gain, dim) pairs by the name of the reading tensor."""
        found: defaultdict[str, list[tuple[Gain, int]]] = defaultdict(list)
        for gain in self.gains:
            for tensor, dim in gain.readers:
                found[tensor].append((gain, dim))
        return {name: tuple(pairs) for name, pairs in found.items()}

    @cached_property
    def gain_of_norm(self) -> Mapping[str, Gain]:
        """Gains by the name of the norm's own tensor."""
        return {gain.norm: gain for gain in self.gains}

    @cached_property
    def gain_of_bias(self) -> Mapping[str, Gain]:
        """Gains by the name of the norm's bias."""
        return {gain.bias: gain for gain in self.gains if gain.bias is not None}

    @cached_property
    def scalings_of(self) -> Mapping[str, tuple[tuple[Scaling, int, Span | None, bool], ...]]:
        """By tensor name (scaling, dim, span of it, whether the tensor writes the space)."""
        found: defaultdict[str, list[tuple[Scaling, int, Span | None, bool]]] = defaultdict(list)
        for scaling in self.scalings:
            for tensor, dim, span in scaling.writers:
                found[tensor].append((scaling, dim, span, True))
            for tensor, dim in scaling.readers:
                found[tensor].append((scaling, dim, None, False))
        return {name: tuple(places) for name, places in found.items()}

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """By the name of a tied tensor, which a checkpoint may lack, the name of its source."""
        return {tie.tensor: tie.source for tie in self.ties}

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        return dict(self.renamed)

    def weight_of(self, linear: str) -> str:
        """The name of a linear's weight among the tensors that the plan was made from."""
        return self._renamed.get(f"{linear}.weight", f"{linear}.weight")

    def read_by(self, linear: str) -> Space | None:
        """The space that the whole input of a linear module lives in; None where it lives in none."""
        weight = self.weight_of(linear)
        reading = 0 if self.transposed and weight != self.head else 1
        axes = (axis for axis in self.axes_of.get(weight, ()) if axis.dim == reading and axis.span is None)
        return next((self.space[axis.space] for axis in axes), None)

    def read_by_experts(self, experts: Experts) -> tuple[Space | None, Space | None]:
        """The spaces that the inputs of the first and of the second weights live in."""
        outside = (self.space[axis.space] for axis in self.axes_of.get(experts.first[0], ()))
        inside = (self.space[o.space] for o in self.onlines if o.module == experts.module and o.site == "experts")
        return next(outside, None), next(inside, None)

    def values_of(self, attention: str) -> Space | None:
        """The space that the values of an attention module live in: that of the linear that reads its output."""
        inside = (self.read_by(name) for group in self.linears for name in group if name.startswith(f"{attention}."))
        return next((space for space in inside if space is not None and space.rotation == "R2"), None)

    def spaces_of(self, rotation: str) -> tuple[Space, ...]:
        """The spaces that a rotation such as "R2" rotates, in order of the layers."""
        return tuple(space for space in self.spaces if space.rotation == rotation)

    def rotated(self, rotations: Iterable[str]) -> frozenset[str]:
        """Names of the spaces that these rotations ("R1", ...) rotate.

        Raises RotationError when one of them is unknown or ruled out for this model.
        """
        names = parse_rotation_names(rotations)
        reasons = dict(self.refused)
        for name in names:
            if name in reasons:
                raise RotationError(f"{name} is impossible for {self.family}: {reasons[name]}. Leave {name} out.")
            if not self.spaces_of(name):
                raise RotationError(f"{self.family} has no space that {name} could rotate. Leave {name} out.")
        return frozenset(space.name for space in self.spaces if space.rotation in names)

    def to_dict(self) -> dict:
        """The plan as plain dicts and lists, for JSON."""
        return asdict(self)


def parse_rotation_names(rotations: str | Iterable[str]) -> tuple[str, ...]:
    """("R1", "R2") from "r1,R2" or any iterable of names; the empty string or "none" means no rotation.

    Raises RotationError for a name that is not R1, R2, R3 or R4.
    """
    items = rotations.split(",") if isinstance(rotations, str) else rotations
    names = [item.strip().upper() for item in items]
    names = [name for name in names if name and name != "NONE"]
    for name in names:
        if name not in ROTATION_NAMES:
            raise RotationError(f"unknown rotation {name!r}: expected some of {', '.join(ROTATION_NAMES)}, or none")
    return tuple(name for name in ROTATION_NAMES if name in names)
