"""Learn R1 together with the scales of the norms that read the residual stream, on captured rows.

The output x of a norm is rounded as x R D: R is shared by all norms, the diagonal D is the norm's own, and both cost
nothing at run time (D is in the norm's weight, D^-1 in the linears that read it). Rounding with steps in proportion to
the range of a row costs, to second order, at each quantizer

    mean of range(x R D)^2 ||g R D^-1||^2                  rounding activations, with g the gradient at x
    mean of range(w R D^-1)^2 times mean of ||x R D||^2    rounding the weights w that read x

each in proportion to its total weight (`joint_sites.py`), and relative to the true error of its quantizer on Gaussian
rows. R descends by Cayley steps, log D by Adam.

For a given R the best D has a closed form (`closed_form.py`), but it can do little in the coordinates of a random R,
where all channels are alike, and descent from there ends in a poor minimum. So R starts as a block-diagonal Hadamard
matrix over *sorted* channels: those that want like scales, on average over all norms, are mixed with each other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import HadamardOrderError
from spinquant.learning.cayley import Descent
from spinquant.learning.closed_form import DIAGONAL, Moments, chosen_transforms
from spinquant.learning.joint_sites import JointSite, unit
from spinquant.learning.layerwise import LocalOptions, all_steps, cosine, placed, taken
from spinquant.learning.objectives import expected_errors
from spinquant.learning.scale_descent import JointDescent, ScaleDescent, bounded
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.integer import group_of
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.factory import generator_for
from spinquant.rotations.hadamard import construct
from spinquant.rotations.mean_preserving import CentredHadamard
from spinquant.rotations.rotation import Hadamard, matrix

BLOCK = 64  # largest block of the start: of 8 to 576, 64 was the best on SmolLM2
SMALLEST_BLOCK = 8  # a smaller one would flatten too little

Scales = dict[str, Tensor]  # log of the diagonal of D by its space, float32 (width,)


def sorted_start(sites: Sequence[JointSite], size: int, weights: Quantizer | None, *, centred: bool) -> Tensor | None:
    """A block-diagonal Hadamard matrix over channels sorted by the scales that they want, float64 (size, size).

    Args:
        sites: What is learned from.
        size: Of the residual stream.
        weights: How weights are quantized; None if they are not.
        centred: The matrix has to preserve the mean.

    Returns:
        None if no block of 8 to 64 channels has such a matrix.
    """
    block = _block(size, centred)
    if block is None:
        return None
    wanted = closed_form_scales(sites, None, weights)
    pooled = torch.zeros(size, dtype=torch.float64)
    for one in sites:
        if (name := one.site.scales) in wanted:
            cost = sum(_cost_of_rounding(one, weights))
            pooled += cost * wanted[name].double().unflatten(0, (-1, size)).mean(0)
    order = pooled.argsort(stable=True)
    one = matrix(CentredHadamard(block) if centred else Hadamard(block))
    start = torch.zeros(size, size, dtype=torch.float64)
    start[order] = torch.block_diag(*[one] * (size // block))
    return start


def _block(size: int, centred: bool) -> int | None:
    """The largest block of the start: a divisor of the size of which there is a (mean-preserving) Hadamard matrix."""
    for block in range(min(BLOCK, size), SMALLEST_BLOCK - 1, -1):
        # Of the mean-preserving ones, those of orders 4^n are flat.
        if size % block or (centred and block not in (16, 64)):
            continue
        try:
            construct(block)
        except HadamardOrderError:
            continue
        return block
    return None


def closed_form_scales(
    sites: Sequence[JointSite], r: Tensor | None, weights: Quantizer | None, *, device: torch.device | str = "cpu"
) -> Scales:
    """The scales of least expected cost of every norm, in the coordinates of R; None: in the original ones.

    Those that are no better on rows that they were not made from are one.
    """
    folds: dict[str, tuple[list[Moments], list[Moments]]] = {}
    for one in sites:
        if not one.site.scales:
            continue
        x, g = (_rotated(t.to(device), r) for t in one.pair(slice(one.learned_from)))
        w = None if one.w is None else _rotated(one.w.to(device), r)
        middle, costs = len(x) // 2, _cost_of_rounding(one, weights)
        halves = folds.setdefault(one.site.scales, ([], []))
        for number, part in enumerate((slice(0, middle), slice(middle, len(x)))):
            slope = costs[0] * _mean(g[part]) + (0 if w is None else costs[1] * _mean(w[number::2]))
            pair = (t.double().cpu()[None, :, None, None] for t in (_mean(x[part]), slope))
            halves[number].append(Moments(*pair, length=1))
    found: Scales = {}
    for name, parts in folds.items():
        ((p, _, _),) = chosen_transforms([parts], DIAGONAL)
        length = parts[0][0].x.shape[1]
        found[name] = bounded(torch.zeros(length) if p is None else p.flatten().log().float() / 2)
    return found


def _cost_of_rounding(one: JointSite, weights: Quantizer | None) -> tuple[float, float]:
    """KL per token that rounding activations and weights costs at a site, where rows are Gaussian and D is one."""
    act = one.site.share * relative_error(one.width, _best_clip(one.site.quantizer))
    return act, 0.0 if weights is None else one.weight_share * relative_error(one.width, weights)


def _mean(rows: Tensor) -> Tensor:
    """Mean square of every number, (width,)."""
    return rows.square().mean(0)


def _best_clip(quantizer: Quantizer) -> Quantizer:
    """The quantizer with clip ratios searched, as they are for every candidate."""
    return Quantizer(quantizer.bits, quantizer.symmetric, quantizer.group_size, "mse", quantizer.kind)


@lru_cache
def _noise(length: int, quantizer: Quantizer) -> float:
    """Error of the quantizer on Gaussian rows, as a fraction of what `expected_errors` makes of their ranges."""
    rows = torch.randn(64, length, generator=torch.Generator().manual_seed(0))
    ranged = float((expected_errors(rows, quantizer).sum(-1) / rows.square().sum(-1)).mean())
    return relative_error(length, quantizer) / ranged


def _rotated(x: Tensor, r: Tensor | None) -> Tensor:
    """Rows x, (.., width), rotated by r, (n, n), in blocks of n."""
    return x if r is None else (x.unflatten(-1, (-1, len(r))) @ r.to(x.dtype)).flatten(-2)


def expected_costs(
    x: Tensor, g: Tensor, w: Tensor | None, quantizer: Quantizer, weights: Quantizer | None
) -> tuple[Tensor, Tensor]:
    """Expected cost of rounding rows and weights, as fractions of the cost of a relative error of one.

    Args:
        x: Rows of unit length, as they are rounded: rotated and scaled, (.., rows, width).
        g: Their gradients, of unit length, with the dual transform.
        w: Rows of weights of unit length, with the dual transform; None if they are not quantized.
        quantizer: Of the rows.
        weights: Of the weights.

    Returns:
        Both costs, (..).
    """
    width = x.shape[-1]
    best = _best_clip(quantizer)
    slopes = _energies(g, quantizer)
    act = (expected_errors(x, quantizer) * slopes).sum(-1).mean(-1) * (slopes.shape[-1] * _noise(width, best))
    if w is None or weights is None:
        return act, torch.zeros_like(act)
    energy = _energies(x, weights).mean(-2)
    rounding = (expected_errors(w, weights).mean(-2) * energy).sum(-1)
    return act, rounding * (energy.shape[-1] * _noise(width, weights))


def _energies(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Squared length of every group that is rounded with one scale, (.., groups)."""
    return x.unflatten(-1, (-1, group_of(x.shape[-1], quantizer))).square().sum(-1)


