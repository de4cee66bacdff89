"""Make rotations for the spaces of a plan: Hadamard, randomized Hadamard, random orthogonal, or Kronecker products."""

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from spinquant.compute.values import check_integer, check_seed
from spinquant.errors import HadamardOrderError, RotationError
from spinquant.plan import Plan, Space
from spinquant.rotation_names import parse_rotation_names
from spinquant.rotations.hadamard import construct
from spinquant.rotations.mean_preserving import CentredHadamard, CentredRandomHadamard, random_mean_preserving
from spinquant.rotations.mean_preserving import describe as describe_centred
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, Rotation, Transform, _description

TRANSFORM_TYPES = ("hadamard", "random-hadamard", "random-matrix", "auto")
DEFAULT_TYPE = "auto"


def generator_for(seed: int, label: str) -> torch.Generator:
    """An independent random generator for each use (`label`) of one seed."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_signs(order: int, generator: torch.Generator) -> Tensor:
    """Independent random signs, +1 or -1 with equal probability; int8, shape (order,)."""
    return torch.randint(0, 2, (order,), generator=generator, dtype=torch.int8) * 2 - 1


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed random orthogonal matrix, float64, shape (order, order); see `rotation.py` for the method."""
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class RotationSpec:
    """Which rotations to apply, of which type, block size and seed.

    The same spec gives the same rotations bit for bit.

    Attributes:
        rotations: some of R1 to R4 and online-R1, as a tuple or as text such as "R1,R2". R1 and R2 are offline
            rotations, fused into the weights; R3, R4 and online-R1 run online.
        transform_type: "auto" (default; random-hadamard if a Hadamard matrix of the order is known, else random signs
            times the Kronecker product of an orthogonal matrix of odd order and a Hadamard matrix whose order is a
            power of two); "hadamard"; "random-hadamard" (random signs times a Hadamard matrix); or "random-matrix"
            (Haar-distributed orthogonal). One type for all rotations, or one per rotation, such as {"R4": "hadamard"}.
        block_size: order of the blocks of a block-diagonal rotation; None for one block per space. One for all
            rotations, or one per rotation.
        randomize: draw a rotation of its own for every layer, instead of one for all spaces of the same kind.
        seed: seed of everything random.

    Raises:
        RotationError: an unknown rotation or type, a block size or seed that is no integer in its range, an option for
            a rotation that is not asked for, or `randomize` where nothing is random.

    Example:
        >>> from spinquant import RotationSpec
        >>> spec = RotationSpec("R1,R4", {"R4": "hadamard"}, block_size={"R4": 32})
        >>> spec.rotations, spec.type_of("R1"), spec.type_of("R4"), spec.block_of("R1")
        (('R1', 'R4'), 'auto', 'hadamard', None)
    """

    rotations: tuple[str, ...] = ("R1", "R2")
    transform_type: str | Mapping[str, str] = DEFAULT_TYPE
    block_size: int | Mapping[str, int] | None = None
    randomize: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "rotations", parse_rotation_names(self.rotations))
        chosen = self.transform_type.values() if isinstance(self.transform_type, Mapping) else [self.transform_type]
        for name in chosen:
            if not isinstance(name, str) or name not in TRANSFORM_TYPES:
                raise RotationError(f"unknown transform type {name!r}: expected one of {', '.join(TRANSFORM_TYPES)}")
        sizes = self.block_size.values() if isinstance(self.block_size, Mapping) else [self.block_size]
        for size in sizes:
            if size is not None:
                check_integer(size, "block size", RotationError)
        if not isinstance(self.randomize, bool):
            raise RotationError(f"randomize is {self.randomize!r}: expected True or False")
        check_seed(self.seed, RotationError)
        for field_name in ("transform_type", "block_size"):
            option = getattr(self, field_name)
            if isinstance(option, Mapping):
                unused = set(parse_rotation_names(option)) - set(self.rotations)
                if unused:
                    raise RotationError(f"{field_name} is given for {sorted(unused)[0]}, which is not rotated")
                object.__setattr__(self, field_name, {n: v for k, v in option.items() for n in parse_rotation_names(k)})
        per_layer = [name for name in self.rotations if name != "R1"]
        if self.randomize and per_layer and all(self.type_of(name) == "hadamard" for name in per_layer):
            raise RotationError("randomize does nothing to type hadamard, which is not random: use random-hadamard")

    @classmethod
    def from_dict(cls, data: Any) -> "RotationSpec":
        """The spec from its `to_dict()` form. Raises RotationError for other data."""
        known = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) - set(known):
            raise RotationError(f"a saved rotation spec is {reprlib.repr(data)}: expected some of {', '.join(known)}")
        return cls(**data)

    def type_of(self, rotation: str) -> str:
        """Transform type of a rotation such as "R4"."""
        if isinstance(self.transform_type, Mapping):
            return self.transform_type.get(rotation, DEFAULT_TYPE)
        return self.transform_type

    def block_of(self, rotation: str) -> int | None:
        """Block size of a rotation such as "R4"; None for one block per space."""
        if isinstance(self.block_size, Mapping):
            return self.block_size.get(rotation)
        return self.block_size

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain dicts for JSON."""
        return asdict(self)


def choose(space: Space, spec: RotationSpec) -> dict[str, Any]:
    """Describe the rotation that a spec gives a space (kind, order, construction) without making it.

    Raises:
        RotationError: the block size does not divide the space.
        HadamardOrderError: no Hadamard matrix of the order is known and the type is not "auto".
    """
    order = spec.block_of(space.rotation) or space.size
    if space.size % order:
        divisors = [d for d in range(2, space.size + 1) if space.size % d == 0]
        raise RotationError(
            f"block size {order} does not divide {space.name} ({space.rotation}, size {space.size}). "
            f"Divisors: {', '.join(map(str, divisors))}."
        )
    kind = spec.type_of(space.rotation)
    if kind == "random-matrix":
        return _description("orthogonal", order)
    if space.centred and kind == "hadamard":
        return describe_centred("centred-hadamard", order)
    try:
        if space.centred:
            construct(order)
            return describe_centred("centred-random-hadamard", order, hadamard_order=order)
        return _description("hadamard" if kind == "hadamard" else "random-hadamard", order)
    except HadamardOrderError as error:
        if kind != "auto":
            raise HadamardOrderError(f"{space.name} ({space.rotation}): {error}") from None
        if space.centred:
            return describe_centred("centred-random-hadamard", order, hadamard_order=order & -order)
        return _description("kronecker", order, hadamard_order=order & -order)


def make_rotations(plan: Plan, spec: RotationSpec) -> dict[str, Transform]:
    """Make the rotation of every space that the spec rotates.

    Args:
        plan: the plan of the model, from `make_plan` or `plan_of`.
        spec: which rotations, of which type, block size and seed.

    Returns:
        Rotations by the name of the space. Spaces of the same kind and size share one, unless `spec.randomize` is set.

    Raises:
        RotationError: a rotation is impossible for this model, or the block size does not divide a space.
        HadamardOrderError: no Hadamard matrix of a needed order is known and the type is not "auto".

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import RotationSpec, make_rotations, plan_of
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> rotations = make_rotations(plan_of(model), RotationSpec(("R1", "R2"), seed=1))
        >>> {space: rotation.order for space, rotation in rotations.items()}
        {'residual': 32, 'layers.0.value': 16}
    """
    rotated = plan.rotated(spec.rotations)
    shared: dict[tuple[str, int, bool], Rotation] = {}
    found: dict[str, Transform] = {}
    for space in plan.spaces:
        if space.name not in rotated:
            continue
        if spec.randomize:
            found[space.name] = make_rotation(space, spec, space.name)
        else:
            key = (space.rotation, space.size, space.centred)
            if key not in shared:
                shared[key] = make_rotation(space, spec, f"{space.rotation}/{space.size}")
            found[space.name] = shared[key]
    return found


def make_rotation(space: Space, spec: RotationSpec, label: str) -> Rotation:
    """The rotation that a spec gives one space; `label` selects its random numbers. Raises the errors of `choose`."""
    # One generator per space: leaving one rotation out does not change the others.
    generator = generator_for(spec.seed, label)
    chosen = choose(space, spec)
    order = chosen["order"]
    if space.centred:
        return _mean_preserving_rotation(chosen, generator)
    if chosen["kind"] == "orthogonal":
        return Orthogonal(random_orthogonal(order, generator))
    if chosen["kind"] == "kronecker":
        power = chosen["hadamard_order"]
        return Kronecker(random_orthogonal(order // power, generator), power, random_signs(order, generator))
    return Hadamard(order) if chosen["kind"] == "hadamard" else Hadamard(order, random_signs(order, generator))


def _mean_preserving_rotation(chosen: Mapping[str, Any], generator: torch.Generator) -> Rotation:
    order = chosen["order"]
    if chosen["kind"] == "centred-hadamard":
        return CentredHadamard(order)
    if chosen["kind"] == "orthogonal":
        return Orthogonal(random_mean_preserving(order, random_orthogonal(order - 1, generator)))
    power = chosen["hadamard_order"]
    signs, odd = random_signs(power, generator), order // power
    signs[0] = 1  # the sign of the mean must not change
    weight = None if odd == 1 else random_mean_preserving(odd, random_orthogonal(odd - 1, generator))
    return CentredRandomHadamard(signs, weight)
