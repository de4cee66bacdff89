"""Which linears are one factor of what the MLP's last linear reads, as up_proj is in act(gate) * up.

Found by trying: the linear's rows are scaled, by a number for each, and the reader's columns divided by it. The logits
stay where they were if, and only if, what is between is linear in every one of those outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spinquant.plan import Plan, Scaling, Span
from spinquant.rotation import Hadamard, Rotation
from spinquant.wrapped import Scaled


@dataclass(frozen=True)
class Factor:
    """A linear whose rows were scaled, all of them or those of a span, and how far the logits moved.

    entry: what a family file says of it.
    """

    linear: str
    space: str
    entry: Any
    moved: float


def factors(
    data: Mapping[str, Any],
    plan: Plan,
    shapes: Mapping[str, Sequence[int]],
    starred: Callable[[str], str],
    moved: Callable[[Plan, Mapping[str, Rotation]], tuple[float, str]],
    tolerance: float,
) -> Iterator[Factor]:
    """One for every kind of space that is rotated before a linear, where a linear that scales it is found.

    data: of the draft. shapes: of the small model's tensors. starred: a name with `*` for the layer. moved: how far
    logits move when a plan's rotations are fused.
    """
    sizes = {name: entry["size"] for name, entry in data.get("spaces", {}).items()}
    if "mlp" in data:
        sizes["layers.*.hidden"] = data["mlp"]["size"]
    kinds: dict[str, list[str]] = {}
    for online in plan.onlines:
        if online.site == "input":
            kinds.setdefault(_starred_space(online.space), []).append(online.space)
    for kind, spaces in kinds.items():
        for linear, part in _candidates(plan, spaces, shapes, starred):
            tried = replace(plan, scalings=tuple(_scalings(plan, spaces, linear, part, shapes, starred)), onlines=())
            found, error = moved(tried, _scales(tried))
            if not error and found <= tolerance:
                start = {"first": "0", "second": sizes[kind]}.get(part)
                entry = kind if start is None else {"space": kind, "start": start, "length": sizes[kind]}
                yield Factor(linear, kind, entry, found)
                break


def _candidates(
    plan: Plan, spaces: Sequence[str], shapes: Mapping[str, Sequence[int]], starred: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    """Starred linears of the layers of the spaces, and which of their rows: all, the second half, the first."""
    known: dict[tuple[str, str], None] = {}
    layers = {space.rpartition(".")[0] for space in spaces}
    size = plan.space[spaces[0]].size
    for name in (name for group in plan.linears for name in group):
        rows = _rows(plan, name, shapes)
        if not any(f".{layer.rpartition('.')[2]}." in name for layer in layers):
            continue
        parts = {size: ("all",), 2 * size: ("second", "first")}.get(rows, ())
        known |= {(starred(name), part): None for part in parts}
    yield from reversed(known)  # what stands before the reader is nearer to it than the attention


def _rows(plan: Plan, linear: str, shapes: Mapping[str, Sequence[int]]) -> int:
    return shapes[plan.weight_of(linear)][1 if plan.transposed else 0]


def _scalings(
    plan: Plan,
    spaces: Sequence[str],
    linear: str,
    part: str,
    shapes: Mapping[str, Sequence[int]],
    starred: Callable[[str], str],
) -> Iterator[Scaling]:
    for space in spaces:
        size, layer = plan.space[space].size, space.rpartition(".")[0].rpartition(".")[2]
        names = [n for group in plan.linears for n in group if starred(n) == linear and f".{layer}." in n]
        span = None if part == "all" else Span(0 if part == "first" else size, size, 2 * size)
        writers = [
            (tensor, dim, span)
            for name in names
            for tensor, dim in ((plan.weight_of(name), int(plan.transposed)), (f"{name}.bias", 0))
            if tensor in shapes
        ]
        readers = tuple((axis.tensor, axis.dim) for axis in plan.axes if axis.space == space)
        yield Scaling(space, tuple(writers), readers)


def _scales(plan: Plan) -> dict[str, Rotation]:
    """Of both signs: what a ReLU lets through is no factor, though positive numbers pass it too."""
    generator, found = torch.Generator().manual_seed(0), {}
    for scaling in plan.scalings:
        scale = 0.5 + torch.rand(plan.space[scaling.space].size, generator=generator, dtype=torch.float64)
        scale[::2] *= -1
        found[scaling.space] = Scaled(Hadamard(1), scale)
    return found


def _starred_space(space: str) -> str:
    start, _, name = space.split(".")
    return f"{start}.*.{name}"
