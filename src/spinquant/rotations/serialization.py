"""Save and load transforms: a JSON description plus tensors, as they are stored in model folders.

Descriptions and tensors may come from a stranger, so both are checked: what is restored is orthogonal, or has an
inverse that rounding does not spoil.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from spinquant.compute.values import validated
from spinquant.errors import RotationError
from spinquant.plan import CHANNELS
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard
from spinquant.rotations.rotation import ORTHOGONAL, Hadamard, Kronecker, Orthogonal, Transform, off_orthogonal
from spinquant.rotations.transforms import Composed, Diagonal, KroneckerMatrix, Matrix, check_conditioned
from spinquant.rotations.wrappers import InPrecision

LARGEST = 1 << 22  # order of a transform; the longest axis of a published model has some 10^5
_LARGEST_SIDE = 1 << 16  # of a dense matrix, 34 GB
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST = 8  # transforms that a composed one is a product of
Kind = Literal[
    "hadamard",
    "random-hadamard",
    "orthogonal",
    "kronecker",
    "centred-hadamard",
    "centred-random-hadamard",
    "diagonal",
    "matrix",
    "kronecker-matrix",
    "composed",
]
Order = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
_Count = Annotated[int, Field(strict=True, ge=0)]


class Description(BaseModel):
    """What `Transform.describe` gives, as it is read again; further keys are for readers.

    heads: number of matrices or diagonals, 0 if there is one without an axis of heads. factors: orders of the factors
    of a Kronecker product. parts: descriptions of the transforms of a product, none of them a product.
    """

    kind: Kind
    order: Order
    hadamard_order: Order = 1
    heads: Annotated[int, Field(strict=True, ge=0, le=LARGEST)] = 0
    factors: Annotated[list[Order], Field(max_length=32)] = []
    parts: Annotated[list[dict[str, Any]], Field(max_length=_MOST)] = []
    precision: Literal["float16", "bfloat16", "float32", "float64"] | None = None


class SavedRotations(BaseModel):
    """What `to_save` describes, as it is read again: distinct transforms, and the one of each space.

    scaled: spaces with channel scales of their own in folders of earlier versions.
    """

    rotations: list[dict[str, Any]]
    spaces: dict[str, _Count]
    scaled: list[str] = []


def to_save(rotations: Mapping[str, Transform]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON description, tensors) of rotations by space; `saved` is the inverse.

    A transform that several spaces share is stored once.
    """
    kinds = list({id(rotation): rotation for rotation in rotations.values()}.values())
    index = {id(rotation): i for i, rotation in enumerate(kinds)}
    about: dict[str, Any] = {
        "rotations": [rotation.describe() for rotation in kinds],
        "spaces": {space: index[id(rotation)] for space, rotation in rotations.items()},
    }
    tensors = {f"{i}.{k}": v.contiguous() for i, kind in enumerate(kinds) for k, v in kind.tensors().items()}
    return about, unshared(tensors)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where several lie in one memory, which safetensors refuses: transforms may share scales."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def saved(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Transform]:
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


def restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
    """The transform whose `describe()` and `tensors()` these are.

    Raises:
        RotationError: the kind is unknown, a tensor is missing, or the tensors are not those of a transform.
    """
    about = _described(description)
    try:
        transform = _restored(about, tensors)
    except KeyError as missing:
        raise RotationError(f"a saved rotation of kind {about.kind!r} lacks {missing}: incomplete checkpoint") from None
    if about.order != transform.order:
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {about.order}, and its tensors {transform.order}"
        )
    return transform if about.precision is None else InPrecision(transform, getattr(torch, about.precision))


def _described(description: Mapping[str, Any]) -> Description:
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if isinstance(kind, str) and kind not in get_args(Kind):
        raise RotationError(f"a saved rotation has the unknown kind {kind!r}: upgrade spinquant")
    about: Description = validated(Description, description, "a saved rotation", RotationError)
    if about.kind == "composed" and (
        len(about.parts) < 2 or any(part.get("kind") == "composed" for part in about.parts)
    ):
        raise RotationError(
            f"a saved rotation of kind 'composed' has {len(about.parts)} parts: expected at least two, and no composed "
            "one among them"
        )
    if about.kind == "kronecker-matrix" and (not about.factors or math.prod(about.factors) != about.order):
        raise RotationError(
            f"a saved rotation of kind 'kronecker-matrix' has order {about.order} and factors of orders "
            f"{about.factors}: expected factors whose product is the order"
        )
    return about


