"""The quantized network in rotated coordinates: a model that stays as it is, and rounds what a rotated one would round.

With weights at 16 bits the function of a rotated network depends on its rotations at the quantizers alone, so nothing
has to be rotated when a rotation changes: activations and cache are rounded by Q(x R) R^T where they pass. Gains of
norms have to be in the weights, which is done once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from spinquant.errors import LearningError
from spinquant.models.capture import device_of
from spinquant.models.modules import module_and_attribute
from spinquant.online.hooks import Attachment, attach
from spinquant.plan import Plan
from spinquant.quantization.clip_search import best_ratio
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.rotated_rounding import Turn, round_rotated, turned
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.quantization.targets import Weight, weights_of
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Hadamard, Rotation


def fuse_gains(model: Any, plan: Plan, rotations: Mapping[str, Rotation]) -> None:
    """Fuse gains as rotating would, in place; the function stays. Tied heads are untied."""
    fuse_module(model, plan, {gain.space: Hadamard(1) for gain in plan.gains if gain.space in rotations})


def shard_blocks(model: Any, plan: Plan) -> None:
    """Spread the weights over the processes of torch.distributed, a decoder block being whole only while it runs.

    Raises LearningError where there is no process group.
    """
    if not dist.is_initialized():
        raise LearningError("weights are sharded among the processes of torch.distributed: start this with torchrun")
    model.requires_grad_(False)  # frozen before they are sharded: no memory for gradients
    kind = device_of(model).type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for name in plan.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def learning_scheme(scheme: Scheme, *, weights: bool) -> Scheme:
    """What is rounded while learning: no weights unless asked for, and ranges of the numbers at hand."""
    activations, kv = (q and replace(q, static=False, peak=None) for q in (scheme.activations, scheme.kv))
    return replace(scheme, activations=activations, kv=kv, weights=scheme.weights if weights else None)


@contextmanager
def rounding(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    scheme: Scheme,
    clips: Clips | None = None,
) -> Iterator[Attachment]:
    """Within the block the model rounds like one that is rotated and quantized; gains must be fused.

    Gradients reach rotations that are `Moving`, and pass straight through the rounding.
    """
    rounded: list[tuple[nn.Module, str]] = []
    attachment = attach(model, plan, rotations, scheme, clips, around=True)
    try:
        if scheme.weights is not None:
            for weight in weights_of(plan, scheme):
                module, name = module_and_attribute(model, weight.tensor)
                matrices = weight.matrices(model)
                axes = [axis for axis in plan.axes_of.get(weight.tensor, ()) if axis.space in rotations]
                turns = tuple(
                    Turn(rotations[axis.space], weight.turned_dim(axis.dim, matrices.ndim), axis.span) for axis in axes
                )
                way = _Rounded(weight, turns, _settled(matrices, turns, scheme.weights))
                parametrize.register_parametrization(module, name, way)
                rounded.append((module, name))
        yield attachment
    finally:
        for module, name in rounded:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        attachment.remove()


@contextmanager
def checkpointed(model: Any, plan: Plan, wanted: bool) -> Iterator[None]:
    """Within the block decoder blocks are computed again on the way back, if wanted."""
    if not wanted:
        yield
        return
    blocks = [model.get_submodule(name) for name in plan.blocks]
    model.activation_checkpointing_enable({"use_reentrant": False})
    # transformers checkpoints modules in training alone; their children stay as they are, so nothing drops out. The
    # embedding's output has no gradient, which is fine without reentry.
    before = [block.training for block in blocks]
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training = training
        model.activation_checkpointing_disable()


class _Rounded(nn.Module):
    """Parametrization of a weight."""

    def __init__(self, kept: Weight, turns: tuple[Turn, ...], quantizer: Quantizer):
        super().__init__()
        self._kept = kept
        self._how = (turns, quantizer)

    def forward(self, weight: Tensor) -> Tensor:
        return self._kept.turned(round_rotated(self._kept.turned(weight), *self._how))


@torch.no_grad()
def _settled(weight: Tensor, turns: tuple[Turn, ...], quantizer: Quantizer) -> Quantizer:
    """The quantizer with one clip ratio for the tensor, the best now, where it is to be searched."""
    if quantizer.clip != "mse":
        return quantizer
    z = turned(weight.detach().float(), turns)
    ratio = best_ratio(lambda c: float((fake_quantize(z, replace(quantizer, clip=c)) - z).square().sum()))
    return replace(quantizer, clip=ratio)
