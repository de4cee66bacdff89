"""Fuse rotations into the weights of a model in memory, in place, one tensor at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from spinquant.architectures import FamilyLike, make_plan, use_family
from spinquant.compute.workspace import kept_whole
from spinquant.models.modules import (
    check_changeable,
    config_of,
    largest,
    module_and_attribute,
    named_tensor,
    tensor_shapes,
)
from spinquant.models.tokens import check_model
from spinquant.plan import Plan
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.fuse import fuse_in_place
from spinquant.rotations.mean_preserving import check_mean_preserving
from spinquant.rotations.rotation import Transform


def plan_of(model: Any, *, family: FamilyLike | None = None) -> Plan:
    """Make the rotation plan of a transformers model in memory.

    Args:
        model: a transformers causal LM, its body or a classifier made from it, or a vision-language model; the meta
            device will do.
        family: a family file (path, or from `read_family`) that is used instead of the built-in tables.

    Returns:
        The plan, with the names of the module's parameters.

    Raises:
        ArchitectureError: as `make_plan`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import plan_of
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> plan = plan_of(LlamaForCausalLM(config))
        >>> plan.family, plan.blocks, plan.attentions[0]
        ('llama', ('model.layers.0', 'model.layers.1'), 'model.layers.0.self_attn')
    """
    check_model(model)
    use_family(model.config, family)
    return make_plan(config_of(model), tensor_shapes(model))


@torch.no_grad()
def fuse_module(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Transform],
    *,
    precision: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fuse norm gains and offline rotations into the weights of a model, in place.

    R3, and the online half of R4, are not part of the weights: `attach` adds them. Tied tensors that a rotation parts
    (head and embedding) are untied, and the config is updated. Extra memory: the untied head, and a few copies of the
    largest linear of a layer.

    Args:
        model: the model that the plan was made from.
        plan: its plan, from `plan_of`.
        rotations: rotations by space name, from `make_rotations` or learned; empty changes nothing.
        precision: dtype of the arithmetic; by default float32 for half-precision weights, else the weight's own.
        progress: called as `progress(done, total)` after each tensor.

    Raises:
        CheckpointError: weights are not in memory (meta device). Nothing has been changed then.
        ArchitectureError: two tensors share a weight that the config does not tie. Nothing has been changed then.
        RotationError: a rotation is not mean-preserving where norms subtract the mean (nothing has been changed then),
            does not fit a tensor, or a norm's gain is zero where its bias is not.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import RotationSpec, fuse_module, make_rotations, plan_of
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config).double().eval(), torch.arange(8)[None]
        >>> before = model(ids).logits
        >>> plan = plan_of(model)
        >>> fuse_module(model, plan, make_rotations(plan, RotationSpec("R1,R2")))
        >>> torch.allclose(model(ids).logits, before, atol=1e-4)
        True
    """
    if not rotations:
        return
    check_changeable(model, plan)
    check_mean_preserving(plan, rotations)
    if plan.unties(rotations):
        untie(model, plan)
    parameters = dict(model.named_parameters())
    gains = {gain.norm: named_tensor(model, gain.norm).detach().clone() for gain in plan.gains}
    with kept_whole(), kernels_for(largest(model)):
        for done, (name, parameter) in enumerate(parameters.items()):
            fuse_in_place(name, parameter, plan, gains, rotations, precision=precision)
            if progress:
                progress(done + 1, len(parameters))


def untie(model: Any, plan: Plan) -> None:
    """Give every tied tensor of the plan memory of its own, and set `tie_word_embeddings` to False."""
    for tie in plan.ties:
        owner, attribute = module_and_attribute(model, tie.tensor)
        shared = getattr(owner, attribute)
        source_owner, source_attribute = module_and_attribute(model, tie.source)
        if shared is getattr(source_owner, source_attribute):
            setattr(owner, attribute, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    if plan.ties:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        # transformers reads this mapping when it saves, and when it ties weights again after loading.
        for tie in plan.ties:
            getattr(model, "all_tied_weights_keys", {}).pop(tie.tensor, None)
