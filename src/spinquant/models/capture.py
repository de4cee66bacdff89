"""Capture activations and calls of modules by forward hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter, on which it takes its inputs."""
    return next(model.parameters()).device


@contextmanager
def watching_calls(
    model: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within the block, call `seen(name, first input, output)` after every call of named modules, with gradients."""

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen(name, args[0], output)

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Raised in a hook to end the forward pass once everything is captured."""


@contextmanager
def captured(
    model: nn.Module, names: Iterable[str], *, inputs: bool = False, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Within the block, capture the output (or first input) of named modules, detached.

    Args:
        model: the model that runs within the block.
        names: names of modules.
        inputs: capture the first positional input instead of the output.
        stop: leave the block as soon as the last of `names` is captured.

    Yields:
        A dict that is filled while the model runs: tensors by module name, in order of execution; those of the last
        call, if a module is called several times.
    """
    found: dict[str, Tensor] = {}
    names = list(names)

    def keep(name: str):
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            value = args[0] if inputs else output
            found[name] = (value[0] if isinstance(value, tuple) else value).detach()
            if stop and name == names[-1]:
                raise _Stop

        return hook

    handles = []
    for name in names:
        module = model.get_submodule(name)
        register = module.register_forward_pre_hook if inputs else module.register_forward_hook
        handles.append(register(keep(name)))
    try:
        yield found
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class CapturedCall:
    """The arguments of a module's last call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def watched_calls(
    model: nn.Module, names: Iterable[str], watch: Callable[[str, tuple[Any, ...]], object]
) -> Iterator[None]:
    """Within the block, call `watch(name, positional_args)` before each call of the named modules."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            watch(name, args)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_call(module: nn.Module) -> Iterator[CapturedCall]:
    """Within the block, capture the arguments of a module's last call, before other hooks change them."""
    call = CapturedCall()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.args, call.kwargs = args, dict(kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield call
    finally:
        handle.remove()
