"""Rotations are values: they know their order and how to apply themselves to an axis of a tensor, by default the last.

    apply(x)                  y[.., j] = sum_i x[.., i] R[i, j]        R orthogonal
    apply(x, transpose=True)  the inverse

An axis longer than the order is rotated block by block, so a block-diagonal rotation is the same value applied
to a longer axis. A rotation becomes a dense matrix only where someone asks for `matrix()`.

Random Hadamard rotations are D H / sqrt(n) with random signs D (QuaRot, arXiv 2404.00456); random orthogonal
ones are Haar-distributed: the Q of a Gaussian matrix, with the signs of R's diagonal moved into Q (Mezzadri,
arXiv math-ph/0609050), since plain QR is not uniform.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from spinquant.centred import CentredHadamard, CentredRandomHadamard, random_centred
from spinquant.centred import describe as describe_centred
from spinquant.errors import HadamardOrderError, RotationError
from spinquant.hadamard import construct, hadamard_factors, hadamard_transform, kronecker_transform
from spinquant.plan import Plan, Space, parse_rotation_names

Memo = dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]]
TRANSFORM_TYPES = ("hadamard", "random-hadamard", "random-matrix", "auto")


class Rotation(Protocol):
    """An orthogonal matrix of some order."""

    @property
    def order(self) -> int: ...

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """x R along an axis, block by block; x R^T with `transpose`. Keeps shape, dtype and device.

        out: contiguous, for the result; may be x. Without gradients only.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved; with `describe`, enough for `restore`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind and order, as JSON."""
        ...


def matrix(rotation: Rotation, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rotation as a dense (order, order) matrix."""
    return rotation.apply(torch.eye(rotation.order, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Hadamard:
    """H / sqrt(n), or D H / sqrt(n) with a diagonal D of +-1 given as `signs`, shape (n,)."""

    order: int
    signs: Tensor | None = None
    _memo: Memo = field(default_factory=dict, repr=False)

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        if self.signs is None:
            return hadamard_transform(x, self.order, transpose=transpose, dim=dim, out=out)
        (signs,) = _like(x, (self.signs,), x.dtype, self._memo)
        if transpose:
            return _flip(hadamard_transform(x, self.order, transpose=True, dim=dim, out=out), signs, dim, out)
        return hadamard_transform(_flip(x, signs, dim, out), self.order, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.signs is None else {"signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("hadamard" if self.signs is None else "random-hadamard", self.order)


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """A dense orthogonal matrix, shape (n, n): random or learned."""

    weight: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0]

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        factors = _like(x, (self.weight,), _wide(x), self._memo)
        return kronecker_transform(x, factors, transpose=transpose, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def describe(self) -> dict[str, Any]:
        return _description("orthogonal", self.order)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """D (Q kron H) / sqrt(m): an orthogonal Q of an order that has no Hadamard matrix, times a Hadamard of order m."""

    weight: Tensor
    hadamard_order: int
    signs: Tensor
    _memo: Memo = field(default_factory=dict, repr=False)

    @property
    def order(self) -> int:
        return self.weight.shape[0] * self.hadamard_order

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        check_blocks(x, self.order, dim)
        stored = (self.signs, self.weight, *hadamard_factors(self.hadamard_order))
        signs, *factors = _like(x, stored, _wide(x), self._memo)
        signs = signs.to(x.dtype)
        if transpose:
            return _flip(kronecker_transform(x, factors, transpose=True, dim=dim, out=out), signs, dim, out)
        return kronecker_transform(_flip(x, signs, dim, out), factors, dim=dim, out=out)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "signs": self.signs}

    def describe(self) -> dict[str, Any]:
        return _description("kronecker", self.order, hadamard_order=self.hadamard_order)


def nearest_orthogonal(square: Tensor) -> Tensor:
    """The orthogonal matrix with the largest trace against `square`, which is the nearest one: U V of its SVD."""
    u, _, v = torch.linalg.svd(square)
    return u @ v


def generator_for(seed: int, label: str) -> torch.Generator:
    """The stream of random numbers that a seed gives one use, which the label names."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_signs(order: int, generator: torch.Generator) -> Tensor:
    """Independent fair signs, int8, shape (order,)."""
    return torch.randint(0, 2, (order,), generator=generator, dtype=torch.int8) * 2 - 1


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64, shape (order, order)."""
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class RotationSpec:
    """Which rotations a user asks for.

    rotations: some of R1, R2, R3, R4.
    transform_type: hadamard, random-hadamard, random-matrix (Haar orthogonal), or auto (random-hadamard where a
        matrix of the order is known, else an orthogonal odd factor times a Hadamard power of two); one for all, or
        one per rotation, as in {"R4": "hadamard"}.
    block_size: order of the blocks, None for one block per space; one for all, or one per rotation.
    randomize: a rotation of its own for every layer, instead of one per kind of space.
    seed: of everything random. The same spec gives the same rotations bit for bit.
    """

    rotations: tuple[str, ...] = ("R1", "R2")
    transform_type: str | Mapping[str, str] = "random-hadamard"
    block_size: int | Mapping[str, int] | None = None
    randomize: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "rotations", parse_rotation_names(self.rotations))
        chosen = self.transform_type.values() if isinstance(self.transform_type, Mapping) else [self.transform_type]
        for name in chosen:
            if name not in TRANSFORM_TYPES:
                raise RotationError(f"unknown transform type {name!r}: expected one of {', '.join(TRANSFORM_TYPES)}")
        sizes = self.block_size.values() if isinstance(self.block_size, Mapping) else [self.block_size]
        for size in sizes:
            if size is not None and size < 1:
                raise RotationError(f"block size {size} is not a positive integer")
        for field_name in ("transform_type", "block_size"):
            option = getattr(self, field_name)
            if isinstance(option, Mapping):
                unused = set(parse_rotation_names(option)) - set(self.rotations)
                if unused:
                    raise RotationError(f"{field_name} is given for {sorted(unused)[0]}, which is not rotated")
                object.__setattr__(self, field_name, {name.strip().upper(): v for name, v in option.items()})
        per_layer = [name for name in self.rotations if name != "R1"]
        if self.randomize and per_layer and all(self.type_of(name) == "hadamard" for name in per_layer):
            raise RotationError("randomize does nothing to type hadamard, which is not random: use random-hadamard")

    def type_of(self, rotation: str) -> str:
        """Transform type for a rotation such as "R4"."""
        if isinstance(self.transform_type, Mapping):
            return self.transform_type.get(rotation, "random-hadamard")
        return self.transform_type

    def block_of(self, rotation: str) -> int | None:
        """Block size for a rotation such as "R4"."""
        if isinstance(self.block_size, Mapping):
            return self.block_size.get(rotation)
        return self.block_size

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def choose(space: Space, spec: RotationSpec) -> dict[str, Any]:
    """Kind, order and construction of the rotation that a spec gives a space, without making it.

    Raises RotationError when the block size does not divide the space, and HadamardOrderError when no Hadamard matrix
    of the order is known and the type does not fall back on another form.
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


def _description(kind: str, order: int, **more: int) -> dict[str, Any]:
    if kind == "orthogonal":
        construction = "dense orthogonal"
    elif kind == "kronecker":
        power = more["hadamard_order"]
        construction = f"orthogonal {order // power} x {construct(power)}"
    else:
        construction = str(construct(order))
    return {"kind": kind, "order": order, "construction": construction, **more}


def make_rotations(plan: Plan, spec: RotationSpec) -> dict[str, Rotation]:
    """A rotation for every space that the spec rotates, by the space's name.

    Raises RotationError when a rotation is refused for this model, and what `choose` raises.
    """
    rotated = plan.rotated(spec.rotations)
    shared: dict[tuple[str, int, bool], Rotation] = {}
    found: dict[str, Rotation] = {}
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
    """The rotation that a spec gives one space; the label names its stream of random numbers. Raises as `choose`."""
    # A stream of random numbers per space: leaving one rotation out does not change the others.
    generator = generator_for(spec.seed, label)
    chosen = choose(space, spec)
    order = chosen["order"]
    if space.centred:
        return _centred(chosen, generator)
    if chosen["kind"] == "orthogonal":
        return Orthogonal(random_orthogonal(order, generator))
    if chosen["kind"] == "kronecker":
        power = chosen["hadamard_order"]
        return Kronecker(random_orthogonal(order // power, generator), power, random_signs(order, generator))
    return Hadamard(order) if chosen["kind"] == "hadamard" else Hadamard(order, random_signs(order, generator))


def _centred(chosen: Mapping[str, Any], generator: torch.Generator) -> Rotation:
    order = chosen["order"]
    if chosen["kind"] == "centred-hadamard":
        return CentredHadamard(order)
    if chosen["kind"] == "orthogonal":
        return Orthogonal(random_centred(order, random_orthogonal(order - 1, generator)))
    power = chosen["hadamard_order"]
    signs, odd = random_signs(power, generator), order // power
    signs[0] = 1  # the mean keeps its sign
    weight = None if odd == 1 else random_centred(odd, random_orthogonal(odd - 1, generator))
    return CentredRandomHadamard(signs, weight)


def _flip(x: Tensor, signs: Tensor, dim: int, out: Tensor | None) -> Tensor:
    blocks = x.unflatten(dim, (-1, len(signs)))
    signs = signs.view(-1, *[1] * len(x.shape[dim:][1:]))
    if out is None:
        return (blocks * signs).reshape(x.shape)
    torch.mul(blocks, signs, out=out.view(blocks.shape))
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(x: Tensor, stored: tuple[Tensor, ...], dtype: torch.dtype, memo: Memo) -> tuple[Tensor, ...]:
    """The stored tensors on the device of x; remembered, since an online rotation is applied at every step."""
    key = (x.device, dtype)
    found = memo.get(key)
    if found is None:
        # Outside inference mode, or the first use under it would spoil later ones with gradients.
        with torch.inference_mode(False):
            found = tuple(tensor.to(x.device, dtype) for tensor in stored)
        if all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in found):  # not of FakeTensorMode, say
            memo[key] = found
    return found


def check_blocks(x: Tensor, order: int, dim: int) -> None:
    """Raise RotationError when an axis is not made of whole blocks."""
    if x.shape[dim] % order:
        raise RotationError(f"a rotation of order {order} does not divide an axis of length {x.shape[dim]}")
