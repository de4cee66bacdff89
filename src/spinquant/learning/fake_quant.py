"""Fake quantization during learning: an unrotated model that quantizes like a rotated one.

With weights at 16 bits, rotations change the function of a quantized network only at its quantizers. So activations and
KV cache are quantized as Q(x R) R^T, and no weight has to be rotated when a rotation changes. The gains of norms have
to be fused into the weights, which is done once.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from spinquant.errors import LearningError
from spinquant.models.capture import device_of
from spinquant.models.modules import module_and_attribute
from spinquant.online.attachment import Attachment
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.clip_search import with_gaussian_clip
from spinquant.quantization.rotated_rounding import Turn, round_rotated
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.quantization.targets import Weight, weights_of
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Hadamard, Transform, dual


def fuse_gains(model: Any, plan: Plan, rotations: Mapping[str, Transform]) -> None:
    """Fuse the gains of norms into the weights, in place, as rotating does, and untie a tied head.

    The model's function is unchanged.
    """
    fuse_module(model, plan, gains_alone(plan, rotations))


def gains_alone(plan: Plan, spaces: Container[str]) -> dict[str, Transform]:
    """What has to be fused for the gains of the norms of rotated spaces to be fused, and nothing else."""
    return {gain.space: Hadamard(1) for gain in plan.gains if gain.space in spaces}


def shard_blocks(model: Any, plan: Plan) -> None:
    """Shard the weights over the processes of torch.distributed (FSDP2), one unit per decoder block.

    Raises LearningError without a process group.
    """
    if not dist.is_initialized():
        raise LearningError("--shard divides the weights among the processes of torch.distributed: start with torchrun")
    model.requires_grad_(False)  # frozen before sharding, so that no memory is reserved for gradients
    kind = device_of(model).type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for name in plan.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def learning_scheme(scheme: Scheme, *, weights: bool) -> Scheme:
    """The scheme during learning: dynamic ranges instead of static ones, and weights only if `weights`."""
    activations, kv = (q and replace(q, static=False, peak=None) for q in (scheme.activations, scheme.kv))
    return replace(scheme, activations=activations, kv=kv, weights=scheme.weights if weights else None)


@contextmanager
def rounding(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Transform],
    scheme: Scheme,
    clips: Clips | None = None,
) -> Iterator[Attachment]:
    """Within the `with` block, the model quantizes like a rotated one; its gains must be fused.

    Rotations that are `Moving` get gradients, by the straight-through estimator.
    """
    attachment = attach(model, plan, rotations, scheme, clips, around=True)
    try:
        with rounded_weights(model, plan, rotations, scheme):
            yield attachment
    finally:
        attachment.remove()


@contextmanager
def rounded_weights(
    model: nn.Module, plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme, share: float = 1.0
) -> Iterator[None]:
    """Within the `with` block, weights are rounded to nearest in rotated coordinates, where the scheme quantizes them.

    share: part of the squared error that is made; the whole by default.
    """
    rounded: list[tuple[nn.Module, str]] = []
    try:
        for weight in weights_of(plan, scheme) if scheme.weights is not None and share else ():
            assert scheme.weights is not None
            module, name = module_and_attribute(model, weight.tensor)
            matrices = weight.matrices(model)
            axes = [axis for axis in plan.axes_of.get(weight.tensor, ()) if axis.space in rotations]
            turns = tuple(
                Turn(
                    dual(rotations[axis.space]) if axis.reads else rotations[axis.space],
                    weight.turned_dim(axis.dim, matrices.ndim),
                    axis.span,
                )
                for axis in axes
            )
            quantizer = with_gaussian_clip(scheme.weights, matrices.shape[-1])
            made = _Rounded(weight, turns, quantizer, share)
            # `unsafe` leaves out a check of its shape, which rounds the weight once more.
            parametrize.register_parametrization(module, name, made, unsafe=True)
            rounded.append((module, name))
        yield
    finally:
        for module, name in rounded:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def has_rounded_weights(model: nn.Module) -> bool:
    """Whether weights of a model are rounded at the moment (`rounded_weights`)."""
    return any(isinstance(module, _Rounded) for module in model.modules())


@contextmanager
def checkpointed(model: Any, plan: Plan, wanted: bool) -> Iterator[None]:
    """Within the `with` block, use gradient checkpointing of the decoder blocks if `wanted`."""
    if not wanted:
        yield
        return
    blocks = [model.get_submodule(name) for name in plan.blocks]
    model.activation_checkpointing_enable({"use_reentrant": False})
    # transformers checkpoints only modules in training mode; their children stay in evaluation mode, without dropout.
    # The embedding's output has no gradient, which non-reentrant checkpointing allows.
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
    """Parametrization that quantizes a weight in rotated coordinates, or goes some of the way there."""

    def __init__(self, layout: Weight, turns: tuple[Turn, ...], quantizer: Quantizer, share: float):
        super().__init__()
        self._layout, self._share = layout, share
        self._how = (turns, quantizer)

    def forward(self, weight: Tensor) -> Tensor:
        rounded = self._layout.turned(round_rotated(self._layout.turned(weight), *self._how))
        return rounded if self._share == 1 else weight + (rounded - weight) * self._share**0.5
