"""Describe learned rotations, and check those that another run of learning starts from."""

from collections.abc import Mapping

from spinquant.errors import LearningError
from spinquant.learning.options import LearnOptions
from spinquant.plan import Plan
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Rotation
from spinquant.rotations.wrappers import Scaled, check_given


def described(plan: Plan, rotations: Mapping[str, Rotation], spec: RotationSpec) -> RotationSpec:
    """The spec of the selected rotations: type random-matrix (dense) where rotations were learned."""
    types = {name: spec.type_of(name) for name in spec.rotations}
    for space in plan.spaces:
        if space.name in rotations and rotations[space.name].describe()["kind"] == "orthogonal":
            types[space.rotation] = "random-matrix"
    sizes = {name: size for name in spec.rotations if (size := spec.block_of(name)) is not None}
    return RotationSpec(spec.rotations, types, sizes or None, False, spec.seed)


def to_start_from(
    start: LearnedRotations, plan: Plan, spec: RotationSpec, options: LearnOptions
) -> Mapping[str, Rotation]:
    """The initial rotations. Raises LearningError if they do not match what is to be rotated now."""
    sizes = [{name: one.block_of(name) for name in one.rotations} for one in (start.spec, spec)]
    if sizes[0] != sizes[1]:
        found, asked = (
            ", ".join(f"{name} in blocks of {size}" if size else name for name, size in one.items()) for one in sizes
        )
        raise LearningError(f"the initial rotations are {found}, and this run asks for {asked}: use the same")
    check_given(plan, spec, start.rotations)
    if options.shard and any(isinstance(rotation, Scaled) for rotation in start.rotations.values()):
        raise LearningError(
            "the initial rotations have scales, which are fused into weights, and a sharded model's weights are not "
            "changed: start from rotations without scales (--no-scales), or do not shard"
        )
    return start.rotations
