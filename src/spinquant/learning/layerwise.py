"""Local (layer-wise) learning of rotations on captured activations, without running the network.

The loss is an objective of `objectives.py` on the input rows of each quantizer, weighted row by row and averaged over
quantizers. It is minimized by one of three solvers:

    cayley       gradient descent on the orthogonal group (`cayley.py`)
    qr           R = qr(Z) with the signs of the triangular factor's diagonal moved into Q, Z by plain SGD (DartQuant)
    procrustes   iterate R <- the orthogonal matrix nearest to the sum of x^T Q(x R) (DFRot). For fixed codes that is
                 the best rotation, and rounding again is no worse. Its objective is always the rounding error itself
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.learning.activations import WEIGHTINGS, ActivationSite, Weighting, transformed
from spinquant.learning.cayley import OPTIMIZERS, Descent, Optimizer
from spinquant.learning.objectives import OBJECTIVES, Objective, row_loss
from spinquant.learning.option_checks import check_choices, check_numbers, check_unused
from spinquant.quantization.integer import fake_quantize
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Orthogonal, Transform, matrix, nearest_orthogonal

Solver = Literal["cayley", "qr", "procrustes"]
SOLVERS = get_args(Solver)


@dataclass(frozen=True)
class LocalOptions:
    """Options of local learning: rotations that minimize an objective on captured activations.

    With objective `error`, solver `cayley` and weighting `fisher`, R1 is learned together with the scales of norms.

    Attributes:
        objective: `error` (rounding error, the default), `whip` (DartQuant, arXiv 2511.04063) or `kurtosis` (KurTail).
        solver: `cayley` (the default), `qr` (DartQuant) or `procrustes` (DFRot).
        steps: Number of steps per rotation. Default: 400.
        lr: For cayley the length of a step, ||A||; for qr the learning rate of SGD (momentum 0.9, losses divided by
            the first). Both decay along half a cosine. Default: 0.5.
        optimizer: Of cayley: `adam` (the default) or `sgd`.
        rows: Rows sampled for every quantizer. Default: 1024.
        batch: Rows of every quantizer in a step; procrustes uses all rows. Default: 32.
        weighting: How rows are sampled. `fisher` (the default): with probability proportional to their estimated cost
            in KL (`sensitivity.py`), which takes a forward and backward pass through the whole model. The others need
            one decoder block at a time and sample uniformly: `uniform` weighs all rows the same, and `massive` weighs
            rows with a massive activation `factor` times.
        factor: Weight of rows with a massive activation; only with weighting `massive`.
        checkpointing: Gradient checkpointing of the decoder blocks; only with weighting `fisher`. Default: False.
        save_every: Steps between two saves of the state. Default: 25.

    Raises:
        LearningError: An option has an invalid value, or has no effect with the solver or the weighting.

    Example:
        >>> import spinquant
        >>> spinquant.LocalOptions(solver="procrustes", steps=20).rows
        1024
    """

    objective: Objective = "error"
    solver: Solver = "cayley"
    steps: int = 400
    lr: float = 0.5
    optimizer: Optimizer = "adam"
    rows: int = 1024
    batch: int = 32
    weighting: Weighting = "fisher"
    factor: float = 1.0
    checkpointing: bool = False
    save_every: int = 25

    def __post_init__(self):
        known = {"objective": OBJECTIVES, "solver": SOLVERS, "weighting": WEIGHTINGS, "optimizer": OPTIMIZERS}
        check_choices(self, known)
        check_numbers(self, counts=("steps", "rows", "batch", "save_every"), positive=("lr", "factor"))
        if (self.weighting == "massive") != (self.factor != 1.0):
            raise LearningError(
                f"weighting {self.weighting} with factor {self.factor}: weighting massive needs a factor other than 1 "
                "(--massive), and the other weightings take none"
            )
        if self.weighting != "fisher" and self.checkpointing:
            raise LearningError(
                f"weighting {self.weighting} computes no gradients, so checkpointing has no effect: leave it out"
            )
        unused = {"qr": ("optimizer",), "procrustes": ("objective", "lr", "optimizer", "batch")}.get(self.solver, ())
        check_unused(self, unused, f"solver {self.solver}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


Report = Callable[[str, int, float], None]


def learn_locally(
    sites: Sequence[ActivationSite],
    rotations: Mapping[str, Transform],
    options: LocalOptions,
    *,
    centred: Collection[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    pieces: Pieces | None = None,
    report: Report | None = None,
) -> tuple[dict[str, Transform], dict[str, list[float]]]:
    """Learn the rotations of the sites' spaces on their captured rows.

    Args:
        sites: Captured rows and their quantizers.
        rotations: Initial rotations by space.
        options: Options of local learning.
        centred: Spaces whose rotation has to preserve the mean (under a LayerNorm).
        seed: Of the batches.
        device: Where to compute.
        pieces: Where the optimizer state of each space is saved, and resumed from. Default: not saved.
        report: Called with (space, step, loss) after every step.

    Returns:
        The learned rotations, and the losses of all steps, by space.

    Raises:
        LearningError: A loss is not finite, or the solver cannot preserve the mean where that is needed.
    """
    learned: dict[str, Transform] = {}
    curves: dict[str, list[float]] = {}
    for space in dict.fromkeys(site.space for site in sites):
        if space in centred and options.solver != "cayley":
            raise LearningError(f"the rotation of {space} must preserve the mean, which only solver cayley supports")
        start = matrix(rotations[space], torch.float32).to(device)
        solver = _SOLVERS[options.solver](start, options, space in centred)
        own = [site for site in sites if site.space == space]
        curves[space] = _minimize(solver, space, own, options, seed, pieces, report)
        learned[space] = Orthogonal(nearest_orthogonal(solver.rotation().double().cpu()))
    return learned, curves


def _minimize(
    solver: Any,
    space: str,
    sites: Sequence[ActivationSite],
    options: LocalOptions,
    seed: int,
    pieces: Pieces | None,
    report: Report | None,
) -> list[float]:
    """Run a solver on the sites of one space, or resume it; returns the losses of all steps."""
    weights = {site.name: site.weights(options.weighting, options.factor) for site in sites}
    mean = sum(site.share for site in sites) / len(sites)
    sites = [replace(site, share=site.share / mean) for site in sites]

    def one_step(number: int) -> float:
        return solver.step(sites, weights, number, generator_for(seed, f"{space}/{number}"))

    to_space = None if report is None else partial(report, space)
    return all_steps(solver, one_step, options, pieces, f"local-{space}", to_space)


def all_steps(
    state: Any,
    one_step: Callable[[int], float],
    options: LocalOptions,
    pieces: Pieces | None,
    piece: str,
    report: Callable[[int, float], None] | None,
) -> list[float]:
    """Make all steps of a descent, or those that an interrupted run had left; returns the losses of all.

    Args:
        state: What descends, with `tensors` and `restore`.
        one_step: Makes the step of a number, counted from zero, and returns its loss.
        options: Steps, and steps between saves.
        pieces: Where the state is saved. None: nowhere.
        piece: Name of the saved state: what learns, "-" and the space.
        report: Called with (step, loss) after every step.

    Raises:
        LearningError: A loss is not finite.
    """
    losses: list[float] = []
    if pieces and (saved := pieces.load(piece)) is not None:
        losses = saved[1]["losses"]
        state.restore(saved[0], len(losses))
    for step in range(len(losses), options.steps):
        loss = one_step(step)
        if not math.isfinite(loss):
            raise LearningError(
                f"the loss of {piece.partition('-')[2]} is {loss}: its activations are not finite, or the steps are "
                "too long. Lower the learning rate"
            )
        losses.append(float(f"{loss:.6g}"))
        if pieces and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            pieces.save(piece, state.tensors(), {"losses": losses})
        if report:
            report(step + 1, loss)
    return losses


@torch.no_grad()
def rounding_errors(sites: Sequence[ActivationSite], rotations: Mapping[str, Transform]) -> dict[str, float]:
    """Relative rounding error ||Q(x R) - x R||^2 / ||x R||^2 of every site, by name, with the scheme's own quantizer.

    rotations: may have scales of norms, which follow R.
    """
    errors = {}
    for site in sites:
        z = transformed(site, rotations)
        errors[site.name] = float((fake_quantize(z, site.quantizer) - z).square().sum() / z.square().sum())
    return errors


def _rotated(x: Tensor, r: Tensor) -> Tensor:
    """Rows x, (rows, width), rotated by r, (n, n), in blocks of n."""
    return (x.unflatten(-1, (-1, len(r))) @ r).flatten(-2)


def _loss(
    sites: Sequence[ActivationSite],
    r: Tensor,
    options: LocalOptions,
    generator: torch.Generator,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """Mean over sites, weighted by their shares, of the weighted mean of the objective over a batch of rows."""
    total = torch.zeros((), dtype=r.dtype, device=r.device)
    for site in sites:
        chosen = torch.randperm(len(site.rows), generator=generator)[: options.batch]
        x, w = site.rows[chosen].to(r.device), weights[site.name][chosen].to(r.device)
        losses = row_loss(_rotated(x, r), site.quantizer, options.objective)
        total = total + site.share * (losses * w).sum() / w.sum()
    return total / len(sites)


class _Cayley:
    """Solver `cayley`: gradient descent on the orthogonal group."""

    def __init__(self, start: Tensor, options: LocalOptions, centred: bool):
        self.options = options
        self.descent = Descent({"r": start.clone()}, options.optimizer, centred=frozenset("r" if centred else ""))
        self.tensors, self.restore = self.descent.tensors, self.descent.restore

    def rotation(self) -> Tensor:
        return self.descent.matrices["r"]

    def step(
        self, sites: Sequence[ActivationSite], weights: Mapping[str, Tensor], number: int, generator: torch.Generator
    ) -> float:
        r = self.rotation()
        leaf = r.clone().requires_grad_()
        loss = _loss(sites, leaf, self.options, generator, weights)
        (gradient,) = torch.autograd.grad(loss, leaf)
        # R becomes R (I - A), so the loss changes by <A, -R^T dL/dR>.
        self.descent.step({"r": -r.T @ gradient}, self.options.lr * cosine(number, self.options.steps))
        return float(loss.detach())


class _QR:
    """Solver `qr`: SGD with momentum on Z, with R = qr(Z)."""

    def __init__(self, start: Tensor, options: LocalOptions, centred: bool):
        self.options = options
        self.z, self.velocity = start.clone(), torch.zeros_like(start)
        self.first = torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        return {"z": self.z, "velocity": self.velocity, "first": self.first}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.z, self.velocity = (tensors[name].to(self.z.device) for name in ("z", "velocity"))
        self.first = tensors["first"]

    def rotation(self, z: Tensor | None = None) -> Tensor:
        q, triangle = torch.linalg.qr(self.z if z is None else z)
        return q * triangle.diagonal().sign()

    def step(
        self, sites: Sequence[ActivationSite], weights: Mapping[str, Tensor], number: int, generator: torch.Generator
    ) -> float:
        z = self.z.clone().requires_grad_()
        loss = _loss(sites, self.rotation(z), self.options, generator, weights)
        if number == 0:
            self.first = loss.detach().cpu()
        (gradient,) = torch.autograd.grad(loss / self.first.to(loss.device), z)
        self.velocity.mul_(0.9).add_(gradient)
        self.z.sub_(self.velocity, alpha=self.options.lr * cosine(number, self.options.steps))
        return float(loss.detach())


class _Procrustes:
    """Solver `procrustes`: alternate between rounding and the best rotation for the codes."""

    def __init__(self, start: Tensor, options: LocalOptions, centred: bool):
        self.r = start.clone()

    def tensors(self) -> dict[str, Tensor]:
        return {"r": self.r}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.r = tensors["r"].to(self.r.device)

    def rotation(self) -> Tensor:
        return self.r

    @torch.no_grad()
    def step(
        self, sites: Sequence[ActivationSite], weights: Mapping[str, Tensor], number: int, generator: torch.Generator
    ) -> float:
        r, product, total = self.r, torch.zeros_like(self.r), 0.0
        for site in sites:
            x = site.rows.to(r.device)
            z = _rotated(x, r)
            rounded = fake_quantize(z, site.quantizer)
            share = site.share * weights[site.name].to(r.device) / weights[site.name].sum()
            w = (share / x.square().sum(-1).clamp(min=1e-30)).unsqueeze(-1)
            product += (x * w).reshape(-1, len(r)).T @ rounded.reshape(-1, len(r))
            total += float(((rounded - z).square() * w).sum())
        self.r = nearest_orthogonal(product)
        return total / len(sites)


def cosine(step: int, steps: int) -> float:
    """Cosine decay: from one at step 0 to zero at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# Made from the initial rotation, the options, and whether the mean has to be preserved.
_SOLVERS: dict[str, Callable[[Tensor, LocalOptions, bool], Any]] = {
    "cayley": _Cayley,
    "qr": _QR,
    "procrustes": _Procrustes,
}
