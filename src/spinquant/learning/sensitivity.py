"""Sensitivity of every quantizer, per row: a second-order estimate of the KL that rounding costs (Fisher information).

Rounding adds an error e to a row of an activation. Rounding errors have no preferred direction in rotated coordinates;
as long as they are small and independent, the KL from the 16-bit model to the quantized one is

    KL ~ 1/2 sum over rows of E[(g . e)^2] = 1/2 sum ||g||^2 ||e||^2 / n

with n the length of a row, and g the gradient of log p(y), y sampled from the model's own predictions. So a row costs
its relative error times its weight, ||g||^2 ||x||^2 / n: a massive activation that the loss does not depend on has
little weight. Most rows have almost none, and quantizers differ. Rows are therefore sampled from all tokens with
probability proportional to their weight, and weigh the same afterwards; the total weight of each quantizer is stored
with it (`ActivationSite.share`).

It takes one forward and backward pass through the 16-bit model per sample. On SmolLM2-135M at A4KV4 with a random
Hadamard, the estimates from 16 samples of the manual (in parentheses, the KL measured with that quantizer alone, on
four other samples) were 0.167 (0.193) for gate and up, 0.083 (0.088) for q, k and v, 0.030 (0.030) for o_proj, 0.089
(0.073) for down_proj and 0.056 (0.053) for the KV cache; 0.43 in all, where all rounding together cost 0.52.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.evaluation.metrics import drawn, wide
from spinquant.learning.activations import ActivationSite, quantized_spaces, scales_after, transformed
from spinquant.learning.fake_quant import checkpointed
from spinquant.models.capture import device_of
from spinquant.online.attachment import Attachment
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.rotation import Transform, dual


def collect_by_weight(
    model: Any,
    plan: Plan,
    spaces: Sequence[str],
    scheme: Scheme,
    tokens: Tensor,
    *,
    rows: int,
    generator: torch.Generator,
    checkpointing: bool = False,
    slopes: Collection[str] = (),
    observers: Mapping[str, Callable[[Tensor], None]] | None = None,
    keys: Mapping[str, Transform] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ActivationSite]:
    """Sample about `rows` rows of every site in the given spaces, with probability proportional to their weight.

    Args:
        model: A causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: Where it can be rotated.
        spaces: Names of the spaces whose sites are sampled.
        scheme: What is quantized.
        tokens: Calibration tokens, int64 (samples, length).
        rows: About how many rows per site: `rows // samples` of every sample, at least one.
        generator: Of the sampled labels and rows.
        checkpointing: Gradient checkpointing of the decoder blocks.
        slopes: Those of the spaces of whose rows the gradients are kept too.
        observers: Further observers of activations, by the linear that reads them; none at a sampled site.
        keys: Transforms that come before R3, by space. Keys are sampled after them. Default: none.
        progress: Called with (samples done, samples in all).

    Returns:
        The sites; their share is the KL per token, in nats, that a relative error of one would cost.

    Raises:
        LearningError: A gradient is not finite.
    """
    wanted = quantized_spaces(plan, spaces, scheme)
    inclined = {name for name, (space, _) in wanted.items() if space.name in slopes}
    sampling = _WeightedSampling(max(1, rows // len(tokens)), generator, inclined)

    def observe(attachment: Attachment) -> None:
        _observe_sites(attachment, wanted, sampling)
        for name, observer in (observers or {}).items():
            attachment.inputs[name].watch = observer

    how: dict[str, Any] = {"generator": generator, "checkpointing": checkpointing, "progress": progress}
    backward_own_predictions(model, plan, scheme, tokens, observe, keys=keys, **how)
    share = {name: 0.5 * weight / tokens.numel() for name, weight in sampling.weight.items()}
    return [
        ActivationSite(
            name,
            space.name,
            quantizer,
            torch.cat(sampling.rows[name]),
            share[name],
            scales_after(plan, name),
            torch.cat(sampling.slopes[name]) if name in inclined else None,
        )
        for name, (space, quantizer) in wanted.items()
        if name in sampling.rows
    ]


def backward_own_predictions(
    model: Any,
    plan: Plan,
    scheme: Scheme,
    tokens: Tensor,
    observe: Callable[[Attachment], None],
    *,
    generator: torch.Generator,
    checkpointing: bool,
    keys: Mapping[str, Transform] | None = None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Backpropagate log p(y), y sampled from the model's own predictions, so that observers see activation gradients.

    Nothing is quantized; weights get no gradients. One forward and backward pass per sample.

    Args:
        model: A causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: Where it can be rotated.
        scheme: What is quantized: it has a site for each.
        tokens: Calibration tokens, int64 (samples, length).
        observe: Called once, to set the observers (`watch`) of the sites.
        generator: Of the labels y.
        checkpointing: Gradient checkpointing of the decoder blocks.
        keys: Transforms that keys have, by space, and queries the dual ones. Default: none.
        progress: Called with (samples done, samples in all).
    """
    attachment = attach(model, plan, keys or {}, scheme)
    try:
        observe(attachment)
        with attachment.exact(), _input_gradients_only(model), checkpointed(model, plan, checkpointing):
            for done, row in enumerate(tokens.split(1)):
                sampled_nll(model, row.to(device_of(model)), [generator]).backward()
                if progress:
                    progress(done + 1, len(tokens))
    finally:
        attachment.remove()


