"""Plan of a model: which axis of which weight each transform changes. Plain data, no tensors, no torch.

Every axis of every weight tensor belongs to named *spaces* (the residual stream, the values of a layer, ...), or to
none, and a space carries an invertible matrix T, its transform. What writes a space is contracted with T and what
reads it with T^-T, block by block where the axis is longer than T:

    W'[.., j, ..] = sum_i W[.., i, ..] T[i, j]        a writer
    W'[.., j, ..] = sum_i W[.., i, ..] T^-T[i, j]     a reader

The two cancel, so the function of the model does not change. A rotation (R1 to R4) is the case where T = T^-T, channel
scales the case where T is diagonal. What a space may carry is a fact of the architecture (`Space.allows`). Three things
complete a plan: the *gains* of norms, which do not commute with a rotation and are fused into the linears that read the
norm; the *spans* of fused tensors (q, k and v in one weight), where only part of an axis belongs to a space; and the
*online* sites, where a space is transformed at run time because what writes it is not linear.

A plan describes the whole model. The transforms passed along with it select the spaces that are transformed.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

from spinquant.errors import RotationError
from spinquant.rotation_names import ONLINE_R1, USUAL, parse_rotation_names

OnlineSite = Literal["input", "query_key", "experts", "experts_input"]
Allows = Literal["orthogonal", "mean-preserving", "diagonal", "any"]
CHANNELS = ".channels"  # ends the names of factors of products: "layers.0.hidden.channels" is before "layers.0.hidden"


@dataclass(frozen=True)
class Space:
    """A vector space of the model, such as the residual stream.

    Attributes:
        name: "residual", a name with the layer's number, such as "layers.0.value", or, for the output of a norm, the
            name of the norm's module; "NAME.input" for the input of a linear, or of experts.
        rotation: the one of R1 to R4, or online R1, that rotates the space; "" for a space that only carries channel
            scales.
        size: number of elements that one transform mixes; the head size for R2 and R3.
        allows: the transforms that leave the function of the model unchanged. "orthogonal": a norm divides by the
            length of the vector. "mean-preserving": it also subtracts the mean (LayerNorm), so that R 1 = 1 as well
            (see `rotations/mean_preserving.py`). "diagonal": the space is multiplied element by element. "any": it is
            only read linearly.
        heads: number of vectors of that size, each of which may have a transform of its own (key-value heads).
        beside: for a space of channel scales, the rotation in whose coordinates they are; they are left out with it.
    """

    name: str
    rotation: str
    size: int
    allows: Allows = "orthogonal"
    heads: int = 1
    beside: str = ""

    @property
    def centred(self) -> bool:
        """Whether norms of the space subtract the mean, so that its rotation has to preserve it."""
        return self.allows == "mean-preserving"


@dataclass(frozen=True)
class Span:
    """The part of an axis that belongs to a space: `length` elements from `start` on, in every `period` elements."""

    start: int
    length: int
    period: int


@dataclass(frozen=True)
class Axis:
    """Axis `dim` of a tensor belongs to a space; with a span, only part of the axis does.

    Axes of one dim are transformed one after another, in the order of the plan.

    Attributes:
        tensor: name of the tensor.
        dim: the axis.
        space: name of the space.
        span: the part of the axis that belongs to it; None for all of it.
        reads: the tensor reads the space (and is contracted with T^-T) instead of writing it (T).
        offset: the model uses `offset + tensor`, which is what is transformed: the weight of some norms.
    """

    tensor: str
    dim: int
    space: str
    span: Span | None = None
    reads: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Gain:
    """The elementwise scale of a norm, fused into axis `dim` of each reader when its space is rotated.

    Attributes:
        norm: name of the norm's weight.
        space: the space that the norm normalizes.
        readers: (tensor, dim) of every weight that reads the norm's output.
        offset: the model multiplies by `offset + weight`, so fusing leaves the weight at `1 - offset`.
        bias: name of the norm's bias, if it has one. The norm adds it after scaling, so fusing divides it by the scale
            and rotates it like the space.
    """

    norm: str
    space: str
    readers: tuple[tuple[str, int], ...]
    offset: float = 0.0
    bias: str | None = None


@dataclass(frozen=True)
class Online:
    """A space that is rotated at run time.

    The site is the input of a linear, the queries and keys of an attention module, the input of stacked experts, or
    their inside, before the second matrix product.
    """

    module: str
    site: OnlineSite
    space: str


@dataclass(frozen=True)
class Experts:
    """Expert weights of one mixture-of-experts module.

    A module stacks them, (experts, out, in), or (experts, in, out) if `transposed`; a checkpoint may hold one tensor
    per expert.

    Attributes:
        module: name of the module.
        first: weights that read the module's input (gate and up projections).
        second: weights that read the hidden activation (down projections).
        transposed: weights are (in, out).
    """

    module: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Tie:
    """A tied tensor, which shares the memory of `source` and has to be untied when the residual space is rotated.

    It is the output head, or a tensor of a shared decoder block, which `tie_word_embeddings` ties as well.
    """

    tensor: str
    source: str


@dataclass(frozen=True)
class Plan:
    """Where every rotation of one model goes: the spaces of a model and the weight axes that belong to them.

    Made by `make_plan` from a config and tensor shapes, or by `plan_of` from a model in memory.

    Attributes:
        family: name of the family table that the plan was made from, such as "llama".
        spaces: the spaces that can be transformed, in order of execution; after those with a rotation, those that only
            carry channel scales.
        axes: the tensor axes that belong to them.
        gains: norm scales that are fused into the linears after the norm.
        onlines: places where a space is rotated at run time.
        ties: tensors that share memory, such as a head tied to the embedding.
        linears: groups of linear modules that read the same activation, in order of execution. Together with
            `experts` these are the places where weights and activations are quantized.
        attentions: modules whose keys and values are cached.
        blocks: the decoder layers; each reads the output of the one before.
        head: name of the output head's weight; "" for a model without one.
        refused: (rotation, mathematical reason) for rotations that the architecture rules out.
        experts: expert weights that are not modules of their own.
        transposed: weights of `linears` are (in, out), as in Conv1D; the head's never is.
        renamed: (name by the module, name in the checkpoint) for weights of linears and the head, where the two differ.
        predictors: tensors of multi-token prediction layers, which belong to no space and exist in checkpoints only.
        uncalled: linears whose weights the model class uses without calling the module, so that their inputs cannot
            be quantized.
        biased: linears with a bias.

    Example:
        >>> from transformers import LlamaConfig
        >>> from spinquant import make_plan
        >>> config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=0, vocab_size=32)
        >>> shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
        >>> plan = make_plan(config, shapes)
        >>> [(space.name, space.rotation, space.size, space.allows) for space in plan.spaces]
        [('residual', 'R1', 8, 'orthogonal'), ('model.norm', '', 8, 'diagonal')]
        >>> [(axis.tensor, axis.dim, axis.reads) for axis in plan.axes if axis.space == "residual"]
        [('model.embed_tokens.weight', 1, False), ('lm_head.weight', 1, True)]
        >>> [(gain.norm, gain.readers) for gain in plan.gains]
        [('model.norm.weight', (('lm_head.weight', 1),))]
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
    uncalled: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()

    @cached_property
    def space(self) -> Mapping[str, Space]:
        """Spaces by name."""
        return {space.name: space for space in self.spaces}

    @cached_property
    def axes_of(self) -> Mapping[str, tuple[Axis, ...]]:
        """Axes by tensor name; a tensor that is absent belongs to no space."""
        found: defaultdict[str, list[Axis]] = defaultdict(list)
        for axis in self.axes:
            found[axis.tensor].append(axis)
        return {name: tuple(axes) for name, axes in found.items()}

    @cached_property
    def rotated_axes(self) -> tuple[Axis, ...]:
        """The axes in spaces that one of R1 to R4 rotates."""
        return tuple(axis for axis in self.axes if self.space[axis.space].rotation in USUAL)

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
    def tied(self) -> Mapping[str, str]:
        """The name of the source by the name of a tied tensor, which a checkpoint may lack."""
        return {tie.tensor: tie.source for tie in self.ties}

    def unties(self, spaces: Container[str]) -> bool:
        """Whether transforming these spaces changes a tied tensor otherwise than its source; then all are untied."""
        return any(self._changes(tie.tensor, spaces) != self._changes(tie.source, spaces) for tie in self.ties)

    def _changes(self, tensor: str, spaces: Container[str]) -> set[Axis | tuple[Gain, int]]:
        """What transforming spaces does to a tensor: axes without its name, and gains that are multiplied in."""
        axes = {replace(axis, tensor="") for axis in self.axes_of.get(tensor, ()) if axis.space in spaces}
        gains = (pair for pair in self.gains_of.get(tensor, ()) if pair[0].space in spaces)
        return {*axes, *gains}

    @property
    def heads(self) -> tuple[str, ...]:
        """The head's module, as a group of linears; empty for a model without a head."""
        return (self.head.removesuffix(".weight"),) if self.head else ()

    @cached_property
    def _renamed(self) -> Mapping[str, str]:
        return dict(self.renamed)

    def weight_of(self, linear: str) -> str:
        """The name of a linear module's weight among the tensors that the plan was made from."""
        return self._renamed.get(f"{linear}.weight", f"{linear}.weight")

    def stored_as(self, module: str) -> str:
        """The name of a linear or attention module in the checkpoint, without that of its tensors."""
        for linear in (module, *(name for group in self.linears for name in group if name.startswith(f"{module}."))):
            stored, inside = self.weight_of(linear).removesuffix(".weight"), linear.removeprefix(module)
            if stored.endswith(inside):
                return stored.removesuffix(inside)
        return module

    def read_by(self, linear: str) -> Space | None:
        """The space with a rotation that the whole input of a linear module belongs to; None if there is none."""
        return next((space for space in self.spaces_read_by(linear) if space.rotation), None)

    def spaces_read_by(self, linear: str) -> tuple[Space, ...]:
        """The spaces that the whole input of a linear module belongs to, in the order of their transforms."""
        weight = self.weight_of(linear)
        reading = 0 if self.transposed and linear != self.head.removesuffix(".weight") else 1
        axes = (axis for axis in self.axes_of.get(weight, ()) if axis.dim == reading and axis.span is None)
        return tuple(self.space[axis.space] for axis in axes)

    def read_by_experts(self, experts: Experts) -> tuple[tuple[Space, ...], Space | None]:
        """The spaces of the inputs of the first expert weights, in order, and that of the second."""
        axes = self.axes_of.get(experts.first[0], ())
        outside = tuple(self.space[axis.space] for axis in axes if axis.reads)
        inside = (self.space[o.space] for o in self.onlines if o.module == experts.module and o.site == "experts")
        return outside, next(inside, None)

    def values_of(self, attention: str) -> Space | None:
        """The space of the values of an attention module: that of the linear that reads its output."""
        inside = (self.read_by(name) for group in self.linears for name in group if name.startswith(f"{attention}."))
        return next((space for space in inside if space is not None and space.rotation == "R2"), None)

    def spaces_of(self, rotation: str) -> tuple[Space, ...]:
        """The spaces that a rotation such as "R2" rotates, in layer order."""
        return tuple(space for space in self.spaces if space.rotation == rotation)

    def scales_beside(self, rotation: str) -> tuple[Space, ...]:
        """The spaces of channel scales that go with a rotation; those of norms go with R1, fused or online."""
        rotation = "R1" if rotation == ONLINE_R1 else rotation
        return tuple(space for space in self.spaces if space.beside == rotation)

    def without(self, rotation: str) -> "Plan":
        """The plan without the spaces of a rotation such as "R2"."""
        kept = {space.name for space in self.spaces if space.rotation != rotation}
        return replace(
            self,
            spaces=tuple(space for space in self.spaces if space.name in kept),
            axes=tuple(axis for axis in self.axes if axis.space in kept),
            onlines=tuple(online for online in self.onlines if online.space in kept),
        )

    def rotated(self, rotations: Iterable[str]) -> frozenset[str]:
        """Names of the spaces that these rotations ("R1", ...) rotate.

        Raises:
            RotationError: a rotation is unknown, or impossible for this model.
        """
        names = parse_rotation_names(rotations)
        reasons = dict(self.refused)
        for name in names:
            if name in reasons:
                instead = " or run it online (--online R1)" if name == "R1" and self.spaces_of(ONLINE_R1) else ""
                raise RotationError(
                    f"{name} is impossible for {self.family}: {reasons[name]}. Leave {name} out{instead}."
                )
            if not self.spaces_of(name):
                raise RotationError(f"{self.family} has no space that {name} could rotate. Leave {name} out.")
        return frozenset(space.name for space in self.spaces if space.rotation in names)

    def to_dict(self) -> dict:
        """The plan as plain dicts and lists for JSON."""
        return asdict(self)
