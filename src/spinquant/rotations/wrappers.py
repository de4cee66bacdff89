"""Rotations with something around them: a precision of their own, or scales of the space that they rotate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.plan import Plan, Space
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import Orthogonal, Rotation


@dataclass(frozen=True, eq=False)
class InPrecision:
    """A rotation whose arithmetic is done in a dtype of its own, whatever the dtype of what it rotates."""

    rotation: Rotation
    dtype: torch.dtype

    @property
    def order(self) -> int:
        return self.rotation.order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        # Half types are rounded to before and after; sums are float32, as everywhere.
        rounded = x.to(self.dtype).to(torch.promote_types(self.dtype, torch.float32))
        y = self.rotation.apply(rounded, transpose=transpose, dim=dim).to(self.dtype).to(x.dtype)
        return y if out is None else out.copy_(y)

    def tensors(self) -> dict[str, Tensor]:
        return self.rotation.tensors()

    def describe(self) -> dict[str, Any]:
        return {**self.rotation.describe(), "precision": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True, eq=False)
class Scaled:
    """The rotation of a space whose channels are scaled first, by what writes them: x becomes (x * scale) R.

    Scales are fused into the weights on both sides (`Plan.scalings`), so nothing is scaled at run time: `apply` is R
    alone, and so is what it says of itself. scale: positive, float64, shape (size of the space,).
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
    """What is left of a rotation at run time: without scales."""
    return rotation.rotation if isinstance(rotation, Scaled) else rotation


def online_part(plan: Plan, rotations: Mapping[str, Rotation]) -> dict[str, Rotation]:
    """Those of the rotations that are applied at run time, by space, as they are applied there."""
    return {online.space: bare(rotations[online.space]) for online in plan.onlines if online.space in rotations}


def in_precision(rotations: Mapping[str, Rotation], dtype: torch.dtype | None) -> dict[str, Rotation]:
    """The rotations as they run, computing in a dtype, or in that of what they rotate. What was shared stays so."""
    rotations = {space: bare(rotation) for space, rotation in rotations.items()}
    if dtype is None:
        return rotations
    wrapped = {id(rotation): InPrecision(rotation, dtype) for rotation in rotations.values()}
    return {space: wrapped[id(rotation)] for space, rotation in rotations.items()}


def check_given(plan: Plan, spec: RotationSpec, rotations: Mapping[str, Rotation]) -> None:
    """Raise RotationError for rotations, by space, that are not of this model and spec, or not orthogonal."""
    wanted = plan.rotated(spec.rotations)
    if set(rotations) != wanted:
        odd = sorted(set(rotations) ^ wanted)[0]
        raise RotationError(
            f"the rotations given are not those of this model: {odd!r} is "
            + ("not among them" if odd in wanted else f"no space that {', '.join(spec.rotations)} rotates")
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
                f"the rotation given for {space.name} has order {rotation.order}, and this model needs {expected}: "
                "take rotations that were made for this model, or give the block size that they have"
            )
        if isinstance(rotation, Orthogonal):
            error = rotation.weight.T @ rotation.weight - torch.eye(rotation.order, dtype=rotation.weight.dtype)
            if not float(error.abs().max()) < 1e-6:
                raise RotationError(
                    f"the matrix of {space.name} is not orthogonal: off by {float(error.abs().max()):.1e}"
                )


def _check_scale(plan: Plan, space: Space, rotation: Rotation) -> None:
    if not isinstance(rotation, Scaled):
        return
    if all(scaling.space != space.name for scaling in plan.scalings):
        raise RotationError(
            f"scales are given for {space.name}, and {plan.family} has no linear that is one factor of it: they "
            "cannot be fused into its weights"
        )
    scale = rotation.scale
    if scale.shape != (space.size,) or not bool((scale > 0).all() & scale.isfinite().all()):
        raise RotationError(
            f"the scales of {space.name} have shape {tuple(scale.shape)}: expected {space.size} positive numbers"
        )
