"""Moments of what is rounded, and of the gradients there: one pass forward and back, for closed-form transforms.

A space gets the moments of every quantizer that reads it: the inputs of linears, and the keys and values of a KV cache.
The rounding of weights that read or write the space has moments of its own (`rounded_weights.py`).
Its kind decides what of the moments counts: the diagonal for a space of channel scales, a block for each head of values
and keys. Memory is that of these blocks, whatever the number of tokens. Samples are divided into two folds, by turns,
so that damping can be chosen on those that a transform was not made from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import Moments, second_moments, weighted_sum, wide
from spinquant.learning.rounded_weights import by_head, of_writer, outer, rows_of, weight_gradient, writers_of
from spinquant.learning.sensitivity import backward_own_predictions
from spinquant.models.capture import watching_calls
from spinquant.online.attachment import Attachment
from spinquant.plan import Axis, Plan, Space
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import compose

FOLDS = 2


@dataclass(frozen=True)
class Site:
    """Where something of a space is rounded: what a quantizer reads of it, or weights that read or write it.

    Attributes:
        name: the linear or the tensor of stacked experts that reads or writes it, or `ATTENTION.keys` or
            `ATTENTION.values`.
        space: the space.
        quantizer: how the activation is quantized; None where weights alone are.
        cached: whether it is in a KV cache, where every head is rounded by itself.
        readers: the linears that read the activation, whose weights are quantized too.
        before: a transform that the activation has before that of the space (R1, for the output of a norm).
        written: the axis of its outputs, for a linear whose quantized weights write the space.
    """

    name: str
    space: Space
    quantizer: Quantizer | None
    cached: bool = False
    readers: tuple[str, ...] = ()
    before: Transform | None = None
    written: Axis | None = None


def sites_of(plan: Plan, spaces: Sequence[str], scheme: Scheme, rotations: Mapping[str, Transform]) -> list[Site]:
    """Where some spaces of channel scales, values, or keys (R3) are rounded.

    scheme: what is quantized, weights too.
    """
    found = []
    groups = (*plan.linears, *([plan.heads] if scheme.lm_head and plan.heads else []))
    reading = [(group[0], group, plan.spaces_read_by(group[0])) for group in groups]
    reading += [(experts.first[0], (), plan.read_by_experts(experts)[0]) for experts in plan.experts]
    for name, group, read in reading:
        # The outputs of stacked experts have no gradients that could be observed, so their weights alone are no site.
        if scheme.activations is None and (scheme.weights is None or set(group) <= set(plan.uncalled)):
            continue
        for i, space in enumerate(read):
            if space.name in spaces:
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
    if scheme.weights is not None:
        # Channel scales change no relative error of the rows that write them.
        for space in (one for one in plan.spaces if one.name in spaces and one.allows == "any"):
            writers = writers_of(plan, space).items()
            found += [Site(name, space, None, written=axis) for name, axis in writers if name not in plan.uncalled]
    return found


@dataclass
class _Sums:
    """The sums of one site, by fold.

    folds: moments of the activation. x: X of the weights that read it (`rounded_weights.py`). h: by linear, |M_j|^2 of
    every row. d: D of weights that write.
    """

    site: Site
    folds: dict[int, Moments] = field(default_factory=dict)
    x: dict[int, Tensor] = field(default_factory=dict)
    h: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    d: dict[int, Tensor] = field(default_factory=dict)

    def add(self, fold: int, x: Tensor, gradient: Tensor) -> None:
        """Add rows, (.., width) or, of a cache, (batch, heads, tokens, size), and their gradients."""
        assert self.site.quantizer is not None
        rows, slopes = (arranged(self.site, t) for t in (x, gradient))
        noise = relative_error(x.shape[-1], self.site.quantizer)
        _accumulate(self.folds, fold, second_moments(rows, slopes, x.shape[-1], noise))

    def add_weight(self, fold: int, name: str, m: Tensor, w: Tensor) -> None:
        """Add a linear that reads or writes the space: its M and its rows, (outputs, inputs)."""
        if self.site.written is not None:
            _accumulate(self.d, fold, outer(by_head(self.site.space, self.site.written, m)))
            return
        _accumulate(self.x, fold, wide(weighted_sum(in_blocks(self.site, m), w.square().sum(-1, keepdim=True))))
        _accumulate(self.h, (fold, name), wide(m.square().sum(-1)))

    def check_finite(self) -> None:
        """Raise LearningError if a sum is not finite."""
        sums = [traces(m.x).sum() + traces(m.g).sum() for m in self.folds.values()]
        sums += [total.sum() for held in (self.x, self.h, self.d) for total in held.values()]
        if not all(total.isfinite() for total in sums):
            raise LearningError(
                f"the gradient at {self.site.name} is not finite: the model's weights are damaged, or their dtype "
                "overflows"
            )


def _accumulate(sums: dict[Any, Any], key: Any, new: Any) -> None:
    sums[key] = sums[key] + new if key in sums else new


class MomentSums:
    """Sums of the moments of sites, while a model runs forward and back.

    Args:
        model: with the weights that read and write the spaces of the sites.
        plan: its plan.
        sites: from `sites_of`.
        scheme: what is quantized.
        share: part of the error of rounded weights that counts (`weights_share`).
    """

    def __init__(self, model: Any, plan: Plan, sites: Sequence[Site], scheme: Scheme, share: float = 1.0):
        self.model, self.plan, self.sites, self._weights, self._share = model, plan, sites, scheme.weights, share
        self._sums, self._fold = [_Sums(site) for site in sites], 0
        self._read: dict[str, list[_Sums]] = {}  # activations, by the name of their site
        self._called: dict[str, list[_Sums]] = {}  # weights, by the name of their linear
        for one in self._sums:
            if one.site.quantizer is not None:
                self._read.setdefault(one.site.name, []).append(one)
            linears = one.site.readers if one.site.written is None else (one.site.name,)
            for name in linears if self._weights is not None else ():
                self._called.setdefault(name, []).append(one)

    @property
    def linears(self) -> list[str]:
        """The linears whose calls are observed (`watching_calls`)."""
        return list(self._called)

    def watch_call(self, name: str, x: Tensor, output: Tensor) -> None:
        """Observe a call of a linear."""
        x = x.detach()

        def add(gradient: Tensor) -> None:
            m, w = weight_gradient(x, gradient), self._rows(name)
            for one in self._called[name]:
                one.add_weight(self._fold, name, m, w)

        output.register_hook(add)

    def next_sample(self, number: int) -> None:
        """Count what is observed from now on in the fold of sample `number`.

        Raises LearningError if a sum is not finite.
        """
        self._fold = number % FOLDS
        for one in self._sums:
            one.check_finite()

    def observe(self, attachment: Attachment) -> None:
        """Set the observers of the sites in an attachment."""
        for name, site in attachment.inputs.items():
            site.watch = partial(self._watch, name)
        for name, site in attachment.keys_values.items():
            site.watch = partial(self._watch_cache, name)

    def _watch(self, name: str, x: Tensor) -> None:
        held, seen = self._read.get(name, ()), x.detach()
        if held:
            x.register_hook(lambda gradient: [one.add(self._fold, seen, gradient) for one in held] and None)

    def _watch_cache(self, attention: str, keys: Tensor, values: Tensor) -> None:
        self._watch(f"{attention}.keys", keys)
        self._watch(f"{attention}.values", values)

    def _rows(self, linear: str) -> Tensor:
        transposed = self.plan.transposed and linear not in self.plan.heads
        return rows_of(self.model.get_submodule(linear).weight, transposed=transposed)

    def found(self) -> dict[str, list[list[Moments]]]:
        """The moments of each site's space, by space: for each fold, those of every site; see `collect_moments`."""
        found: dict[str, list[list[Moments]]] = {}
        missing: set[str] = set()
        for one in self._sums:
            folds = found.setdefault(one.site.space.name, [[] for _ in range(FOLDS)])
            for fold in range(FOLDS):
                parts = [*self._of_activation(one, fold), *self._of_weights(one, fold)]
                folds[fold].extend(parts)
                unseen = not parts or (one.site.quantizer is not None and fold not in one.folds)
                if unseen or not all((traces(m.x) > 0).all() and (traces(m.g) > 0).all() for m in parts):
                    missing.add(one.site.space.name)
        return {name: folds for name, folds in found.items() if name not in missing}

    def _of_activation(self, sums: _Sums, fold: int) -> list[Moments]:
        moments = sums.folds.get(fold)
        return [] if moments is None else [replace(moments, x=moments.x.cpu(), g=moments.g.cpu())]

    def _of_weights(self, sums: _Sums, fold: int) -> list[Moments]:
        """The moments of rounding the weights that read or write what a site has."""
        site = sums.site
        if self._weights is None or not (fold in sums.x or fold in sums.d):
            return []
        if site.written is not None:
            found = of_writer(self._rows(site.name), site.space, site.written, sums.d[fold])
        else:
            g = 0.0
            for name in site.readers:
                if (h := sums.h.get((fold, name))) is not None:
                    w = self._rows(name)
                    g = g + weighted_sum(in_blocks(site, w), h.to(w.device, w.dtype)[:, None]).cpu().double()
            assert isinstance(g, Tensor)
            found = Moments(sums.x[fold].cpu(), g, w.shape[-1])
        return [replace(found, noise=self._share * relative_error(found.length, self._weights))]


