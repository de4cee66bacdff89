"""Random transforms of the kinds that a model has: what a tiny model is proved with before the real one is changed."""

from collections.abc import Collection, Mapping

import torch

from spinquant.plan import Plan, Space
from spinquant.rotations.factory import generator_for, random_orthogonal
from spinquant.rotations.rotation import Transform, is_orthogonal
from spinquant.rotations.transforms import Diagonal, Matrix

SPREAD = 4.0  # largest over smallest singular value


def general_kinds(plan: Plan, transforms: Mapping[str, Transform]) -> frozenset[str]:
    """The kinds of spaces with a transform that is no rotation: "R2", or "scales of R4" for scales beside R4."""
    general = (space for space in plan.spaces if space.name in transforms)
    return frozenset(_kind(space) for space in general if not is_orthogonal(transforms[space.name]))


def random_transforms(plan: Plan, kinds: Collection[str], seed: int = 0) -> dict[str, Transform]:
    """Random transforms, one for each space of these kinds that allows them: scales, or a matrix for each head.

    Args:
        plan: the plan of a tiny model.
        kinds: as `general_kinds` returns them.
        seed: of the random numbers.
    """
    general = (space for space in plan.spaces if space.allows in ("any", "diagonal"))
    return {space.name: _random(space, seed) for space in general if _kind(space) in kinds}


def _kind(space: Space) -> str:
    return space.rotation or f"scales of {space.beside}"


def _random(space: Space, seed: int) -> Transform:
    generator = generator_for(seed, f"invertible {space.name}")
    values = SPREAD ** (torch.rand(space.heads, space.size, generator=generator, dtype=torch.float64) - 0.5)
    if space.allows == "diagonal":
        return Diagonal(values[0])
    left, right = (torch.stack([random_orthogonal(space.size, generator) for _ in values]) for _ in range(2))
    return Matrix(left * values[:, None] @ right)
