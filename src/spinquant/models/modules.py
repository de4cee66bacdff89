"""Names, shapes and classes of a model's modules and tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from spinquant.errors import ArchitectureError, CheckpointError, SpinquantError


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by name; a tied tensor is listed under each of its names."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def largest(model: nn.Module) -> int:
    """Size of the largest parameter in float32, in bytes."""
    return max((4 * parameter.numel() for parameter in model.parameters()), default=0)


def model_class(config: Any) -> Any:
    """The transformers auto class that loads the model of a config: causal LM or vision-language model."""
    # For some vision-language configs AutoModelForCausalLM gives only the language model, without the vision tower.
    # `_model_mapping.keys()` would import all models of transformers, and `in` looks up only one of the model types of
    # a config that has several.
    seeing = AutoModelForImageTextToText._model_mapping  # pyright: ignore[reportAttributeAccessIssue]
    return AutoModelForCausalLM if seeing.get(type(config), None) is None else AutoModelForImageTextToText


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


def check_in_memory(model: nn.Module) -> None:
    """Raise CheckpointError if a weight is on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(
                f"tensor {name!r} is not in memory (meta device): load the model without offloading before rotating it"
            )


def module_and_attribute(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a tensor, and its attribute: "model.norm.weight" -> (the norm module, "weight")."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, attribute = module_and_attribute(model, name)
    return getattr(owner, attribute)
