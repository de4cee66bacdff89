"""Moments of what quantizers read, and of the gradients there: one pass forward and back, for closed-form transforms.

A space gets the moments of every quantizer that reads it: the inputs of linears, and the keys and values of a KV cache.
Its kind decides what of the moments counts: the diagonal for a space of channel scales, a block for each head of values
and keys. Memory is that of these blocks, whatever the number of tokens. Samples are divided into two folds, by turns,
so that damping can be chosen on those that a transform was not made from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import Moments
from spinquant.learning.sensitivity import backward_own_predictions
from spinquant.models.capture import watching_calls
from spinquant.online.hooks import Attachment
from spinquant.plan import Plan, Space
from spinquant.quantization.clip_search import best_ratio
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import compose

FOLDS = 2
_DRAWN = 64  # random rows from which the error of a quantizer is estimated


@dataclass(frozen=True)
class Site:
    """What a quantizer reads of a space.

    Attributes:
        name: the linear or the tensor of stacked experts that reads it, or `ATTENTION.keys` or `ATTENTION.values`.
        space: the space.
        quantizer: how it is quantized.
        cached: whether it is in a KV cache, where every head is rounded by itself.
        readers: the linears that read the activation, whose weights are quantized too.
        before: a transform that the activation has before that of the space (R1, for the output of a norm).
    """

    name: str
    space: Space
    quantizer: Quantizer
    cached: bool = False
    readers: tuple[str, ...] = ()
    before: Transform | None = None


def sites_of(plan: Plan, spaces: Sequence[str], scheme: Scheme, rotations: Mapping[str, Transform]) -> list[Site]:
    """The quantizers that read some spaces of channel scales, values, or keys (R3)."""
    found = []
    groups = (*plan.linears, *([plan.heads] if scheme.lm_head and plan.heads else []))
    reading = [(group[0], group, plan.spaces_read_by(group[0])) for group in groups]
    reading += [(experts.first[0], (), plan.read_by_experts(experts)[0]) for experts in plan.experts]
    for name, group, read in reading:
        for i, space in enumerate(read):
            if scheme.activations is not None and space.name in spaces:
                # Scales of a norm are in the coordinates of the space that it normalizes, after its rotation.
                earlier = [rotations[one.name] for one in read[:i] if one.name in rotations]
                before = reduce(compose, earlier) if earlier else None
                found.append(Site(name, space, scheme.activations, readers=group, before=before))
    if scheme.kv is not None:
        keys = {online.module: plan.space[online.space] for online in plan.onlines if online.site == "query_key"}
        for attention in plan.attentions:
            for part, space in (("keys", keys.get(attention)), ("values", plan.values_of(attention))):
                if space is not None and space.name in spaces:
                    found.append(Site(f"{attention}.{part}", space, scheme.kv, cached=True))
    return found


@dataclass
class _Sums:
    """Sums over the rows of one site, by fold: X and G as in `Moments`."""

    site: Site
    x: list[Tensor | None] = field(default_factory=lambda: [None] * FOLDS)
    g: list[Tensor | None] = field(default_factory=lambda: [None] * FOLDS)
    length: int = 0

    def add(self, fold: int, x: Tensor, gradient: Tensor) -> None:
        """Add rows, (.., width) or, of a cache, (batch, heads, tokens, size), and their gradients."""
        space = self.site.space
        if not self.site.cached:
            rows, slopes = (t.flatten(0, -2).float() for t in (x, gradient))
            self.length = rows.shape[-1]
            energy, slope = rows.square().sum(-1), slopes.square().sum(-1)
            if self.site.before is not None:
                rows, slopes = (self.site.before.apply(t) for t in (rows, slopes))
            if space.allows == "diagonal":
                found = (slope @ rows.square())[None, :, None, None], (energy @ slopes.square())[None, :, None, None]
            else:
                heads = (t.unflatten(-1, (space.heads, -1, space.size)) for t in (rows, slopes))
                found = [
                    torch.einsum("t,tkhi,tkhj->kij", w, t, t)[None] for w, t in zip((slope, energy), heads, strict=True)
                ]
        else:
            rows, slopes = (t.float() for t in (x, gradient))
            self.length = rows.shape[-1]
            energy, slope = rows.square().sum(-1), slopes.square().sum(-1)
            found = [torch.einsum("bkt,bkti,bktj->kij", w, t, t)[:, None] for w, t in ((slope, rows), (energy, slopes))]
        for held, new in zip((self.x, self.g), found, strict=True):
            if not new.isfinite().all():
                raise LearningError(
                    f"the gradient at {self.site.name} is not finite: the model's weights are damaged, or {x.dtype} "
                    "overflows"
                )
            before = held[fold]
            held[fold] = new.double().cpu() if before is None else before + new.double().cpu()

    def moments(self, fold: int, noise: float, weights: Tensor | None) -> Moments | None:
        """The moments of a fold; None if it saw no gradient.

        noise: expected relative error of a rounded row. weights: what the rounding of the readers' weights adds to G.
        """
        x, g = self.x[fold], self.g[fold]
        if x is None or g is None:
            return None
        energy = x.diagonal(dim1=-2, dim2=-1).sum((1, 2))  # of each term; the cost is then energy times slope
        if not (energy > 0).all():
            return None
        g = noise * g if weights is None else noise * g + weights
        return Moments(x / energy[:, None, None, None], g, self.length)


@dataclass
class _Outputs:
    """h of every reader and fold: sums over tokens of |x|^2 times the squared gradients at the linear's outputs."""

    fold: int = 0
    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def watch(self, name: str, x: Tensor, output: Tensor) -> None:
        """Observe a call of a linear."""
        energy = x.detach().flatten(0, -2).float().square().sum(-1)

        def add(gradient: Tensor) -> None:
            new = (energy @ gradient.detach().flatten(0, -2).float().square()).double().cpu()
            key = self.fold, name
            self.sums[key] = self.sums[key] + new if key in self.sums else new

        output.register_hook(add)


