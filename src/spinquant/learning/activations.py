"""Capture the inputs of activation and KV cache quantizers, block by block, as training data of local learning.

A site is a quantizer and the space of its input: the input of a linear, keys, or values. A row is one token, or one
head of a token, as the quantizer reads it; rows are stored on the CPU in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spinquant.calibration.sequential import after_blocks, block_calls, check_finite_output, run_block
from spinquant.learning.free_transforms import kind_of
from spinquant.models.capture import captured, device_of
from spinquant.online.attachment import Attachment
from spinquant.online.hooks import attach
from spinquant.plan import Experts, Plan, Space
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform

Weighting = Literal["fisher", "uniform", "massive"]
WEIGHTINGS = get_args(Weighting)
MASSIVE = 20.0  # a row has a massive activation if its largest magnitude exceeds this many times its RMS


@dataclass(frozen=True)
class ActivationSite:
    """Rows sampled from the input of one quantizer.

    Attributes:
        name: The linear or the tensor of stacked experts that reads the activation; `ATTENTION.keys` or
            `ATTENTION.values` for the KV cache.
        space: Space of the activation.
        quantizer: The quantizer.
        rows: The rows, float32 (rows, width); width is a multiple of the size of the space.
        share: Weight of the site in the loss, see `sensitivity.py`. Default: 1.
        scales: Space of the scales that the activation has after the transform of `space`; "" for none. Default: "".
        slopes: Gradients at the rows, shaped like them. Default: not captured.
    """

    name: str
    space: str
    quantizer: Quantizer
    rows: Tensor
    share: float = 1.0
    scales: str = ""
    slopes: Tensor | None = None

    def weights(self, weighting: Weighting, factor: float) -> Tensor:
        """Weight of each row in the loss, (rows,): one, or `factor` for rows with a massive activation."""
        if weighting != "massive":
            return torch.ones(len(self.rows))
        rms = self.rows.square().mean(-1).sqrt()
        return torch.where(self.rows.abs().amax(-1) > MASSIVE * rms, factor, 1.0)


@torch.no_grad()
def collect(
    model: Any,
    plan: Plan,
    spaces: Sequence[str],
    scheme: Scheme,
    tokens: Tensor,
    *,
    rows: int,
    generator: torch.Generator,
    device: str | None = None,
    keys: Mapping[str, Transform] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ActivationSite]:
    """Sample about `rows` rows of every site in the given spaces, uniformly, without quantizing anything.

    Args:
        model: A causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: Where it can be rotated.
        spaces: Names of the spaces whose sites are captured.
        scheme: What is quantized.
        tokens: Calibration tokens, int64 (samples, length).
        rows: About how many rows per site: `rows // samples` of every sample, at least one.
        generator: Of the sampling.
        device: Where blocks are run; they are moved there one at a time. Default: where they are.
        keys: Transforms that come before R3, by space. Keys are sampled after them. Default: none.
        progress: Called with (blocks done, blocks in all).

    Returns:
        The sites with their rows.
    """
    attachment = attach(model, plan, keys or {}, scheme)
    wanted = quantized_spaces(plan, spaces, scheme)
    sampling = _Sampling(model, attachment, plan.experts, list(wanted), max(1, rows // len(tokens)), generator)
    try:
        with attachment.exact():
            calls = block_calls(model, plan.blocks, tokens)
            states = list(calls.hidden)
            for done, name in enumerate(plan.blocks):
                block = model.get_submodule(name)
                home = device_of(block)
                block.to(device or home)
                try:
                    states = sampling.through(name, calls.arguments[name], states)
                finally:
                    block.to(home)
                if progress:
                    progress(done + 1, len(plan.blocks))
            for head in plan.heads:
                for state in states if head in wanted else ():
                    sampling.add(head, after_blocks(model, plan.blocks, state))
    finally:
        attachment.remove()
    return [
        ActivationSite(name, space.name, quantizer, torch.cat(sampling.rows[name]), scales=scales_after(plan, name))
        for name, (space, quantizer) in wanted.items()
        if name in sampling.rows
    ]


def quantized_spaces(plan: Plan, spaces: Sequence[str], scheme: Scheme) -> dict[str, tuple[Space, Quantizer]]:
    """Space and quantizer of every site in the given spaces, by name: the first linear of a group, keys or values."""
    found: dict[str, tuple[Space, Quantizer]] = {}
    for group in (*plan.linears, *([plan.heads] if scheme.lm_head else [])):
        space = plan.read_by(group[0])
        if scheme.activations is not None and space is not None and space.name in spaces:
            found[group[0]] = space, scheme.activations
    for experts in plan.experts:
        outside, inside = plan.read_by_experts(experts)
        rotated = next((space for space in outside if space.rotation), None)
        for tensors, space in ((experts.first, rotated), (experts.second, inside)):
            if scheme.activations is not None and space is not None and space.name in spaces:
                found[tensors[0]] = space, scheme.activations
    if scheme.kv is not None:
        keys = {online.module: plan.space[online.space] for online in plan.onlines if online.site == "query_key"}
        for attention in plan.attentions:
            for part, space in (("keys", keys.get(attention)), ("values", plan.values_of(attention))):
                if space is not None and space.name in spaces:
                    found[f"{attention}.{part}"] = space, scheme.kv
    return found


def transformed(site: ActivationSite, transforms: Mapping[str, Transform]) -> Tensor:
    """The rows of a site as its quantizer would read them: rotated, and scaled if its scales are given."""
    z = transforms[site.space].apply(site.rows)
    return transforms[site.scales].apply(z) if site.scales in transforms else z


def scales_after(plan: Plan, site: str) -> str:
    """The space of the scales of a norm that what a site reads has after R1; "" for none."""
    outside = {experts.first[0]: plan.read_by_experts(experts)[0] for experts in plan.experts}
    read = outside[site] if site in outside else plan.spaces_read_by(site)
    return next((space.name for space in read if kind_of(space) == "norms"), "")


class _Sampling:
    """Runs hidden states through the blocks, and samples rows of all sites. share: rows per site and sample."""

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        experts: Sequence[Experts],
        sites: Sequence[str],
        share: int,
        generator: torch.Generator,
    ):
        self.model, self.attachment, self.experts = model, attachment, experts
        self.sites, self.share, self.generator = sites, share, generator
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Sample rows of an activation, (.., width)."""
        flat = x.reshape(-1, x.shape[-1])
        chosen = torch.randperm(len(flat), generator=self.generator)[: self.share].to(flat.device)
        self.rows.setdefault(name, []).append(flat[chosen].to("cpu", torch.float32))

    def through(self, name: str, arguments: Sequence[Mapping[str, Any]], states: Sequence[Tensor]) -> list[Tensor]:
        """Run one block, and sample rows of its sites; returns the block's outputs. arguments: of every sample."""
        block = self.model.get_submodule(name)
        inside = [site for site in self.sites if site.startswith(f"{name}.")]
        cached = [site for site in inside if site.endswith((".keys", ".values"))]
        attentions = {site.rpartition(".")[0] for site in cached}
        for attention in attentions:
            self.attachment.keys_values[attention].watch = self._watch(attention, cached)
        # The inputs of the experts' matrix products are not inputs of modules, so the hooks' sites observe them.
        stacked = [tensor for e in self.experts for tensor in (e.first[0], e.second[0]) if tensor in inside]
        for tensor in stacked:
            self.attachment.inputs[tensor].watch = partial(self.add, tensor)
        linears = [site for site in inside if site not in cached and site not in stacked]
        outputs = []
        for state, others in zip(states, arguments, strict=True):
            with captured(self.model, linears, inputs=True) as found:
                output = run_block(block, state, others)
            check_finite_output(block, name, state, others, output)
            for linear, x in found.items():
                self.add(linear, x)
            outputs.append(output.to(state.device))
        for attention in attentions:
            self.attachment.keys_values[attention].watch = None
        for tensor in stacked:
            self.attachment.inputs[tensor].watch = None
        return outputs

    def _watch(self, attention: str, cached: Sequence[str]) -> Callable[[Tensor, Tensor], None]:
        def observe(keys: Tensor, values: Tensor) -> None:
            for part, x in (("keys", keys), ("values", values)):
                if f"{attention}.{part}" in cached:
                    self.add(f"{attention}.{part}", x)

        return observe
