"""Transforms that cost nothing at run time, in closed form, for every space that allows more than a rotation.

    scales    of factors of products: the inside of a gated MLP
    values    a matrix for each key-value head, in v_proj and o_proj
    keys      a matrix for each key-value head, where R3 runs online anyway; its dual for queries
    norms     scales in the weight of a norm, in the coordinates that R1 gives its output

Values and scales are fused into the model that learning sees, since nothing after them depends on them. Transforms of
keys and norms belong to the coordinates of a rotation, and are multiplied with it where activations are rounded.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import DIAGONAL, MATRIX, Damping, Moments, chosen_transform, symmetric_root
from spinquant.models.capture import device_of
from spinquant.plan import CHANNELS, Plan, Space
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Orthogonal, Transform, is_orthogonal, matrix, nearest_orthogonal
from spinquant.rotations.transforms import LARGEST_CONDITION, Diagonal, Matrix, compose

Kind = Literal["scales", "values", "keys", "norms"]
KINDS: tuple[Kind, ...] = ("scales", "values", "keys", "norms")


def free_spaces(plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme) -> dict[Kind, list[str]]:
    """The spaces of each kind that are quantized and can have a transform beside the rotations given."""
    found: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for space in plan.spaces:
        kind = kind_of(space)
        if kind is None or space.allows not in ("any", "diagonal"):
            continue
        if kind == "keys" and scheme.kv is None:
            continue
        if scheme.activations is None and (kind in ("scales", "norms") or scheme.kv is None):
            continue
        # A norm's scales are in the coordinates that R1 gives its output, or in those of the model without R1.
        if kind == "norms" or space.name.removesuffix(CHANNELS) in rotations:
            found[kind].append(space.name)
    return {kind: spaces for kind, spaces in found.items() if spaces}


def kind_of(space: Space) -> Kind | None:
    """The kind of a space's transform; None for a space that has no other than a rotation."""
    if space.name.endswith(CHANNELS):
        return "scales"
    return {"R2": "values", "R3": "keys"}.get(space.rotation, "norms" if space.beside == "R1" else None)  # pyright: ignore[reportReturnType]


def is_fused(space: Space) -> bool:
    """Whether a transform of the space is fused into the model during learning."""
    return kind_of(space) in ("scales", "values")


def closed_form_transforms(
    plan: Plan, moments: Mapping[str, Sequence[Sequence[Moments]]], dampings: Sequence[Damping] | None = None
) -> dict[str, Transform]:
    """The best transform of each space, with damping chosen on held-out samples; none where none is better.

    Args:
        plan: the plan of the model.
        moments: as `collect_moments` returns them.
        dampings: to choose from. Default: those for scales or matrices.
    """
    found: dict[str, Transform] = {}
    for name, folds in moments.items():
        diagonal = plan.space[name].allows == "diagonal"
        p, _, _ = chosen_transform(folds, dampings or (DIAGONAL if diagonal else MATRIX))
        if p is not None:
            found[name] = Diagonal(p.sqrt().flatten()) if diagonal else Matrix(_bounded(symmetric_root(p)))
    return found


def _bounded(roots: Tensor) -> Tensor:
    """Symmetric positive definite matrices, (heads, n, n), with small eigenvalues raised to what is allowed."""
    values, vectors = torch.linalg.eigh(roots)
    least = values.amax(-1, keepdim=True) / (LARGEST_CONDITION / 1.01)
    return (vectors * values.clamp(min=least).unsqueeze(-2)) @ vectors.mT


def with_free(plan: Plan, rotations: Mapping[str, Transform], free: Mapping[str, Transform]) -> dict[str, Transform]:
    """The transforms that activations are rounded in, of a model into which those that can be are fused."""
    return composed(rotations, {name: found for name, found in free.items() if not is_fused(plan.space[name])})


def composed(rotations: Mapping[str, Transform], free: Mapping[str, Transform]) -> dict[str, Transform]:
    """Every space's transform: the free one, followed by the rotation, if it has both."""
    found = dict(rotations)
    for name, transform in free.items():
        found[name] = compose(transform, rotations[name]) if name in rotations else transform
    return found


def parted(plan: Plan, transforms: Mapping[str, Transform]) -> tuple[dict[str, Transform], dict[str, Transform]]:
    """Rotations and free transforms whose products are the transforms given (polar decomposition T = S R)."""
    rotations, free = {}, {}
    for name, transform in transforms.items():
        space = plan.space[name]
        if is_orthogonal(transform):
            rotations[name] = transform
        elif kind_of(space) is None or isinstance(transform, Diagonal):
            free[name] = transform
        else:
            weight = matrix(transform)
            root = symmetric_root(weight @ weight.mT)
            turn = torch.linalg.solve(root, weight)  # the same for all heads, if one rotation followed all of them
            rotations[name] = Orthogonal(nearest_orthogonal(turn.reshape(-1, space.size, space.size).mean(0)))
            free[name] = Matrix(root)
    return rotations, free


def fuse_free(model: Any, plan: Plan, free: Mapping[str, Transform], tokens: Tensor) -> None:
    """Fuse the transforms that can be into the model's weights, in place.

    Raises LearningError if that changes the logits on tokens, (samples, length): then the plan is wrong.
    """
    fused = {name: found for name, found in free.items() if is_fused(plan.space[name])}
    if not fused:
        return
    row = tokens.to(device_of(model))
    with torch.no_grad():
        before = model(input_ids=row, use_cache=False).logits
        fuse_module(model, plan, fused)
        after = model(input_ids=row, use_cache=False).logits
    moved = float((after.double() - before.double()).norm() / before.double().norm())
    if not moved <= min(0.2, 16 * torch.finfo(before.dtype).eps ** 0.5):
        raise LearningError(
            f"fusing the transform of {next(iter(fused))} and others changed the logits of {plan.family} by "
            f"{moved:.2g} (relative): its table declares that the space allows it, and it does not. Learn without "
            "(--no-transforms), or correct `scaled` and `allows` in the family file"
        )


def unfuse_free(model: Any, plan: Plan, free: Mapping[str, Transform]) -> None:
    """Undo `fuse_free`, up to rounding of the weights."""
    fuse_module(model, plan, {name: _inverse(found) for name, found in free.items() if is_fused(plan.space[name])})


def _inverse(transform: Transform) -> Transform:
    if isinstance(transform, Diagonal):
        return transform.dual()
    assert isinstance(transform, Matrix) and transform.inverse is not None
    return Matrix(transform.inverse, transform.weight)
