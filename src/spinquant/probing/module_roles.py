"""Infer the role of each module (norm, reader, writer, value) from the activations of a tiny model.

Everything here is inferred numerically, and is a guess until it passes the tests of `verify_draft.py`:

- the residual stream enters a layer as s and leaves it as s + sum_m c_m y_m, with a scalar c_m for every module m
  whose output y_m is written to it; modules with c_m = 0 are not writers;
- a norm belongs to the stream if its input is such a sum;
- a linear reads a norm if its input is a multiple of the norm's output, and the stream itself if each token's input is
  a multiple of the stream (perhaps after subtracting the mean), as after a norm without a scale;
- a row of a linear is a value if a perturbation of it reaches a writer's input unchanged: attention weights sum to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spinquant.probing.moe import is_router, is_stack
from spinquant.probing.trace import TracedCall, answers

EXACT = 1e-9  # relative error that float64 rounding can cause
NUDGE = 1e-3  # size of a perturbation
MOST_ROWS = 4096  # of a linear whose outputs are perturbed, each in its own sequence
LINEARS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream: its scale tensor w, the offset (scale = offset + w), and its readers.

    offset: 0 or 1, None for any other scale. centred: it subtracts the mean.
    """

    scale: str
    offset: float | None
    centred: bool
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Values:
    """The rows of a linear that are values, with the channels of `reader`'s input at which each arrives."""

    linear: str
    reader: str
    channels: Mapping[int, tuple[int, ...]]


@dataclass
class LayerRoles:
    """The roles found in a layer, or outside the layers.

    stacks: modules of experts that read and write the stream. fed: the writers whose inputs each reader affects.
    looks_back: readers whose output at one token affects such inputs at later tokens, as keys and values do. centred:
    its norms subtract the mean. problems: why the residual stream cannot be rotated.
    """

    norms: list[Norm] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    fed: dict[str, list[str]] = field(default_factory=dict)
    looks_back: set[str] = field(default_factory=set)
    attention: str | None = None
    centred: bool = False
    problems: list[str] = field(default_factory=list)


def combination(target: Tensor, parts: Sequence[Tensor]) -> tuple[list[float], float]:
    """Least-squares scalars of a linear combination of parts that gives the target, and its relative error."""
    if not parts:
        return [], 1.0
    columns = torch.stack([part.flatten() for part in parts], dim=1)
    found = torch.linalg.lstsq(columns, target.flatten().unsqueeze(1), driver="gelsd").solution
    error = (columns @ found).squeeze(1) - target.flatten()
    return found.squeeze(1).tolist(), (error.norm() / target.norm()).item()


def token_combination(target: Tensor, parts: Sequence[Tensor]) -> tuple[list[float], float]:
    """As `combination`, with separate scalars for each token; the largest per part, and the relative error."""
    if len(parts) * 2 > target.shape[-1]:
        return [0.0] * len(parts), 1.0  # so many parts can fit anything
    columns = torch.stack([part.flatten(0, -2) for part in parts], dim=-1)  # (tokens, hidden, parts)
    found = torch.linalg.lstsq(columns, target.flatten(0, -2).unsqueeze(-1), driver="gelsd").solution
    error = (columns @ found).squeeze(-1) - target.flatten(0, -2)
    return found.abs().amax(0).squeeze(-1).tolist(), (error.norm() / target.norm()).item()


def is_multiple(x: Tensor, y: Tensor) -> bool:
    """Whether one tensor is a scalar multiple of the other."""
    # Some modules flatten the batch.
    return x.shape[-1] == y.shape[-1] and x.numel() == y.numel() and combination(x, [y])[1] <= EXACT


def is_normed(x: Tensor, y: Tensor, *, centred: bool = False) -> bool:
    """Whether each token of x is a scalar multiple of that of y, or (centred) of y minus its mean."""
    if x.shape != y.shape:
        return False
    source = y - y.mean(-1, keepdim=True) if centred else y
    scale = (x * source).sum(-1, keepdim=True) / (source * source).sum(-1, keepdim=True)
    return bool((x - scale * source).norm() <= EXACT * x.norm())


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, by name."""
    return dict(module.named_parameters(recurse=False))


def scale_of(call: TracedCall) -> str | None:
    """The name of a norm's scale parameter; None for a module that is not a norm."""
    parameters = own_parameters(call.module)
    scales = [name for name, p in parameters.items() if p.ndim == 1 and p.shape[0] == call.output.shape[-1]]
    weights = [name for name in scales if name != "bias"]
    same = call.input.shape == call.output.shape
    return weights[0] if same and len(weights) == 1 and len(scales) == len(parameters) else None


