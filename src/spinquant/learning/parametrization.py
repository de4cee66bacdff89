"""Rotations as trainable parameters of a model (Cayley parametrization), for any optimizer.

    R = R0 (I + A/2)^-1 (I - A/2)        A = L - L^T, L the strict lower triangle of the parameter, zero at the start

The Cayley transform of a skew-symmetric A is orthogonal whatever A is, so any optimizer keeps R orthogonal, without a
retraction. I + A/2 is normal with eigenvalues 1 + i t, hence well conditioned as long as A is of moderate size.

The weights are frozen, under a parametrization that rotates them in the forward pass by `fuse.transform`;
`end_training` removes it, and the learned rotations are then fused by `fuse_module` like any other.
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
    """Module with a trainable rotation. `skew`, (n, n): its strict lower triangle is the parameter L."""

    def __init__(self, initial: Rotation, dtype: torch.dtype, device: torch.device, *, centred: bool = False):
        super().__init__()
        self.centred = centred
        # Half types have no linear solver, and R would not stay orthogonal.
        dtype = torch.promote_types(dtype, torch.float32)
        self.initial = initial
        self.start: Tensor
        self.register_buffer("start", matrix(initial).to(device, dtype))
        self.skew = nn.Parameter(torch.zeros_like(self.start))
        self._known: tuple[tuple[Any, ...], Tensor] | None = None

    def matrix(self) -> Tensor:
        """R, (n, n); cached until the parameter changes or `forget` is called."""
        key = (self.skew._version, self.skew.data_ptr(), self.skew.dtype, torch.is_grad_enabled())
        if self._known is None or self._known[0] != key:
            self._known = (key, cayley(self.start, self.skew, centred=self.centred))
        return self._known[1]

    def forget(self) -> None:
        """Clear the cached matrix, since its graph serves one backward pass only."""
        self._known = None


@dataclass(frozen=True, eq=False)
class Learned:
    """A `Rotation` that is being trained. Not a module, so that its parameter is listed in the model only once."""

    module: LearnableRotation

    @property
    def order(self) -> int:
        """Order of the matrix."""
        return len(self.module.skew)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Rotation.apply`, with gradients for the matrix."""
        r = self.module.matrix()
        blocks = x.movedim(dim, -1).to(r.dtype).unflatten(-1, (-1, self.order))
        y = (blocks @ (r.T if transpose else r)).flatten(-2).movedim(-1, dim).to(x.dtype)
        return y if out is None else out.copy_(y)

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

    def __init__(self, name: str, plan: Plan, gains: Mapping[str, Tensor], rotations: Mapping[str, Rotation], dtype):
        super().__init__()
        self._how = (name, plan, gains, rotations, dtype)

    def forward(self, tensor: Tensor) -> Tensor:
        name, plan, gains, rotations, dtype = self._how
        return transform(name, tensor, plan, gains, rotations, precision=dtype)


@dataclass(frozen=True)
class Trainable:
    """A model whose rotations are trainable parameters, with the state that `end_training` needs to undo that.

    rotations: current ones, by space. norms: original weights of fused norms, by name. trained: names of parameters
    that required gradients before. save: an earlier override of `save_pretrained`, None without one.
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
    """Rotate a model with trainable rotations for the spaces in `names`, as parameters of the model.

    names: the spaces, each with the name of its rotation in the model's module `spinquant_learned`. online: the fixed
    rotations in the precision of online use. precision: dtype of the trainable rotations and of fusing. The model's own
    parameters are frozen, and saving it is refused, until `end_training`.
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
    """Restore the model's own weights, and return the current rotations, by space."""
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