@torch.no_grad()
def held_out_costs(
    sites: Sequence[JointSite], r: Tensor, scales: Mapping[str, Tensor], weights: Quantizer | None
) -> dict[str, float]:
    """Expected cost of rounding activations and weights on the rows that are not learned from, in nats per token."""
    total = {"activations": 0.0, "weights": 0.0}
    for one in sites:
        logs = scales.get(one.site.scales)
        d = torch.ones((), device=r.device) if logs is None else logs.to(r.device).exp()
        x, g = (_rotated(t.to(r.device), r) for t in one.pair(slice(one.learned_from, None)))
        w = None if one.w is None else _rotated(one.w.to(r.device), r) / d
        act, rounding = expected_costs(x * d, g / d, w, one.site.quantizer, weights)
        total["activations"] += one.site.share * float(act)
        total["weights"] += one.weight_share * float(rounding)
    return total


def learn_jointly(
    sites: Sequence[JointSite],
    start: Tensor,
    scales: Mapping[str, Tensor],
    weights: Quantizer | None,
    options: LocalOptions,
    *,
    centred: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    pieces: Pieces | None = None,
    space: str = "residual",
    report: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Scales, list[float]]:
    """Learn the rotation of the residual stream and the scales of the norms that read it.

    Args:
        sites: What is learned from.
        start: Initial rotation, (n, n).
        scales: Initial log D by space, (width,).
        weights: How weights are quantized; None if they are not.
        options: Steps, learning rate, optimizer, batch, and steps between saves.
        centred: The rotation has to preserve the mean, as `start` does.
        seed: Of the batches.
        device: Where to compute.
        pieces: Where the state is saved, and resumed from. Default: not saved.
        space: Space of the rotation, by whose name the state is saved.
        report: Called with (step, loss) after every step.

    Returns:
        The rotation, float32 (n, n), log D by space, and the losses of all steps.

    Raises:
        LearningError: A loss is not finite.
    """
    run = _Run(sites, start, scales, weights, options, centred, seed, device)
    to_report = None if report is None else lambda step, losses: report(step, losses[0])
    losses = all_steps(run, lambda number: [run.step(number)], options, pieces, "jointly", [space], to_report)
    return run.rotation.cpu(), run.scales(), [loss for (loss,) in losses]


