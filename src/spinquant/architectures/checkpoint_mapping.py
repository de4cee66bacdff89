"""Map the tensors of a model to those of its checkpoint: renamed, split into parts, or one tensor per expert.

A model stacks the experts of a layer, the rows of the gate before those of up: `experts.gate_up_proj` (experts,
gate + up, in). Checkpoints store `experts.E.gate_proj.weight`, `experts.E.up_proj.weight`, ... (out, in), often under
older names. A model's convolution over queries, keys and values may be stored as three tensors. A `Piece` states which
part of which model tensor a checkpoint tensor is; a tensor that is stored unchanged has one piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spinquant.architectures import family_of, module_names
from spinquant.plan import Plan

# Matrices of an expert, and tensors of the model, that a checkpoint stores as several, concatenated along the rows.
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
_PARTS = {"conv1d.weight": tuple(f"{name}_conv1d.weight" for name in "qkv")}


@dataclass(frozen=True)
class Piece:
    """The place of a checkpoint tensor in the model.

    Attributes:
        tensor: name of the model's tensor.
        stored: name of the checkpoint's tensor.
        expert: number of the expert whose matrix in a stack it is part of; None if the tensor is no stack.
        first: first row within that matrix, (out, in), or within the tensor.
        rows: number of rows; 0 for the whole tensor.
    """

    tensor: str
    stored: str
    expert: int | None = None
    first: int = 0
    rows: int = 0

    @property
    def is_all(self) -> bool:
        """Whether the tensor is stored unchanged."""
        return not self.rows

    @property
    def place(self) -> tuple[int | slice, ...]:
        """The index of this piece in the model's tensor."""
        rows = (slice(self.first, self.first + self.rows),)
        return rows if self.expert is None else (self.expert, *rows)


@dataclass(frozen=True)
class Form:
    """The pieces of each model tensor.

    Attributes:
        pieces: by the model's tensors; none for one that the checkpoint cannot provide.
        misfit: (name in the model, name in the checkpoint) of the first one whose shape differs.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    misfit: tuple[str, str] | None = None

    @property
    def missing(self) -> list[str]:
        """The tensors that the checkpoint cannot provide."""
        return [tensor for tensor, pieces in self.pieces.items() if not pieces]

    @cached_property
    def of_stored(self) -> Mapping[str, Piece]:
        """Pieces by checkpoint tensor; if two model tensors share one, the piece of the same name wins."""
        found: dict[str, Piece] = {}
        for pieces in self.pieces.values():
            for piece in pieces:
                if piece.stored not in found or piece.tensor == piece.stored:
                    found[piece.stored] = piece
        return found


def form_of(config: Any, plan: Plan, tensors: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> Form:
    """Find how a checkpoint stores a model, from the shapes of both.

    Args:
        config: the model's config.
        plan: the checkpoint's plan.
        tensors: shapes of the model's tensors.
        stored: shapes of the checkpoint's tensors.
    """
    family = family_of(config)
    assert family is not None  # or there would be no plan
    names = module_names(family, stored)
    for tie in plan.ties:
        names.setdefault(next(iter(module_names(family, [tie.tensor]))), tie.source)
    pieces: dict[str, tuple[Piece, ...]] = {}
    misfit: tuple[str, str] | None = None
    for tensor, shape in tensors.items():
        origin = names.get(tensor)
        if origin is not None and tuple(stored.get(origin, ())) == tuple(shape):
            pieces[tensor] = (Piece(tensor, origin),)
            continue
        found = tuple(_of_experts(tensor, shape, names, stored) or _of_parts(tensor, shape, names, stored))
        if not found:
            misfit = misfit or (None if origin is None else (tensor, origin))
        pieces[tensor] = found
    return Form(pieces, misfit)


def _of_experts(
    tensor: str, shape: Sequence[int], names: Mapping[str, str], stored: Mapping[str, Sequence[int]]
) -> list[Piece]:
    """The pieces of stacked experts; none if the checkpoint lacks one or has another shape."""
    module, _, last = tensor.rpartition(".")
    if len(shape) != 3:
        return []
    found: list[Piece] = []
    for expert in range(shape[0]):
        parts = [f"{module}.{expert}.{part}.weight" for part in _EXPERT_PARTS.get(last, (last,))]
        pieces = _stacked_rows(tensor, shape[1:], parts, names, stored, expert)
        if not pieces:
            return []
        found.extend(pieces)
    return found


def _of_parts(
    tensor: str, shape: Sequence[int], names: Mapping[str, str], stored: Mapping[str, Sequence[int]]
) -> list[Piece]:
    """The pieces of a tensor whose rows are stored as several tensors; none if the checkpoint lacks one."""
    for last, parts in _PARTS.items():
        if tensor.endswith(f".{last}"):
            prefix = tensor.removesuffix(last)
            return _stacked_rows(tensor, shape, [prefix + part for part in parts], names, stored)
    return []


def _stacked_rows(
    tensor: str,
    shape: Sequence[int],
    parts: Sequence[str],
    names: Mapping[str, str],
    stored: Mapping[str, Sequence[int]],
    expert: int | None = None,
) -> list[Piece]:
    """Pieces (by their names in the module) that fill a shape row by row from the first row on; none if they do not."""
    found: list[Piece] = []
    first = 0
    for part in parts:
        origin = names.get(part, "")
        rows, *others = stored.get(origin, (0,))
        if not rows or others != list(shape[1:]):
            return []
        found.append(Piece(tensor, origin, expert, first, rows))
        first += rows
    return found if first == shape[0] else []
