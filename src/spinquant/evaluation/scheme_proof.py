"""Prove that quantizers of activations and KV cache round what they should, before a model's weights are changed.

A tiny model (`tiny_model.py`) is rotated and quantized as the real one will be, at a few bits, and compared with a
reference: the same weights without any hook, in a `TorchFunctionMode` that sees the matrix products and attentions
that the class computes. It knows a linear by the identity of its weight and an attention by the linear before it, and
rounds and rotates what they read with a formula of its own and dense matrices. So it relies on nothing that the hooks
rely on: no call of a module, no keyword of the KV cache, no attention interface.

    x ~ step * clamp(round(x / step), first, last)        step = clip * (largest - smallest) / (2^bits - 1)

Both compute in float64 and have to agree within its rounding: logits, logits of greedy generation through a KV cache,
and what every linear and attention reads. And each part of the scheme has to move the logits.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spinquant.architectures import FamilyLike, use_family
from spinquant.errors import ProofError
from spinquant.evaluation.equivalence import TOLERANCE, Float64Arithmetic, difference, greedy_logits
from spinquant.evaluation.tiny_model import TINY_VOCABULARY, make_tiny_model, tiny_spec
from spinquant.models.modules import output_of
from spinquant.online.attachment import Attachment
from spinquant.online.firing import versions
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import fuse_module, plan_of, untie
from spinquant.rotations.rotation import Transform, matrix

# Bits and clip ratio of the proof. Without clipping, the first token, whose attention returns its own rounded values,
# would be rounded to grids that are multiples of each other: its numbers lie between two codes, and the last bit
# decides.
COARSE = {"activations": (3, 0.93), "kv": (2, 0.97)}
# Ways to write a product without calling a linear: by its transposed weight (Falcon), or by the experts' weights for
# each token.
PRODUCTS = (torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
PICKS = (Tensor.__getitem__, Tensor.T.__get__)  # pyright: ignore[reportAttributeAccessIssue]
MASKED = ("doge",)  # families that compute the attention mask, too, from the values that they store
MOVED = 1e-3  # relative; 2 to 3 bits move the logits of the tests' families by 0.1 to 1.5


@dataclass(frozen=True)
class SchemeProof:
    """How a quantized tiny model compares with the reference.

    Attributes:
        relative: Relative difference of their logits, of whole sequences or of generation, whichever is larger.
        moved: How far the quantizers moved the logits, relative.
        unseen: Linears, experts and attentions that do not compute through operations that the reference sees. Their
            quantizers are known to run and to move the logits, no more.
    """

    relative: float
    moved: float
    unseen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return {**vars(self), "unseen": list(self.unseen)}


@dataclass(frozen=True)
class Treatment:
    """What happens to one tensor in the reference: it is multiplied by a dense matrix, then rounded.

    Attributes:
        turn: The matrix (order, order), or one for each head (heads, order, order).
        quantizer: How the product is rounded.
    """

    turn: Tensor | None = None
    quantizer: Quantizer | None = None

    def apply(self, x: Tensor) -> Tensor:
        """The treated tensor; both act along the last axis, block by block."""
        if self.turn is not None:
            turn = self.turn.to(x.dtype)
            blocks = x.unflatten(-1, (-1, turn.shape[-1]))
            if turn.ndim == 3:  # as many blocks in a row share the matrix of a head
                turn = turn.repeat_interleave(blocks.shape[-2] // len(turn), 0)
                x = torch.stack([blocks[..., k, :] @ one for k, one in enumerate(turn)], -2).flatten(-2)
            else:
                x = (blocks @ turn).flatten(-2)
        return x if self.quantizer is None else plainly_rounded(x, self.quantizer)

    def apply_to_heads(self, x: Tensor) -> Tensor:
        """The treated tensor (batch, heads, tokens, size); it is rounded head by head."""
        if self.turn is not None and self.turn.ndim == 3:
            turned = Treatment(self.turn).apply(x.transpose(1, 2).flatten(2))
            return Treatment(None, self.quantizer).apply(turned.view(x.transpose(1, 2).shape).transpose(1, 2))
        return self.apply(x)


def plainly_rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Round to the nearest of 2^bits numbers, by a formula of its own (not that of `quantization/integer.py`)."""
    groups = x.unflatten(-1, (-1, quantizer.group_size or x.shape[-1]))
    smallest, largest = groups.aminmax(dim=-1, keepdim=True)
    if quantizer.symmetric:
        largest = torch.maximum(largest, -smallest)
        step = float(quantizer.clip) * largest / (2 ** (quantizer.bits - 1) - 1)
        first = torch.full_like(step, -(2 ** (quantizer.bits - 1)))
    else:
        smallest, largest = (float(quantizer.clip) * end for end in (smallest.clamp(max=0), largest.clamp(min=0)))
        step = (largest - smallest) / (2**quantizer.bits - 1)
        first = torch.round(smallest / step)
    codes = torch.round(groups / step).clamp(first, first + 2**quantizer.bits - 1)
    return torch.where(step == 0, torch.zeros_like(groups), codes * step).flatten(-2)