@torch.no_grad()
def offset_of(call: TracedCall) -> float | None:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight; measured by running it."""
    name = scale_of(call)
    assert name is not None
    parameters = own_parameters(call.module)
    saved = {key: p.detach().clone() for key, p in parameters.items()}
    weight = saved[name]
    try:
        if "bias" in parameters:
            parameters["bias"].zero_()
        parameters[name].copy_(torch.ones_like(weight))
        unit = call.module(call.input)
        parameters[name].copy_(weight)
        found = call.module(call.input)
    finally:
        for key, p in parameters.items():
            p.copy_(saved[key])
    for offset in (0.0, 1.0):
        expected = unit / (1.0 + offset) * (weight + offset)
        if (found - expected).norm() <= 1e-6 * expected.norm():  # some norms are computed in float32
            return offset
    return None


@torch.no_grad()
def subtracts_mean(call: TracedCall) -> bool:
    """Whether a norm's output is unchanged if its input is shifted."""
    plain, shifted = call.module(call.input), call.module(call.input + 1)
    return bool((plain - shifted).norm() <= 1e-6 * plain.norm())


def infer_layer_roles(model: Any, layer: TracedCall, calls: Sequence[TracedCall], tokens: Tensor) -> LayerRoles:
    """Infer the roles of a layer's modules. calls: of the modules inside, in order of execution."""
    part = LayerRoles()
    hidden = layer.output.shape[-1]
    leaves = [call for call in calls if own_parameters(call.module)]
    parts: list[TracedCall] = []
    for call in leaves:  # a module may return the output of a module inside it
        if call.output.shape == layer.output.shape and not any(torch.equal(call.output, p.output) for p in parts):
            parts.append(call)
    part.writers = _writers(part, layer, parts)
    stream = [layer.input]
    for call in calls:  # the stream at intermediate points of the layer
        if call.input.shape == layer.input.shape and not isinstance(call.module, LINEARS):
            sums, error = combination(call.input, [layer.input, *(c.output for c in parts)])
            if error <= EXACT and _is_stream(sums, parts) and not any(is_multiple(call.input, s) for s in stream):
                stream.append(call.input)
    # A norm takes its input only; an attention may have a one-dimensional parameter too.
    scaled = [c for c in leaves if scale_of(c) and not c.keywords and c.output.shape[-1] == hidden]
    # If the layer's output is no such sum, any norm that linears read may belong to the stream.
    norms = [call for call in scaled if part.problems or any(is_multiple(call.input, value) for value in stream)]
    linears = [call for call in leaves if isinstance(call.module, LINEARS)]
    others = [call for call in leaves if is_stack(call) or is_router(call)]
    _add_readers(part, [call for call in leaves if call in linears or call in others], norms, stream)
    part.attention = next((c.name for c in calls if any("past" in word for word in c.keywords)), None)
    reading = {name for norm in part.norms for name in norm.readers} | set(part.readers)
    part.stacks = [call.name for call in leaves if is_stack(call) and call.name in part.writers]
    part.writers = [name for name in part.writers if name not in reading and name not in part.stacks]
    outs = [call for call in linears if call.name in part.writers]
    for call in linears:
        if not outs or call.name not in reading or call.output.shape[-1] > MOST_ROWS:
            continue
        moved = answers(model, call, outs, tokens, NUDGE)
        # Perturbing all keys alike does not change attention weights, except through rotary positions.
        later = answers(model, call, outs, tokens, NUDGE, where=slice(0, 1))
        both = {name: max(moved[name].abs().max(), later[name].abs().max()) for name in moved}
        part.fed[call.name] = [name for name, size in both.items() if size > 1e-6 * NUDGE]
        fed = part.fed[call.name][:1]
        if any(later[name][:, 1:].abs().max() > 1e-6 * NUDGE for name in fed):
            part.looks_back.add(call.name)
        for name, delta in moved.items():
            channels = _carried(delta) if call.name in part.looks_back else {}
            if channels:
                part.values.append(Values(call.name, name, channels))
                break
    return part


