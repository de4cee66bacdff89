"""Find the MLPs, experts, and token mixers without a KV cache in a layer, and add them to a draft.

A branch is a linear that writes to the residual stream, with the readers whose outputs its input depends on. It is an
MLP if a reader's output at one token affects only that token, and a token mixer if it also affects later tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from spinquant.probing.moe import stack_of
from spinquant.probing.observation import Draft, Observation, formula, reading_of

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "4*hidden_size")
SHARED_WIDTHS = (
    *("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    *(
        f"{size}*{count}"
        for size in ("moe_intermediate_size", "intermediate_size")
        for count in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    ),
    *("moe_intermediate_size", "intermediate_size"),
)
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size", "expert_dim", "ffn_dim")
EXPERTS, SHARED = "layers.*.experts", "layers.*.shared"

Original = tuple[Any, Mapping[str, Sequence[int]]]


def add_stacks(found: Draft, seen: Sequence[Observation]) -> dict[str, str]:
    """Add experts and routers to a draft; returns the tensor that reads the residual stream, by experts module."""
    first, data = seen[0], found.data
    reads: dict[str, str] = {}
    for part in first.layers:
        for name in part.stacks:
            module = first.starred(name)
            if module in reads:
                continue
            stack = stack_of([(one.calls[name].module, one.hidden) for one in seen])
            if stack is None:
                found.left.append(f"{module}: the axes of its experts that are in the residual stream are ambiguous")
                continue
            reads[module] = f"{module}.{stack.first}"
            for tensor, axes in stack.axes.items():
                data["tensors"][f"{module}.{tensor}"] = ["residual" if there else "-" for there in axes]
            sizes = [(one.config, one.shapes[f"{name}.{stack.second}"][stack.inner]) for one in seen]
            size = formula(sizes, EXPERT_WIDTHS)
            if size is None:
                numbers = [number for _, number in sizes]
                found.left.append(f"no formula of the config gives {numbers}, the width of the experts in {module}")
                continue
            data["tensors"][f"{module}.{stack.second}"][stack.inner] = EXPERTS
            data["spaces"][EXPERTS] = {"rotation": "R4", "size": size}
            data["onlines"][module] = {"site": "experts", "space": EXPERTS}
    for part in first.layers:
        for name in reading_of(first, part):
            if name not in part.stacks and not isinstance(first.calls[name].module, nn.Linear | Conv1D):
                data["tensors"][f"{first.starred(name)}.weight"] = ["-", "residual"]
    return reads


def add_branches(found: Draft, seen: Sequence[Observation], original: Original, taken: set[str]) -> list[str]:
    """Add MLPs, shared experts and mixers to a draft; returns linears on the residual stream that only R1 rotates."""
    first, data = seen[0], found.data
    attention = data.get("attention") or {}
    inputs = [attention[key] for key in ("q", "k", "v", "qkv", "kv") if key in attention]
    groups: dict[tuple[str, ...], float] = {}
    rest: dict[str, None] = {}

    def add(names: Sequence[str], layer: int) -> None:
        group = tuple(first.starred(name) for name in names)
        if group:
            groups.setdefault(group, first.position(names[0], layer))

    def keep(name: str, reads: bool) -> None:
        axes = ["-", "residual"] if reads else ["residual", "-"]
        data["tensors"][f"{first.starred(name)}.weight"] = axes[::-1] if data.get("transposed") else axes

    for i, part in enumerate(first.layers):
        linears = [n for n in reading_of(first, part) if isinstance(first.calls[n].module, nn.Linear | Conv1D)]
        readers = [name for name in linears if first.starred(name) not in taken]
        writers = [name for name in part.writers if first.starred(name) not in taken]
        if i == 0 or first.starred(part.attention or "") == attention.get("module"):
            real = {first.starred(name): name for name in (*linears, *part.writers)}
            add([real[name] for name in inputs if name in real], i)
            add([real[name] for name in (attention.get("o"),) if name in real], i)
        unknown = [name for name in readers if name not in part.fed]
        for writer in writers:
            mine = [name for name in readers if part.fed.get(name, [None])[:1] == [writer]]
            mine = [name for name in readers if name in mine or (name in unknown and writer == writers[-1])]
            role = "mlp" if not part.stacks else "shared"
            if mine and not part.looks_back & set(mine) and _add_mlp(found, seen, original, role, mine, writer):
                add(mine, i)
                add([writer], i)
                continue
            for name in (*mine, writer):
                rest[first.starred(name)] = None
                keep(name, name != writer)
            add(mine, i)
            add([writer], i)
        for name in readers:
            if part.fed.get(name) == []:  # a gate of scalars for a branch: in no group of quantized linears
                keep(name, True)
    if not attention:
        found.left.append("no attention module with a KV cache was found: neither R2 nor R3 is possible")
    roles = [inputs, [attention.get("o")], *(([*data["mlp"]["in"]], [data["mlp"]["out"]]) if "mlp" in data else ())]
    ordered = [list(group) for group, _ in sorted(groups.items(), key=lambda item: item[1])]
    if ordered != [group for group in roles if any(group)]:
        data["linears"] = ordered
    return list(rest)


def _add_mlp(
    found: Draft, seen: Sequence[Observation], original: Original, role: str, readers: Sequence[str], writer: str
) -> bool:
    """Add an MLP, or shared experts, to a draft; False if the config does not give its width."""
    first, data, (config, shapes) = seen[0], found.data, original
    names, out = [first.starred(name) for name in readers], first.starred(writer)
    if (known := data.get("mlp")) and role == "mlp":
        return known["in"] == names and known["out"] == out
    if role == "shared" and SHARED in data["spaces"]:
        return out in data["onlines"]
    widths = [(one.config, one.calls[writer].input.shape[-1]) for one in seen]
    # The same layer of the full-size model, if it has one.
    stored = [s for n, s in shapes.items() if first.starred(n) == f"{out}.weight"]
    if stored:
        widths.append((config, stored[0][0 if data.get("transposed") else 1]))
    candidates = WIDTHS if role == "mlp" else SHARED_WIDTHS
    absent = [f"{name}|4*hidden_size" for name in WIDTHS if hasattr(first.config, name)] if role == "mlp" else []
    size = formula(widths, (*candidates, *absent))
    if size is None:
        found.left.append(f"no formula of the config gives {[number for _, number in widths]}, the width of {out}")
        return False
    if size == "4*hidden_size" and absent:
        size = next((text for text in absent if formula(widths, (text,)) == text), size)
    if role == "mlp":
        data["mlp"] = {"in": names, "out": out, "size": size}
        return True
    for name in names:
        data["tensors"][f"{name}.weight"] = ["-", "residual"]
    data["tensors"][f"{out}.weight"] = ["residual", SHARED]
    data["spaces"][SHARED] = {"rotation": "R4", "size": size}
    data["onlines"][out] = {"site": "input", "space": SHARED}
    return True
