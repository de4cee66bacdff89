"""Quantize weights with calibration data, one decoder block at a time.

The inputs of a block are the outputs of the quantized blocks before it. In each block the clip ratios of activations,
keys and values are searched if that is asked for, the weights are quantized (GPTQ or round-to-nearest), and the outputs
of the quantized block become the inputs of the next. For asymmetric calibration (GPTAQ) a second copy of the hidden
states goes through the unquantized blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.experts import Calls, Routed, between, routed_calls
from spinquant.calibration.hidden_states import HiddenStates
from spinquant.calibration.observers import BlockInputs, find_peaks, search_cache_clips, search_input_clips
from spinquant.calibration.sequential import (
    Home,
    InMemory,
    after_blocks,
    block_calls,
    check_finite_output,
    check_finite_weights,
)
from spinquant.compute.dtypes import named
from spinquant.errors import CalibrationError, SchemeError
from spinquant.models.capture import device_of
from spinquant.models.modules import named_tensor
from spinquant.online.attachment import Attachment
from spinquant.online.hooks import attach
from spinquant.plan import Experts, Plan
from spinquant.quantization.gptq import GPTQOptions, Moments, gptq
from spinquant.quantization.integer import Packed, dequantize, fake_quantize, stacked
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, static_parts, with_clip
from spinquant.quantization.targets import Weight, parts_tied, weights_of
from spinquant.rotations.fuse_module import untie
from spinquant.rotations.rotation import Transform


@dataclass(frozen=True)
class Calibration:
    """Options of calibration: GPTQ, clip search, and how inputs are computed.

    Attributes:
        gptq: Options of GPTQ. They count only with error feedback, not for round-to-nearest.
        clips: Search clip ratios of activations, keys and values. Default: False, the scheme's own.
        round_inputs: Quantize activations and KV cache during calibration, as they will be at inference. Default: True.
        sequential: Calibrate each linear of a block on the outputs of the quantized linears before it, which takes a
            pass per group of linears. Default: False, one pass per block.
        device: Device that the blocks are moved to one at a time, such as "cuda". Default: where the model is.
        dtype: Dtype that the blocks compute in. Default: that of the model, or float32 where a CPU is faster in it than
            in half precision and a block in float32 fits into memory. Weights and scales keep their dtype.

    Example:
        >>> import spinquant
        >>> calibration = spinquant.Calibration(clips=True, device="cpu")
        >>> calibration.round_inputs, calibration.sequential
        (True, False)
    """

    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    clips: bool = False
    round_inputs: bool = True
    sequential: bool = False
    device: str | None = None
    dtype: torch.dtype | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return {**asdict(self), "dtype": None if self.dtype is None else named(self.dtype)}


@torch.no_grad()
def quantize_blocks(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    scheme: Scheme,
    tokens: Tensor,
    calibration: Calibration,
    *,
    error_feedback: bool = True,
    stored: torch.dtype | None = None,
    store: BlockStore | None = None,
    home: Home | None = None,
    hidden: HiddenStates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clips:
    """Quantize the weights of a rotated model in place, block by block; returns the clip ratios found.

    Args:
        model: A model with nothing attached (`attach`).
        plan: Where it is rotated.
        rotations: By space; the online ones are attached during calibration.
        scheme: What is quantized.
        tokens: Calibration tokens, int64, (samples, length).
        calibration: Options.
        error_feedback: GPTQ, else round-to-nearest (RTN).
        stored: Dtype of scales and of the numbers of weights where blocks compute in another one. Default: that of the
            model if the options name a dtype, else that of each weight.
        store: Where finished blocks are stored, to resume from.
        home: Where the weights are, by default in the model. If it loads and drops them block by block, only the store
            has the quantized weights.
        hidden: Empty container for the hidden states, by default in memory.
        progress: Called with (blocks done, blocks in all).

    Raises:
        CalibrationError: Activations are not finite, or a second moment is singular; the module is named.
    """
    if home is None:
        home = InMemory(model, plan.blocks, calibration.device, calibration.dtype)
        stored = model.dtype if stored is None and calibration.dtype is not None else stored
        if scheme.weights is not None and parts_tied(plan, scheme):
            untie(model, plan)
    attachment = attach(model, plan, rotations, scheme)
    try:
        hidden = HiddenStates() if hidden is None else hidden
        walk = _Walk(home, plan, scheme, tokens, calibration, attachment, error_feedback, hidden, stored)
        total = len(plan.blocks)
        for done, name in enumerate(plan.blocks):
            finished = store.load(name) if store else None
            walk.block(name, finished)
            if store and finished is None:
                store.save(name, walk.packed, walk.clips)
            if progress:
                progress(done + 1, total)
        if scheme.lm_head and scheme.weights is not None:
            (name,) = plan.heads
            finished = store.load(name) if store else None
            walk.head(name, finished)
            if store and finished is None:
                store.save(name, walk.packed, walk.clips)
        return walk.clips
    finally:
        attachment.remove()


class _Walk:
    """State of the block-by-block pass: hidden states, clip ratios, and the packed weights of the current block."""

    def __init__(
        self,
        home: Home,
        plan: Plan,
        scheme: Scheme,
        tokens: Tensor,
        calibration: Calibration,
        attachment: Attachment,
        error_feedback: bool,
        hidden: HiddenStates,
        stored: torch.dtype | None,
    ):
        self.home, self.model, self.plan, self.scheme = home, home.model, plan, scheme
        self.calibration, self.attachment, self.stored = calibration, attachment, stored
        self.options = calibration.gptq if error_feedback and scheme.weights is not None else None
        with home.outside(tokens):
            self.arguments = block_calls(self.model, plan.blocks, tokens, hidden).arguments
        self.states = hidden
        asymmetric = self.options is not None and bool(self.options.asymmetry)
        self.exact = hidden.copy() if asymmetric else None
        self.clips = Clips({}, {}, {})
        self.weights = weights_of(plan, scheme)
        self.packed: dict[str, Packed] = {}

    def block(self, name: str, finished: "tuple[Mapping[str, Packed], Clips] | None") -> None:
        """Quantize one block, or load it from an earlier run, and compute its outputs."""
        work = BlockInputs(self.model, self.plan, self.scheme, self.attachment, name, self.states, self.arguments[name])
        with self.home.block(name):
            self.packed = {}
            if finished is not None:
                self._advance_exact(work)
                self._take_over(*finished)
            else:
                check_finite_weights(work.block, name)
                if static_parts(self.scheme):
                    self._set_clips(find_peaks(work))
                if self.calibration.clips:
                    self._set_clips(search_input_clips(work))
                    self._set_clips(search_cache_clips(work))
                self._round_block(work)
                if static_parts(self.scheme):
                    self._set_clips(find_peaks(work))  # again, with the quantized weights
            for i, state in enumerate(self.states):
                output = work.run(i, state, rounded=self.calibration.round_inputs)
                check_finite_output(work.block, name, state, work.arguments[i], output)
                self.states[i] = output.to(state.device)

    def head(self, name: str, finished: "tuple[Mapping[str, Packed], Clips] | None") -> None:
        """Quantize the output head, or load it from an earlier run."""
        self.packed = {}
        if finished is not None:
            with self.home.head():
                self._take_over(*finished)
            return
        moments = Moments()
        with self.home.outside(torch.zeros(1, 1, dtype=torch.int64)):
            if "activations" in static_parts(self.scheme):
                last = (after_blocks(self.model, self.plan.blocks, state) for state in self.states)
                self._set_clips(Clips({name: max(float(x.abs().amax()) for x in last) or 1.0}, {}, {}))
            for i, state in enumerate(self.states if self.options is not None else ()):
                x = after_blocks(self.model, self.plan.blocks, state)
                exact = None if self.exact is None else after_blocks(self.model, self.plan.blocks, self.exact[i])
                moments.add(self._rounded(x, name), exact)
        with self.home.head():
            self._round_group((name,), self.model.get_submodule(name).weight.device, moments)

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        site = self.attachment.inputs.get(name)
        if site is None or site.quantizer is None or not self.calibration.round_inputs:
            return x
        return fake_quantize(x, site.quantizer)

    def _advance_exact(self, work: BlockInputs) -> None:
        """Compute the unquantized hidden states behind the block, whose weights are not quantized yet."""
        for i, state in enumerate(self.exact or ()):
            assert self.exact is not None
            self.exact[i] = work.run(i, state, rounded=False).to(state.device)

    def _take_over(self, packed: Mapping[str, Packed], clips: Clips) -> None:
        for weight in self.weights:
            if weight.tensor in packed:
                weight.put(self.model, packed[weight.tensor].to(weight.matrices(self.model).device))
        self._set_clips(clips)

    def _set_clips(self, clips: Clips) -> None:
        for name, ratio in clips.inputs.items():
            site = self.attachment.inputs[name]
            site.quantizer = with_clip(site.quantizer, ratio)
        for name, site in self.attachment.keys_values.items():
            if name in clips.keys:
                site.keys = with_clip(site.keys, clips.keys[name])
                site.values = with_clip(site.values, clips.values[name])
        both = ((getattr(self.clips, part), getattr(clips, part)) for part in ("inputs", "keys", "values"))
        self.clips = Clips(*({**old, **new} for old, new in both))

    def _round_block(self, work: BlockInputs) -> None:
        groups, stacks, home = work.groups, work.stacks, device_of(work.block)
        if self.scheme.weights is None:
            self._advance_exact(work)
            return
        if self.options is None:
            for group in groups:
                self._round_group(group, home, None)
            for experts in stacks:
                self._round_experts(experts, None)
            return
        # The weights before quantization, for the unquantized hidden states.
        own = [w.tensor for w in self.weights if w.tensor.startswith(f"{work.name}.")]
        inside = own if self.exact is not None else []
        whole = {tensor: named_tensor(self.model, tensor).data.clone() for tensor in inside}
        # Groups of linears, and stacked experts, that are calibrated in one pass.
        stages: list[tuple[Sequence[tuple[str, ...]], Sequence[Experts]]] = [(groups, stacks)]
        if self.calibration.sequential:
            stages = [*(([group], ()) for group in groups), ((), stacks)]
        # The first stage replaces each state after reading it; later ones need a copy.
        before = self.exact.copy() if self.exact is not None and len(stages) > 1 else self.exact
        for number, (stage, routing) in enumerate(stages):
            moments = {group: Moments() for group in stage}
            routed: dict[str, Routed] = {}
            exactly: dict[str, Routed] = {}
            for i, state in enumerate(self.states if stage or routing or number == 0 else ()):
                exact: Mapping[str, Tensor] = {}
                if before is not None and self.exact is not None:
                    with self._weights(whole), routed_calls(self.model, routing, exactly):
                        # In the first stage to the end of the block, for the inputs of the next block.
                        stop = number > 0 and not routing
                        start = before[i]
                        exact, output = work.inputs(stage, i, start, rounded=False, stop=stop)
                    if number == 0:
                        assert output is not None
                        self.exact[i] = output.to(start.device)
                with routed_calls(self.model, routing, routed):
                    rounded = self.calibration.round_inputs
                    inputs, _ = work.inputs(stage, i, state, rounded=rounded, stop=not routing)
                for group in stage:
                    if group[0] in inputs:  # not every module has to run
                        moments[group].add(inputs[group[0]], exact.get(group[0]))
            for group in stage:
                self._round_group(group, home, moments[group])
            for experts in routing:
                calls = Calls(routed[experts.module], exactly.get(experts.module), whole)
                self._round_experts(experts, calls)

    @contextmanager
    def _weights(self, wanted: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the `with` block, these tensors of the model have these values."""
        tensors = {name: named_tensor(self.model, name) for name in wanted}
        usual = {name: tensor.data for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.data = wanted[name]
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = usual[name]

    def _round_group(self, group: tuple[str, ...], device: torch.device, moments: Moments | None) -> None:
        """Quantize the linears that read one activation as one weight: rows are independent."""
        weights = [weight for weight in self.weights if weight.tensor.removesuffix(".weight") in group]
        parts = [weight.matrices(self.model) for weight in weights]
        packed = self._rounded_weight(torch.cat([part.to(device) for part in parts]), moments, ", ".join(group))
        sizes = [len(part) for part in parts]
        split = zip(*(tensor.split(sizes) for tensor in packed.tensors()), strict=True)
        for weight, part, tensors in zip(weights, parts, split, strict=True):
            # Clones: views would keep the whole tensor alive, and safetensors does not save them.
            self._put(weight, packed.with_tensors(*(t.clone().to(part.device) for t in tensors)))

    def _rounded_weight(self, weight: Tensor, moments: Moments | None, name: str) -> Packed:
        if self.stored is not None:
            weight = weight.to(self.stored)  # exact for what was read in it; scales have the dtype of the weight
        try:
            if moments is None or self.options is None:
                return quantize_weight(weight, _present(self.scheme.weights))
            return gptq(weight, moments, _present(self.scheme.weights), self.options)
        except (CalibrationError, SchemeError) as error:
            raise type(error)(f"{name}: {error}") from None

    def _put(self, weight: Weight, packed: Packed) -> None:
        self.packed[weight.tensor] = packed
        weight.put(self.model, packed)

    def _round_experts(self, experts: Experts, calls: Calls | None) -> None:
        """Quantize experts one by one; by RTN those that no token was routed to, and all of them without calls."""
        weights = [Weight(tensors[0], experts.transposed) for tensors in (experts.first, experts.second)]
        matrices = [weight.matrices(self.model) for weight in weights]
        done: tuple[list[Packed], list[Packed]] = ([], [])
        for expert in range(len(matrices[0])):
            for number, weight in enumerate(weights):
                moments = None if calls is None else self._expert_moments(experts, expert, calls, number)
                label = f"expert {expert} of {weight.tensor}"
                packed = self._rounded_weight(matrices[number][expert], moments, label)
                done[number].append(packed)
                if self.calibration.sequential:  # the second weight's inputs come from the quantized first one
                    matrices[number][expert].copy_(dequantize(packed))
        for weight, parts in zip(weights, done, strict=True):
            self._put(weight, stacked(parts))

    def _expert_moments(self, experts: Experts, expert: int, calls: Calls, number: int) -> Moments | None:
        """Second moments of the inputs of an expert's first or second matrix product; None if it got no token."""
        found = Moments()
        for rows, same in calls.rows_of(expert):
            if number == 1:
                with nullcontext() if self.calibration.round_inputs else self.attachment.exact():
                    rows = between(self.model, experts, expert, rows)
                if same is not None:
                    with self.attachment.exact():
                        same = between(self.model, experts, expert, same, calls.whole[experts.first[0]])
            found.add(rows, same)
        return found if found.tokens else None


def _present(quantizer: Quantizer | None) -> Quantizer:
    assert quantizer is not None
    return quantizer


Method = Literal["rtn", "gptq", "gptaq"]


METHODS = get_args(Method)
