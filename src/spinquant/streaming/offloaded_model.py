"""Offloaded model: a transformers model on the meta device, whose blocks are loaded from a checkpoint while they run.

Tensors that the model stacks and the checkpoint stores one by one (experts) are stacked when they are loaded
(`architectures/checkpoint_mapping.py`).

The model is created with every `torch.empty` on the meta device: modules allocate their weights that way, and nothing
else. Whatever else a model computes at creation (rotary frequencies, scales of embeddings) is in memory.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights

from spinquant.architectures import family_of, module_names
from spinquant.architectures.checkpoint_mapping import Form, Piece, form_of
from spinquant.calibration.sequential import body_of
from spinquant.checkpoint.reader import Stored
from spinquant.compute.workspace import give_back
from spinquant.errors import CheckpointError
from spinquant.models.modules import module_and_attribute, new_model
from spinquant.plan import Plan
from spinquant.rotations.fuse_module import plan_of


class Weights(Protocol):
    """Protocol of a checkpoint that a model is loaded from: tensors by name, each as a whole or in parts."""

    @property
    def folder(self) -> Path:
        """The model folder, for error messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Entries of all tensors, by name."""
        ...

    def whole(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        ...

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Rows of a tensor in order, each part with the number of its first row; the next part may overwrite it."""
        ...


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def hollow_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, in evaluation mode, with its weights on the meta device."""
    with _EmptyOnMeta(), no_init_weights(), torch.random.fork_rng(devices=[]):
        return new_model(copy.deepcopy(config), dtype=dtype).eval()  # a copy: transformers writes the dtype into it


def unfillable(model: Any, plan: Plan) -> str | None:
    """Why the blocks of a model cannot be run one by one; None if they can."""
    if body_of(model) is model and plan.heads:
        return "the model's class has no base model without the head, so its blocks cannot be run one by one"
    return None


def check_stored(model: Any, source: Weights, plan: Plan) -> None:
    """Check that a checkpoint holds the weights that its config describes.

    Args:
        model: the model of the config, whose weights may be on the meta device.
        source: the checkpoint.
        plan: its plan.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config implies, has no place in the model, or
            holds integers.
    """
    form, expected = form_in(model, source, plan), model.state_dict()
    if form.misfit is not None:
        tensor, stored = form.misfit
        raise CheckpointError(
            f"tensor {stored!r} of {source.folder} has shape {source.tensors[stored].entry.shape}, and by its config "
            f"(config.json) it has {tuple(expected[tensor].shape)}: one of the two is not of this model"
        )
    if form.missing:
        first = form.missing[0]
        raise CheckpointError(
            f"{source.folder} has no tensor {first!r} (and {len(form.missing) - 1} others), nor tensors that it is "
            f"made of, and a model of its config (config.json) has it, of shape {tuple(expected[first].shape)}: the "
            "checkpoint is incomplete, or the config is of another model. Download both again"
        )
    _check_placed(model, source, plan, {piece.stored for pieces in form.pieces.values() for piece in pieces})
    for tensor, pieces in form.pieces.items():
        for piece in pieces if expected[tensor].is_floating_point() else ():
            found = source.tensors[piece.stored].dtype
            if not found.is_floating_point:
                raise CheckpointError(
                    f"tensor {piece.stored!r} of {source.folder} has dtype {found}: expected floating-point numbers"
                )


def _check_placed(model: Any, source: Weights, plan: Plan, placed: Collection[str]) -> None:
    """Raise CheckpointError for a tensor of a checkpoint that the model of its config would not read."""
    family = family_of(model.config)
    assert family is not None  # or there would be no plan
    state = model.state_dict()
    for inside, name in module_names(family, source.tensors).items():
        known = name in placed or name in plan.predictors or inside in state
        if not known and not any(re.fullmatch(pattern, inside) for pattern in family.ignored):
            raise CheckpointError(
                f"tensor {name!r} of {source.folder} has no place in a model of its config (config.json), which would "
                "not read it: one of the two is not of this model"
            )


def form_in(model: Any, source: Weights, plan: Plan) -> Form:
    """How the tensors of a model are stored in a checkpoint; plan: of the checkpoint."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return form_of(model.config, plan, shapes, {name: stored.entry.shape for name, stored in source.tensors.items()})


