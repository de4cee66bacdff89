"""Trace a tiny model: inputs and outputs of all modules in order of execution, and responses to perturbations."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.models.cache_names import cache_of


@dataclass(frozen=True)
class TracedCall:
    """The first call of a module: its input and output, (B, T, ..), and the names of its keyword arguments."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    keywords: frozenset[str]


def trace(model: Any, tokens: Tensor) -> dict[str, TracedCall]:
    """Record the first call of every module with a tensor input and a floating-point output, in order of execution.

    A module comes after its submodules.
    """
    found: dict[str, TracedCall] = {}
    names = {module: name for name, module in model.named_modules() if name}
    handles = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, result = _first_tensor((*args, *kwargs.values())), _first_tensor([output])
        if names[module] not in found and given is not None and result is not None and result.is_floating_point():
            # A copy, because some classes change tensors in place.
            given, result = (by_sequence(x, tokens.shape[0]) for x in (before[module], result.detach().clone()))
            call = TracedCall(names[module], module, given, result, frozenset(kwargs))
            found[call.name] = call

    before: dict[nn.Module, Tensor] = {}

    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _first_tensor((*args, *kwargs.values()))
        if given is not None and module not in before:
            before[module] = given.detach().clone()

    for module in names:
        handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        run(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def by_sequence(x: Tensor, batch: int) -> Tensor:
    """Reshape (B * T, width), of a module that flattens the batch, to (B, T, width)."""
    return x.unflatten(0, (batch, -1)) if x.ndim == 2 and x.shape[0] % batch == 0 and x.is_floating_point() else x


@torch.no_grad()
def run(model: Any, tokens: Tensor) -> Tensor:
    """Logits of whole sequences, in float64 arithmetic."""
    with Float64Arithmetic():
        return model(input_ids=tokens, use_cache=False).logits


def silent_parts(model: Any, calls: Mapping[str, TracedCall]) -> list[str]:
    """The outermost modules with parameters of which neither they nor a submodule was called."""
    embedding = model.get_input_embeddings()
    called = {*calls, *(name for name, module in model.named_modules() if module is embedding)}
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(part == name or part.startswith(f"{name}.") for part in called)
        if not name or inside or name.startswith(tuple(f"{part}." for part in found)):
            continue
        if any(True for _ in module.parameters()):
            found.append(name)
    return found


@torch.no_grad()
def cached_layers(model: Any, tokens: Tensor, count: int) -> list[bool]:
    """Whether each layer's keys are in the KV cache; all True if the cache has no such record."""
    with Float64Arithmetic():
        cache = cache_of(model(input_ids=tokens, use_cache=True))
    found = [getattr(layer, "keys", None) is not None for layer in getattr(cache, "layers", ())]
    return found if len(found) == count and any(found) else [True] * count


@contextmanager
def _nudged(module: nn.Module, size: float, tokens: slice) -> Iterator[None]:
    """Within the `with` block, add `size` to channel b of the module's output, at these tokens of sequence b."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.shape[:-1].numel() % output.shape[-1]:
            return output  # a router or an expert, which does not get every token
        index = torch.arange(output.shape[-1])
        nudged = output.clone()
        by_sequence(nudged, len(index))[index, tokens, index] += size
        return nudged

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def answers(
    model: Any,
    linear: TracedCall,
    readers: Sequence[TracedCall],
    tokens: Tensor,
    size: float,
    *,
    where: slice = slice(None),
) -> dict[str, Tensor]:
    """Change of the readers' inputs when a linear's outputs are perturbed one by one: (rows, T, width) by name.

    tokens: the first traced sequence, (1, T). where: the tokens whose outputs are perturbed.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(name, args[0].detach().clone())

        return hook

    handles = [reader.module.register_forward_pre_hook(keep(reader.name)) for reader in readers]
    try:
        with _nudged(linear.module, size, where):
            run(model, tokens.expand(linear.output.shape[-1], -1).contiguous())
    finally:
        for handle in handles:
            handle.remove()
    rows = linear.output.shape[-1]
    moved = {reader.name: by_sequence(found[reader.name], rows) for reader in readers if reader.name in found}
    plain = {reader.name: reader.input[:1] for reader in readers}
    return {name: x - plain[name] for name, x in moved.items() if x.shape[1:] == plain[name].shape[1:]}


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        inside = tuple(value.values()) if isinstance(value, Mapping) else value
        if isinstance(inside, tuple | list) and (inner := _first_tensor(inside)) is not None:
            return inner
    return None