def _is_stream(sums: Sequence[float], parts: Sequence[TracedCall]) -> bool:
    """Whether a sum contains the stream: the layer's input, or a norm of it that replaces it."""
    return abs(sums[0]) > EXACT or sum(abs(number) > EXACT for number in sums) > 1


def _carried(delta: Tensor) -> dict[int, tuple[int, ...]]:
    """The rows whose perturbation arrives unchanged, with their channels; delta is (rows, T, channels)."""
    found = {}
    for row, moved in enumerate(delta):
        arrived = (moved - NUDGE).abs().amax(0) <= 1e-6 * NUDGE
        elsewhere = moved[:, ~arrived]
        if arrived.any() and (elsewhere.numel() == 0 or elsewhere.abs().max() <= 1e-6 * NUDGE):
            found[row] = tuple(arrived.nonzero().flatten().tolist())
    return found


def _writers(part: LayerRoles, layer: TracedCall, parts: Sequence[TracedCall]) -> list[str]:
    """The modules whose outputs a layer adds to the stream; obstacles are appended to the part's problems."""
    sums, error = combination(layer.output, [layer.input, *(call.output for call in parts)])
    if error > EXACT:  # a gate may scale a branch per token, which commutes with a rotation
        sums, error = token_combination(layer.output, [layer.input, *(call.output for call in parts)])
    if error > EXACT:
        part.problems.append(_why_no_sum(layer, parts))
        # Fallback: linears of the right width that do not read the layer's normed input.
        return [c.name for c in parts if isinstance(c.module, LINEARS) and not is_normed(c.input, layer.input)]
    writing = [call for call, number in zip(parts, sums[1:], strict=True) if abs(number) > EXACT]
    for call in writing:
        if scale_of(call):
            part.problems.append(
                f"{call.name}.{scale_of(call)} scales what is added to the residual stream element by element, and "
                "diag(g) R = R diag(g) holds only if all elements of g are equal"
            )
        elif not isinstance(call.module, LINEARS) and not is_stack(call):
            part.problems.append(
                f"{call.name} ({type(call.module).__name__}) writes to the residual stream and is not a linear"
            )
    if abs(sums[0]) <= EXACT and not part.problems:
        part.problems.append(f"{layer.name} does not add the residual stream to its output")
    # A linear whose output goes through a norm before it is added still ends its branch.
    names, pending = {call.name for call in writing}, [call for call in writing if scale_of(call)]
    while pending:
        norm = pending.pop()
        earlier = [call for call in parts if call is not norm]
        sums, error = combination(norm.input, [layer.input, *(call.output for call in earlier)])
        for call, number in zip(earlier, sums[1:], strict=True):
            if error <= EXACT and abs(number) > EXACT and call.name not in names:
                names.add(call.name)
                pending += [call] if scale_of(call) else []
    return [c.name for c in parts if c.name in names and (isinstance(c.module, LINEARS) or is_stack(c))]


def _why_no_sum(layer: TracedCall, parts: Sequence[TracedCall]) -> str:
    """Why a layer's output is no such sum: names an elementwise scale if that is the cause."""
    columns = torch.stack([layer.input, *(call.output for call in parts)]).flatten(1, 2)  # (parts, tokens, hidden)
    if columns.shape[1] > columns.shape[0]:
        a, b = columns.permute(2, 1, 0), layer.output.flatten(0, 1).T.unsqueeze(-1)  # one problem per channel
        found = torch.linalg.lstsq(a, b).solution
        if (a @ found - b).norm() <= 1e-6 * b.norm():
            found = found.squeeze(-1)  # (hidden, parts)
            names = ["the residual stream", *(f"the output of {call.name}" for call in parts)]
            scaled = [
                name
                for name, number in zip(names, found.T, strict=True)
                if number.abs().max() > EXACT and (number - number.mean()).abs().max() > 1e-6 * number.abs().max()
            ]
            inside = [
                f"{layer.name}.{name}"
                for name, p in layer.module.named_parameters()
                if p.numel() == layer.output.shape[-1] and any(_follows(p.detach().flatten(), n) for n in found.T)
            ]
            by = f" by {inside[0]}" if inside else ""
            return (
                f"{layer.name} scales {' and '.join(scaled)} element by element{by}, and diag(g) R = R diag(g) holds "
                "only if all elements of g are equal"
            )
    return f"{layer.name} does not add multiples of its linears' outputs to the residual stream"


