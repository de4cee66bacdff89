"""Extend a draft to a checkpoint that stores experts one by one, where the module stacks them.

The tensors of an experts module (`experts.0.gate_proj.weight`, ...) are linears, (out, in): one whose inputs are as
many as the hidden size reads the residual stream, one whose outputs are as many writes to it. If both are, it is
ambiguous and nothing is drafted. `#` stands for the expert index.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spinquant.architectures.family_file import FamilyFile, family_from
from spinquant.probing.branches import EXPERTS
from spinquant.probing.observation import formula

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def with_single_experts(file: FamilyFile, config: Any, shapes: Mapping[str, Sequence[int]]) -> FamilyFile | None:
    """The family file extended to a checkpoint's single experts; None if it has none, or they are ambiguous.

    shapes: of the checkpoint's tensors.
    """
    data = file.recorded()
    hidden = config.hidden_size
    found = False
    for module in [name for name, online in data.get("onlines", {}).items() if online["site"] == "experts"]:
        leaves, count = _leaves(module, shapes)
        axes = {leaf: _axes(shape, hidden) for leaf, shape in leaves.items()}
        size = formula([(config, count)], COUNTS) if count else None
        if size not in COUNTS or any(spaces is None for spaces in axes.values()):
            return None
        found = True
        data["experts"] = size
        stacked = [name for name in data["tensors"] if re.fullmatch(rf"{re.escape(module)}\.[^.]+", name)]
        for leaf, spaces in axes.items():
            data["tensors"][f"{module}.#.{leaf}.weight"] = spaces
        reading = [f"{module}.#.{leaf}" for leaf, spaces in axes.items() if spaces == ["-", "residual"]]
        for readers in data["norms"].values():
            if isinstance(readers, list) and set(readers) & set(stacked):
                readers += reading
        data["choices"] = _either(data.get("choices", []), module, stacked, list(data["tensors"]))
    return family_from(data, "the draft") if found else None


def _leaves(module: str, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the tensors of a module's single experts, and the number of experts."""
    pattern = re.compile(re.escape(module).replace(r"\*", r"\d+") + r"\.(\d+)\.(.+)\.weight")
    matches = [(match, tuple(shapes[name])) for name in shapes if (match := pattern.fullmatch(name))]
    return {match[2]: shape for match, shape in matches}, max((int(match[1]) + 1 for match, _ in matches), default=0)


def _axes(shape: Sequence[int], hidden: int) -> list[str] | None:
    if len(shape) != 2 or (shape[0] == hidden) == (shape[1] == hidden):
        return None
    return ["residual", EXPERTS] if shape[0] == hidden else ["-", "residual"]


def _either(
    choices: Sequence[Sequence[Sequence[str]]], module: str, stacked: list[str], names: Sequence[str]
) -> list[list[list[str]]]:
    """The choices, extended by experts that are stacked or single."""
    single = [f"{module}.#."]
    found: list[list[list[str]]] = []
    known = False
    for choice in choices:
        alternatives: list[list[str]] = []
        for alternative in choice:
            whole = [prefix for prefix in alternative if any(name.startswith(prefix) for name in stacked)]
            if not whole:
                alternatives.append(list(alternative))
                continue
            known = True
            inside = [n for n in names if n.startswith(tuple(whole)) and n not in stacked and ".#." not in n]
            others = [*(prefix for prefix in alternative if prefix not in whole), *inside]
            alternatives += [[*stacked, *others], [*single, *others]]
        found.append(alternatives)
    return found if known else [*found, [stacked, single]]
