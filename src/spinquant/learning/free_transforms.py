"""Transforms that cost nothing at run time, in closed form, for every space that allows more than a rotation.

    scales    of factors of products: the inside of a gated MLP
    values    a matrix for each key-value head, in v_proj and o_proj
    keys      a matrix for each key-value head, where R3 runs online anyway; its dual for queries
    norms     scales in the weight of a norm, in the coordinates that R1 gives its output

Values and scales are fused into the model that learning sees, since nothing after them depends on them. Transforms of
keys and norms belong to the coordinates of a rotation, and are multiplied with it where activations are rounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import DIAGONAL, MATRIX, Damping, Moments, chosen_transforms, symmetric_root
from spinquant.models.capture import device_of
from spinquant.models.modules import named_tensor
from spinquant.plan import CHANNELS, Plan, Space
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Hadamard, Orthogonal, Transform, is_orthogonal, matrix, nearest_orthogonal
from spinquant.rotations.transforms import LARGEST_CONDITION, Diagonal, Matrix, compose

Kind = Literal["scales", "values", "keys", "norms"]
KINDS: tuple[Kind, ...] = ("scales", "values", "keys", "norms")
# Largest condition number of a matrix that is fused into half-precision weights: at 300, the logits of a tiny bfloat16
# model move by 0.27 (relative), which is more than proofs allow.
HALF_CONDITION = 30.0
HALF = (torch.float16, torch.bfloat16)
HALF_MOVED = 0.05  # relative move of the logits up to which a kind is kept there


def free_spaces(plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme) -> dict[Kind, list[str]]:
    """The spaces of each kind that can have a transform beside the rotations given, and of which something is rounded.

    That is the activation, the cache, or the weights that read or write the space.

    Rotations in blocks stay in blocks, and an R3 that is a plain Hadamard matrix stays one: runtimes know no other.
    """
    found: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for space in plan.spaces:
        kind = kind_of(space)
        if kind is None or space.allows not in ("any", "diagonal"):
            continue
        inputs = scheme.activations is not None or scheme.weights is not None
        cached = kind in ("values", "keys") and scheme.kv is not None
        if not cached and (kind == "keys" or not inputs):
            continue
        rotation = rotations.get(space.name)
        if kind in ("values", "keys") and rotation is not None:
            fixed = kind == "keys" and isinstance(rotation, Hadamard) and rotation.signs is None
            if fixed or rotation.order != space.size:
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
    plan: Plan,
    moments: Mapping[str, Sequence[Sequence[Moments]]],
    dampings: Sequence[Damping] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Transform]:
    """The best transform of each space, with damping chosen on held-out samples; none where none is better.

    Args:
        plan: the plan of the model.
        moments: as `collect_moments` returns them.
        dampings: to choose from. Default: those for scales or matrices.
        dtype: of the model's weights, whose rounding bounds the condition numbers of matrices.
    """
    bound = LARGEST_CONDITION if dtype in (torch.float32, torch.float64) else HALF_CONDITION
    found: dict[str, Transform] = {}
    for allowed, default in (("diagonal", DIAGONAL), ("any", MATRIX)):
        names = [name for name in moments if plan.space[name].allows == allowed]
        chosen = chosen_transforms([moments[name] for name in names], dampings or default)
        for name, (p, _, _) in zip(names, chosen, strict=True):
            if p is not None:
                diagonal = allowed == "diagonal"
                found[name] = Diagonal(p.sqrt().flatten()) if diagonal else Matrix(_bounded(symmetric_root(p), bound))
    return found


def _bounded(roots: Tensor, bound: float) -> Tensor:
    """Symmetric positive definite matrices, (heads, n, n), with condition numbers of at most `bound`."""
    values, vectors = torch.linalg.eigh(roots)
    least = values.amax(-1, keepdim=True) / (bound / 1.01)
    return (vectors * values.clamp(min=least).unsqueeze(-2)) @ vectors.mT


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


@dataclass
class Fused:
    """Transforms that are fused into a model, and what undoes it.

    kept: whether the logits moved no more than rounding explains; if not, nothing is fused.
    before: the weights of a half-precision model, which would be rounded twice otherwise.
    """

    model: Any
    plan: Plan
    transforms: dict[str, Transform]
    kept: bool = True
    before: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights: those of half precision bit for bit, others up to rounding."""
        for name, weight in self.before.items():
            named_tensor(self.model, name).copy_(weight)
        if self.transforms and not self.before:
            fuse_module(self.model, self.plan, {name: _inverse(found) for name, found in self.transforms.items()})
        self.transforms = {}


def fuse_free(model: Any, plan: Plan, free: Mapping[str, Transform], tokens: Tensor) -> Fused:
    """Fuse the transforms that can be into the model's weights, in place.

    Args:
        model: the model.
        plan: its plan.
        free: free transforms by space.
        tokens: int64 (samples, length), on which logits have to stay the same.

    Raises:
        LearningError: logits of a model in float32 or float64 move: the plan is wrong.
    """
    fused = Fused(model, plan, {name: found for name, found in free.items() if is_fused(plan.space[name])})
    if not fused.transforms:
        return fused
    row = tokens[:1, :128].to(device_of(model))
    half = next(model.parameters()).dtype in HALF
    if half:
        touched = {axis.tensor for axis in plan.axes if axis.space in fused.transforms}
        fused.before = {name: named_tensor(model, name).detach().clone() for name in touched}
    with torch.no_grad():
        before = model(input_ids=row, use_cache=False).logits
        fuse_module(model, plan, fused.transforms)
        after = model(input_ids=row, use_cache=False).logits
    moved = float((after.double() - before.double()).norm() / before.double().norm())
    if half:
        fused.kept = moved <= HALF_MOVED
        if not fused.kept:
            fused.undo()
    elif not moved <= 16 * torch.finfo(before.dtype).eps ** 0.5:
        raise LearningError(
            f"fusing the transform of {next(iter(fused.transforms))} and others changed the logits of {plan.family} by "
            f"{moved:.2g} (relative): its table declares that the space allows it, and it does not. Learn without "
            "(--no-transforms), or correct `scaled` and `allows` in the family file"
        )
    return fused


def _inverse(transform: Transform) -> Transform:
    if isinstance(transform, Diagonal):
        return transform.dual()
    assert isinstance(transform, Matrix) and transform.inverse is not None
    return Matrix(transform.inverse, transform.weight)