class Reference(TorchFunctionMode):
    """Context in which a model without hooks computes like a rotated and quantized one.

    Without rotations and scheme it changes nothing and takes down what a model with hooks reads.

    Args:
        model: The model that runs in it, with fused rotations.
        plan: Its plan.
        rotations: Those that run online; others are ignored.
        scheme: What is rounded.
        unseen: Sites that the reference leaves alone.

    Attributes:
        read: What each linear, experts' weight and attention read, by name, in order of execution.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        rotations: Mapping[str, Transform],
        scheme: Scheme,
        *,
        unseen: Collection[str] = (),
    ):
        super().__init__()
        self.read: dict[str, list[Tensor]] = {}
        turns = {(one.module, one.site): rotations[one.space] for one in plan.onlines if one.space in rotations}
        dense = {place: matrix(rotation) for place, rotation in turns.items()}
        self._names: dict[int, str] = {}
        self._inputs: dict[str, Treatment] = {}
        heads = (plan.heads,) if plan.heads else ()
        for group in (*plan.linears, *heads):
            rounded = scheme.activations if group not in heads or scheme.lm_head else None
            for name in group:
                self._names[id(model.get_submodule(name).weight)] = name
                self._inputs[name] = Treatment(dense.get((group[0], "input")), rounded)
        self._stacks: dict[int, str] = {}
        for experts in plan.experts:
            for name in (*experts.first, *experts.second):
                self._stacks[id(model.get_parameter(name))] = name
                site = "experts" if name in experts.second else "experts_input"
                turn = dense.get((experts.module, site))
                self._inputs[name] = Treatment(turn, scheme.activations)
        self._picked: tuple[Tensor | None, str] = (None, "")
        self._attention_of = {
            name: attention
            for attention in plan.attentions
            for name in self._inputs
            if name.startswith(f"{attention}.")
        }
        heads = [name for name in plan.attentions if name not in unseen]
        self._heads = {name: _attention_treatments(dense.get((name, "query_key")), scheme.kv) for name in heads}
        self._inside = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and id(args[1]) in self._names:
            args = (self._input(self._names[id(args[1])], args[0]), *args[1:])
        elif func is torch.addmm and id(args[2]) in self._names:  # Conv1D
            args = (args[0], self._input(self._names[id(args[2])], args[1]), args[2])
        elif func in PRODUCTS and self._picked[0] is not None:
            args = (*self._product(*args[:2]), *args[2:])
        elif func is F.scaled_dot_product_attention and self._inside in self._heads:
            args = (*self._attention(*args[:3]), *args[3:])
        result: Any = func(*args, **kwargs)
        if func in PICKS and (name := self._stacks.get(id(args[0])) or self._names.get(id(args[0]))):
            self._picked = result, name
        return result

    def _input(self, name: str, x: Tensor) -> Tensor:
        self._inside = self._attention_of.get(name, "")
        treated = self._inputs[name].apply(x)
        self.read.setdefault(name, []).append(treated)
        return treated

    def _product(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Operands of a product; if one is a weight that was picked, the other one is treated."""
        weights, name = self._picked
        if second is weights:
            return self._input(name, first), second
        return (first, self._input(name, second.mT).mT) if first is weights else (first, second)

    def _attention(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        treatments = zip(self._heads[self._inside], (queries, keys, values), strict=True)
        queries, keys, values = (treatment.apply_to_heads(x) for treatment, x in treatments)
        self.read.setdefault(self._inside, []).extend((keys, values))
        return queries, keys, values


def _attention_treatments(turn: Tensor | None, quantizer: Quantizer | None) -> tuple[Treatment, Treatment, Treatment]:
    """Those of queries, keys and values: keys are multiplied by T, and queries by T^-T, so that T cancels."""
    inverse = None if turn is None else torch.linalg.inv(turn).mT
    return Treatment(inverse), Treatment(turn, quantizer), Treatment(quantizer=quantizer)


def prove_scheme(
    config: Any, scheme: Scheme, spec: RotationSpec, *, seed: int = 0, family: FamilyLike | None = None
) -> SchemeProof | None:
    """Prove on a tiny float64 model that quantizers of activations and KV cache round what they should.

    `quantize` calls this before it changes a model. It takes a second or so.

    Args:
        config: A config of transformers.
        scheme: What is quantized. Integers of a few bits stand for all formats.
        spec: Which rotations; block sizes are replaced by ones that fit the tiny model.
        seed: Of the tiny model's weights and tokens.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.

    Returns:
        How the tiny model compares with the reference; None for a scheme without activations and KV cache.

    Raises:
        ProofError: The quantized model and the reference differ, or quantizers do not move the logits; the first place
            that differs is named.
        ArchitectureError: The architecture is unknown.
        RotationError: A rotation is not possible in it.
    """
    if scheme.activations is None and scheme.kv is None:
        return None
    use_family(config, family)
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):
        tiny = make_tiny_model(config, seed=seed)
        plan = plan_of(tiny)
        rotations = make_rotations(plan, tiny_spec(spec))
        fuse_module(tiny, plan, rotations)
        untie(tiny, plan)  # the reference knows a linear by its weight; fusing unties with R1 alone
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, TINY_VOCABULARY - 1, (2, 12), generator=generator)
        rounded = coarse(scheme, tiny, plan)
        if rounded.activations is None and rounded.kv is None:
            return None  # a KV cache alone, and a class without attention
        return compare_schemes(tiny, plan, rotations, rounded, tokens)


