"""Learning on captured activations: no network is run, a rotation sees the rows that its quantizers will see.

The loss is the objective of `objectives.py`, weighted row by row and averaged over sites. It is made small by one of

    cayley       descent on the group itself (`cayley.py`)
    qr           R = qr(Z) with the signs of the triangular factor's diagonal moved into Q, Z by plain SGD (DartQuant)
    procrustes   R <- the orthogonal matrix nearest to sum of x^T Q(x R), again and again (DFRot): for a fixed rounding
                 that is the best rotation there is, and the next rounding is no worse; its objective is always the
                 rounding error itself
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spinquant.errors import LearningError
from spinquant.learning.cayley import Descent, Optimizer
from spinquant.learning.objectives import OBJECTIVES, Objective, row_loss
from spinquant.learning.samples import WEIGHTINGS, Site, Weighting
from spinquant.quantization.integer import fake_quantize
from spinquant.rotation import Orthogonal, Rotation, matrix

Solver = Literal["cayley", "qr", "procrustes"]
SOLVERS = get_args(Solver)


@dataclass(frozen=True)
class LocalOptions:
    """How rotations are learned on captured activations.

    rows: sampled of every site. batch: rows of every site in one step. lr: for cayley the length of a step, for qr the
    rate of SGD (momentum 0.9). weighting: "massive" counts rows with a massive activation `factor` times.
    """

    objective: Objective = "error"
    solver: Solver = "cayley"
    steps: int = 200
    lr: float = 0.5
    optimizer: Optimizer = "adam"
    rows: int = 512
    batch: int = 128
    weighting: Weighting = "uniform"
    factor: float = 1.0

    def __post_init__(self):
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("solver", self.solver, SOLVERS),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise LearningError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
        if self.steps < 1 or self.rows < 1 or self.batch < 1 or not self.lr > 0 or not self.factor > 0:
            raise LearningError("steps, rows, batch, lr and factor must be positive")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Report = Callable[[str, int, float], None]


def learn_locally(
    sites: Sequence[Site],
    rotations: Mapping[str, Rotation],
    options: LocalOptions,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> dict[str, Rotation]:
    """Learned rotations of the sites' spaces, starting from `rotations`, by space.

    `report(space, step, loss)` follows the descent. Raises LearningError when a loss is not finite.
    """
    learned: dict[str, Rotation] = {}
    for space in dict.fromkeys(site.space for site in sites):
        own = [site for site in sites if site.space == space]
        start = matrix(rotations[space], torch.float32).to(device)
        r = _SOLVE[options.solver](own, start, options, generator, space, report)
        u, _, v = torch.linalg.svd(r.double().cpu())
        learned[space] = Orthogonal(u @ v)
    return learned


@torch.no_grad()
def rounding_errors(sites: Sequence[Site], rotations: Mapping[str, Rotation]) -> dict[str, float]:
    """||Q(x R) - x R||^2 / ||x||^2 of every site, by name: what the scheme's rounding really costs there."""
    errors = {}
    for site in sites:
        z = rotations[site.space].apply(site.rows)
        errors[site.name] = float((fake_quantize(z, site.quantizer) - z).square().sum() / z.square().sum())
    return errors


def _rotated(x: Tensor, r: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, len(r))) @ r).flatten(-2)


def _loss(
    sites: Sequence[Site], r: Tensor, options: LocalOptions, generator: torch.Generator, weights: Mapping[str, Tensor]
) -> Tensor:
    """Mean over sites of the weighted mean over a batch of rows."""
    total = torch.zeros((), dtype=r.dtype, device=r.device)
    for site in sites:
        chosen = torch.randperm(len(site.rows), generator=generator)[: options.batch]
        x, w = site.rows[chosen].to(r.device), weights[site.name][chosen].to(r.device)
        total = total + (row_loss(_rotated(x, r), site.quantizer, options.objective) * w).sum() / w.sum()
    loss = total / len(sites)
    if not loss.isfinite():
        raise LearningError(
            f"the loss of {sites[0].space} is not finite: its activations are, so the step was too long. Lower the "
            "learning rate"
        )
    return loss


def _weights(sites: Sequence[Site], options: LocalOptions) -> dict[str, Tensor]:
    return {site.name: site.weights(options.weighting, options.factor) for site in sites}


def _by_cayley(
    sites: Sequence[Site],
    r: Tensor,
    options: LocalOptions,
    generator: torch.Generator,
    space: str,
    report: Report | None,
) -> Tensor:
    weights, descent = _weights(sites, options), Descent({space: r.clone()}, options.optimizer)
    moving = descent.matrices[space]
    for step in range(options.steps):
        leaf = moving.clone().requires_grad_()
        loss = _loss(sites, leaf, options, generator, weights)
        (gradient,) = torch.autograd.grad(loss, leaf)
        # R moves to R (I - A): the loss by <A, -R^T dL/dR>.
        descent.step({space: -moving.T @ gradient}, options.lr * cosine(step, options.steps))
        if report:
            report(space, step + 1, float(loss.detach()))
    return moving


def _by_qr(
    sites: Sequence[Site],
    r: Tensor,
    options: LocalOptions,
    generator: torch.Generator,
    space: str,
    report: Report | None,
) -> Tensor:
    weights = _weights(sites, options)
    z = r.clone().requires_grad_()
    optimizer = torch.optim.SGD([z], lr=options.lr, momentum=0.9)
    first = 1.0

    def orthogonal() -> Tensor:
        q, triangle = torch.linalg.qr(z)
        return q * triangle.diagonal().sign()

    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine(step, options.steps)
        optimizer.zero_grad()
        loss = _loss(sites, orthogonal(), options, generator, weights)
        first = float(loss.detach()) if step == 0 else first
        (loss / first).backward()  # so that a rate means the same for every objective and scheme
        optimizer.step()
        if report:
            report(space, step + 1, float(loss.detach()))
    return orthogonal().detach()


@torch.no_grad()
def _by_procrustes(
    sites: Sequence[Site],
    r: Tensor,
    options: LocalOptions,
    generator: torch.Generator,
    space: str,
    report: Report | None,
) -> Tensor:
    weights = _weights(sites, options)
    for step in range(options.steps):
        product, total = torch.zeros_like(r), 0.0
        for site in sites:
            x = site.rows.to(r.device)
            z = _rotated(x, r)
            rounded = fake_quantize(z, site.quantizer)
            w = (weights[site.name].to(r.device) / x.square().sum(-1).clamp(min=1e-30)).unsqueeze(-1)
            product += (x * w).reshape(-1, len(r)).T @ rounded.reshape(-1, len(r)) / weights[site.name].sum()
            total += float(((rounded - z).square() * w).sum() / weights[site.name].sum())
        u, _, v = torch.linalg.svd(product)
        r = u @ v
        if report:
            report(space, step + 1, total / len(sites))
    return r


def cosine(step: int, steps: int) -> float:
    """From one to nearly zero along half a cosine."""
    return 0.5 * (1 + cos(pi * step / steps))


_SOLVE: dict[str, Callable[..., Tensor]] = {"cayley": _by_cayley, "qr": _by_qr, "procrustes": _by_procrustes}
