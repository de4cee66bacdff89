"""Rotations as trainable parameters of a model (Cayley parametrization), which any torch optimizer can train.

    R = R0 (I + A/2)^-1 (I - A/2)        A = L - L^T, L the strict lower triangle of the parameter, zero at the start

The Cayley transform of a skew-symmetric A is orthogonal whatever A is, so R stays orthogonal under any optimizer,
without a retraction. I + A/2 is normal with eigenvalues 1 + i t, hence well conditioned as long as A is of moderate
size.

The weights are frozen, under a parametrization that rotates them in the forward pass (`rotations/fuse.py`).
`end_training` removes it; the learned rotations are then fused by `fuse_module` like any others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spinquant.errors import CheckpointError
from spinquant.learning.cayley import cayley
from spinquant.models.modules import check_in_memory, module_and_attribute, named_tensor
from spinquant.online.attachment import attachment_of
from spinquant.online.hooks import attach, before_forward
from spinquant.plan import Plan
from spinquant.rotations.fuse import transform
from spinquant.rotations.fuse_module import untie
from spinquant.rotations.rotation import Orthogonal, Rotation, Transform, matrix

LEARNED = "spinquant_learned"


class LearnableRotation(nn.Module):
    """Module with a trainable rotation. Its parameter is `skew`, (n, n), of which the strict lower triangle is L.

    dtype: of the parameter, float32 or more: a lower one is promoted. centred: the rotation preserves the mean.
    """

    def __init__(self, initial: Rotation, dtype: torch.dtype, device: torch.device, *, centred: bool = False):
        super().__init__()
        self.centred = centred
        # 16-bit dtypes have no linear solver, and R would not stay orthogonal.
        dtype = torch.promote_types(dtype, torch.float32)
        self.initial = initial
        self.start: Tensor
        self.register_buffer("start", matrix(initial).to(device, dtype))
        self.skew = nn.Parameter(torch.zeros_like(self.start))
        self._cached: tuple[tuple[Any, ...], Tensor] | None = None

    def matrix(self) -> Tensor:
        """R, (n, n); cached until the parameter changes or `forget` is called."""
        key = (self.skew._version, self.skew.data_ptr(), self.skew.dtype, torch.is_grad_enabled())
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, cayley(self.start, self.skew, centred=self.centred))
        return self._cached[1]

    def forget(self) -> None:
        """Clear the cached matrix: its autograd graph is freed by the first backward pass."""
        self._cached = None


@dataclass(frozen=True, eq=False)
class Learned:
    """A `Rotation` that is being trained. It is not a module, so that the model lists its parameter only once."""

    module: LearnableRotation

    @property
    def order(self) -> int:
        """Order of the matrix."""
        return len(self.module.skew)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`, with gradients for the parameter."""
        r = self.module.matrix()
        blocks = x.movedim(dim, -1).to(r.dtype).unflatten(-1, (-1, self.order))
        y = (blocks @ (r.T if transpose else r)).flatten(-2).movedim(-1, dim).to(x.dtype)
        return y if out is None else out.copy_(y)

    def dual(self) -> "Learned":
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the current rotation."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """Description of the current rotation."""
        return self.frozen().describe()

    @torch.no_grad()
    def frozen(self) -> Orthogonal:
        """A copy of the current rotation; orthogonal in float64, whatever dtype it was trained in."""
        start, skew = matrix(self.module.initial), self.module.skew.double().cpu()
        return Orthogonal(cayley(start, skew, centred=self.module.centred))


class _Rotated(nn.Module):
    """Parametrization that rotates one tensor."""

    def __init__(self, name: str, plan: Plan, gains: Mapping[str, Tensor], rotations: Mapping[str, Transform], dtype):
        super().__init__()
        self._how = (name, plan, gains, rotations, dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        name, plan, gains, rotations, dtype = self._how
        return transform(name, tensor, plan, gains, rotations, precision=dtype)


@dataclass(frozen=True)
class Trainable:
    """A model whose rotations are trainable parameters, with the state that `end_training` restores.

    Attributes:
        model: The model.
        plan: Where it is rotated.
        rotations: Current rotations by space.
        norms: Original weights of the norms whose gains are fused, by name.
        trained: Names of the parameters that required gradients before.
        save: An earlier override of `save_pretrained` on the model, None without one.
    """

    model: Any
    plan: Plan
    rotations: Mapping[str, Transform]
    norms: Mapping[str, Tensor]
    trained: tuple[str, ...]
    save: Any


def begin_training(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    names: Mapping[str, str],
    *,
    online: Mapping[str, Transform],
    precision: torch.dtype,
) -> Trainable:
    """Rotate a model, with the rotations of some spaces as trainable parameters of the model.

    Until `end_training`, the model's own parameters are frozen, and `save_pretrained` raises CheckpointError.

    Args:
        model: A causal language model of transformers, changed in place. Its weights have to be in memory.
        plan: Where it can be rotated.
        rotations: Initial rotations by space.
        names: The spaces to train, with the name of their rotation in the model's module `spinquant_learned`; spaces
            of one name share one rotation.
        online: The rotations by space, in the precision in which they run online.
        precision: Dtype of the trainable rotations (at least float32) and of fusing.

    Returns:
        The model with its rotations, for `end_training`.
    """
    check_in_memory(model)
    if plan.unties(rotations):
        untie(model, plan)
    current, learned = _trainable_rotations(model, plan, rotations, names, precision)
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    norms = _parametrize(model, plan, current, precision)
    model.add_module(LEARNED, nn.ModuleDict({name: rotation.module for name, rotation in learned.items()}))
    attachment = attach(model, plan, {space: current[space] if space in names else online[space] for space in current})
    for rotation in learned.values():
        attachment.hook(before_forward(model, rotation.module.forget))
    save = model.__dict__.get("save_pretrained")
    model.save_pretrained = _refuse_saving
    return Trainable(model, plan, current, norms, trained, save)


def _trainable_rotations(
    model: Any, plan: Plan, rotations: Mapping[str, Transform], names: Mapping[str, str], precision: torch.dtype
) -> tuple[dict[str, Transform], dict[str, Learned]]:
    """All rotations by space, and the trainable ones by name."""
    device = next(model.parameters()).device
    current: dict[str, Transform] = dict(rotations)
    learned: dict[str, Learned] = {}
    for space, name in names.items():
        if name not in learned:
            centred = plan.space[space].centred
            learned[name] = Learned(LearnableRotation(rotations[space], precision, device, centred=centred))
        current[space] = learned[name]
    return current, learned


@torch.no_grad()
def _parametrize(
    model: Any, plan: Plan, rotations: Mapping[str, Transform], precision: torch.dtype
) -> dict[str, Tensor]:
    """Fuse the norms' gains, and put every rotated weight under a parametrization; returns the norms' own weights."""
    gains = {gain.norm: named_tensor(model, gain.norm).detach().clone() for gain in plan.gains}
    norms: dict[str, Tensor] = {}
    for name, parameter in dict(model.named_parameters()).items():
        if name in gains and plan.gain_of_norm[name].space in rotations:
            norms[name] = gains[name]
            parameter.copy_(transform(name, parameter, plan, gains, rotations))
        elif any(axis.space in rotations for axis in plan.axes_of.get(name, ())):
            owner, attribute = module_and_attribute(model, name)
            parametrize.register_parametrization(owner, attribute, _Rotated(name, plan, gains, rotations, precision))
    return norms


@torch.no_grad()
def end_training(learning: Trainable) -> dict[str, Transform]:
    """Undo `begin_training`: restore the model's own weights; returns the trained rotations, by space."""
    model = learning.model
    found: dict[int, Rotation] = {}
    for rotation in learning.rotations.values():
        found[id(rotation)] = rotation.frozen() if isinstance(rotation, Learned) else rotation
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.remove()
    if learning.save is None:
        del model.save_pretrained
    else:
        model.save_pretrained = learning.save
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            if isinstance(module.parametrizations[name][0], _Rotated):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    delattr(model, LEARNED)
    for name, weight in learning.norms.items():
        named_tensor(model, name).copy_(weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning.trained)
    return {space: found[id(rotation)] for space, rotation in learning.rotations.items()}


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        "the rotations of this model are still being trained: finalize the modifier, then save the model"
    )