def coarse(scheme: Scheme, model: nn.Module, plan: Plan) -> Scheme:
    """The scheme of the proof: the same parts and symmetry, in groups that fit the tiny model."""
    lengths = [
        model.get_parameter(f"{name}.weight").shape[not plan.transposed] for group in plan.linears for name in group
    ]
    stacks = (model.get_parameter(name) for experts in plan.experts for name in (*experts.first, *experts.second))
    lengths += [length for stack in stacks for length in stack.shape[-2:]]

    def part(name: str) -> Quantizer | None:
        asked: Quantizer | None = getattr(scheme, name)
        if asked is None or (name == "kv" and not plan.attentions):
            return None
        bits, clip = COARSE[name]
        group = math.gcd(asked.group_size, 16, *lengths) if asked.group_size else None
        # Keys and values always have a zero point. Without one, values take the codes -1, 0 and 1 only, and the zero
        # point of activations that are made of them lies between two codes.
        return Quantizer(bits, symmetric=asked.symmetric and name != "kv", group_size=group, clip=clip)

    return Scheme(activations=part("activations"), kv=part("kv"), lm_head=scheme.lm_head)


@torch.no_grad()
def compare_schemes(
    model: nn.Module, plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme, tokens: Tensor
) -> SchemeProof:
    """Compare a model that hooks quantize with the reference; raises ProofError if they differ.

    Args:
        model: A float64 model with fused rotations and without hooks.
        plan: Its plan.
        rotations: Its rotations.
        scheme: What is rounded; dynamic integers.
        tokens: int64, (batch, length).
    """

    def logits(mode: Reference) -> Tensor:
        with mode:
            return output_of(model(input_ids=tokens, use_cache=False))

    def generated(mode: Reference) -> Tensor:
        with mode:
            return greedy_logits(model, tokens, steps=3)

    def watching() -> Reference:
        return Reference(model, plan, {}, Scheme())

    with attach(model, plan, rotations, scheme) as attachment:
        stored = _stored(attachment)
        _round_only(attachment, ())
        exact = logits(mode := watching())
        unseen = _unseen(attachment, plan, mode.read, stored)
        parts = {"activations": attachment.inputs, "keys and values": attachment.keys_values}
        asked = {"activations": scheme.activations, "keys and values": scheme.kv}
        moved = {}
        for part, sites in parts.items():
            if asked[part] is not None:
                _round_only(attachment, sites)
                moved[part] = difference(exact, logits(watching())).relative
        _round_only(attachment, {*attachment.inputs, *attachment.keys_values} - {*unseen})
        found = watching()
        outputs = logits(found), generated(watching())
    for part, distance in moved.items():
        if not distance > MOVED:
            raise ProofError(_message(f"quantizers of {part} move the logits by {distance:.3g} (relative) only"))
    expected = Reference(model, plan, rotations, scheme, unseen=unseen)
    wanted = logits(expected), generated(Reference(model, plan, rotations, scheme, unseen=unseen))
    for name, tensors in expected.read.items():
        deviation = _deviation(tensors, found.read.get(name, []))
        if not deviation <= TOLERANCE[torch.float64]:
            raise ProofError(
                _message(f"what {name!r} reads differs from a computation without hooks by {deviation:.3g}")
            )
    relative = 0.0
    for what, one, other in zip(("logits", "logits of generation through a KV cache"), wanted, outputs, strict=True):
        deviation = difference(one, other).relative
        if not deviation <= TOLERANCE[torch.float64]:
            raise ProofError(_message(f"{what} differ from a computation without hooks by {deviation:.3g} (relative)"))
        relative = max(relative, deviation)
    return SchemeProof(relative, min(moved.values()), unseen)


