"""Observe a decoder block on calibration data: clip ratios of activations and KV cache, ranges of static quantizers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.calibration.experts import Routed, expert_products, routed_calls
from spinquant.calibration.hidden_states import HiddenStates
from spinquant.calibration.sequential import run_block
from spinquant.models.capture import captured, captured_call
from spinquant.online.attachment import Attachment
from spinquant.plan import Experts, Plan
from spinquant.quantization.clip_search import best_ratio, search_input_clip
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, static_parts
from spinquant.quantization.targets import weights_of

# Clip ratios of activations are searched on this many tokens from this many samples; those of the KV cache on whole
# samples, since attention needs all of their tokens.
CLIP_TOKENS, CLIP_INPUT_SAMPLES, CLIP_CACHE_SAMPLES = 1024, 8, 2


@dataclass(frozen=True)
class BlockInputs:
    """A decoder block with its weights loaded, its input hidden states and its other arguments (positions, masks).

    A sample is named by its number: it may have arguments of its own.
    """

    model: Any
    plan: Plan
    scheme: Scheme
    attachment: Attachment
    name: str
    states: HiddenStates
    arguments: Sequence[Mapping[str, Any]]

    @property
    def block(self) -> nn.Module:
        """The block."""
        return self.model.get_submodule(self.name)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The block's linears, grouped by the activation they read."""
        return [group for group in self.plan.linears if group[0].startswith(f"{self.name}.")]

    @property
    def stacks(self) -> list[Experts]:
        """The block's stacked experts."""
        return [experts for experts in self.plan.experts if experts.module.startswith(f"{self.name}.")]

    def run(self, number: int, state: Tensor, *, rounded: bool) -> Tensor:
        """The block's output for a state of a sample; rounded: with activations and KV cache quantized."""
        with nullcontext() if rounded else self.attachment.exact():
            return run_block(self.block, state, self.arguments[number])

    def inputs(
        self, groups: Sequence[tuple[str, ...]], number: int, state: Tensor, *, rounded: bool, stop: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Inputs of the groups, by the first linear of each, and the block's output (None if it stopped early)."""
        output = None
        with captured(self.model, [group[0] for group in groups], inputs=True, stop=stop) as found:
            output = self.run(number, state, rounded=rounded)
        return found, output


def find_peaks(work: BlockInputs) -> Clips:
    """Ranges of static quantizers: the largest magnitudes on the calibration data."""
    parts, attachment = static_parts(work.scheme), work.attachment
    inputs: dict[str, float] = {}
    keys: dict[str, float] = {}
    values: dict[str, float] = {}

    def follow(attention: str) -> Callable[[Tensor, Tensor], None]:
        def watch(k: Tensor, v: Tensor) -> None:
            _raise_peak(keys, attention, k)
            _raise_peak(values, attention, v)

        return watch

    inside = f"{work.name}."
    caches = {n: s for n, s in attachment.keys_values.items() if "kv" in parts and n.startswith(inside)}
    tensors = [tensor for experts in work.stacks for tensor in (experts.first[0], experts.second[0])]
    experts = {tensor: attachment.inputs[tensor] for tensor in tensors if "activations" in parts}
    for attention, site in caches.items():
        site.watch = follow(attention)
    for tensor, site in experts.items():
        site.watch = partial(_raise_peak, inputs, tensor)
    for number, state in enumerate(work.states):
        found, _ = work.inputs(work.groups, number, state, rounded=False, stop=False)
        for first, x in found.items() if "activations" in parts else ():
            _raise_peak(inputs, first, x)
    for site in (*caches.values(), *experts.values()):
        site.watch = None
    # If everything is zero, any range will do.
    return Clips(*({n: peak or 1.0 for n, peak in found.items()} for found in (inputs, keys, values)))


def _raise_peak(peaks: dict[str, float], name: str, x: Tensor) -> None:
    peaks[name] = max(peaks.get(name, 0.0), float(x.abs().amax()))


def search_input_clips(work: BlockInputs) -> Clips:
    """Search the clip ratio of activations for each group of linears and each matrix product of experts."""
    quantizer, states = work.scheme.activations, work.states
    if quantizer is None or "activations" in static_parts(work.scheme):
        return Clips()
    found: dict[str, list[Tensor]] = {}
    routed: dict[str, Routed] = {}
    chosen = range(0, len(states), max(1, len(states) // CLIP_INPUT_SAMPLES))
    step = max(1, len(chosen) * states[0].shape[1] // CLIP_TOKENS)
    with routed_calls(work.model, work.stacks, routed):
        for number in chosen:
            inputs, _ = work.inputs(work.groups, number, states[number], rounded=False, stop=not work.stacks)
            for first, x in inputs.items():
                found.setdefault(first, []).append(x.flatten(0, -2)[::step])
    ratios = {}
    weights = {w.tensor: w for w in weights_of(work.plan, work.scheme)}
    for group in (group for group in work.groups if group[0] in found):
        weight = torch.cat([weights[work.plan.weight_of(name)].matrices(work.model) for name in group])
        ratios[group[0]] = search_input_clip([(torch.cat(found[group[0]]), weight)], quantizer)
    for experts in work.stacks:
        with work.attachment.exact():
            pairs = expert_products(work.model, experts, routed[experts.module], step)
        for tensors, products in zip((experts.first, experts.second), pairs, strict=True):
            ratios[tensors[0]] = search_input_clip(products, quantizer)
    return Clips(ratios, {}, {})


def search_cache_clips(work: BlockInputs) -> Clips:
    """Search the clip ratios of keys, then of values, that change the output of the attention least."""
    quantizer, states = work.scheme.kv, work.states
    keys: dict[str, float] = {}
    values: dict[str, float] = {}
    if quantizer is not None and "kv" not in static_parts(work.scheme):
        chosen = range(0, len(states), max(1, len(states) // CLIP_CACHE_SAMPLES))[:CLIP_CACHE_SAMPLES]
        for attention in (a for a in work.plan.attentions if a.startswith(f"{work.name}.")):
            keys[attention], values[attention] = _cache_clips(work, attention, quantizer, chosen)
    return Clips({}, keys, values)


def _cache_clips(
    work: BlockInputs, attention: str, quantizer: Quantizer, samples: Sequence[int]
) -> tuple[float, float]:
    module, site = work.model.get_submodule(attention), work.attachment.keys_values[attention]
    calls = []
    with work.attachment.exact():
        for number in samples:
            with captured_call(module) as call:
                run_block(work.block, work.states[number], work.arguments[number])
            calls.append((call, _first(module(*call.args, **call.kwargs))))

    def error(keys: Quantizer, values: Quantizer) -> float:
        site.keys, site.values = keys, values
        with work.attachment.exact():
            site.rounds = True
            outputs = [(_first(module(*call.args, **call.kwargs)), exact) for call, exact in calls]
        return sum(float((output - exact).square().sum()) for output, exact in outputs)

    keys = best_ratio(lambda ratio: error(replace(quantizer, clip=ratio), quantizer))
    best = replace(quantizer, clip=keys)
    return keys, best_ratio(lambda ratio: error(best, replace(quantizer, clip=ratio)))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