def _follows(parameter: Tensor, scale: Tensor) -> bool:
    return any(is_multiple(scale, p) for p in (parameter, 1 + parameter)) if parameter.any() else False


def _add_readers(
    part: LayerRoles, linears: Sequence[TracedCall], norms: Sequence[TracedCall], stream: Sequence[Tensor]
) -> None:
    """Add norms with the linears that read them, and the linears that read the stream without a norm with a scale."""
    found = [
        Norm(
            f"{norm.name}.{scale_of(norm)}",
            offset_of(norm),
            subtracts_mean(norm),
            tuple(call.name for call in linears if is_multiple(call.input, norm.output)),
        )
        for norm in norms
    ]
    taken = {name for norm in found for name in norm.readers}
    part.norms = [norm for norm in found if norm.readers]
    others = [call for call in linears if call.name not in taken]
    plain = [call.name for call in others if any(is_normed(call.input, value) for value in stream)]
    centred = [call.name for call in others if any(is_normed(call.input, value, centred=True) for value in stream)]
    part.readers = [call.name for call in others if call.name in (*plain, *centred)]
    part.centred = any(norm.centred for norm in part.norms) or any(name not in plain for name in centred)


def infer_end_roles(model: Any, calls: Mapping[str, TracedCall], first: TracedCall, last: TracedCall) -> LayerRoles:
    """Infer what writes to the stream before the first layer, token embedding first, and what reads it last."""
    part = LayerRoles()
    names = {module: name for name, module in model.named_modules()}
    embedding, head = names.get(model.get_input_embeddings()), names.get(model.get_output_embeddings())
    if embedding is None or head is None or embedding not in calls or head not in calls:
        part.problems.append("get_input_embeddings and get_output_embeddings do not give the embedding and the head")
        return part
    order = list(calls)
    before = [calls[name] for name in order if order.index(name) < order.index(first.name)]
    sources = {
        c.name: s for c in before if own_parameters(c.module) and (s := _spread(c.output, first.input)) is not None
    }
    sums, error = combination(first.input, list(sources.values()))
    written = [name for name, number in zip(sources, sums, strict=True) if abs(number) > EXACT]
    part.writers = [embedding, *(name for name in written if name != embedding)] if error <= EXACT else [embedding]
    if error > EXACT:
        part.problems.append(
            f"the input of {first.name} is not the sum of embeddings: something else is added to the residual stream, "
            "which cannot be rotated"
        )
    elif embedding not in written:
        part.problems.append(f"the output of {embedding} is not written to the residual stream unchanged")
    for name in part.writers:
        if scale_of(calls[name]) is not None:
            part.problems.append(f"{name} scales the input of the first layer element by element")
        elif not isinstance(calls[name].module, nn.Embedding):
            part.problems.append(
                f"{name} ({type(calls[name].module).__name__}) writes to the residual stream and is not an embedding"
            )
    part.writers = [name for name in part.writers if isinstance(calls[name].module, nn.Embedding)]
    inside = f"{first.name.rpartition('.')[0]}."
    outside = [c for c in calls.values() if not c.name.startswith(inside) and own_parameters(c.module)]
    norms = [c for c in outside if scale_of(c) and is_multiple(c.input, last.output)]
    _add_readers(part, [calls[head]], norms, [last.output])
    if not part.norms and not part.readers:
        part.problems.append(f"{head} reads neither the residual stream nor a norm of it")
    return part


def _spread(output: Tensor, like: Tensor) -> Tensor | None:
    """A module's output expanded to the batch; None if it does not fit the stream's shape."""
    if output.ndim and output.shape[-1] == like.shape[-1] and output.ndim in (2, 3):
        try:
            return output.expand(like.shape) if output.ndim == 3 else output.unsqueeze(0).expand(like.shape)
        except RuntimeError:
            return None
    return None
