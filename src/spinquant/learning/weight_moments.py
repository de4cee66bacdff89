"""Moments without a backward pass: weights' second moments in the place of those of gradients (WUSH, arXiv 2512.00956).

An error e at the input of a linear changes its output by e W^T. Where nothing is known of what follows, all outputs
matter alike, and the expected cost of rounding rows x T is proportional to

    sum over rows of |x T|^2 |W T^-T|^2        X = |W|^2 sum x^T x,  G = sum |x|^2 W^T W

which is the form of `closed_form.py` with the rows of W as gradients. All linears that read the activation count. An
error of a key meets the queries of its heads, so G has their second moment; an error of a value meets the weights of
o_proj, as if every token were attended to once. That is coarser than gradients: it does not know which tokens and which
linears matter. It takes forward passes alone.

Rounding the weights that read x T has the same X and G, so it adds to the relative error where x is rounded too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.closed_form import Moments, weighted_sum, wide
from spinquant.learning.moments import FOLDS, Site, arranged, in_blocks, traces
from spinquant.learning.rounded_weights import of_writer, rows_of
from spinquant.models.capture import device_of, watching_calls
from spinquant.models.modules import named_tensor
from spinquant.online.hooks import attach
from spinquant.online.queries import watch_queries
from spinquant.plan import Plan
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.scheme import Quantizer, Scheme


@dataclass
class _Sums:
    """Sums of one site by fold: x^T x, (terms, blocks, n, n), and of a cache's keys q^T q of their queries.

    energy: |x|^2 of the inputs of a linear that writes the space.
    """

    site: Site
    x: list[Tensor | None] = field(default_factory=lambda: [None] * FOLDS)
    queries: list[Tensor | None] = field(default_factory=lambda: [None] * FOLDS)
    energy: list[float] = field(default_factory=lambda: [0.0] * FOLDS)
    length: int = 0

    def add(self, fold: int, x: Tensor) -> None:
        """Add rows, (.., width) or, of a cache, (batch, heads, tokens, size)."""
        if self.site.written is not None:
            self.energy[fold] += float(x.detach().float().square().sum(dtype=torch.float64))
            return
        _accumulate(self.x, fold, arranged(self.site, x.detach()))
        self.length = x.shape[-1]

    def add_queries(self, fold: int, q: Tensor) -> None:
        """Add queries, (batch, heads, tokens, size), to those that meet the same keys."""
        known = self.x[fold]
        assert known is not None, "keys are stored before queries meet them"
        groups = q.detach().float().transpose(1, 2).flatten(0, 1).unflatten(1, (len(known), -1))
        _accumulate(self.queries, fold, groups[:, :, None])


def _accumulate(sums: list[Tensor | None], fold: int, rows: Tensor) -> None:
    new, before = wide(weighted_sum(rows, rows.new_ones(rows.shape[:2]))), sums[fold]
    sums[fold] = new if before is None else before + new


@torch.no_grad()
def collect_weight_moments(
    model: Any,
    plan: Plan,
    sites: Sequence[Site],
    scheme: Scheme,
    tokens: Tensor,
    *,
    share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[Moments]]]:
    """The moments of sites, by space, like those of `collect_moments`, from forward passes.

    Args:
        model: a causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: its plan.
        sites: from `sites_of`.
        scheme: what is quantized.
        tokens: calibration tokens, int64 (samples, length), at least two samples.
        share: part of the error of rounded weights that counts (`weights_share`). Default: all of it.
        progress: called with (samples done, samples in all).

    Returns:
        Moments by space; none of a space that a fold reads nothing of.

    Raises:
        LearningError: an activation is not finite.
    """
    sums, fold = [_Sums(site) for site in sites], 0
    by_name: dict[str, list[_Sums]] = {}
    called: dict[str, list[_Sums]] = {}
    for one in sums:
        (called if one.site.quantizer is None else by_name).setdefault(one.site.name, []).append(one)

    def watch(name: str, x: Tensor) -> None:
        for one in by_name.get(name, ()):
            one.add(fold, x)

    def watch_call(name: str, x: Tensor, output: Tensor) -> None:
        for one in called[name]:
            one.add(fold, x)

    def both(attention: str, keys: Tensor, values: Tensor) -> None:
        watch(f"{attention}.keys", keys)
        watch(f"{attention}.values", values)

    def queries(attention: str, q: Tensor) -> None:
        for one in by_name[f"{attention}.keys"]:
            one.add_queries(fold, q)

    with (
        attach(model, plan, {}, scheme, around=True) as attachment,
        attachment.exact(),
        watching_calls(model, called, watch_call),
    ):
        for name, site in attachment.inputs.items():
            site.watch = partial(watch, name)
        for name, site in attachment.keys_values.items():
            site.watch = partial(both, name)
        keyed = [name for name in attachment.keys_values if f"{name}.keys" in by_name]
        watch_queries(model, attachment, {name: partial(queries, name) for name in keyed})
        for done, row in enumerate(tokens.split(1)):
            fold = done % FOLDS
            model(input_ids=row.to(device_of(model)), use_cache=False)
            if progress:
                progress(done + 1, len(tokens))
    found: dict[str, list[list[Moments]]] = {}
    missing: set[str] = set()
    for one in sums:
        folds = found.setdefault(one.site.space.name, [[] for _ in range(FOLDS)])
        for number in range(FOLDS):
            moments = _moments(model, plan, one, number, scheme.weights, share)
            if moments is None:
                missing.add(one.site.space.name)
            else:
                folds[number].append(moments)
    return {name: folds for name, folds in found.items() if name not in missing}


def _moments(model: Any, plan: Plan, sums: _Sums, fold: int, weights: Quantizer | None, share: float) -> Moments | None:
    """The moments of one site and fold; None if there are none."""
    site = sums.site
    reading = sums.queries[fold] if site.name.endswith(".keys") and site.cached else _of_readers(model, plan, site)
    if reading is None or not (traces(reading) > 0).all():
        return None
    reading = reading.cpu()
    if site.written is not None:
        assert weights is not None
        d = _finite(site, torch.tensor(sums.energy[fold])) * reading
        w = rows_of(model.get_submodule(site.name).weight, transposed=plan.transposed)
        found = of_writer(w, site.space, site.written, d)
        return replace(found, noise=share * relative_error(found.length, weights)) if (traces(d) > 0).all() else None
    x = sums.x[fold]
    if x is None or not (traces(_finite(site, x)) > 0).all():
        return None
    x = x.cpu()
    whole, other = (traces(t)[:, None, None, None] for t in (x, reading))
    noise = 0.0 if site.quantizer is None else relative_error(sums.length, site.quantizer)
    if weights is not None and not site.cached:
        noise += share * relative_error(sums.length, weights)
    return Moments(other * x, whole * reading, sums.length, noise)


def _finite(site: Site, total: Tensor) -> Tensor:
    """The sum; LearningError if it is not finite."""
    if not total.isfinite().all():
        raise LearningError(
            f"the activation at {site.name} is not finite: the model's weights are damaged, or their dtype overflows"
        )
    return total


def _of_readers(model: Any, plan: Plan, site: Site) -> Tensor | None:
    """Sum of W^T W over the weights that read a site, shaped like its X; of values, those that read their attention."""
    space, values = site.space, site.cached or site.written is not None
    if values:
        group = next((group for group in plan.linears if space in plan.spaces_read_by(group[0])), ())
        inside = replace(site, readers=group, cached=False, written=None)
    else:
        inside = site
    total = None
    for rows in _weights_of(model, plan, inside):
        blocks = in_blocks(inside, rows.detach().float())
        new = wide(weighted_sum(blocks, blocks.new_ones(blocks.shape[:2])))
        total = new if total is None else total + new.to(total.device)
    # Every head of values is a term of one block.
    return total if total is None or not values else total.transpose(0, 1)


def _weights_of(model: Any, plan: Plan, site: Site) -> list[Tensor]:
    """The weights that read a site, (outputs, width); those of stacked experts one below the other."""
    if site.readers:
        found = [(name, model.get_submodule(name).weight) for name in site.readers]
        return [w.T if plan.transposed and name not in plan.heads else w for name, w in found]
    experts = [one for one in plan.experts if site.name in (*one.first, *one.second)]
    found = []
    for one in experts:
        for tensor in one.first if site.name in one.first else one.second:
            w = named_tensor(model, tensor)
            found.append((w.mT if one.transposed else w).flatten(0, -2))
    return found
