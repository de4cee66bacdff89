"""Draft a family file from the roles found in tiny models of two sizes.

Two sizes, because one number may have several explanations: 32 rows may be two heads of 16 or half of the hidden size.
A formula is accepted if it gives the right number for both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from spinquant.architectures.family import size_of
from spinquant.errors import ArchitectureError
from spinquant.evaluation.tiny_model import Sizing
from spinquant.probing.branches import add_branches, add_stacks
from spinquant.probing.module_roles import LayerRoles, Values, is_multiple, scale_of
from spinquant.probing.observation import Draft, Observation, formula, reading_of

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


def same_attention(seen: Observation) -> str | None:
    """Why the attentions of a model's layers cannot be described as one; None if they can."""

    def described(part: LayerRoles) -> Any:
        values = [(seen.starred(v.linear), seen.starred(v.reader), dict(v.channels)) for v in part.values]
        return values, part.attention and seen.starred(part.attention)

    found = [(i, part) for i, part in enumerate(seen.layers) if part.attention is not None]
    for i, part in found[1:]:
        if described(part) != described(found[0][1]):
            return (
                f"the attention of layer {i} differs from that of layer {found[0][0]}, and a drafted family file has "
                "one kind of attention"
            )
    return None


def draft(
    model_type: str, seen: Sequence[Observation], original: tuple[Any, Mapping[str, Sequence[int]]], sizing: Sizing
) -> Draft:
    """Draft the family of tiny models of several sizes. original: config and shapes of the full-size model."""
    first = seen[0]
    star = first.starred
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
    if any(one.centred for one in (*first.layers, first.ends)):
        data["centred"] = True
    if any(type(call.module).__name__ == "Conv1D" for call in first.calls.values()):
        data["transposed"] = True
    every = [norm for part in first.layers for norm in part.norms] + first.ends.norms
    offsets = {norm.offset for norm in every}
    if len(offsets) > 1 or None in offsets:
        found.left.append("the norms multiply neither all by w nor all by 1 + w, and a family has one kind")
    elif offsets == {1.0}:
        data["norm_offset"] = 1.0
    at = next((i for i, part in enumerate(first.layers) if part.attention is not None and part.values), None)
    at = at if at is not None else next((i for i, part in enumerate(first.layers) if part.attention is not None), 0)
    taken = {star(name) for name in _attention(found, seen, at)}
    data["tensors"], data["spaces"], data["onlines"] = {}, {}, {}
    read_through = add_stacks(found, seen)
    rest = add_branches(found, seen, original, taken)
    data["norms"] = {}
    for norm in every:
        readers = data["norms"].setdefault(star(norm.scale), [])
        readers += [r for reader in norm.readers if (r := read_through.get(star(reader), star(reader))) not in readers]
    if rest:
        written = ", ".join(rest)
        found.left.append(
            f"{written}: reads or writes the residual stream, but no role found, so not rotated by R2 or R4"
        )
    return found


def _attention(found: Draft, seen: Sequence[Observation], at: int) -> set[str]:
    """Add the attention of a layer to a draft; returns the linears that have a role in it."""
    first, part = seen[0], seen[0].layers[at]
    reading = reading_of(first, part)
    out = part.values[0].reader if part.values else None
    if out is None:
        # Values do not arrive unchanged: take the writer inside the module with the KV cache.
        inside = [w for w in part.writers if part.attention and w.startswith(f"{part.attention}.")]
        out = inside[-1] if inside else None
    inputs = [name for name in reading if out is not None and part.fed.get(name, [None])[:1] == [out]]
    if out is None or part.attention is None or not inputs:
        found.left.append("no attention module with a KV cache was found: neither R2 nor R3 is possible")
        return set()
    roles: dict[str, Any] = {"module": first.starred(part.attention)}
    values = next((v for v in part.values if v.reader == out), None)
    width = first.calls[values.linear].output.shape[-1] if values else 0
    whole = values is not None and len(values.channels) == width
    if len(inputs) == 3:
        value = values.linear if values is not None and whole else inputs[-1]
        others = [name for name in inputs if name != value]
        # Keys at one token affect later tokens, queries do not.
        others.sort(key=lambda name: name in part.looks_back)
        roles |= dict(zip("qkv", (first.starred(name) for name in (*others, value)), strict=True))
    elif len(inputs) == 2 and not whole:
        query = next((name for name in inputs if name not in part.looks_back), inputs[0])
        roles |= {"q": first.starred(query), "kv": first.starred(next(n for n in inputs if n != query))}
    elif len(inputs) == 1:
        roles["qkv"] = first.starred(inputs[0])
    else:
        found.left.append(f"{first.starred(part.attention)} has {len(inputs)} input linears: no known layout fits")
        return set()
    roles["o"] = first.starred(out)
    found.data["attention"] = roles
    if values is None:
        between = [
            c.name for c in first.calls.values() if scale_of(c) and is_multiple(first.calls[out].input, c.output)
        ]
        found.values = (
            f"{first.starred(between[0])} scales the values elementwise before {first.starred(out)} reads them"
            if between
            else f"no row of {', '.join(first.starred(name) for name in inputs)} arrives unchanged at "
            f"{first.starred(out)}: values are transformed in between, and an elementwise map does not commute with a "
            "rotation"
        )
    else:
        found.values = _layout(seen, at, values, whole, roles)
    return {*inputs, out}


def _layout(seen: Sequence[Observation], at: int, values: Values, whole: bool, roles: dict[str, Any]) -> str | None:
    """Add the head size, and the rows that are values, to the roles; returns the reason if that fails."""
    every = []
    for one in seen:
        mine = next((v for v in one.layers[at].values if v.linear == values.linear), None)
        if mine is None:
            return f"{one.starred(values.linear)} computes values in a tiny model of one size, and not in another"
        rows, span = one.calls[mine.linear].output.shape[-1], None
        if not whole:
            span = _span(sorted(mine.channels), rows)
            if span is None:
                return f"the value rows of {one.starred(values.linear)} are not evenly spaced"
        every.append((one, mine, rows, span))
    heads = [(one.config, _head_size(one, mine) or 0) for one, mine, _, _ in every]
    size = formula(heads, ("head_dim", "v_head_dim")) if all(size for _, size in heads) else None
    if size is None:
        return f"no size in the config is the head size of the values of {seen[0].starred(values.linear)}"
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
                f"no formula of the config gives {[number for _, number in numbers]}, the {key} of the values in "
                f"{values.linear}"
            )
        parts[key] = text
    roles["values"] = parts
    return None


def _span(rows: list[int], length: int) -> tuple[int, int, int] | None:
    """(start, length, period) of rows, for their smallest period; None if they have none."""
    for period in (p for p in range(1, length + 1) if length % p == 0):
        inside = sorted({row % period for row in rows})
        contiguous = inside == list(range(inside[0], inside[-1] + 1))
        if contiguous and len(rows) == len(inside) * (length // period):
            return inside[0], len(inside), period
    return None


def _head_size(seen: Observation, values: Values) -> int | None:
    """The config's head size if it fits the channels; else the largest size that fits."""
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
