"""Describe learned rotations as a `RotationSpec`, and check the rotations that a new run of `learn` starts from."""

from collections.abc import Mapping

from spinquant.errors import LearningError
from spinquant.learning.options import LearnOptions
from spinquant.plan import Plan
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform, is_orthogonal
from spinquant.rotations.wrappers import check_given


def spec_of(plan: Plan, rotations: Mapping[str, Transform], spec: RotationSpec) -> RotationSpec:
    """The spec of the selected rotations: as asked for, with type random-matrix (dense) for those that were learned."""
    types = {name: spec.type_of(name) for name in spec.rotations}
    for space in plan.spaces:
        if space.name in rotations and rotations[space.name].describe()["kind"] == "orthogonal":
            types[space.rotation] = "random-matrix"
    sizes = {name: size for name in spec.rotations if (size := spec.block_of(name)) is not None}
    return RotationSpec(spec.rotations, types, sizes or None, False, spec.seed)


def initial_rotations(
    start: LearnedRotations, plan: Plan, spec: RotationSpec, options: LearnOptions
) -> Mapping[str, Transform]:
    """The rotations to start from. Raises LearningError if their names or block sizes are not those of `spec`."""
    sizes = [{name: one.block_of(name) for name in one.rotations} for one in (start.spec, spec)]
    if sizes[0] != sizes[1]:
        found, asked = (
            ", ".join(f"{name} in blocks of {size}" if size else name for name, size in one.items()) for one in sizes
        )
        raise LearningError(f"the initial rotations are {found}, and this run asks for {asked}: use the same")
    check_given(plan, spec, start.rotations)
    if options.shard and not all(map(is_orthogonal, start.rotations.values())):
        raise LearningError(
            "the initial rotations have transforms that are fused into the weights, and the weights of a sharded model "
            "cannot be changed: start from rotations alone (--no-transforms), or do not shard"
        )
    return start.rotations
