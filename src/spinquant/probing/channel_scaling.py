"""Candidates for channel scaling: linears whose output is a factor of the next input, like up_proj in act(gate) * up.

`verify_draft.py` tests each: its rows are multiplied by individual scales and the reader's columns divided by them. The
logits are unchanged if and only if the computation in between is linear in each of these outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from spinquant.plan import CHANNELS, Plan
from spinquant.rotation_names import ONLINE_R1
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import Diagonal


def candidates(
    data: Mapping[str, Any], plan: Plan, shapes: Mapping[str, Sequence[int]], starred: Callable[[str], str]
) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Candidates for a family file's `scaled`, for every kind of space at the input of a linear, likely ones first.

    data: the draft's. shapes: of the tiny model's tensors. starred: replaces the layer index in a name by `*`.
    """
    sizes = {name: entry["size"] for name, entry in data.get("spaces", {}).items()}
    if "mlp" in data:
        sizes["layers.*.hidden"] = data["mlp"]["size"]
    inside = dict.fromkeys(
        online.space
        for online in plan.onlines
        if online.site == "input" and plan.space[online.space].rotation != ONLINE_R1
    )
    kinds = {_starred_space(space): plan.space[space].size for space in inside}
    linears = {starred(name): _rows(plan, name, shapes) for group in plan.linears for name in group}
    for kind, size in kinds.items():
        halves = [{"space": kind, "start": start, "length": sizes[kind]} for start in (sizes[kind], "0")]
        entries = {size: [kind], 2 * size: halves}
        # Linears close before the reader are more likely than those of the attention.
        yield kind, [(name, entry) for name in reversed(linears) for entry in entries.get(linears[name], ())]


def scales(plan: Plan) -> dict[str, Transform]:
    """Test scales of both signs, since positive scales alone would commute with a ReLU too."""
    generator, found = torch.Generator().manual_seed(0), {}
    for space in plan.spaces:
        if space.name.endswith(CHANNELS):
            scale = 0.5 + torch.rand(space.size, generator=generator, dtype=torch.float64)
            scale[::2] *= -1
            found[space.name] = Diagonal(scale)
    return found


def _rows(plan: Plan, linear: str, shapes: Mapping[str, Sequence[int]]) -> int:
    return shapes[plan.weight_of(linear)][1 if plan.transposed else 0]


def _starred_space(space: str) -> str:
    start, _, name = space.split(".")
    return f"{start}.*.{name}"
