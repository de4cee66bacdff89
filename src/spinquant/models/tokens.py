"""Check the model and the tokens that a caller passes from Python, before torch meets them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinquant.errors import ArchitectureError, SpinquantError


def check_model(model: Any) -> None:
    """Raise ArchitectureError for what is not a module with a transformers config, or is wrapped around one."""
    if isinstance(model, nn.Module):
        _check_bare(model)
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise ArchitectureError(
            f"the model is a {type(model).__name__}: expected a causal language model of transformers, as "
            "AutoModelForCausalLM.from_pretrained or spinquant.load returns it"
        )


def _check_bare(model: nn.Module) -> None:
    """Raise ArchitectureError for a wrapper of a model (peft, torch.compile, DataParallel), and for adapters in it."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ArchitectureError(
                f"the model has an adapter on {name}: merge it first (merge_and_unload of peft), or give the model "
                "without it and rotate the adapter's folder beside it (spinquant.rotate_adapter)"
            )
    if isinstance(model, PreTrainedModel):
        return
    inside = next((name for name, module in modules.items() if isinstance(module, PreTrainedModel)), None)
    if inside is not None:
        raise ArchitectureError(
            f"the model is a {type(model).__name__} around a {type(modules[inside]).__name__}: give the model inside, "
            f"its attribute {inside}, and wrap that again afterwards"
        )


def check_reader(model: Any) -> None:
    """Raise ArchitectureError for what is not a module that reads `input_ids`."""
    named = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    if "input_ids" not in named and all(one.kind != one.VAR_KEYWORD for one in named.values()):
        raise ArchitectureError(
            f"the model is a {type(model).__name__}: expected a causal language model, which reads input_ids"
        )


def check_tokens(tokens: Any, model: Any, what: str, error: type[SpinquantError], *, least: int = 1) -> None:
    """Check tokens before a model reads them.

    Args:
        tokens: expected int64, (rows, length).
        model: the model that reads them.
        what: the name of the tokens in messages.
        error: the kind of error to raise.
        least: smallest length.

    Raises:
        error: another type, dtype or rank, no rows, rows that are too short, or a token outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise error(f"{what} are {found}: expected a tensor of token ids, int64 (rows, length)")
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < least:
        raise error(f"{what} of shape {tuple(tokens.shape)}: expected (rows, length) with length >= {least}")
    size = vocabulary_of(model)
    low, high = (int(found) for found in tokens.aminmax())
    if low < 0 or (size is not None and high >= size):
        wrong = low if low < 0 else high
        raise error(f"token {wrong} is outside the model's vocabulary of {size} tokens: wrong tokenizer or model")


def vocabulary_of(model: Any) -> int | None:
    """Number of rows of a model's token embedding, or the vocabulary of its config; None if neither is known."""
    table = getattr(model.get_input_embeddings(), "weight", None) if hasattr(model, "get_input_embeddings") else None
    if isinstance(table, Tensor) and table.ndim == 2:
        return table.shape[0]
    return getattr(getattr(model, "config", None), "vocab_size", None)