def collect_moments(
    model: Any,
    plan: Plan,
    sites: Sequence[Site],
    scheme: Scheme,
    tokens: Tensor,
    *,
    generator: torch.Generator,
    share: float = 1.0,
    checkpointing: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[Moments]]]:
    """The moments of sites, by space: for each fold, those of every site of the space.

    Args:
        model: a causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: its plan.
        sites: from `sites_of`.
        scheme: what is quantized.
        tokens: calibration tokens, int64 (samples, length), at least two samples.
        generator: of the sampled labels.
        share: part of the error of rounded weights that counts (`weights_share`). Default: all of it.
        checkpointing: gradient checkpointing of the decoder blocks.
        progress: called with (samples done, samples in all).

    Returns:
        Moments by space; none of a space where a fold saw no gradient.

    Raises:
        LearningError: a gradient is not finite, or memory does not suffice for the backward pass.
    """
    sums = MomentSums(model, plan, sites, scheme, share)

    def next_fold(done: int, total: int) -> None:
        sums.next_sample(done)
        if progress:
            progress(done, total)

    how: dict[str, Any] = {"generator": generator, "checkpointing": checkpointing, "progress": next_fold}
    with watching_calls(model, sums.linears, sums.watch_call), _advised():
        backward_own_predictions(model, plan, scheme, tokens, sums.observe, **how)
    return sums.found()


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
            "fewer activations (--checkpointing), or take moments of weights, which need no backward pass (--moments "
            "weights)"
        ) from error


def traces(moment: Tensor) -> Tensor:
    """Trace of every term, (terms,)."""
    return moment.diagonal(dim1=-2, dim2=-1).sum((1, 2))