def _restored(about: Description, tensors: Mapping[str, Tensor]) -> Transform:
    """The transform, in no fixed precision. Raises KeyError for a tensor that is missing."""
    if about.kind in ("hadamard", "centred-hadamard"):
        return (Hadamard if about.kind == "hadamard" else CentredHadamard)(about.order)
    if about.kind == "composed":
        parts = [restore(part, _parts_of(i, tensors)) for i, part in enumerate(about.parts)]
        composed = reduce(Composed, parts)
        check_conditioned("a saved rotation of kind 'composed'", composed)
        return composed
    if about.kind in ("diagonal", "matrix", "kronecker-matrix"):
        found: dict[str, Tensor] = {}
        for name, (_, shape) in _layout(about).items():
            found[name] = _of_shape(about, name, tensors[name], shape)
        if about.kind == "kronecker-matrix":
            made: Transform = KroneckerMatrix(tuple(found.values()))
        else:
            made = Diagonal(found["scale"]) if about.kind == "diagonal" else Matrix(found["weight"])
        check_conditioned(f"a saved rotation of kind {about.kind!r}", made)
        return made
    if about.kind == "random-hadamard":
        signs = _signs(about, tensors)
        return Hadamard(len(signs), signs)
    if about.kind == "orthogonal":
        return Orthogonal(_orthogonal(about, tensors))
    if about.kind == "centred-random-hadamard":
        return CentredRandomHadamard(
            _signs(about, tensors), _orthogonal(about, tensors) if "weight" in tensors else None
        )
    rotation = Kronecker(_orthogonal(about, tensors), about.hadamard_order, _signs(about, tensors))
    if len(rotation.signs) != rotation.order:
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {rotation.order} and {len(rotation.signs)} signs"
        )
    return rotation


def _parts_of(i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one transform of a product."""
    return {name.removeprefix(f"{i}_"): tensor for name, tensor in tensors.items() if name.startswith(f"{i}_")}


def _of_shape(about: Description, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a transform. Raises RotationError for one of another shape, or with numbers that are not finite."""
    if tuple(tensor.shape) != shape or tensor.dtype not in _FLOATING or not bool(tensor.isfinite().all()):
        raise RotationError(
            f"{name} of a saved rotation of kind {about.kind!r} has shape {tuple(tensor.shape)} and dtype "
            f"{tensor.dtype}: expected finite floating-point numbers of shape {shape}"
        )
    return tensor


def _signs(about: Description, tensors: Mapping[str, Tensor]) -> Tensor:
    """The signs of a rotation. Raises RotationError for others: a model would be spoilt without a word."""
    signs = tensors["signs"]
    if signs.ndim != 1 or signs.dtype not in _SIGNED or not bool((signs.abs() == 1).all()):
        raise RotationError(f"the signs of a saved rotation of kind {about.kind!r} are not a row of integers 1 and -1")
    return signs


def _orthogonal(about: Description, tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix of a rotation. Raises RotationError for one that is not orthogonal."""
    weight = tensors["weight"]
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or weight.dtype not in _FLOATING:
        raise RotationError(
            f"the matrix of a saved rotation of kind {about.kind!r} has shape {tuple(weight.shape)} and dtype "
            f"{weight.dtype}: expected a square of floating-point numbers"
        )
    if not len(weight):
        raise RotationError(f"the matrix of a saved rotation of kind {about.kind!r} is empty")
    error = off_orthogonal(weight)
    if not error < ORTHOGONAL:
        raise RotationError(
            f"the matrix of a saved rotation of kind {about.kind!r} is not orthogonal: off by {error:.1e}"
        )
    return weight


def empty_tensors(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Uninitialized tensors with the shapes and dtypes that `restore` needs, for a loader to fill.

    Raises RotationError for a description that is not one of an online transform.
    """
    layout = _layout(_described(description))
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}


def _layout(about: Description) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors of a transform that can run online, by name."""
    side, rest = divmod(about.order, about.hadamard_order)
    heads, wide = (about.heads,) if about.heads else (), torch.float64
    known: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
        "hadamard": {},
        "random-hadamard": {"signs": (torch.int8, (about.order,))},
        "orthogonal": {"weight": (wide, (side, side))},
        "kronecker": {"weight": (wide, (side, side)), "signs": (torch.int8, (about.order,))},
        "diagonal": {"scale": (wide, (*heads, about.order))},
        "matrix": {"weight": (wide, (*heads, about.order, about.order))},
        "kronecker-matrix": {f"factor{i}": (wide, (k, k)) for i, k in enumerate(about.factors)},
        "composed": {
            f"{i}_{name}": found
            for i, part in enumerate(about.parts)
            for name, found in _layout(_described(part)).items()
        },
    }
    if about.kind not in known:
        raise RotationError(f"a saved rotation of kind {about.kind!r} does not run online")
    numbers = sum(math.prod(shape) for _, shape in known[about.kind].values())
    if rest or numbers > _LARGEST_SIDE**2 + LARGEST:
        raise RotationError(
            f"a saved rotation of kind {about.kind!r} has order {about.order}, a Hadamard factor of order "
            f"{about.hadamard_order} and {numbers} numbers: expected a divisor, and at most those of a matrix of "
            f"{_LARGEST_SIDE} rows"
        )
    return known[about.kind]
