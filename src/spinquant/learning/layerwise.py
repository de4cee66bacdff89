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
from dataclasses import asdict, dataclass
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
from spinquant.quantization.scheme import Quantizer
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


Report = Callable[[str, int, list[float]], None]


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

    Spaces of one size, as the values of all layers, are computed together; each has steps of its own.

    Args:
        sites: Captured rows and their quantizers.
        rotations: Initial rotations by space.
        options: Options of local learning.
        centred: Spaces whose rotation has to preserve the mean (under a LayerNorm).
        seed: Of the batches.
        device: Where to compute.
        pieces: Where the optimizer state is saved, and resumed from. Default: not saved.
        report: Called with (spaces, step, losses) after every step.

    Returns:
        The learned rotations, and the losses of all steps, by space.

    Raises:
        LearningError: A loss is not finite, or the solver cannot preserve the mean where that is needed.
    """
    learned: dict[str, Transform] = {}
    curves: dict[str, list[float]] = {}
    own: dict[str, list[ActivationSite]] = {}
    for site in sites:
        own.setdefault(site.space, []).append(site)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for space, read in own.items():
        if space in centred and options.solver != "cayley":
            raise LearningError(f"the rotation of {space} must preserve the mean, which only solver cayley supports")
        form = [(site.rows.shape[-1], site.quantizer, min(options.batch, len(site.rows))) for site in read]
        alike.setdefault((rotations[space].order, space in centred, *form), []).append(space)
    for spaces in alike.values():
        start = torch.stack([matrix(rotations[space], torch.float32) for space in spaces]).to(device)
        solver = _SOLVERS[options.solver](start, options, spaces[0] in centred)
        rows = _Rows([own[space] for space in spaces], options, device)
        losses = _minimize(solver, spaces, rows, options, seed, pieces, report)
        found = nearest_orthogonal(solver.rotation().double().cpu())
        for number, space in enumerate(spaces):
            learned[space], curves[space] = Orthogonal(found[number]), [loss[number] for loss in losses]
    return {space: learned[space] for space in own}, {space: curves[space] for space in own}


class _Rows:
    """The rows of spaces of one size, by space and site: with their weights, and the shares of sites.

    own: the sites of every space, of the same forms in the same order, with as many rows in a batch.
    """

    def __init__(self, own: Sequence[Sequence[ActivationSite]], options: LocalOptions, device: torch.device | str):
        self.device, first = device, own[0]
        self.quantizers = [site.quantizer for site in first]
        self.rows = [placed([sites[place].rows for sites in own], device) for place in range(len(first))]
        self.weights = [
            [sites[place].weights(options.weighting, options.factor).to(device) for sites in own]
            for place in range(len(first))
        ]
        shares = torch.tensor([[sites[place].share for sites in own] for place in range(len(first))])
        self.shares = (shares / shares.mean(0)).to(device)  # (sites, spaces)

    def drawn(self, batch: int, generator: torch.Generator) -> list[tuple[Quantizer, Tensor, Tensor]]:
        """For every site its quantizer, and of as many rows as a batch has: (spaces, batch, width), their weights."""
        found = []
        for quantizer, rows, weights in zip(self.quantizers, self.rows, self.weights, strict=True):
            chosen = torch.stack([torch.randperm(len(one), generator=generator)[:batch] for one in rows])
            x = taken(rows, chosen, self.device)
            w = torch.stack([one[at] for one, at in zip(weights, chosen.to(self.device), strict=True)])
            found.append((quantizer, x, w))
        return found


def placed(rows: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Rows of several sites on a device, if they take at most a quarter of its free memory; else where they are."""
    device = torch.device(device)
    if device.type == "cpu":
        return list(rows)
    free = torch.get_device_module(device).mem_get_info(device)[0]
    fits = 4 * sum(one.numel() * one.element_size() for one in rows) <= free
    return [one.to(device) for one in rows] if fits else list(rows)


def taken(rows: Sequence[Tensor], chosen: Tensor, device: torch.device | str) -> Tensor:
    """Some rows of every site, (sites, batch, width), on a device. chosen: their numbers, (sites, batch)."""
    at = chosen.to(rows[0].device)
    return torch.stack([one[numbers] for one, numbers in zip(rows, at, strict=True)]).to(device)


def _minimize(
    solver: Any,
    spaces: Sequence[str],
    rows: _Rows,
    options: LocalOptions,
    seed: int,
    pieces: Pieces | None,
    report: Report | None,
) -> list[list[float]]:
    """Run a solver on some spaces, or resume it; returns the losses of all steps, each of every space."""
    label = spaces[0] if len(spaces) == 1 else f"{spaces[0]} to {spaces[-1]}"

    def one_step(number: int) -> list[float]:
        return solver.step(rows, number, generator_for(seed, f"{label}/{number}")).tolist()

    return all_steps(solver, one_step, options, pieces, "layerwise", spaces, report and partial(report, label))


