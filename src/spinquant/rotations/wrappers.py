"""Transforms of a model as they are given and used: in a fixed precision, those that run online, and their checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.plan import Plan, Space
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import (
    ORTHOGONAL,
    Orthogonal,
    Transform,
    dual,
    heads_of,
    is_orthogonal,
    off_orthogonal,
)
from spinquant.rotations.transforms import Diagonal, check_conditioned


@dataclass(frozen=True, eq=False)
class InPrecision:
    """A transform that rounds its input and output to a fixed dtype, whatever the dtype of the tensor."""

    rotation: Transform
    dtype: torch.dtype

    def dual(self) -> "InPrecision":
        """The dual, in the same dtype."""
        return self if is_orthogonal(self.rotation) else InPrecision(dual(self.rotation), self.dtype)

    @property
    def heads(self) -> int:
        """The number of heads that have a transform of their own."""
        return heads_of(self.rotation)

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


def online_part(plan: Plan, rotations: Mapping[str, Transform]) -> dict[str, Transform]:
    """The subset of transforms that run online, by space."""
    return {online.space: rotations[online.space] for online in plan.onlines if online.space in rotations}


def in_precision(rotations: Mapping[str, Transform], dtype: torch.dtype | None) -> dict[str, Transform]:
    """The transforms, computing in `dtype`, or in their input's dtype if it is None.

    Spaces that shared one still share one.
    """
    if dtype is None:
        return dict(rotations)
    wrapped = {id(rotation): InPrecision(rotation, dtype) for rotation in rotations.values()}
    return {space: wrapped[id(rotation)] for space, rotation in rotations.items()}


def check_given(plan: Plan, spec: RotationSpec, rotations: Mapping[str, Transform]) -> None:
    """Raise RotationError for transforms (by space) that do not belong to this model and spec, or change its function.

    Spaces of channel scales may be left out.
    """
    wanted = plan.rotated(spec.rotations)
    scaled = {space.name for space in plan.spaces if not space.rotation}
    odd = sorted(wanted - set(rotations)) or sorted(set(rotations) - wanted - scaled)
    if odd:
        raise RotationError(
            f"the rotations do not belong to this model: space {odd[0]!r} is "
            + ("not among them" if odd[0] in wanted else f"not one that {', '.join(spec.rotations)} rotates")
        )
    for space in plan.spaces:
        rotation = rotations.get(space.name)
        if rotation is None:
            continue
        expected = (spec.block_of(space.rotation) if space.rotation else None) or space.size
        if rotation.order != expected or space.size % rotation.order:
            raise RotationError(
                f"the transform of {space.name} has order {rotation.order}, and this model needs {expected}: use "
                "transforms that were made for this model, or pass their block size"
            )
        _check_allowed(space, rotation)


def _check_allowed(space: Space, transform: Transform) -> None:
    """Raise RotationError for a transform that changes the model's function where it is, or spoils it by rounding."""
    if isinstance(transform, Orthogonal):
        error = off_orthogonal(transform.weight)
        if not error < ORTHOGONAL:
            raise RotationError(f"the matrix of {space.name} is not orthogonal: off by {error:.1e}")
    kind = transform.describe()["kind"]
    if space.allows == "diagonal" and not isinstance(transform, Diagonal):
        raise RotationError(
            f"{space.name} has a transform of kind {kind!r}, and allows channel scales alone: the model multiplies it "
            "element by element"
        )
    if space.allows in ("orthogonal", "mean-preserving") and not is_orthogonal(transform):
        raise RotationError(
            f"{space.name} has a transform of kind {kind!r}, which is no rotation: it would change the model's "
            "function, because a norm divides by the length of the vectors of that space"
        )
    if heads_of(transform) > 1 and space.heads % heads_of(transform):
        raise RotationError(
            f"the transform of {space.name} is one for each of {heads_of(transform)} heads, and the model has "
            f"{space.heads}"
        )
    check_conditioned(space.name, transform)
