"""Capture what R1 and the scales of norms are learned from: rows x, their gradients g, and rows w of weights.

A quantizer of the residual stream costs 1/2 ||g||^2 ||e||^2 / n for the error e of a row (`sensitivity.py`), and the
linears that read it cost 1/2 h ||e||^2 / n for the error e of a row w of their weights, with h = sum over samples of
||m||^2 and m the gradient of that row, since all tokens of a sample meet the same error. Both are drawn in proportion
to their cost at a relative error of one, and have unit length; the total cost of all rows of a site is stored with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinquant.learning.activations import ActivationSite
from spinquant.learning.closed_form import wide
from spinquant.learning.sensitivity import collect_by_weight
from spinquant.models.capture import watching_calls
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import Weight
from spinquant.rotations.factory import generator_for

WEIGHT_ROWS = 512  # rows drawn from the weights that read a site
HELD_OUT = 8  # one row in this many is not learned from


@dataclass(frozen=True)
class JointSite:
    """Rows that a quantizer of the residual stream reads, and rows of the weights that read what it rounds.

    Attributes:
        site: The rows with their gradients, in the order of the samples that they come from.
        w: Rows of weights of unit length, float32 (rows, width); None if weights are not quantized.
        weight_share: KL per token, in nats, that a relative error of one of these weights would cost, and as much of
            it as the way to round them leaves (`weights_share`).
    """

    site: ActivationSite
    w: Tensor | None = None
    weight_share: float = 0.0

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.site.rows.shape[-1]

    @property
    def learned_from(self) -> int:
        """Number of rows that are learned from; the others measure what was learned."""
        return len(self.site.rows) - len(self.site.rows) // HELD_OUT

    def pair(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Some of the rows and their gradients, of unit length, (rows, width)."""
        assert self.site.slopes is not None
        x, g = (unit(t[chosen]) for t in (self.site.rows, self.site.slopes))
        return x, g


@dataclass
class _OutputGradients:
    """h of every linear: sums over samples of the squared length of the gradient of each row of its weight."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, name: str, x: Tensor, output: Tensor) -> None:
        """Observe a call of a linear."""
        rows = x.detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            slopes = gradient.detach().flatten(0, -2)
            new = wide((slopes.float().T @ rows.float()).square().sum(-1))
            self.sums[name] = self.sums[name] + new if name in self.sums else new

        output.register_hook(add)


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length, (.., width)."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def readers_of(plan: Plan, site: str) -> tuple[str, ...]:
    """The linears that read the activation of a site, by the name of the first; none for stacked experts."""
    return next((group for group in (*plan.linears, plan.heads) if site in group), ())


def collect_jointly(
    model: Any,
    plan: Plan,
    spaces: Sequence[str],
    joint: Sequence[str],
    scheme: Scheme,
    tokens: Tensor,
    *,
    seed: int,
    weights: Quantizer | None,
    share: float = 1.0,
    **how: Any,
) -> tuple[list[ActivationSite], dict[str, list[JointSite]]]:
    """Sample rows of every site in some spaces (`collect_by_weight`), and what is learned together in some of them.

    Args:
        model: A causal language model, not rotated, with its gains fused (`fuse_gains`).
        plan: Where it can be rotated.
        spaces: Names of the spaces whose sites are sampled.
        joint: Those of them whose rotation is learned together with scales.
        scheme: What is quantized during learning.
        tokens: Calibration tokens, int64 (samples, length).
        seed: Of the rows of weights.
        weights: How the weights are quantized that read the residual stream; None if they are not.
        share: Part of the error of rounded weights that counts (`weights_share`). Default: all of it.
        how: Rows, generator and other options of `collect_by_weight`.

    Returns:
        All sites, and by space those to learn from jointly.
    """
    outputs = _OutputGradients()
    read = {space.name for space in plan.spaces if space.name in joint}
    groups = (*plan.linears, *([plan.heads] if scheme.lm_head and plan.heads else []))
    readers = [n for group in groups for n in group if (s := plan.read_by(group[0])) is not None and s.name in read]
    with watching_calls(model, readers if weights is not None else (), outputs.watch):
        sites = collect_by_weight(model, plan, spaces, scheme, tokens, slopes=joint, **how)
    found: dict[str, list[JointSite]] = {space: [] for space in joint}
    for site in sites:
        if site.slopes is not None:
            w, cost = None, 0.0
            if weights is not None:
                w, cost = _weight_rows(model, plan, site, outputs, tokens.numel(), seed)
                cost *= share
            found[site.space].append(JointSite(site, w, cost))
    return sites, found


def _weight_rows(
    model: Any, plan: Plan, site: ActivationSite, outputs: _OutputGradients, tokens: int, seed: int
) -> tuple[Tensor, float]:
    """Rows of the weights that read a site, drawn by cost, and the cost of a relative error of one of all rows."""
    stacked = next((experts for experts in plan.experts if experts.first[0] == site.name), None)
    if stacked is not None:
        parts = [Weight(name, stacked.transposed).matrices(model) for name in stacked.first]
    else:
        names = readers_of(plan, site.name)
        flipped = plan.transposed and site.name not in plan.heads
        parts = [w.T if flipped else w for w in (model.get_submodule(name).weight.detach() for name in names)]
    parts = [part.reshape(-1, part.shape[-1]) for part in parts]
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    squares = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).square().double().cpu() for part in parts]
    known = [outputs.sums.get(name) for name in readers_of(plan, site.name)]
    heard = [h.cpu() for h in known if h is not None]
    if len(heard) == len(parts):
        costs = torch.cat([h * square for h, square in zip(heard, squares, strict=True)])
        share = 0.5 * float(costs.sum()) / parts[0].shape[-1] / tokens
    else:  # of stacked experts: gradients at the outputs of rows are taken as equal and independent, g = sum of h w
        costs, share = torch.cat(squares), site.share
    generator = generator_for(seed, f"weights of {site.name}")
    if not costs.sum() > 0:
        costs, share = torch.ones_like(costs), 0.0
    # multinomial takes up to 2^24 numbers; this takes any number of them.
    places = torch.rand(WEIGHT_ROWS, generator=generator, dtype=torch.float64) * costs.sum()
    chosen = torch.searchsorted(costs.cumsum(0), places).clamp(max=len(costs) - 1)
    rows, first = [], 0
    for part in parts:
        inside = chosen[(chosen >= first) & (chosen < first + len(part))] - first
        rows.append(part[inside.to(part.device)].float().cpu())
        first += len(part)
    return unit(torch.cat(rows)), share
