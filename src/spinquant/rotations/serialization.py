"""Save and load rotations: a JSON description plus tensors, as they are stored in model folders.

Descriptions and tensors may come from a stranger, so both are checked: what is restored is orthogonal.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from spinquant.compute.values import validated
from spinquant.errors import RotationError
from spinquant.plan import CHANNELS
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard
from spinquant.rotations.rotation import ORTHOGONAL, Hadamard, Kronecker, Orthogonal, Rotation, off_orthogonal
from spinquant.rotations.transforms import Diagonal
from spinquant.rotations.wrappers import InPrecision

LARGEST = 1 << 22  # order of a rotation; the longest axis of a published model has some 10^5
_LARGEST_SIDE = 1 << 16  # of a dense matrix, 34 GB
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Kind = Literal["hadamard", "random-hadamard", "orthogonal", "kronecker", "centred-hadamard", "centred-random-hadamard"]
Order = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
_Count = Annotated[int, Field(strict=True, ge=0)]


class Description(BaseModel):
    """What `Rotation.describe` gives, as it is read again; further keys are for readers."""

    kind: Kind
    order: Order
    hadamard_order: Order = 1
    precision: Literal["float16", "bfloat16", "float32", "float64"] | None = None


class SavedRotations(BaseModel):
    """What `to_save` describes, as it is read again: distinct transforms, and the one of each space.

    scaled: spaces with channel scales of their own in folders of earlier versions.
    """

    rotations: list[dict[str, Any]]
    spaces: dict[str, _Count]
    scaled: list[str] = []


def to_save(rotations: Mapping[str, Rotation]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON description, tensors) of rotations by space; `saved` is the inverse.

    A transform that several spaces share is stored once.
    """
    kinds = list({id(rotation): rotation for rotation in rotations.values()}.values())
    index = {id(rotation): i for i, rotation in enumerate(kinds)}
    about: dict[str, Any] = {
        "rotations": [rotation.describe() for rotation in kinds],
        "spaces": {space: index[id(rotation)] for space, rotation in rotations.items()},
    }
    return about, {f"{i}.{k}": v.contiguous() for i, kind in enumerate(kinds) for k, v in kind.tensors().items()}


def saved(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Rotation]:
    """The rotations by space that `to_save` described.

    Raises:
        RotationError: the description is incomplete, or the tensors are not those of rotations.
    """
    described: SavedRotations = validated(SavedRotations, about, "the description of saved rotations", RotationError)
    kinds = [
        restore(one, {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")})
        for i, one in enumerate(described.rotations)
    ]
    for space, i in described.spaces.items():
        if i >= len(kinds):
            raise RotationError(f"the description of saved rotations has no rotation {i}, which {space} names")
    found = {space: kinds[i] for space, i in described.spaces.items()}
    for space in described.scaled:
        scale = tensors.get(f"scale.{space}")
        if space not in found or scale is None:
            raise RotationError(f"the description of saved rotations is incomplete: {space} has no rotation or scales")
        positive = scale.ndim == 1 and scale.is_floating_point() and bool((scale > 0).all() & scale.isfinite().all())
        if not positive:
            raise RotationError(f"the channel scales of {space} are not a row of positive, finite numbers")
        found[space + CHANNELS] = Diagonal(scale)
    return found


def restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotation:
    """The rotation whose `describe()` and `tensors()` these are.

    Raises:
        RotationError: the kind is unknown, a tensor is missing, or the tensors are not those of a rotation.
    """
    about = _described(description)
    try:
        signs, weight = (_checked(about, name, tensors.get(name)) for name in ("signs", "weight"))
        rotation = _restored(about, signs, weight)
    except KeyError as missing:
        raise RotationError(f"a saved rotation of kind {about.kind!r} lacks {missing}: incomplete checkpoint") from None
    if about.order != rotation.order:
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {about.order}, and its tensors {rotation.order}"
        )
    return rotation if about.precision is None else InPrecision(rotation, getattr(torch, about.precision))


def _described(description: Mapping[str, Any]) -> Description:
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if isinstance(kind, str) and kind not in get_args(Kind):
        raise RotationError(f"a saved rotation has the unknown kind {kind!r}: upgrade spinquant")
    return validated(Description, description, "a saved rotation", RotationError)


def _restored(about: Description, signs: Tensor | None, weight: Tensor | None) -> Rotation:
    def given(name: str, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise KeyError(name)
        return tensor

    if about.kind == "hadamard":
        return Hadamard(about.order)
    if about.kind == "random-hadamard":
        return Hadamard(len(given("signs", signs)), signs)
    if about.kind == "orthogonal":
        return Orthogonal(given("weight", weight))
    if about.kind == "centred-hadamard":
        return CentredHadamard(about.order)
    if about.kind == "centred-random-hadamard":
        return CentredRandomHadamard(given("signs", signs), weight)
    rotation = Kronecker(given("weight", weight), about.hadamard_order, given("signs", signs))
    if len(rotation.signs) != rotation.order:
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {rotation.order} and {len(rotation.signs)} signs"
        )
    return rotation


def _checked(about: Description, name: str, tensor: Tensor | None) -> Tensor | None:
    """A tensor of a rotation. Raises RotationError for one that makes none: a model would be spoilt without a word."""
    if tensor is None:
        return None
    if name == "signs":
        if tensor.ndim != 1 or tensor.dtype not in _SIGNED or not bool((tensor.abs() == 1).all()):
            raise RotationError(
                f"the signs of a saved rotation of kind {about.kind!r} are not a row of integers 1 and -1"
            )
        return tensor
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or tensor.dtype not in _FLOATING:
        raise RotationError(
            f"the matrix of a saved rotation of kind {about.kind!r} has shape {tuple(tensor.shape)} and dtype "
            f"{tensor.dtype}: expected a square of floating-point numbers"
        )
    if not len(tensor):
        raise RotationError(f"the matrix of a saved rotation of kind {about.kind!r} is empty")
    error = off_orthogonal(tensor)
    if not error < ORTHOGONAL:
        raise RotationError(
            f"the matrix of a saved rotation of kind {about.kind!r} is not orthogonal: off by {error:.1e}"
        )
    return tensor


def empty_tensors(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Uninitialized tensors with the shapes and dtypes that `restore` needs, for a loader to fill.

    Raises RotationError for a description that is not one of an online rotation.
    """
    about = _described(description)
    side, rest = divmod(about.order, about.hadamard_order)
    if rest or (about.kind in ("orthogonal", "kronecker") and side > _LARGEST_SIDE):
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {about.order} and a Hadamard factor of order "
            f"{about.hadamard_order}: expected a divisor, and a matrix of at most {_LARGEST_SIDE} rows"
        )
    signs = torch.empty(about.order, dtype=torch.int8)
    known: dict[str, dict[str, Tensor]] = {"hadamard": {}, "random-hadamard": {"signs": signs}}
    if about.kind in ("orthogonal", "kronecker"):
        weight = torch.empty(side, side, dtype=torch.float64)
        known |= {"orthogonal": {"weight": weight}, "kronecker": {"weight": weight, "signs": signs}}
    if about.kind not in known:
        raise RotationError(f"a saved rotation of kind {about.kind!r} does not run online")
    return known[about.kind]
