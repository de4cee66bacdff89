"""Moments of what quantizers read, and of the gradients there: one pass forward and back, for closed-form transforms.

A space gets the moments of every quantizer that reads it: the inputs of linears, and the keys and values of a KV cache.
Its kind decides what of the moments counts: the diagonal for a space of channel scales, a block for each head of values
and keys. Memory is that of these blocks, whatever the number of tokens. Samples are divided into two folds, by turns,
so that damping can be chosen on those that a transform was not made from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import Moments, second_moments, weighted_sum, wide
from spinquant.learning.sensitivity import backward_own_predictions
from spinquant.models.capture import watching_calls
from spinquant.models.modules import named_tensor
from spinquant.online.attachment import Attachment
from spinquant.plan import Plan, Space
from spinquant.quantization.clip_search import best_ratio
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import compose

FOLDS = 2
WEIGHTS = 0.5  # part of the error of rounded weights that counts: GPTQ compensates for some
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
    """The moments of one site, by fold.

    drift: of a cache, sum of g^T g by head, which the rounding of the weights that write it meets.
    """

    site: Site
    folds: list[Moments | None] = field(default_factory=lambda: [None] * FOLDS)
    drift: list[Tensor | None] = field(default_factory=lambda: [None] * FOLDS)

    def add(self, fold: int, x: Tensor, gradient: Tensor) -> None:
        """Add rows, (.., width) or, of a cache, (batch, heads, tokens, size), and their gradients."""
        rows, slopes = (arranged(self.site, t) for t in (x, gradient))
        noise = relative_error(x.shape[-1], self.site.quantizer)
        new = second_moments(rows, slopes, x.shape[-1], noise)
        before = self.folds[fold]
        self.folds[fold] = new if before is None else before + new
        if self.site.cached:
            columns = slopes.permute(1, 2, 3, 0, 4).flatten(1, 3)  # (heads, tokens, size)
            plain, held = wide(columns.mT @ columns), self.drift[fold]
            self.drift[fold] = plain if held is None else held + plain

    def check_finite(self) -> None:
        """Raise LearningError if a sum is not finite."""
        for moments in self.folds:
            if moments is not None and not (traces(moments.x).sum() + traces(moments.g).sum()).isfinite():
                raise LearningError(
                    f"the gradient at {self.site.name} is not finite: the model's weights are damaged, or their dtype "
                    "overflows"
                )

    def found(self) -> tuple[list[Moments | None], list[Tensor | None]]:
        """The sums by fold, on the CPU."""
        folds = [moments and replace(moments, x=moments.x.cpu(), g=moments.g.cpu()) for moments in self.folds]
        return folds, [None if drift is None else drift.cpu() for drift in self.drift]


@dataclass
class OutputGradients:
    """h of every reader and fold: sums over tokens of |x|^2 times the squared gradients at the linear's outputs."""

    fold: int = 0
    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def watch(self, name: str, x: Tensor, output: Tensor) -> None:
        """Observe a call of a linear."""
        energy = x.detach().flatten(0, -2).float().square().sum(-1)

        def add(gradient: Tensor) -> None:
            new = wide(energy @ gradient.detach().flatten(0, -2).float().square())
            key = self.fold, name
            self.sums[key] = self.sums[key] + new if key in self.sums else new

        output.register_hook(add)


