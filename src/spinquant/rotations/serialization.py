"""Save and load rotations: a JSON description plus tensors, as they are stored in model folders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import RotationError
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, Rotation
from spinquant.rotations.wrappers import InPrecision, Scaled, bare


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
        found = {space: kinds[i] for space, i in about["spaces"].items()}
        return {s: Scaled(rotation, scaled[s]) if s in scaled else rotation for s, rotation in found.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise RotationError(f"the description of saved rotations is incomplete: {error!r}") from None


def restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotation:
    """The rotation whose `describe()` and `tensors()` these are.

    Raises:
        RotationError: the kind is unknown or a tensor is missing.
    """
    if "precision" in description:
        rest = {key: value for key, value in description.items() if key != "precision"}
        return InPrecision(restore(rest, tensors), getattr(torch, description["precision"]))
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