class OnDisk:
    """A model whose weights are on disk (`sequential.Home`); each block is loaded within its context manager.

    plan: of the checkpoint. The attribute `plan` is that of the model, whose tensors may have other names and may be
    stacked. dtype: of the model. device: where loaded weights are put.
    """

    def __init__(
        self, config: Any, plan: Plan, source: Weights, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.model = hollow_model(config, dtype)
        self.plan, self.form = plan_of(self.model), form_in(self.model, source, plan)
        self._source, self._dtype, self._device = source, dtype, device
        self._dtypes = _dtypes(self.model, dtype)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def widen(self) -> None:
        """Load every floating tensor in the model's dtype, also those that the class keeps in float32 (routers)."""
        self._dtypes = {n: self._dtype if kept.is_floating_point else kept for n, kept in self._dtypes.items()}

    @contextmanager
    def outside(self, tokens: Tensor) -> Iterator[None]:
        """All weights but those of the decoder blocks and the head; of the embedding only the rows of these tokens."""
        elsewhere = tuple(f"{module}." for module in (*self.plan.blocks, *self.plan.heads))
        names = [n for n in self.model.state_dict() if not n.startswith(elsewhere)]
        table = self.model.get_input_embeddings().weight
        looked_up = next((name for name in names if _get(self.model, name) is table), None)
        with self._filled([name for name in names if name != looked_up]):
            try:
                if looked_up is not None:
                    _set(self.model, looked_up, self._rows(looked_up, tokens))
                yield
            finally:
                if looked_up is not None:
                    _set(self.model, looked_up, _get(self.model, looked_up).to("meta"))

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """The weights of one block. Buffers that are registered meanwhile are removed with them."""
        block = self.model.get_submodule(name)
        before = [(module, set(module._buffers)) for module in block.modules()]
        try:
            with self._filled([n for n in self.model.state_dict() if n.startswith(f"{name}.")]):
                yield
        finally:
            for module, known in before:
                for added in set(module._buffers) - known:
                    del module._buffers[added]
            give_back()

    @contextmanager
    def head(self) -> Iterator[None]:
        """The weight and bias of the head."""
        heads = tuple(f"{head}." for head in self.plan.heads)
        with self._filled([name for name in self.model.state_dict() if name.startswith(heads)]):
            yield

    @contextmanager
    def _filled(self, names: Sequence[str]) -> Iterator[None]:
        """Within the `with` block, the named weights are loaded; afterwards they are on the meta device again."""
        try:
            for name in names:
                _set(self.model, name, self._whole(name).to(self._device))
            yield
        finally:
            for name in names:
                _set(self.model, name, _get(self.model, name).to("meta"))

    def _whole(self, name: str) -> Tensor:
        """A tensor of the model; a stack is filled with one tensor of the checkpoint at a time."""
        pieces = self._pieces(name)
        if pieces[0].is_all:
            found = self._source.whole(pieces[0].stored)
            return found.to(self._dtypes[name]) if found.is_floating_point() else found
        stack = torch.empty(_get(self.model, name).shape, dtype=self._dtypes[name])
        for piece in pieces:
            stack[piece.place] = self._source.whole(piece.stored)
        return stack

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        pieces = self.form.pieces[name]
        if not pieces:
            raise CheckpointError(f"{self._source.folder} has no tensor {name!r}")
        return pieces

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        """An embedding with the rows of these tokens; the others are virtual memory that is never touched."""
        wanted = tokens.unique().cpu()
        origin = self._pieces(name)[0].stored
        shape = self._source.tensors[origin].entry.shape
        memory = np.zeros(torch.Size(shape).numel() * self._dtype.itemsize, dtype=np.uint8)
        table = torch.from_numpy(memory).view(self._dtype).view(shape)
        for first, rows in self._source.parts(origin):
            here = wanted[(wanted >= first) & (wanted < first + len(rows))]
            table[here] = rows[here - first].to(self._dtype)
        if torch.device(self._device).type != "cpu":
            table = table.to(self._device)
        return table


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Dtypes of tensors when transformers loads a model in `dtype`: some classes keep some of them in float32."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return {
        name: torch.float32 if any(pattern.search(name) for pattern in kept) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def _get(model: nn.Module, name: str) -> Tensor:
    owner, attribute = module_and_attribute(model, name)
    return getattr(owner, attribute)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, attribute = module_and_attribute(model, name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor.detach(), requires_grad=False)
