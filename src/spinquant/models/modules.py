"""Names, shapes and classes of a model's modules and tensors."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from spinquant.architectures.model_classes import class_name, head_of_class, is_body, is_causal, is_known
from spinquant.errors import ArchitectureError, CheckpointError, SpinquantError
from spinquant.plan import Plan


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by name; a tied tensor is listed under each of its names."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def largest(model: nn.Module) -> int:
    """Size of the largest parameter in float32, in bytes."""
    return max((4 * parameter.numel() for parameter in model.parameters()), default=0)


# By the end of the class's name (`architectures/model_classes.py`).
_WITH_HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}


def model_class(config: Any) -> Any:
    """The transformers auto class that loads the model of a config, by the class that it names.

    That of causal LMs, unless the config names a class with another head or none, or is a vision-language model's.
    """
    # For some vision-language configs AutoModelForCausalLM gives only the language model, without the vision tower.
    # `_model_mapping.keys()` would import all models of transformers, and `in` looks up only one of the model types of
    # a config that has several.
    seeing = AutoModelForImageTextToText._model_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if seeing.get(type(config), None) is not None:
        return AutoModelForImageTextToText
    name = class_name(config)
    if is_body(name):
        return AutoModel
    return _WITH_HEADS.get(head_of_class(name) or "", AutoModelForCausalLM)


def config_of(model: Any) -> Any:
    """The config of a model, naming the model's own class; a copy if it names none or another.

    A class is loaded from the checkpoint of another one (`AutoModel` from a causal LM's), and keeps its config.
    """
    name = type(model).__name__
    if class_name(model.config) == name or not is_known(name):
        return model.config
    found = copy.copy(model.config)
    found.architectures = [name]
    return found


def check_causal(model: Any, what: str) -> None:
    """Raise ArchitectureError, naming what needs it, for a model that predicts no tokens."""
    config = getattr(model, "config", None)
    if config is not None and not is_causal(config_of(model)):
        raise ArchitectureError(
            f"{what} needs a model that predicts tokens, and {class_name(config_of(model))} has no head over the "
            "vocabulary: use the causal LM that it was made from"
        )


def output_of(output: Any) -> Tensor:
    """What a forward pass computes: logits (for question answering of starts and ends), or hidden states if no head."""
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    found = getattr(output, "logits", None)
    return output.last_hidden_state if found is None else found


def new_model(config: Any, **options: Any) -> Any:
    """A model of a config, with random weights; options: of `from_config`.

    Raises ArchitectureError for a config from which transformers makes no model, such as one with an activation
    function, a type of RoPE or a size that its class does not know.
    """
    with config_errors(config):
        return model_class(config).from_config(config, **options)


@contextmanager
def config_errors(config: Any) -> Iterator[None]:
    """Within the block, what the code of a model class raises for its config is an ArchitectureError."""
    try:
        yield
    except SpinquantError:
        raise
    except Exception as error:  # the code of some hundred classes, which raise what a wrong value leads to
        raise ArchitectureError(
            f"transformers makes and runs no model of this config (model_type {getattr(config, 'model_type', None)!r}):"
            f" {type(error).__name__}: {error}. A value in config.json is not one that the class knows"
        ) from error


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Within the block, dropout is off, which would make every forward pass another; then every mode is restored."""
    before = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def check_changeable(model: nn.Module, plan: Plan) -> None:
    """Check that the weights of a model can be changed in place, one by one.

    Raises:
        CheckpointError: a weight is not in memory.
        ArchitectureError: two names of the plan share a weight that is not tied by the config.
    """
    check_in_memory(model)
    sources = {tie.tensor: tie.source for tie in plan.ties}
    weights = (f"{name}.weight" for group in plan.linears for name in group)
    changed = {*(axis.tensor for axis in plan.axes), *(gain.norm for gain in plan.gains), *weights, plan.head}
    seen: dict[tuple[Any, int], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in changed or parameter.numel() == 0:
            continue
        other = seen.setdefault((parameter.device, parameter.data_ptr()), name)
        if sources.get(name, name) != sources.get(other, other):
            raise ArchitectureError(
                f"{other!r} and {name!r} are one weight, which would be changed twice, and the config does not tie "
                "them. Give each its own before (module.weight = torch.nn.Parameter(module.weight.detach().clone())); "
                "if they are embedding and head, model.config.tie_word_embeddings = True will do"
            )


def check_in_memory(model: nn.Module) -> None:
    """Raise CheckpointError if a weight is on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(
                f"tensor {name!r} is not in memory (meta device), so it cannot be changed: load the model without "
                "offloading (device_map), or rotate and quantize its folder, which is streamed"
            )


def module_and_attribute(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a tensor, and its attribute: "model.norm.weight" -> (the norm module, "weight")."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, attribute = module_and_attribute(model, name)
    return getattr(owner, attribute)
