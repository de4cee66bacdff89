"""A transformers model without weights, whose parts are filled from a checkpoint while they are at work.

The model is made with every `torch.empty` on the meta device: that is where modules get the memory of their weights,
and nothing else. Whatever else a model computes when it is made (rotary frequencies, scales of embeddings) is real.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spinquant.errors import CheckpointError
from spinquant.module import model_class, module_and_attribute
from spinquant.source import Stored


class Weights(Protocol):
    """What a model is filled from: tensors by name, each as a whole."""

    @property
    def folder(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def whole(self, name: str) -> Tensor: ...


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def hollow_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config in evaluation mode, its large weights on the meta device."""
    with _EmptyOnMeta(), torch.random.fork_rng(devices=[]):
        return model_class(config).from_config(config, dtype=dtype).eval()


def unfillable(model: nn.Module, source: Weights, ties: Mapping[str, str]) -> str | None:
    """The first tensor of a model that a checkpoint does not hold under its name and shape; None where it holds all."""
    for name, tensor in model.state_dict().items():
        stored = source.tensors.get(name) or source.tensors.get(ties.get(name, ""))
        if stored is None or stored.entry.shape != tuple(tensor.shape):
            return name
    return None


@contextmanager
def filled(
    model: Any, names: Sequence[str], source: Weights, ties: Mapping[str, str], dtype: torch.dtype
) -> Iterator[None]:
    """Within the block, the named weights of a hollow model are there, in the dtype. Afterwards it is hollow again.

    ties: names of tensors that a checkpoint does not hold, with the names of those that they share.
    """
    try:
        for name in names:
            if name not in source.tensors and name not in ties:
                raise CheckpointError(f"{source.folder} has no tensor {name!r}")
            found = source.whole(name if name in source.tensors else ties[name])
            _set(model, name, found.to(dtype) if found.is_floating_point() else found)
        yield
    finally:
        for name in names:
            owner, attribute = module_and_attribute(model, name)
            _set(model, name, getattr(owner, attribute).to("meta"))


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, attribute = module_and_attribute(model, name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor.detach(), requires_grad=False)
