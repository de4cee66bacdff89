"""From what was found in small models of two sizes to a family, as a family file says it.

Two sizes, since one number may have several explanations: 32 rows may be two heads of 16 or half of the hidden size. A
formula is taken where it gives the numbers of both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinquant.architectures.table import size_of
from spinquant.errors import ArchitectureError
from spinquant.probing.explain import Part, Values, is_multiple, scale_of
from spinquant.probing.trace import Call
from spinquant.proof import Sizing

_HEADS, _KV = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"
_GROUP = ("num_attention_heads/num_key_value_heads*head_dim", "num_attention_heads/num_kv_heads*head_dim")
FORMULAS = (
    *("0", "head_dim", "2*head_dim", "3*head_dim"),
    *(_HEADS, _KV, f"{_HEADS} + {_KV}", f"{_HEADS} + 2*{_KV}", f"2*{_HEADS}", f"3*{_HEADS}"),
    *(f"{_HEADS} + head_dim", f"{_HEADS} + 2*head_dim"),
    *("hidden_size", "2*hidden_size", "3*hidden_size", "4*hidden_size", "hidden_size + head_dim"),
    *("hidden_size + 2*head_dim", "hidden_size/4", "2*hidden_size/4", "3*hidden_size/4"),
    *(f"{group}{rest}" for group in _GROUP for rest in ("", " + head_dim", " + 2*head_dim")),
)
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "4*hidden_size")


@dataclass(frozen=True)
class Seen:
    """What was found in one small model: by layer, and at its ends. layers: the pattern of the names of layers."""

    config: Any
    calls: Mapping[str, Call]
    pattern: str
    layers: tuple[Part, ...]
    ends: Part
    shapes: Mapping[str, tuple[int, ...]]

    def starred(self, name: str) -> str:
        """The name with * for the layer."""
        prefix = self.pattern.removesuffix("*")
        return re.sub(rf"^{re.escape(prefix)}\d+(?=\.|$)", lambda match: self.pattern, name)


@dataclass
class Draft:
    """What a family file would say. left: what it cannot say, and why."""

    data: dict[str, Any]
    left: list[str] = field(default_factory=list)
    values: str | None = None


def formula(sizes: Sequence[tuple[Any, int]], candidates: Sequence[str]) -> str | None:
    """The first formula that gives every config its number; else an attribute that does."""

    def fits(text: str) -> bool:
        try:
            return all(size_of(config, text) == number for config, number in sizes)
        except (ArchitectureError, AttributeError, TypeError):
            return False

    zero = "0" if all(number == 0 for _, number in sizes) else None
    named = [key for key, value in sizes[0][0].to_dict().items() if type(value) is int and value == sizes[0][1]]
    return zero or next((text for text in [*candidates, *named] if fits(text)), None)


def same_layers(seen: Seen) -> str | None:
    """Why the layers of a model cannot be described as one; None where they can."""

    def described(part: Part) -> Any:
        norms = [(seen.starred(n.scale), n.offset, n.centred, [seen.starred(r) for r in n.readers]) for n in part.norms]
        values = [(seen.starred(v.linear), seen.starred(v.reader), dict(v.channels)) for v in part.values]
        rest = [sorted(seen.starred(name) for name in names) for names in (part.readers, part.writers)]
        return norms, values, rest, part.attention and seen.starred(part.attention)

    first = described(seen.layers[0])
    for i, part in enumerate(seen.layers):
        if described(part) != first:
            return (
                f"layer {i} is built otherwise than layer 0, and a family file drafted from roles has one kind of layer"
            )
    return None


def draft(seen: Sequence[Seen], original: tuple[Any, Mapping[str, Sequence[int]]], sizing: Sizing) -> Draft:
    """The family of small models of several sizes. original: the config and the shapes of the large one."""
    model_type = original[0].model_type
    first, part = seen[0], seen[0].layers[0]

    def star(name: str) -> str:
        return first.starred(name)

    data: dict[str, Any] = {"name": model_type, "model_types": [model_type], "layer": first.pattern}
    found = Draft(data)
    head = next(iter([*(r for n in first.ends.norms for r in n.readers), *first.ends.readers]), None)
    head = head or next((n.removesuffix(".weight") for n in first.shapes if n.endswith("head.weight")), "lm_head")
    data["embedding"] = first.ends.writers[0] if len(first.ends.writers) == 1 else first.ends.writers
    data["head"] = head
    if sizing.names:
        data["config"] = dict(sizing.names)
    if sizing.filled:
        data["filled"] = True
    if sizing.heads > 1:
        data["heads"] = sizing.heads
    if any(one.centred for one in (part, first.ends)):
        data["centred"] = True
    if any(type(call.module).__name__ == "Conv1D" for call in first.calls.values()):
        data["transposed"] = True
    norms = [*part.norms, *first.ends.norms]
    offsets = {norm.offset for norm in norms}
    if len(offsets) > 1 or None in offsets:
        found.left.append("the scales of the norms are neither all w nor all 1 + w, and cannot be fused as one kind")
    elif offsets == {1.0}:
        data["norm_offset"] = 1.0
    reading = [r for norm in part.norms for r in norm.readers] + part.readers
    order = {name: i for i, name in enumerate(first.calls)}
    reading = sorted(dict.fromkeys(reading), key=order.__getitem__)
    taken = _attention(found, seen, part, reading)
    taken |= _mlp(found, seen, original, [r for r in reading if r not in taken], taken)
    data["norms"] = {star(norm.scale): [star(reader) for reader in norm.readers] for norm in norms}
    rest = [name for name in (*reading, *part.writers) if name not in taken]
    tensors: dict[str, list[str]] = {}
    for name in rest:
        axes = ["residual" if name in part.writers else "-", "residual" if name in reading else "-"]
        tensors[f"{star(name)}.weight"] = axes[::-1] if data.get("transposed") else axes
    data["tensors"] = tensors
    if rest:
        written = ", ".join(star(name) for name in rest)
        found.left.append(f"{written}: on the residual stream, but in no role, so that neither R2 nor R4 reaches them")
        roles = [data.get("attention") or {}, data.get("mlp") or {}]
        inputs = [roles[0][key] for key in ("q", "k", "v", "qkv", "kv") if key in roles[0]]
        groups = [inputs, [roles[0].get("o", "")], roles[1].get("in", []), [roles[1].get("out", "")]]
        data["linears"] = [group for group in groups if any(group)] + [[star(name)] for name in rest]
    return found


def _attention(found: Draft, seen: Sequence[Seen], part: Part, reading: list[str]) -> set[str]:
    """Adds the attention to a draft; returns the linears that have a role in it."""
    first = seen[0]
    out = part.values[0].reader if part.values else None
    if out is None:
        # Values are changed on their way: the writer that the cache's module holds.
        inside = [w for w in part.writers if part.attention and w.startswith(f"{part.attention}.")]
        out = inside[-1] if inside else None
    inputs = [name for name in reading if out is not None and part.fed.get(name, [None])[:1] == [out]]
    if out is None or part.attention is None or not inputs:
        found.left.append("no attention was found whose module is handed a KV cache: neither R2 nor R3 has a place")
        return set()
    roles: dict[str, Any] = {"module": first.starred(part.attention)}
    values = next((v for v in part.values if v.reader == out), None)
    width = first.calls[values.linear].output.shape[-1] if values else 0
    whole = values is not None and len(values.channels) == width
    if len(inputs) == 3:
        value = values.linear if values is not None and whole else inputs[-1]
        others = [name for name in inputs if name != value]
        # Keys at one token matter to later ones, queries do not.
        others.sort(key=lambda name: name in part.looks_back)
        roles |= dict(zip("qkv", (first.starred(name) for name in (*others, value)), strict=True))
    elif len(inputs) == 2 and not whole:
        query = next((name for name in inputs if name not in part.looks_back), inputs[0])
        roles |= {"q": first.starred(query), "kv": first.starred(next(n for n in inputs if n != query))}
    elif len(inputs) == 1:
        roles["qkv"] = first.starred(inputs[0])
    else:
        found.left.append(f"{len(inputs)} linears go into {first.starred(part.attention)}: no layout of attention fits")
        return set()
    roles["o"] = first.starred(out)
    found.data["attention"] = roles
    if values is None:
        between = [
            c.name for c in first.calls.values() if scale_of(c) and is_multiple(first.calls[out].input, c.output)
        ]
        found.values = (
            f"{first.starred(between[0])} scales what {first.starred(out)} reads of the values element by element"
            if between
            else f"no row of {', '.join(first.starred(name) for name in inputs)} arrives at {first.starred(out)} as it "
            "is: something acts on values in between, and an elementwise map does not commute with a rotation"
        )
    else:
        found.values = _layout(found, seen, values, whole, roles)
    return {*inputs, out}


def _layout(found: Draft, seen: Sequence[Seen], values: Values, whole: bool, roles: dict[str, Any]) -> str | None:
    """Adds the size of a head, and the rows that are values, to the roles; returns why that cannot be said."""
    every = []
    for one in seen:
        mine = next((v for v in one.layers[0].values if v.linear == values.linear), None)
        if mine is None:
            return f"{one.starred(values.linear)} makes values in a small model of one size, and not in another"
        rows, span = one.calls[mine.linear].output.shape[-1], None
        if not whole:
            span = _span(sorted(mine.channels), rows)
            if span is None:
                return f"the rows of {one.starred(values.linear)} that make values are not evenly spaced"
        every.append((one, mine, rows, span))
    heads = [(one.config, _head_size(one, mine) or 0) for one, mine, _, _ in every]
    size = formula(heads, ("head_dim", "v_head_dim")) if all(size for _, size in heads) else None
    if size is None:
        return f"the values of {seen[0].starred(values.linear)} are in no heads of a size that the config gives"
    if size != "head_dim":
        roles["head_size"] = size
    if whole:
        return None
    parts: dict[str, Any] = {}
    for key, at in (("start", 0), ("length", 1), ("period", 2)):
        numbers = [(one.config, span[at]) for one, _, _, span in every if span is not None]
        if key == "period" and all(span is not None and span[2] == rows for _, _, rows, span in every):
            continue
        text = formula(numbers, FORMULAS)
        if text is None:
            return (
                f"the config gives no {[number for _, number in numbers]}, the {key} of the values in {values.linear}"
            )
        parts[key] = text
    roles["values"] = parts
    return None


def _span(rows: list[int], length: int) -> tuple[int, int, int] | None:
    """(start, length, period) of rows, in the smallest period that they have."""
    for period in (p for p in range(1, length + 1) if length % p == 0):
        inside = sorted({row % period for row in rows})
        contiguous = inside == list(range(inside[0], inside[-1] + 1))
        if contiguous and len(rows) == len(inside) * (length // period):
            return inside[0], len(inside), period
    return None


def _head_size(seen: Seen, values: Values) -> int | None:
    """The size of a head as the config has it, where channels agree with it; else the largest that they allow."""
    rows = sorted(values.channels)
    width = seen.calls[values.reader].input.shape[-1]

    def fits(size: int) -> bool:
        if len(rows) % size or width % size:
            return False
        for k, row in enumerate(rows):
            start = values.channels[rows[k - k % size]]
            if tuple(c + k % size for c in start) != values.channels[row] or any(c % size for c in start):
                return False
        return True

    try:
        expected = size_of(seen.config, "head_dim")
    except (ArchitectureError, AttributeError, TypeError):
        expected = 0
    if expected and fits(expected):
        return expected
    return next((size for size in range(len(rows), 1, -1) if fits(size)), None)


def _mlp(found: Draft, seen: Sequence[Seen], original: Any, reading: list[str], taken: set[str]) -> set[str]:
    """Adds the MLP to a draft; returns the linears that have a role in it."""
    first, (config, shapes) = seen[0], original
    outs = [name for name in first.layers[0].writers if name not in taken]
    if len(outs) != 1 or not reading:
        found.left.append(f"{len(outs)} linears write to the stream beside attention, where one comes out of an MLP")
        return set()
    widths = [(one.config, one.calls[outs[0]].input.shape[-1]) for one in seen]
    if f"{outs[0]}.weight" in shapes:
        widths.append((config, shapes[f"{outs[0]}.weight"][0 if found.data.get("transposed") else 1]))
    absent = [f"{name}|4*hidden_size" for name in WIDTHS if hasattr(first.config, name)]
    size = formula(widths, (*WIDTHS, *absent))
    if size is None:
        found.left.append(
            f"the config gives no {[number for _, number in widths]}, the width of {first.starred(outs[0])}"
        )
        return set()
    if size == "4*hidden_size" and absent:
        size = next((text for text in absent if formula(widths, (text,)) == text), size)
    found.data["mlp"] = {"in": [first.starred(n) for n in reading], "out": first.starred(outs[0]), "size": size}
    return {*reading, outs[0]}