def all_steps(
    state: Any,
    one_step: Callable[[int], list[float]],
    options: LocalOptions,
    pieces: Pieces | None,
    piece: str,
    spaces: Sequence[str],
    report: Callable[[int, list[float]], None] | None,
) -> list[list[float]]:
    """Make all steps of a descent, or those that an interrupted run had left; returns the losses of all.

    Args:
        state: What descends, with `tensors` and `restore`.
        one_step: Makes the step of a number, counted from zero, and returns the loss of every space.
        options: Steps, and steps between saves.
        pieces: Where the state is saved. None: nowhere.
        piece: Name of the saved state, which the first space is added to.
        spaces: What is learned.
        report: Called with (step, losses) after every step.

    Raises:
        LearningError: A loss is not finite.
    """
    losses: list[list[float]] = []
    piece = f"{piece}-{spaces[0]}"
    if pieces and (saved := pieces.load(piece)) is not None:
        losses = saved[1]["losses"]
        state.restore(saved[0], len(losses))
    for step in range(len(losses), options.steps):
        found = one_step(step)
        for space, loss in zip(spaces, found, strict=True):
            if not math.isfinite(loss):
                raise LearningError(
                    f"the loss of {space} is {loss}: its activations are not finite, or the steps are too long. Lower "
                    "the learning rate"
                )
        losses.append([float(f"{loss:.6g}") for loss in found])
        if pieces and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            pieces.save(piece, state.tensors(), {"losses": losses})
        if report:
            report(step + 1, found)
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
    """Rows x, (spaces, rows, width), rotated by r, (spaces, n, n), in blocks of n."""
    return (x.unflatten(-1, (-1, r.shape[-1])) @ r.unsqueeze(1)).flatten(-2)


def _losses(rows: _Rows, r: Tensor, options: LocalOptions, generator: torch.Generator) -> Tensor:
    """Mean over sites, weighted by their shares, of the weighted mean of the objective over a batch, (spaces,)."""
    total = torch.zeros(len(r), dtype=r.dtype, device=r.device)
    for share, (quantizer, x, w) in zip(rows.shares, rows.drawn(options.batch, generator), strict=True):
        losses = row_loss(_rotated(x, r), quantizer, options.objective)
        total = total + share * (losses * w).sum(-1) / w.sum(-1)
    return total / len(rows.shares)


class _Cayley:
    """Solver `cayley`: gradient descent on the orthogonal group."""

    def __init__(self, start: Tensor, options: LocalOptions, centred: bool):
        self.options = options
        self.descent = Descent({"r": start.clone()}, options.optimizer, centred=frozenset("r" if centred else ""))
        self.tensors, self.restore = self.descent.tensors, self.descent.restore

    def rotation(self) -> Tensor:
        return self.descent.matrices["r"]

    def step(self, rows: _Rows, number: int, generator: torch.Generator) -> Tensor:
        r = self.rotation()
        leaf = r.clone().requires_grad_()
        losses = _losses(rows, leaf, self.options, generator)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        # R becomes R (I - A), so the loss changes by <A, -R^T dL/dR>.
        self.descent.step({"r": -r.mT @ gradient}, self.options.lr * cosine(number, self.options.steps))
        return losses.detach()


class _QR:
    """Solver `qr`: SGD with momentum on Z, with R = qr(Z)."""

    def __init__(self, start: Tensor, options: LocalOptions, centred: bool):
        self.options = options
        self.z, self.velocity = start.clone(), torch.zeros_like(start)
        self.first = torch.ones(len(start))

    def tensors(self) -> dict[str, Tensor]:
        return {"z": self.z, "velocity": self.velocity, "first": self.first}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.z, self.velocity = (tensors[name].to(self.z.device) for name in ("z", "velocity"))
        self.first = tensors["first"]

    def rotation(self, z: Tensor | None = None) -> Tensor:
        q, triangle = torch.linalg.qr(self.z if z is None else z)
        return q * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

    def step(self, rows: _Rows, number: int, generator: torch.Generator) -> Tensor:
        z = self.z.clone().requires_grad_()
        losses = _losses(rows, self.rotation(z), self.options, generator)
        if number == 0:
            self.first = losses.detach().cpu()
        (gradient,) = torch.autograd.grad((losses / self.first.to(losses.device)).sum(), z)
        self.velocity.mul_(0.9).add_(gradient)
        self.z.sub_(self.velocity, alpha=self.options.lr * cosine(number, self.options.steps))
        return losses.detach()


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
    def step(self, rows: _Rows, number: int, generator: torch.Generator) -> Tensor:
        product, total, order = torch.zeros_like(self.r), torch.zeros(len(self.r)), self.r.shape[-1]
        for quantizer, held, weights, shares in zip(rows.quantizers, rows.rows, rows.weights, rows.shares, strict=True):
            for space, r in enumerate(self.r):  # all rows count, so that one space fills the processor
                x = held[space].to(r.device)
                z = _rotated(x.unsqueeze(0), r.unsqueeze(0)).squeeze(0)
                rounded = fake_quantize(z, quantizer)
                share = shares[space] * weights[space] / weights[space].sum()
                w = (share / x.square().sum(-1).clamp(min=1e-30)).unsqueeze(-1)
                product[space] += (x * w).reshape(-1, order).T @ rounded.reshape(-1, order)
                total[space] += ((rounded - z).square() * w).sum().cpu()
        self.r = nearest_orthogonal(product)
        return total / len(rows.shares)


def cosine(step: int, steps: int) -> float:
    """Cosine decay: from one at step 0 to zero at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# Made from the initial rotations, (spaces, n, n), the options, and whether the mean has to be preserved.
_SOLVERS: dict[str, Callable[[Tensor, LocalOptions, bool], Any]] = {
    "cayley": _Cayley,
    "qr": _QR,
    "procrustes": _Procrustes,
}