class _Run:
    """R and all D while they are learned. Sites of one width are computed together."""

    def __init__(
        self,
        sites: Sequence[JointSite],
        start: Tensor,
        scales: Mapping[str, Tensor],
        weights: Quantizer | None,
        options: LocalOptions,
        centred: bool,
        seed: int,
        device: torch.device | str,
    ):
        self.weights, self.options, self.seed, self.device = weights, options, seed, device
        matrices = {"r": start.to(device, torch.float32, copy=True)}
        descent = Descent(matrices, options.optimizer, centred=frozenset("r" if centred else ""))
        names = dict.fromkeys(one.site.scales for one in sites if one.site.scales)
        widths = {one.site.scales: one.width for one in sites}
        logs = {name: bounded(scales.get(name, torch.zeros(widths[name])).float()).to(device) for name in names}
        self.descent = JointDescent(descent, ScaleDescent(logs))
        self.tensors, self.restore = self.descent.tensors, self.descent.restore
        groups: dict[int, list[JointSite]] = {}
        for one in sites:
            groups.setdefault(one.width, []).append(one)
        self.groups = [_Group(group, device) for group in groups.values()]

    @property
    def rotation(self) -> Tensor:
        """R as it is now."""
        return self.descent.rotations.matrices["r"]

    def scales(self) -> Scales:
        """log D as it is now, by space."""
        return {name: logs.cpu().clone() for name, logs in self.descent.scales.logs.items()}

    def step(self, number: int) -> float:
        """Make one step, counted from zero; returns the loss on its rows."""
        generator = generator_for(self.seed, f"joint/{number}")
        r = self.rotation.clone().requires_grad_()
        leaves = {name: logs.clone().requires_grad_() for name, logs in self.descent.scales.logs.items()}
        costs = [self._loss(group, r, leaves, generator) for group in self.groups]
        total = torch.stack(costs).sum()
        gradient, *slopes = torch.autograd.grad(total, [r, *leaves.values()])
        lr = self.options.lr * cosine(number, self.options.steps)
        # R becomes R (I - A), so the loss changes by <A, -R^T dL/dR>.
        self.descent.step({"r": -self.rotation.T @ gradient}, dict(zip(leaves, slopes, strict=True)), lr)
        return float(total.detach())

    def _loss(self, group: "_Group", r: Tensor, logs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """Expected cost on a batch of the rows of sites of one width."""
        x, g, w = group.drawn(self.options.batch, generator)
        turned, slopes = _rotated(x, r), _rotated(g, r)
        none = torch.zeros(x.shape[-1], device=x.device)  # of sites without scales
        d = torch.stack([logs.get(name, none) for name in group.scales]).exp().unsqueeze(1)
        readers = None if w is None else _rotated(w, r) / d
        act, rounding = expected_costs(turned * d, slopes / d, readers, group.quantizer, self.weights)
        return (act * group.shares[:, 0] + rounding * group.shares[:, 1]).sum()


class _Group:
    """Sites of one width, with what is drawn from them on the device if it fits."""

    def __init__(self, sites: Sequence[JointSite], device: torch.device | str):
        self.sites, self.device = sites, device
        self.quantizer, self.scales = sites[0].site.quantizer, [one.site.scales for one in sites]
        self.rows, self.slopes = (
            placed([t for one in sites if (t := getattr(one.site, part)) is not None], device)
            for part in ("rows", "slopes")
        )
        self.weights = placed([one.w for one in sites if one.w is not None], device)
        self.shares = torch.tensor([[one.site.share, one.weight_share] for one in sites], device=device)

    def drawn(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, their gradients and rows of weights of unit length, (sites, rows, width); None without weights."""
        chosen, readers = [], []
        for one in self.sites:
            chosen.append(torch.randint(one.learned_from, (batch,), generator=generator))
            if one.w is not None:
                readers.append(torch.randint(len(one.w), (max(1, batch // 2),), generator=generator))
        x, g = (unit(taken(t, torch.stack(chosen), self.device)) for t in (self.rows, self.slopes))
        return x, g, taken(self.weights, torch.stack(readers), self.device) if readers else None
