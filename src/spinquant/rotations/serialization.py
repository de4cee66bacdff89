"""Save and load rotations: a JSON description plus tensors, as they are stored in model folders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, Rotation
from spinquant.rotations.wrappers import InPrecision, Scaled, bare

ORTHOGONAL = 1e-6  # how far R^T R may be from the identity; learned rotations are off by some 1e-15
PRECISIONS = ("float16", "bfloat16", "float32", "float64")


def to_save(rotations: Mapping[str, Rotation]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON description, tensors) of rotations by space; `saved` is the inverse.

    A rotation that several spaces share is stored once; scales are stored per space.
    """
    alone = {space: bare(rotation) for space, rotation in rotations.items()}
    kinds = list({id(rotation): rotation for rotation in alone.values()}.values())
    index = {id(rotation): i for i, rotation in enumerate(kinds)}
    about: dict[str, Any] = {
        "rotations": [rotation.describe() for rotation in kinds],
        "spaces": {space: index[id(rotation)] for space, rotation in alone.items()},
    }
    tensors = {f"{i}.{k}": v.contiguous() for i, kind in enumerate(kinds) for k, v in kind.tensors().items()}
    scales = {space: rotation.scale for space, rotation in rotations.items() if isinstance(rotation, Scaled)}
    if scales:
        about["scaled"] = list(scales)
    return about, tensors | {f"scale.{space}": scale.contiguous() for space, scale in scales.items()}


def saved(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Rotation]:
    """The rotations by space that `to_save` described.

    Raises:
        RotationError: the description is incomplete.
    """
    try:
        kinds = [
            restore(described, {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")})
            for i, described in enumerate(about["rotations"])
        ]
        scaled = {space: tensors[f"scale.{space}"] for space in about.get("scaled", ())}
        for space, scale in scaled.items():
            if scale.ndim != 1 or not bool((scale > 0).all() & scale.isfinite().all()):
                raise RotationError(f"the channel scales of {space} are not a row of positive, finite numbers")
        found = {space: kinds[i] for space, i in about["spaces"].items()}
        return {s: Scaled(rotation, scaled[s]) if s in scaled else rotation for s, rotation in found.items()}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RotationError(f"the description of saved rotations is incomplete: {error!r}") from None


def restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotation:
    """The rotation whose `describe()` and `tensors()` these are.

    Raises:
        RotationError: the kind is unknown, a tensor is missing, or the tensors are not those of a rotation.
    """
    if "precision" in description:
        rest = {key: value for key, value in description.items() if key != "precision"}
        precision = description["precision"]
        if precision not in PRECISIONS:
            raise RotationError(f"a saved rotation has precision {precision!r}: expected {', '.join(PRECISIONS)}")
        return InPrecision(restore(rest, tensors), getattr(torch, precision))
    rotation = _restored(description, tensors)
    _check(description, rotation)
    return rotation


def _restored(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotation:
    kind = description.get("kind")
    try:
        if kind == "hadamard":
            return Hadamard(description["order"])
        if kind == "random-hadamard":
            return Hadamard(description["order"], tensors["signs"])
        if kind == "orthogonal":
            return Orthogonal(tensors["weight"])
        if kind == "kronecker":
            return Kronecker(tensors["weight"], description["hadamard_order"], tensors["signs"])
        if kind == "centred-hadamard":
            return CentredHadamard(description["order"])
        if kind == "centred-random-hadamard":
            return CentredRandomHadamard(tensors["signs"], tensors.get("weight"))
    except KeyError as missing:
        raise RotationError(f"a saved rotation of kind {kind!r} lacks {missing}: incomplete checkpoint") from None
    raise RotationError(f"a saved rotation has the unknown kind {kind!r}: upgrade spinquant")


def _check(description: Mapping[str, Any], rotation: Rotation) -> None:
    """Raise RotationError for tensors that make no rotation: a model would be spoilt without a word."""
    kind, order, tensors = description["kind"], description.get("order"), rotation.tensors()
    signs, weight = tensors.get("signs"), tensors.get("weight")
    if signs is not None and (signs.ndim != 1 or signs.is_floating_point() or not bool((signs.abs() == 1).all())):
        raise RotationError(f"the signs of a saved rotation of kind {kind!r} are not a row of integers 1 and -1")
    if weight is not None:
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or not weight.is_floating_point():
            raise RotationError(
                f"the matrix of a saved rotation of kind {kind!r} has shape {tuple(weight.shape)} and dtype "
                f"{weight.dtype}: expected a square of floating-point numbers"
            )
        error = float((weight.T @ weight - torch.eye(len(weight), dtype=weight.dtype)).abs().max())
        if not error < ORTHOGONAL:
            raise RotationError(
                f"the matrix of a saved rotation of kind {kind!r} is not orthogonal: off by {error:.1e}"
            )
    if isinstance(order, bool) or not isinstance(order, int) or order < 1 or order != rotation.order:
        raise RotationError(f"a saved rotation of kind {kind!r} has order {order!r}, and its tensors {rotation.order}")
    if kind in ("random-hadamard", "kronecker") and signs is not None and len(signs) != order:
        raise RotationError(f"a saved rotation of kind {kind!r} has order {order} and {len(signs)} signs")


def empty_tensors(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Uninitialized tensors with the shapes and dtypes that `restore` needs, for a loader to fill."""
    order, kind = description["order"], description["kind"]
    side = order // description.get("hadamard_order", 1)
    signs = torch.empty(order, dtype=torch.int8)
    weight = torch.empty(side, side, dtype=torch.float64)
    return {
        "hadamard": {},
        "random-hadamard": {"signs": signs},
        "orthogonal": {"weight": weight},
        "kronecker": {"weight": weight, "signs": signs},
    }[kind]
