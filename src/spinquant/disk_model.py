"""A transformers model without weights, whose parts are filled from a checkpoint while they are at work.

The model is made with every `torch.empty` on the meta device: that is where modules get the memory of their weights,
and nothing else. Whatever else a model computes when it is made (rotary frequencies, scales of embeddings) is real.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spinquant.errors import CheckpointError
from spinquant.module import model_class, module_and_attribute
from spinquant.plan import Plan
from spinquant.source import Stored
from spinquant.workspace import give_back


class Weights(Protocol):
    """What a model is filled from: tensors by name, each as a whole or in parts."""

    @property
    def folder(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def whole(self, name: str) -> Tensor: ...

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Rows of a tensor in order, each part with the number of its first row; the next part may overwrite it."""
        ...


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def hollow_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config in evaluation mode, its large weights on the meta device."""
    with _EmptyOnMeta(), torch.random.fork_rng(devices=[]):
        return model_class(config).from_config(config, dtype=dtype).eval()


def unfillable(model: Any, source: Weights, plan: Plan) -> str | None:
    """Why the blocks of a model cannot be filled from a checkpoint and run one by one; None where they can."""
    if model.base_model is model:
        return "the model's class has no base model, whose blocks could be run one by one"
    for name, tensor in model.state_dict().items():
        stored = source.tensors.get(name) or source.tensors.get(plan.tied.get(name, ""))
        if stored is None or stored.entry.shape != tuple(tensor.shape):
            return f"the model's class keeps {name!r} in another form than the checkpoint"
    return None


class OnDisk:
    """The blocks of a hollow model (`blocks.Home`), each filled while it is at work.

    dtype: of the model; device: where what is filled is put.
    """

    def __init__(
        self, config: Any, plan: Plan, source: Weights, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.model = hollow_model(config, dtype)
        self._plan, self._source, self._dtype, self._device = plan, source, dtype, device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    @contextmanager
    def outside(self, tokens: Tensor) -> Iterator[None]:
        """All but the decoder blocks and the head; of the embedding the rows of these tokens."""
        blocks = tuple(f"{block}." for block in self._plan.blocks)
        names = [n for n in self.model.state_dict() if not n.startswith(blocks) and n != self._plan.head]
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
        """The weights of one block. What is registered with its modules meanwhile goes with them."""
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
        """The weight of the head."""
        with self._filled([self._plan.head]):
            yield

    @contextmanager
    def _filled(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, the named weights are there. Afterwards the model is hollow again."""
        try:
            for name in names:
                found = self._source.whole(self._origin(name))
                found = found.to(self._dtype) if found.is_floating_point() else found
                _set(self.model, name, found.to(self._device))
            yield
        finally:
            for name in names:
                _set(self.model, name, _get(self.model, name).to("meta"))

    def _origin(self, name: str) -> str:
        if name not in self._source.tensors and name not in self._plan.tied:
            raise CheckpointError(f"{self._source.folder} has no tensor {name!r}")
        return name if name in self._source.tensors else self._plan.tied[name]

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        """A table with the rows of these tokens; the others are memory that is never touched, and so not there."""
        wanted = tokens.unique().cpu()
        shape = self._source.tensors[self._origin(name)].entry.shape
        memory = np.zeros(torch.Size(shape).numel() * self._dtype.itemsize, dtype=np.uint8)
        table = torch.from_numpy(memory).view(self._dtype).view(shape)
        for first, rows in self._source.parts(self._origin(name)):
            here = wanted[(wanted >= first) & (wanted < first + len(rows))]
            table[here] = rows[here - first].to(self._dtype)
        if torch.device(self._device).type != "cpu":
            table = table.to(self._device)
        return table


def _get(model: nn.Module, name: str) -> Tensor:
    owner, attribute = module_and_attribute(model, name)
    return getattr(owner, attribute)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, attribute = module_and_attribute(model, name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor.detach(), requires_grad=False)
