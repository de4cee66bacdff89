"""Run a model one decoder block at a time (sequential calibration).

A block is called with hidden states and keyword arguments (positions, masks) that the model computes. They are recorded
by running the model with every block replaced by the identity: embeddings and masks are computed, the blocks' weights
are not used. Samples have the same length, so most arguments are the same for all of them; those that differ (the
embeddings that the shared blocks of Zamba read, token ids) are kept for each sample.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import getsource, signature
from textwrap import dedent
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinquant.calibration.hidden_states import HiddenStates
from spinquant.compute.dtypes import HALVES
from spinquant.errors import CalibrationError
from spinquant.models.capture import captured, device_of
from spinquant.online.firing import STANDS_IN


@dataclass(frozen=True)
class BlockCalls:
    """Inputs of the blocks: hidden states before the first, (1, length, width) each, and arguments by block and sample.

    The arguments of samples that do not differ are one object.
    """

    hidden: HiddenStates
    arguments: Mapping[str, Sequence[Mapping[str, Any]]]


class Home(Protocol):
    """Where a model's weights are stored; each context manager makes some of them available."""

    @property
    def model(self) -> Any:
        """The transformers model, whose weights are available within the context managers below."""
        ...

    def outside(self, tokens: Tensor) -> AbstractContextManager[object]:
        """All weights but those of the decoder blocks and the head; of the embedding the rows of these tokens."""
        ...

    def block(self, name: str) -> AbstractContextManager[object]:
        """The weights of one decoder block."""
        ...

    def head(self) -> AbstractContextManager[object]:
        """The weight of the head."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A model that is in memory as a whole.

    blocks: names of its decoder blocks. device: where a block is moved to for work, by default none. dtype: what
    weights in half precision are cast to for work, by default none; numbers written into one have to be exact in its
    own dtype.
    """

    model: Any
    blocks: Sequence[str] = ()
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def outside(self, tokens: Tensor) -> AbstractContextManager[object]:
        inside = {id(p) for name in self.blocks for p in self.model.get_submodule(name).parameters()}
        return self._cast([p for p in self.model.parameters() if id(p) not in inside])

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        block = self.model.get_submodule(name)
        usual = device_of(block)
        block.to(self.device or usual)
        try:
            with self._cast(list(block.parameters())):
                yield
        finally:
            block.to(usual)

    @contextmanager
    def _cast(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within the block, parameters in half precision have the dtype of work."""
        usual = {p: p.dtype for p in parameters if self.dtype is not None and p.dtype in HALVES}
        try:
            for parameter in usual:
                parameter.data = parameter.data.to(self.dtype)
            yield
        finally:
            for parameter, dtype in usual.items():
                parameter.data = parameter.data.to(dtype)

    def head(self) -> AbstractContextManager[object]:
        return nullcontext()


def body_of(model: Any) -> Any:
    """The base model without the head, which turns tokens into hidden states; the model itself if it has none."""
    if model.base_model is not model:
        return model.base_model
    # Text-only Llama 4 models lack the attribute that base_model_prefix names.
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


@torch.no_grad()
def block_calls(model: Any, blocks: Sequence[str], tokens: Tensor, hidden: HiddenStates | None = None) -> BlockCalls:
    """Record the inputs of the decoder blocks for each row of `tokens`, int64 (samples, length).

    hidden: empty container that receives the states.

    Raises CalibrationError for a block that is called more than once in a pass.
    """
    hidden = HiddenStates() if hidden is None else hidden
    arguments: dict[str, list[Mapping[str, Any]]] = {name: [] for name in blocks}
    sample = 0

    def keep(name: str, states: Tensor, others: Mapping[str, Any]) -> Tensor:
        before = arguments[name]
        if len(before) > sample:
            raise CalibrationError(
                f"{name} is called more than once in a pass through a {type(model).__name__}, so the model cannot run "
                "block by block: round to nearest without clip ratios, which needs no calibration"
            )
        if name == blocks[0]:
            hidden.append(states.detach().clone())
        own = {key: value for key, value in others.items() if not before or not _same(value, before[0].get(key))}
        before.append({**before[0], **own} if before and own else before[0] if before else own)
        return states

    with _replaced(model, blocks, keep):
        for sample, row in enumerate(tokens.split(1)):  # noqa: B007 - read by `keep`
            body_of(model)(row.to(device_of(model)), use_cache=False)
    return BlockCalls(hidden, arguments)


@torch.no_grad()
def run_block(block: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The block's output for hidden states (batch, length, width), without gradients."""
    return block_output(block, states, arguments)


def block_output(block: nn.Module, states: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The block's output for hidden states (batch, length, width)."""
    device = device_of(block)
    moved = {name: _to(value, device) for name, value in arguments.items()}
    output = block(states.to(device), **moved)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def after_blocks(model: Any, blocks: Sequence[str], states: Tensor) -> Tensor:
    """The head's input, from the last block's output, (batch, length, width): usually the final norm."""
    with _replaced(model, blocks, lambda name, hidden, others: states):
        placeholder = torch.zeros(states.shape[:2], dtype=torch.int64, device=device_of(model))
        return body_of(model)(placeholder, use_cache=False).last_hidden_state


def logits_after(model: Any, blocks: Sequence[str], states: Tensor) -> Tensor:
    """The logits, from the last block's output, (batch, length, width): final norm, head, and what scales its output.

    The weights outside of the blocks and of the head have to be available.
    """
    with _replaced(model, blocks, lambda name, hidden, others: states):
        placeholder = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        return model(input_ids=placeholder, use_cache=False).logits


@contextmanager
def _replaced(
    model: nn.Module, blocks: Sequence[str], function: Callable[[str, Tensor, Mapping[str, Any]], Tensor]
) -> Iterator[None]:
    """Within the `with` block, every decoder block returns function(name, hidden states, keyword arguments)."""

    def stand_in(name: str) -> Callable[..., Any]:
        called = list(signature(modules[name].forward).parameters)[1:]
        values = _values_returned(type(modules[name]))

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(called):
                raise CalibrationError(
                    f"{name} is called with {len(args) + 1} positional arguments: expected hidden states and at most "
                    f"{', '.join(called)}"
                )
            found = function(name, hidden_states, {**dict(zip(called, args, strict=False)), **kwargs})
            return found if not values else (found, *[None] * (values - 1))

        setattr(forward, STANDS_IN, True)
        return forward

    modules = {name: model.get_submodule(name) for name in blocks}
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = stand_in(name)
        yield
    finally:
        for name, module in modules.items():
            forward = before[name]
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@cache
def _values_returned(block: type[nn.Module]) -> int:
    """Length of the tuple that a block's forward returns; 0 if it returns hidden states alone.

    Read from its source code: without weights it cannot be run.
    """
    try:
        code = ast.parse(dedent(getsource(block.forward)))
    except (OSError, TypeError, SyntaxError):  # no source at hand
        return 0
    given = [node.value for node in ast.walk(code) if isinstance(node, ast.Return)]
    return max((len(value.elts) for value in given if isinstance(value, ast.Tuple)), default=0)


def check_finite_weights(block: nn.Module, name: str) -> None:
    """Raise CalibrationError, naming the tensor, for a block with a weight that is not finite."""
    for child, weight in block.named_parameters():
        if not weight.isfinite().all():
            raise CalibrationError(
                f"tensor '{name}.{child}' holds values that are NaN or infinite: the checkpoint is broken, download it "
                "again"
            )


def check_finite_output(
    block: nn.Module, name: str, states: Tensor, arguments: Mapping[str, Any], output: Tensor
) -> None:
    """Raise CalibrationError, naming a weight or the first module inside the block, when its output is not finite."""
    if output.isfinite().all():
        return
    check_finite_weights(block, name)
    if not states.isfinite().all():
        raise CalibrationError(
            f"the input of {name} is not finite (NaN or Inf): the weights before it (for a first layer, the embedding) "
            "are damaged"
        )
    inside = [child for child, module in block.named_modules() if child and not any(True for _ in module.children())]
    with captured(block, inside) as outputs:
        run_block(block, states, arguments)
    guilty = next((child for child in outputs if not outputs[child].isfinite().all()), None)
    where = f"{name}.{guilty}" if guilty else name
    raise CalibrationError(
        f"the output of {where} is not finite (NaN or Inf) on the text: its weights are damaged, or it overflows "
        f"{output.dtype}; try --dtype bfloat16 or float32"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether arguments of two samples have equal tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and (one is other or torch.equal(one, other))
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        equal = isinstance(other, Mapping) and one.keys() == other.keys()
        return equal and all(_same(one[key], other[key]) for key in one)
    # Of other objects (caches) only the kind counts.
    return type(one) is type(other) and (one == other or not isinstance(one, bool | int | float | str))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_to(item, device) for item in value) if isinstance(value, tuple) else value
