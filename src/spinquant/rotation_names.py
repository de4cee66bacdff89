"""The names of rotations: which are fused into weights, which run online, and how they are parsed."""

from collections.abc import Iterable

from spinquant.errors import RotationError

ONLINE_R1 = "online-R1"  # takes the place of R1: at the inputs of the linears that read the residual stream
ROTATION_NAMES = ("R1", "R2", "R3", "R4", ONLINE_R1)
USUAL = ("R1", "R2", "R3", "R4")  # those of the paper
MERGEABLE = ("R1", "R2")  # fused into weights
ONLINE = ("R3", "R4", ONLINE_R1)  # work at run time


def run_online(rotations: str | Iterable[str], online: str | Iterable[str]) -> tuple[str, ...]:
    """Rotation names with some of them replaced by their online counterparts: R1 by online-R1.

    Raises:
        RotationError: a name is unknown, is not among the rotations, or has no online counterpart.
    """
    names, wanted = parse_rotation_names(rotations), parse_rotation_names(online)
    for name in wanted:
        if name in ONLINE:
            raise RotationError(f"{name} runs online anyway: leave it out of the rotations to run online (expected R1)")
        if name != "R1":
            raise RotationError(f"{name} is fused into weights exactly and has no online form: expected R1, or none")
        if name not in names:
            raise RotationError(f"{name} is to run online, and the rotations are {', '.join(names) or 'none'}")
    return parse_rotation_names([ONLINE_R1 if name in wanted else name for name in names])


def parse_rotation_names(rotations: str | Iterable[str]) -> tuple[str, ...]:
    """Parse rotation names: ("R1", "R2") from "r1,R2" or from any iterable of names.

    The empty string and "none" mean no rotation.

    Raises:
        RotationError: a name is not R1, R2, R3, R4 or online-R1.
    """
    expected = f"expected some of {', '.join(ROTATION_NAMES)}, or none"
    items = rotations.split(",") if isinstance(rotations, str) else rotations
    if not isinstance(items, Iterable):
        raise RotationError(f"rotations are {rotations!r}: {expected}")
    known = {name.lower(): name for name in ROTATION_NAMES}
    found = set()
    for item in items:
        name = item.strip().lower() if isinstance(item, str) else item
        if name in ("", "none"):
            continue
        if not isinstance(name, str) or name not in known:
            raise RotationError(f"unknown rotation {item!r}: {expected}")
        found.add(known[name])
    return tuple(name for name in ROTATION_NAMES if name in found)
