"""Rotations as trainable parameters of a model: its forward pass sees rotated weights, gradients reach the rotations.

    R = R0 (I + A/2)^-1 (I - A/2)        A = L - L^T, L the strict lower triangle of the parameter, zero at the start

A Cayley map of a skew A is orthogonal whatever A is, so any optimizer keeps R orthogonal, without a retraction. The
matrix I + A/2 is normal with eigenvalues 1 + i t, hence well conditioned as long as A is of moderate size.

Weights stay as they were, frozen, under a parametrization that calls `fuse.transform`; `end_training` takes it all off
again, and what was learned is then fused by `fuse_module` as any other rotation is.
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
from spinquant.online.hooks import attach, attachment_of, before_forward
from spinquant.plan import Plan
from spinquant.rotations.fuse import transform
from spinquant.rotations.fuse_module import untie
from spinquant.rotations.rotation import Orthogonal, Rotation, matrix

LEARNED = "spinquant_learned"


class LearnableRotation(nn.Module):
    """A rotation whose matrix is trained. `skew`, shape (n, n): its strict lower triangle is the parameter L."""

    def __init__(self, initial: Rotation, dtype: torch.dtype, device: torch.device, *, centred: bool = False):
        super().__init__()
        self.centred = centred
        dtype = torch.promote_types(dtype, torch.float32)  # half types have no solver, and would not stay orthogonal
        self.initial = initial
        self.start: Tensor
        self.register_buffer("start", matrix(initial).to(device, dtype))
        self.skew = nn.Parameter(torch.zeros_like(self.start))
        self._known: tuple[tuple[Any, ...], Tensor] | None = None

    def matrix(self) -> Tensor:
        """R, (n, n); remembered until the parameter changes or `forget` is called."""
        key = (self.skew._version, self.skew.data_ptr(), self.skew.dtype, torch.is_grad_enabled())
        if self._known is None or self._known[0] != key:
            self._known = (key, cayley(self.start, self.skew, centred=self.centred))
        return self._known[1]

    def forget(self) -> None:
        """Compute the matrix anew at the next use: a graph serves one backward pass."""
        self._known = None


@dataclass(frozen=True, eq=False)
class Learned:
    """The value of a rotation that is being learned; no module, or whatever holds it would list its parameter again."""

    module: LearnableRotation

    @property
    def order(self) -> int:
        """Rows of the matrix."""
        return len(self.module.skew)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`, with gradients for the matrix too."""
        r = self.module.matrix()
        blocks = x.movedim(dim, -1).to(r.dtype).unflatten(-1, (-1, self.order))
        y = (blocks @ (r.T if transpose else r)).flatten(-2).movedim(-1, dim).to(x.dtype)
        return y if out is None else out.copy_(y)

    def tensors(self) -> dict[str, Tensor]:
        """Of the rotation as it is now."""
        return self.frozen().tensors()

    def describe(self) -> dict[str, Any]:
        """Of the rotation as it is now."""
        return self.frozen().describe()

    @torch.no_grad()
    def frozen(self) -> Orthogonal:
        """The rotation as it is now, as a value that stays; orthogonal in float64 whatever it was learned in."""
        start, skew = matrix(self.module.initial), self.module.skew.double().cpu()
        return Orthogonal(cayley(start, skew, centred=self.module.centred))


class _Rotated(nn.Module):
    """Parametrization of one tensor."""

    def __init__(self, name: str, plan: Plan, gains: Mapping[str, Tensor], rotations: Mapping[str, Rotation], dtype):
        super().__init__()
        self._how = (name, plan, gains, rotations, dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        name, plan, gains, rotations, dtype = self._how
        return transform(name, tensor, plan, gains, rotations, precision=dtype)


@dataclass(frozen=True)
class Trainable:
    """A model whose rotations are being learned, and what is needed to undo that.

    rotations: as they are now, by space. norms: the weights of fused norms, by name. trained: names of the parameters
    that required gradients before. save: what `save_pretrained` was replaced by before, None where it was not.
    """

    model: Any
    plan: Plan
    rotations: Mapping[str, Rotation]
    norms: Mapping[str, Tensor]
    trained: tuple[str, ...]
    save: Any


def begin_training(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    names: Mapping[str, str],
    *,
    online: Mapping[str, Rotation],
    precision: torch.dtype,
) -> Trainable:
    """Rotate a model so that the rotations of the spaces in `names` are trainable parameters of it.

    names: by space, what the rotation is called in the model's module `spinquant_learned`. online: what fixed rotations
    are at run time. precision: of the learned rotations and the arithmetic. The model's own parameters are frozen, and
    saving it is refused, until `end_training`.
    """
    check_in_memory(model)
    if "residual" in rotations:
        untie(model, plan)
    device = next(model.parameters()).device
    current: dict[str, Rotation] = dict(rotations)
    learned: dict[str, Learned] = {}
    for space, name in names.items():
        if name not in learned:
            centred = plan.space[space].centred
            learned[name] = Learned(LearnableRotation(rotations[space], precision, device, centred=centred))
        current[space] = learned[name]
    parameters = dict(model.named_parameters())
    gains = {gain.norm: named_tensor(model, gain.norm).detach().clone() for gain in plan.gains}
    trained = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    model.requires_grad_(False)
    norms: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in gains and plan.gain_of_norm[name].space in rotations:
                norms[name] = gains[name]
                parameter.copy_(transform(name, parameter, plan, gains, current))
            elif any(axis.space in rotations for axis in plan.axes_of.get(name, ())):
                owner, attribute = module_and_attribute(model, name)
                parametrize.register_parametrization(owner, attribute, _Rotated(name, plan, gains, current, precision))
    model.add_module(LEARNED, nn.ModuleDict({name: rotation.module for name, rotation in learned.items()}))
    attachment = attach(model, plan, {space: current[space] if space in names else online[space] for space in current})
    for rotation in learned.values():
        attachment.hook(before_forward(model, rotation.module.forget))
    save = model.__dict__.get("save_pretrained")
    model.save_pretrained = _refuse_saving
    return Trainable(model, plan, current, norms, trained, save)


@torch.no_grad()
def end_training(learning: Trainable) -> dict[str, Rotation]:
    """Give the model its own weights back, and return the rotations as they are now, by space."""
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
        "the rotations of this model are being learned: finalize the modifier before saving the model"
    )