def collect_moments(
    model: Any,
    plan: Plan,
    sites: Sequence[Site],
    scheme: Scheme,
    tokens: Tensor,
    *,
    generator: torch.Generator,
    checkpointing: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[Moments]]]:
    """The moments of sites, by space: for each fold, those of every site of the space.

    Args:
        model: a causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: its plan.
        sites: from `sites_of`.
        scheme: what is quantized; if weights are, their rounding adds to the moments of gradients.
        tokens: calibration tokens, int64 (samples, length), at least two samples.
        generator: of the sampled labels.
        checkpointing: gradient checkpointing of the decoder blocks.
        progress: called with (samples done, samples in all).

    Returns:
        Moments by space; none of a space where a fold saw no gradient.

    Raises:
        LearningError: a gradient is not finite.
    """
    sums, outputs = [_Sums(site) for site in sites], _Outputs()
    by_name: dict[str, list[_Sums]] = {}
    for one in sums:
        by_name.setdefault(one.site.name, []).append(one)
    readers = {name for site in sites for name in site.readers} if scheme.weights is not None else set()

    def watch(name: str, x: Tensor) -> None:
        held, seen = by_name.get(name, ()), x.detach()
        if held:
            x.register_hook(lambda gradient: [one.add(outputs.fold, seen, gradient) for one in held] and None)

    def both(attention: str, keys: Tensor, values: Tensor) -> None:
        watch(f"{attention}.keys", keys)
        watch(f"{attention}.values", values)

    def observe(attachment: Attachment) -> None:
        for name, site in attachment.inputs.items():
            site.watch = partial(watch, name)
        for name, site in attachment.keys_values.items():
            site.watch = partial(both, name)

    def next_fold(done: int, total: int) -> None:
        outputs.fold = done % FOLDS
        if progress:
            progress(done, total)

    how: dict[str, Any] = {"generator": generator, "checkpointing": checkpointing, "progress": next_fold}
    with watching_calls(model, readers, outputs.watch):
        backward_own_predictions(model, plan, scheme, tokens, observe, **how)
    found: dict[str, list[list[Moments]]] = {}
    missing: set[str] = set()
    for one in sums:
        noise = relative_error(one.length, one.site.quantizer) if one.length else 0.0
        folds = found.setdefault(one.site.space.name, [[] for _ in range(FOLDS)])
        for fold in range(FOLDS):
            moments = one.moments(fold, noise, _of_weights(model, plan, one.site, outputs, fold, scheme.weights))
            if moments is None:
                missing.add(one.site.space.name)
            else:
                folds[fold].append(moments)
    return {space: folds for space, folds in found.items() if space not in missing}


@lru_cache
def relative_error(length: int, quantizer: Quantizer) -> float:
    """Expected squared error of rounding a row of Gaussian numbers, relative to its squared length.

    With clip "mse", at the best clip ratio.
    """
    length = min(length, 1 << 14)
    rows = torch.randn(_DRAWN, length, generator=torch.Generator().manual_seed(0))

    def error(ratio: float) -> float:
        rounded = fake_quantize(rows, replace(quantizer, clip=ratio, static=False, peak=None))
        return float((rounded - rows).square().sum() / rows.square().sum())

    return error(best_ratio(error)) if quantizer.clip == "mse" else error(float(quantizer.clip))


def _of_weights(
    model: Any, plan: Plan, site: Site, outputs: _Outputs, fold: int, quantizer: Quantizer | None
) -> Tensor | None:
    """W^T diag(h) W of the readers of a site, in blocks like its G, times the relative error of rounding W."""
    space, total = site.space, None
    for name in site.readers:
        h = outputs.sums.get((fold, name))
        if quantizer is None or h is None:
            continue
        w = model.get_submodule(name).weight.detach().double().cpu()
        w = w.T if plan.transposed and name not in plan.heads else w
        if site.before is not None:
            w = site.before.apply(w)
        if space.allows == "diagonal":
            found = (h @ w.square())[None, :, None, None]
        else:
            heads = w.unflatten(-1, (space.heads, -1, space.size))
            found = torch.einsum("o,okhi,okhj->kij", h, heads, heads)[None]
        found = relative_error(w.shape[-1], quantizer) * found
        total = found if total is None else total + found
    return total