def _round_only(attachment: Attachment, names: Collection[str]) -> None:
    for sites in (attachment.inputs, attachment.keys_values):
        for name, site in sites.items():
            site.rounds = name in names


def _stored(attachment: Attachment) -> dict[str, tuple[Tensor, Tensor]]:
    """A dict that is filled with the keys and values of each attention, as they are about to be rounded."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, keys: Tensor, values: Tensor) -> None:
        found[name] = keys, values

    for name, site in attachment.keys_values.items():
        site.watch = partial(watch, name)
    return found


def _unseen(
    attachment: Attachment,
    plan: Plan,
    read: Mapping[str, list[Tensor]],
    stored: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[str, ...]:
    """The sites whose linears or attentions do not read what the site rounds by an operation that the reference sees.

    Attentions of some classes are written with matrix products, or compute keys and values from what they store.
    """
    groups = {group[0]: group for group in plan.linears}
    inputs = [name for name in attachment.inputs if not {*groups.get(name, (name,))} <= read.keys()]
    heads = [n for n, pair in stored.items() if plan.family in MASKED or not _same(pair, read.get(n, []))]
    return (*inputs, *heads)


def _same(stored: tuple[Tensor, Tensor], read: list[Tensor]) -> bool:
    """Whether an attention reads the keys and values that it stores, each head as often as it has groups of queries."""
    if len(read) != len(stored):
        return False
    for one, other in zip(stored, read, strict=True):
        if one.ndim != other.ndim or one.shape[0] != other.shape[0] or other.shape[1] % one.shape[1]:
            return False
        repeated = one.repeat_interleave(other.shape[1] // one.shape[1], 1)
        if repeated.shape != other.shape or not torch.equal(repeated, other):
            return False
    return True


def _deviation(expected: list[Tensor], found: list[Tensor]) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    return max(difference(one, other).relative for one, other in zip(expected, found, strict=True))


def _message(what: str) -> str:
    return (
        f"quantizers do not compute what they should in a tiny model of this architecture (yours was not touched): "
        f"{what} ({versions()}). Keep activations and KV cache at 16 bits, or use the versions that spinquant was "
        "tested with; please report this with the model's config"
    )