class MomentSums:
    """Sums of the moments of sites, while a model runs forward and back.

    Args:
        sites: from `sites_of`.
        scheme: what is quantized; if weights are, their rounding adds to the moments of gradients.
    """

    def __init__(self, sites: Sequence[Site], scheme: Scheme):
        self.sites, self._weights = sites, scheme.weights
        self._sums, self._outputs = [_Sums(site) for site in sites], OutputGradients()
        self._by_name: dict[str, list[_Sums]] = {}
        for one in self._sums:
            self._by_name.setdefault(one.site.name, []).append(one)
        # Linears whose output gradients are observed (`watching_calls`).
        self.readers = {name for site in sites for name in site.readers} if self._weights is not None else set()
        self.watch_call = self._outputs.watch

    def next_sample(self, number: int) -> None:
        """Count what is observed from now on in the fold of sample `number`.

        Raises LearningError if a sum is not finite.
        """
        self._outputs.fold = number % FOLDS
        for one in self._sums:
            one.check_finite()

    def observe(self, attachment: Attachment) -> None:
        """Set the observers of the sites in an attachment."""
        for name, site in attachment.inputs.items():
            site.watch = partial(self._watch, name)
        for name, site in attachment.keys_values.items():
            site.watch = partial(self._watch_cache, name)

    def _watch(self, name: str, x: Tensor) -> None:
        held, seen, outputs = self._by_name.get(name, ()), x.detach(), self._outputs
        if held:
            x.register_hook(lambda gradient: [one.add(outputs.fold, seen, gradient) for one in held] and None)

    def _watch_cache(self, attention: str, keys: Tensor, values: Tensor) -> None:
        self._watch(f"{attention}.keys", keys)
        self._watch(f"{attention}.values", values)

    def found(self, model: Any, plan: Plan) -> dict[str, list[list[Moments]]]:
        """The moments of each site's space, by space: for each fold, those of every site; see `collect_moments`.

        model: with the weights that read and write the spaces of the sites.
        """
        found: dict[str, list[list[Moments]]] = {}
        missing: set[str] = set()
        weights = self._weights
        for one in self._sums:
            folds = found.setdefault(one.site.space.name, [[] for _ in range(FOLDS)])
            for fold, (moments, drift) in enumerate(zip(*one.found(), strict=True)):
                if moments is None or not (traces(moments.x) > 0).all() or not (traces(moments.g) > 0).all():
                    missing.add(one.site.space.name)
                    continue
                added = None if weights is None else _of_readers(model, plan, one.site, self._outputs, fold, weights)
                folds[fold].append(moments if added is None else replace(moments, g=moments.g + added / moments.noise))
                if weights is not None and drift is not None:
                    folds[fold].extend(of_writers(model, plan, one.site.space, moments, drift, weights))
        return {name: folds for name, folds in found.items() if name not in missing}


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
        LearningError: a gradient is not finite, or memory does not suffice for the backward pass.
    """
    sums = MomentSums(sites, scheme)

    def next_fold(done: int, total: int) -> None:
        sums.next_sample(done)
        if progress:
            progress(done, total)

    how: dict[str, Any] = {"generator": generator, "checkpointing": checkpointing, "progress": next_fold}
    with watching_calls(model, sums.readers, sums.watch_call), _advised():
        backward_own_predictions(model, plan, scheme, tokens, sums.observe, **how)
    return sums.found(model, plan)


def arranged(site: Site, t: Tensor) -> Tensor:
    """What a site reads, or its gradient, as rows, terms, blocks, copies and numbers of `second_moments`."""
    if site.cached:
        return t.float().transpose(1, 2).flatten(0, 1)[:, :, None, None]
    return in_blocks(site, t.flatten(0, -2).float())


def in_blocks(site: Site, rows: Tensor) -> Tensor:
    """Rows of what a site reads, (rows, width), as rows, one term, blocks, copies and numbers of `second_moments`."""
    if site.before is not None:
        rows = site.before.apply(rows)
    if site.space.allows == "diagonal":
        return rows[:, None, :, None, None]
    return rows.unflatten(-1, (site.space.heads, -1, site.space.size))[:, None]


@contextmanager
def _advised() -> Iterator[None]:
    """Within the block, running out of memory is a LearningError that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise LearningError(
            f"the backward pass for the moments of gradients ran out of memory ({str(error).splitlines()[0]}): keep "
            "only the inputs of decoder blocks (--checkpointing), or take moments of weights, which need no backward "
            "pass (--moments weights)"
        ) from error


def traces(moment: Tensor) -> Tensor:
    """Trace of every term, (terms,)."""
    return moment.diagonal(dim1=-2, dim2=-1).sum((1, 2))


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


def _of_readers(
    model: Any, plan: Plan, site: Site, outputs: OutputGradients, fold: int, quantizer: Quantizer
) -> Tensor | None:
    """W^T diag(h) W of the readers of a site, in blocks like its G, times the relative error of rounding W."""
    total = None
    for name in site.readers:
        h = outputs.sums.get((fold, name))
        if h is None:
            continue
        w = model.get_submodule(name).weight.detach().float()  # on its device
        w = w.T if plan.transposed and name not in plan.heads else w
        rows = in_blocks(site, w)
        found = weighted_sum(rows, h.to(w.device, w.dtype)[:, None])
        found = WEIGHTS * relative_error(w.shape[-1], quantizer) * found.cpu().double()
        total = found if total is None else total + found
    return total


def of_writers(
    model: Any, plan: Plan, space: Space, cached: Moments, drift: Tensor, quantizer: Quantizer
) -> Iterator[Moments]:
    """The moments of rounding the weights that write a space: T mixes their rows, each of which has its own scale."""
    for axis in plan.axes:
        if axis.space != space.name or axis.reads:
            continue
        w = named_tensor(model, axis.tensor).detach().float()
        if w.ndim != 2:
            continue
        rows = w.movedim(axis.dim, 0)
        if axis.span is not None:
            rows = rows.unflatten(0, (-1, axis.span.period))[:, axis.span.start : axis.span.start + axis.span.length]
            rows = rows.flatten(0, 1)
        heads = rows.unflatten(0, (space.heads, -1))
        # The mean square of a value, by head: what its row's relative error is of.
        mean = traces(cached.x) / drift.diagonal(dim1=-2, dim2=-1).sum(-1)
        g = mean[:, None, None] * drift
        noise = WEIGHTS * relative_error(rows.shape[-1], quantizer)
        yield Moments((heads @ heads.mT).cpu().double()[:, None], g[:, None], cached.length, noise)