@contextmanager
def _input_gradients_only(model: Any) -> Iterator[None]:
    """Within the `with` block, weights are frozen, and the embedding's output requires a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    model.enable_input_require_grads()  # otherwise activations would have no gradient, since all weights are frozen
    try:
        yield
    finally:
        model.disable_input_require_grads()
        for parameter in trained:
            parameter.requires_grad_(True)


def sampled_nll(model: Any, rows: Tensor, labels: Sequence[torch.Generator]) -> Tensor:
    """-log p(y), summed over all tokens of rows, (batch, length), for labels y sampled from the model's predictions.

    labels: one generator per row, from which its labels are sampled.
    """
    return nll_of_own(model(input_ids=rows, use_cache=False).logits, labels)


def nll_of_own(logits: Tensor, labels: Sequence[torch.Generator]) -> Tensor:
    """The same from logits, (batch, length, vocabulary)."""
    return _SampledNLL.apply(logits, labels)  # pyright: ignore[reportReturnType]


class _SampledNLL(torch.autograd.Function):
    """Sample labels and compute their NLL with a single softmax, since passes over the vocabulary dominate the cost.

    The gradient with respect to the logits is p, minus 1 at y.
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


class _WeightedSampling:
    """Rows of every site, `share` from each sample, and the total weight of all rows of the site.

    inclined: the sites of whose rows the gradients are kept.
    """

    def __init__(self, share: int, generator: torch.Generator, inclined: Collection[str]):
        self.share, self.generator, self.inclined = share, generator, inclined
        self.rows: dict[str, list[Tensor]] = {}
        self.slopes: dict[str, list[Tensor]] = {}
        self.weight: dict[str, float] = {}

    def watch(self, name: str, x: Tensor) -> None:
        """Observe an activation, (.., width); rows are sampled when its gradient is computed."""
        x.register_hook(partial(self._sample, name, x.detach()))

    def _sample(self, name: str, x: Tensor, gradient: Tensor) -> None:
        flat, slopes = (t.reshape(-1, t.shape[-1]).float() for t in (x, gradient))
        weights = (flat.square().sum(-1) * slopes.square().sum(-1) / flat.shape[-1]).cpu()
        if not weights.isfinite().all():
            raise LearningError(
                f"the gradient at {name} is not finite: the model's weights are damaged, or {x.dtype} overflows"
            )
        total = float(weights.sum(dtype=torch.float64))
        if total > 0:
            chosen = torch.multinomial(weights / total, self.share, replacement=True, generator=self.generator)
            self.rows.setdefault(name, []).append(flat[chosen.to(flat.device)].cpu())
            if name in self.inclined:
                self.slopes.setdefault(name, []).append(slopes[chosen.to(flat.device)].cpu())
            self.weight[name] = self.weight.get(name, 0.0) + total


def _observe_sites(attachment: Attachment, wanted: Mapping[str, Any], sampling: _WeightedSampling) -> None:
    for name, site in attachment.inputs.items():
        if name in wanted:
            site.watch = partial(sampling.watch, name)
    for attention, both in attachment.keys_values.items():
        names = [f"{attention}.{part}" for part in ("keys", "values")]

        def observe(keys: Tensor, values: Tensor, names: Sequence[str] = names) -> None:
            for name, x in zip(names, (keys, values), strict=True):
                if name in wanted:
                    sampling.watch(name, x)

        both.watch = observe


@torch.no_grad()
def predicted_kl(sites: Sequence[ActivationSite], rotations: Mapping[str, Transform]) -> dict[str, float]:
    """Estimated KL at every site, by name, in nats per token, from the rounding errors of its rows.

    rotations: may have scales of norms, where the sites have gradients.
    """
    found = {}
    for site in sites:
        z = transformed(site, rotations)
        error = (fake_quantize(z, site.quantizer) - z).square().sum(-1) / z.square().sum(-1)
        if site.slopes is not None and site.scales in rotations:
            turned = dual(rotations[site.scales]).apply(rotations[site.space].apply(site.slopes))
            after, before = (
                (x.square().sum(-1) * g.square().sum(-1)) for x, g in ((z, turned), (site.rows, site.slopes))
            )
            error = error * after / before
        found[site.name] = site.share * float(error.mean())
    return found
