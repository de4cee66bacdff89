"""Backend: fuse rotations into the weights of an nn.Module, in place, one tensor at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from spinquant.architectures import FamilyLike, make_plan
from spinquant.compute.workspace import kept_whole
from spinquant.models.modules import check_in_memory, largest, module_and_attribute, named_tensor, tensor_shapes
from spinquant.plan import Plan
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.fuse import fuse_in_place
from spinquant.rotations.mean_preserving import check_mean_preserving
from spinquant.rotations.rotation import Rotation


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
    check_mean_preserving(plan, rotations)
    if "residual" in rotations:
        untie(model, plan)
    parameters = dict(model.named_parameters())
    gains = {gain.norm: named_tensor(model, gain.norm).detach().clone() for gain in plan.gains}
    with kept_whole(), kernels_for(largest(model)):
        for done, (name, parameter) in enumerate(parameters.items()):
            fuse_in_place(name, parameter, plan, gains, rotations, precision=precision)
            if progress:
                progress(done + 1, len(parameters))


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
