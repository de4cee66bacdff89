"""Backend: fuse rotations into the weights of an nn.Module, in place, one tensor at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from spinquant.architectures import FamilyLike, make_plan
from spinquant.errors import CheckpointError
from spinquant.plan import Plan
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.fuse import fuse_in_place
from spinquant.rotations.mean_preserving import check_centred
from spinquant.rotations.rotation import Rotation
from spinquant.workspace import kept_whole


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters, a tied tensor under each of its names."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def largest(model: nn.Module) -> int:
    """Bytes that the largest parameter has in float32."""
    return max((4 * parameter.numel() for parameter in model.parameters()), default=0)


def plan_of(model: Any, *, family: FamilyLike | None = None) -> Plan:
    """The plan of a loaded transformers model. family and errors: as of `make_plan`."""
    return make_plan(model.config, tensor_shapes(model), family=family)


@torch.no_grad()
def fuse_module(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    *,
    precision: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fuse gains and rotations into the model's weights, in place.

    Tied tensors that a rotation parts are untied, and the config says so. `progress(done, total)` counts tensors.
    Extra memory: the untied head, and a few copies of the largest linear of a layer. Raises CheckpointError, before
    anything is changed, for weights that are not in memory (on the meta device).
    """
    if not rotations:
        return
    check_in_memory(model)
    check_centred(plan, rotations)
    if "residual" in rotations:
        untie(model, plan)
    parameters = dict(model.named_parameters())
    gains = {gain.norm: named_tensor(model, gain.norm).detach().clone() for gain in plan.gains}
    with kept_whole(), kernels_for(largest(model)):
        for done, (name, parameter) in enumerate(parameters.items()):
            fuse_in_place(name, parameter, plan, gains, rotations, precision=precision)
            if progress:
                progress(done + 1, len(parameters))


def model_class(config: Any) -> Any:
    """The transformers class that makes and loads the model of a config: causal LMs, or those that see too."""
    # For some configs the class for causal LMs is that of the language part alone, which would lose what sees.
    seeing = AutoModelForImageTextToText._model_mapping.keys()  # pyright: ignore[reportAttributeAccessIssue]
    return AutoModelForImageTextToText if type(config) in seeing else AutoModelForCausalLM


def check_in_memory(model: nn.Module) -> None:
    """Raise CheckpointError for weights on the meta device."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(
                f"tensor {name!r} is not in memory (meta device): load the model without offloading before rotating it"
            )


def untie(model: Any, plan: Plan) -> None:
    """Give every tied tensor of the plan its own memory; the config then loads as untied."""
    for tie in plan.ties:
        owner, attribute = module_and_attribute(model, tie.tensor)
        shared = getattr(owner, attribute)
        source_owner, source_attribute = module_and_attribute(model, tie.source)
        if shared is getattr(source_owner, source_attribute):
            setattr(owner, attribute, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    if plan.ties:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        # transformers consults this list when it saves and when weights are tied again after loading.
        for tie in plan.ties:
            getattr(model, "all_tied_weights_keys", {}).pop(tie.tensor, None)


def module_and_attribute(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """("model.norm.weight") -> (the norm module, "weight")."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, attribute = module_and_attribute(model, name)
    return getattr(owner, attribute)
