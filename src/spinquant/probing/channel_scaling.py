"""Which linears may be one factor of what the MLP's last linear reads, as up_proj is in act(gate) * up.

Whether one is, is tried (`probe.py`): its rows are scaled, each by a number of its own, and the reader's columns
divided by them. The logits stay where they were if, and only if, what is between is linear in all of those outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from spinquant.plan import Plan
from spinquant.rotations.rotation import Hadamard, Rotation
from spinquant.rotations.wrappers import Scaled


def candidates(
    data: Mapping[str, Any], plan: Plan, shapes: Mapping[str, Sequence[int]], starred: Callable[[str], str]
) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """For every kind of space that is rotated before a linear, entries of a family file's `scaled`, likely ones first.

    data: of the draft. shapes: of the small model's tensors. starred: a name with `*` for the layer.
    """
    sizes = {name: entry["size"] for name, entry in data.get("spaces", {}).items()}
    if "mlp" in data:
        sizes["layers.*.hidden"] = data["mlp"]["size"]
    inside = dict.fromkeys(online.space for online in plan.onlines if online.site == "input")
    kinds = {_starred_space(space): plan.space[space].size for space in inside}
    linears = {starred(name): _rows(plan, name, shapes) for group in plan.linears for name in group}
    for kind, size in kinds.items():
        halves = [{"space": kind, "start": start, "length": sizes[kind]} for start in (sizes[kind], "0")]
        entries = {size: [kind], 2 * size: halves}
        # What stands before the reader is nearer to it than the attention.
        yield kind, [(name, entry) for name in reversed(linears) for entry in entries.get(linears[name], ())]


def scales(plan: Plan) -> dict[str, Rotation]:
    """Numbers to try, of both signs: what a ReLU lets through is no factor, though positive numbers pass it too."""
    generator, found = torch.Generator().manual_seed(0), {}
    for scaling in plan.scalings:
        scale = 0.5 + torch.rand(plan.space[scaling.space].size, generator=generator, dtype=torch.float64)
        scale[::2] *= -1
        found[scaling.space] = Scaled(Hadamard(1), scale)
    return found


def _rows(plan: Plan, linear: str, shapes: Mapping[str, Sequence[int]]) -> int:
    return shapes[plan.weight_of(linear)][1 if plan.transposed else 0]


def _starred_space(space: str) -> str:
    start, _, name = space.split(".")
    return f"{start}.*.{name}"
