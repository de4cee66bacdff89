"""Wrappers around rotations: a fixed arithmetic precision, or channel scales of the rotated space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.plan import Plan, Space
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import ORTHOGONAL, Orthogonal, Rotation, off_orthogonal


@dataclass(frozen=True, eq=False)
class InPrecision:
    """A rotation that rounds its input and output to a fixed dtype, whatever the dtype of the tensor it rotates."""

    rotation: Rotation
    dtype: torch.dtype

    @property
    def order(self) -> int:
        return self.rotation.order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        # Inputs and outputs are rounded to the half-precision dtype; sums are in float32, as everywhere.
        rounded = x.to(self.dtype).to(torch.promote_types(self.dtype, torch.float32))
        y = self.rotation.apply(rounded, transpose=transpose, dim=dim).to(self.dtype).to(x.dtype)
        return y if out is None else out.copy_(y)

    def tensors(self) -> dict[str, Tensor]:
        return self.rotation.tensors()

    def describe(self) -> dict[str, Any]:
        return {**self.rotation.describe(), "precision": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True, eq=False)
class Scaled:
    """The rotation of a space with channel scales: x becomes (x * scale) R.

    Scales are fused into the weights on both sides (`Plan.scalings`), so nothing is scaled at run time: `apply`,
    `tensors` and `describe` are those of R alone.

    Attributes:
        rotation: R.
        scale: positive, float64, shape (size of the space,).
    """

    rotation: Rotation
    scale: Tensor

    @property
    def order(self) -> int:
        return self.rotation.order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        return self.rotation.apply(x, transpose=transpose, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return self.rotation.tensors()

    def describe(self) -> dict[str, Any]:
        return self.rotation.describe()


def bare(rotation: Rotation) -> Rotation:
    """The rotation without its channel scales, as it runs online."""
    return rotation.rotation if isinstance(rotation, Scaled) else rotation


def online_part(plan: Plan, rotations: Mapping[str, Rotation]) -> dict[str, Rotation]:
    """The subset of rotations that run online, by space, without channel scales."""
    return {online.space: bare(rotations[online.space]) for online in plan.onlines if online.space in rotations}


def in_precision(rotations: Mapping[str, Rotation], dtype: torch.dtype | None) -> dict[str, Rotation]:
    """The rotations without channel scales, computing in `dtype`, or in their input's dtype if it is None.

    Spaces that shared a rotation still share one.
    """
    rotations = {space: bare(rotation) for space, rotation in rotations.items()}
    if dtype is None:
        return rotations
    wrapped = {id(rotation): InPrecision(rotation, dtype) for rotation in rotations.values()}
    return {space: wrapped[id(rotation)] for space, rotation in rotations.items()}


def check_given(plan: Plan, spec: RotationSpec, rotations: Mapping[str, Rotation]) -> None:
    """Raise RotationError for rotations (by space) that do not belong to this model and spec, or are not orthogonal."""
    wanted = plan.rotated(spec.rotations)
    if set(rotations) != wanted:
        odd = sorted(set(rotations) ^ wanted)[0]
        raise RotationError(
            f"the rotations do not belong to this model: space {odd!r} is "
            + ("not among them" if odd in wanted else f"not one that {', '.join(spec.rotations)} rotates")
        )
    for space in plan.spaces:
        rotation = rotations.get(space.name)
        if rotation is None:
            continue
        _check_scale(plan, space, rotation)
        rotation = bare(rotation)
        expected = spec.block_of(space.rotation) or space.size
        if rotation.order != expected or space.size % rotation.order:
            raise RotationError(
                f"the rotation of {space.name} has order {rotation.order}, and this model needs {expected}: use "
                "rotations that were made for this model, or pass their block size"
            )
        if isinstance(rotation, Orthogonal):
            error = off_orthogonal(rotation.weight)
            if not error < ORTHOGONAL:
                raise RotationError(f"the matrix of {space.name} is not orthogonal: off by {error:.1e}")


def _check_scale(plan: Plan, space: Space, rotation: Rotation) -> None:
    if not isinstance(rotation, Scaled):
        return
    if all(scaling.space != space.name for scaling in plan.scalings):
        raise RotationError(
            f"channel scales of {space.name} cannot be fused into the weights: no linear of {plan.family} writes one "
            "factor of that space"
        )
    scale = rotation.scale
    if scale.shape != (space.size,) or not bool((scale > 0).all() & scale.isfinite().all()):
        raise RotationError(
            f"the channel scales of {space.name} have shape {tuple(scale.shape)}: expected {space.size} positive, "
            "finite numbers"
        )
