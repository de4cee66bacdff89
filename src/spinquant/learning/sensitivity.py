"""Estimate the cost of rounding at every quantizer, per row: a second-order estimate of KL (Fisher information).

Rounding adds an error e to a row of an activation. Rounding errors have no preferred direction in rotated coordinates;
as long as they are small and independent, the KL from the 16-bit model to the quantized one is

    KL ~ 1/2 sum over rows of E[(g . e)^2] = 1/2 sum ||g||^2 ||e||^2 / n

with n the length of a row, and g the gradient of log p(y), y sampled from the model's own predictions. So the weight of
a row is ||g||^2 ||x||^2 / n times its relative error: a massive activation that nothing depends on has little weight,
and quantizers differ in weight. Most rows have almost none. Rows are therefore sampled from all tokens with probability
proportional to their weight, and weigh the same afterwards; the total weight of each quantizer is stored with it.

It takes one forward and backward pass through the 16-bit model per sample. On SmolLM2-135M at A4KV4 with a random
Hadamard, the estimates from 16 samples of the manual (and the measured cost of rounding there alone, on four others)
were 0.167 (0.193) for gate and up, 0.083 (0.088) for q, k and v, 0.030 (0.030) for o_proj, 0.089 (0.073) for down_proj
and 0.056 (0.053) for the KV cache; 0.43 in all, where all rounding together cost 0.52.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.evaluation.metrics import drawn, wide
from spinquant.learning.activations import ActivationSite, quantized_spaces
from spinquant.learning.fake_quant import checkpointed
from spinquant.models.capture import device_of
from spinquant.online.hooks import Attachment, attach
from spinquant.plan import Plan
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.rotation import Rotation


def sensitive_sites(
    model: Any,
    plan: Plan,
    spaces: Sequence[str],
    scheme: Scheme,
    tokens: Tensor,
    *,
    rows: int,
    generator: torch.Generator,
    checkpointing: bool = False,
    beside: Mapping[str, Callable[[Tensor], None]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ActivationSite]:
    """Sample about `rows` rows, by weight, of every site in the given spaces, on tokens, int64 (samples, length).

    Gains must be fused. beside: further observers of linears' inputs. ActivationSite.share is the KL per token, in
    nats, that a relative error of one would cost. Raises LearningError for gradients that are not finite.
    """
    wanted = quantized_spaces(plan, spaces, scheme)
    attachment = attach(model, plan, {}, scheme, around=True)
    drawn = _Drawn(max(1, rows // len(tokens)), generator)
    try:
        _watch(attachment, wanted, drawn)
        for name, watch in (beside or {}).items():
            attachment.inputs[name].watch = watch
        with attachment.exact():
            own_predictions(model, plan, tokens, generator=generator, checkpointing=checkpointing, progress=progress)
    finally:
        attachment.remove()
    return [
        ActivationSite(
            name, space.name, quantizer, torch.cat(drawn.rows[name]), 0.5 * drawn.mass[name] / tokens.numel()
        )
        for name, (space, quantizer) in wanted.items()
        if name in drawn.rows
    ]


def own_predictions(
    model: Any,
    plan: Plan,
    tokens: Tensor,
    *,
    generator: torch.Generator,
    checkpointing: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Run forward and backward passes, sample by sample, on tokens, (samples, length).

    Hooks get gradients of log p(y) at every token, with y sampled from the model's own predictions.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    model.enable_input_require_grads()  # otherwise activations would have no gradient, since all weights are frozen
    try:
        with checkpointed(model, plan, checkpointing):
            for done, row in enumerate(tokens.split(1)):
                nll_of_own(model, row.to(device_of(model)), [generator]).backward()
                if progress:
                    progress(done + 1, len(tokens))
    finally:
        model.disable_input_require_grads()
        for parameter in frozen:
            parameter.requires_grad_(True)


def nll_of_own(model: Any, rows: Tensor, labels: Sequence[torch.Generator]) -> Tensor:
    """-log p(y), summed over all tokens of rows, (batch, length), of labels y sampled from the model's own predictions.

    labels: one generator per row, from which its labels are sampled.
    """
    return _SampledNLL.apply(model(input_ids=rows, use_cache=False).logits, labels)  # pyright: ignore[reportReturnType]


class _SampledNLL(torch.autograd.Function):
    """Sample labels and compute their NLL with one softmax, since passes over the vocabulary dominate the cost.

    The gradient is p, minus 1 at y.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Sequence[torch.Generator]) -> Tensor:
        p = wide(logits).softmax(-1)
        own = torch.stack([drawn(one, generator) for one, generator in zip(p, labels, strict=True)])
        ctx.dtype = logits.dtype
        ctx.save_for_backward(p, own)
        return -p.gather(-1, own).clamp(min=torch.finfo(p.dtype).tiny).log().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, own = ctx.saved_tensors
        # In place: a second backward pass detects the changed tensor and raises.
        return p.scatter_add_(-1, own, p.new_full(own.shape, -1.0)).mul_(grad).to(ctx.dtype), None


class _Drawn:
    """Sampled rows of every site, `share` from each sample, and the total weight of all rows."""

    def __init__(self, share: int, generator: torch.Generator):
        self.share, self.generator = share, generator
        self.rows: dict[str, list[Tensor]] = {}
        self.mass: dict[str, float] = {}

    def watch(self, name: str, x: Tensor) -> None:
        """Observe an activation, (.., width); rows are sampled when its gradient is known."""
        x.register_hook(partial(self._draw, name, x.detach()))

    def _draw(self, name: str, x: Tensor, gradient: Tensor) -> None:
        flat, slopes = (t.reshape(-1, t.shape[-1]).float() for t in (x, gradient))
        counts = (flat.square().sum(-1) * slopes.square().sum(-1) / flat.shape[-1]).cpu()
        if not counts.isfinite().all():
            raise LearningError(
                f"the gradient at {name} is not finite: the model's weights are damaged, or {x.dtype} overflows"
            )
        total = float(counts.sum(dtype=torch.float64))
        if total > 0:
            chosen = torch.multinomial(counts / total, self.share, replacement=True, generator=self.generator)
            self.rows.setdefault(name, []).append(flat[chosen.to(flat.device)].cpu())
            self.mass[name] = self.mass.get(name, 0.0) + total


def _watch(attachment: Attachment, wanted: Mapping[str, Any], drawn: _Drawn) -> None:
    for name, site in attachment.inputs.items():
        if name in wanted:
            site.watch = partial(drawn.watch, name)
    for attention, both in attachment.keys_values.items():
        names = [f"{attention}.{part}" for part in ("keys", "values")]

        def watch(keys: Tensor, values: Tensor, names: Sequence[str] = names) -> None:
            for name, x in zip(names, (keys, values), strict=True):
                if name in wanted:
                    drawn.watch(name, x)

        both.watch = watch


@torch.no_grad()
def predicted_kl(sites: Sequence[ActivationSite], rotations: Mapping[str, Rotation]) -> dict[str, float]:
    """Estimated KL of every site, by name, in nats per token, from the actual rounding errors of its rows."""
    found = {}
    for site in sites:
        z = rotations[site.space].apply(site.rows)
        error = (fake_quantize(z, site.quantizer) - z).square().sum(-1) / z.square().sum(-1)
        found[site.name] = site.share * float(error.mean())
    return found
