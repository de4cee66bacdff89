"""Learn rotations end to end through the quantized network: Cayley SGD or Adam (SpinQuant, arXiv 2405.16406).

The model's weights are frozen and not rotated (`fake_quant.py`); gradients reach the rotations by the straight-through
estimator. The loss is the expected cost of rounding (`quantization/rotated_rounding.py`), KL to the 16-bit model on its
most likely tokens, or next-token cross-entropy. The step length decays; the samples of each step depend on the seed
alone, so that a run can resume at any step. Under torch.distributed every process takes its share of a step's samples
and gradients are averaged: several processes make the same steps as one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinquant.checkpoint.run_directory import Pieces
from spinquant.errors import LearningError
from spinquant.evaluation.metrics import wide
from spinquant.learning.cayley import OPTIMIZERS, Descent, Optimizer, orthogonality_error
from spinquant.learning.fake_quant import checkpointed, learning_scheme, rounding
from spinquant.learning.layerwise import check_numbers, cosine
from spinquant.learning.sensitivity import nll_of_own
from spinquant.models.capture import device_of
from spinquant.online.hooks import Attachment
from spinquant.plan import Plan
from spinquant.quantization.rotated_rounding import Moving, Tally
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Rotation, matrix

Loss = Literal["fisher", "kl", "cross-entropy"]
Schedule = Literal["cosine", "linear", "constant"]
LOSSES, SCHEDULES = get_args(Loss), get_args(Schedule)
FROM_RANDOM, FROM_LOCAL = 0.5, 0.15  # default step lengths, from random and from locally learned rotations
STATE = "end-to-end"  # name of the saved piece that holds the descent
ORTHOGONAL = 1e-5  # tolerance of |R^T R - I| at any step


@dataclass(frozen=True)
class EndToEndOptions:
    """Options of end-to-end learning: rotations that minimize a loss of the quantized network.

    Attributes:
        loss: `fisher` (the default): the KL that rounding errors of random direction cost to second order, with
            gradients through quantization ranges alone. `kl` to the 16-bit model, or next-token `cross-entropy`: the
            loss of the network itself, with the paper's gradients and, if `range_gradient`, those through ranges.
        steps: Number of steps. Default: 100.
        batch: Samples of a step, over all processes. Default: 4.
        micro_batch: Samples of one forward and backward pass. Default: all that a process has of a step.
        lr: Length of the first step, ||A||. Default: 0.5, or 0.15 after local learning or from learned rotations.
        schedule: Decay of the step length: `cosine` (the default), `linear` or `constant`.
        optimizer: `adam` (the default) or `sgd`.
        momentum: Of sgd, in [0, 1). Default: 0.
        top_tokens: Most likely tokens of the 16-bit model over which `kl` is computed. Default: 256.
        range_gradient: Add the gradients through quantization ranges to those of `kl` and `cross-entropy`. Default:
            True.
        weights: Quantize weights too, anew at every step. Default: False.
        checkpointing: Gradient checkpointing of the decoder blocks. Default: False.
        save_every: Steps between two saves of the state. Default: 5.

    Raises:
        LearningError: An option has an invalid value, or has no effect with the loss.

    Example:
        >>> import spinquant
        >>> options = spinquant.EndToEndOptions(loss="kl", steps=10)
        >>> [round(options.length_of(step), 2) for step in (0, 5, 9)]
        [0.5, 0.25, 0.01]
    """

    loss: Loss = "fisher"
    steps: int = 100
    batch: int = 4
    micro_batch: int | None = None
    lr: float | None = None
    schedule: Schedule = "cosine"
    optimizer: Optimizer = "adam"
    momentum: float = 0.0
    top_tokens: int = 256
    range_gradient: bool = True
    weights: bool = False
    checkpointing: bool = False
    save_every: int = 5

    def __post_init__(self):
        for name, value, known in (
            ("loss", self.loss, LOSSES),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise LearningError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
        check_numbers(self, counts=("steps", "batch", "micro_batch", "top_tokens", "save_every"), positive=("lr",))
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise LearningError(
                f"micro_batch is {self.micro_batch}: expected at most the {self.batch} samples of a step "
                "(--micro-batch, --batch)"
            )
        if not 0 <= self.momentum < 1:
            raise LearningError(f"momentum is {self.momentum}: expected a number in [0, 1)")
        unused = {"fisher": ("top_tokens", "range_gradient"), "cross-entropy": ("top_tokens",)}.get(self.loss, ())
        changed = [f.name for f in fields(self) if f.name in unused and getattr(self, f.name) != f.default]
        if changed:
            raise LearningError(f"loss {self.loss} does not use {', '.join(changed)}: leave them out")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)

    def length_of(self, step: int) -> float:
        """Length of a step, by the schedule."""
        ways = {"cosine": cosine(step, self.steps), "linear": 1 - step / self.steps, "constant": 1.0}
        return self.length * ways[self.schedule]

    @property
    def length(self) -> float:
        """Length of the first step."""
        return FROM_RANDOM if self.lr is None else self.lr


@dataclass(frozen=True)
class Step:
    """One step: mean loss per token in nats, largest |R^T R - I|, and tokens per second of all processes."""

    number: int
    loss: float
    orthogonality: float
    tokens_per_second: float


def learn_end_to_end(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    learned: Mapping[str, str],
    scheme: Scheme,
    tokens: Tensor,
    options: EndToEndOptions,
    *,
    seed: int = 0,
    pieces: Pieces | None = None,
    report: Callable[[Step], None] | None = None,
) -> tuple[dict[str, Rotation], list[Step]]:
    """Learn rotations through the quantized network; returns all rotations by space, and the steps.

    Args:
        model: The original model, with its gains fused (`fuse_gains`); its weights are not changed.
        plan: Where it is rotated.
        rotations: Initial rotations by space.
        learned: The spaces whose rotation is learned, with a name for it; spaces of one name share one rotation.
        scheme: What is quantized.
        tokens: Training tokens, int64, (samples, length).
        options: Options.
        seed: Of samples and labels.
        pieces: Where the run is saved, and resumed from.
        report: Called after every step.

    Raises:
        LearningError: The loss is not finite, a rotation is no longer orthogonal, or a batch cannot be divided among
            the processes.
    """
    device = device_of(model)
    wide = torch.promote_types(model.dtype, torch.float32)
    starts = {name: matrix(rotations[space], wide).to(device) for space, name in learned.items()}
    tally = Tally() if options.loss == "fisher" else None
    how: dict[str, Any] = {"range_gradient": options.range_gradient, "tally": tally}
    moving = {name: Moving.starting(start, **how) for name, start in starts.items()}
    used: dict[str, Rotation] = {
        space: moving[learned[space]] if space in learned else r for space, r in rotations.items()
    }
    centred = frozenset(name for space, name in learned.items() if plan.space[space].centred)
    descent = Descent({name: m.weight for name, m in moving.items()}, options.optimizer, options.momentum, centred)
    history: list[Step] = []
    if pieces is not None and (kept := pieces.load(STATE)) is not None:
        history = [Step(**step) for step in kept[1]["history"]]
        descent.restore(kept[0], len(history))
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with (
            rounding(model, plan, used, learning_scheme(scheme, weights=options.weights)) as attachment,
            checkpointed(model, plan, options.checkpointing),
        ):
            for number in range(len(history), options.steps):
                start = time.perf_counter()
                rows = _rows_of(number, len(tokens), options.batch, seed)
                labels = [generator_for(seed, f"labels {number}/{place}") for place in range(len(rows))]
                loss = _gradients(model, attachment, moving, tokens[rows], options, tally, labels)
                gradients = {name: m.skew.grad for name, m in moving.items()}
                descent.step({n: g for n, g in gradients.items() if g is not None}, options.length_of(number))
                for m in moving.values():
                    m.skew.grad = None
                error = max(orthogonality_error(m.weight) for m in moving.values())
                if not error < ORTHOGONAL:
                    raise LearningError(
                        f"after step {number + 1} a rotation is not orthogonal: |R^T R - I| is {error:.1e}"
                    )
                seconds = time.perf_counter() - start
                history.append(Step(number + 1, loss, error, len(rows) * tokens.shape[1] / seconds))
                if pieces is not None and ((number + 1) % options.save_every == 0 or number + 1 == options.steps):
                    pieces.save(STATE, descent.tensors(), {"history": [asdict(step) for step in history]})
                if report:
                    report(history[-1])
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    return {
        space: moving[learned[space]].frozen() if space in learned else r for space, r in rotations.items()
    }, history


def _rows_of(step: int, samples: int, batch: int, seed: int) -> Tensor:
    """Indices of the samples of a step; every epoch is a new permutation of all samples."""
    first, last = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(first // samples, (last - 1) // samples + 1):
        parts.append(torch.randperm(samples, generator=generator_for(seed, f"epoch {epoch}")))
    stream, offset = torch.cat(parts), first // samples * samples
    return stream[first - offset : last - offset]


def _gradients(
    model: Any,
    attachment: Attachment,
    moving: Mapping[str, Moving],
    rows: Tensor,
    options: EndToEndOptions,
    tally: Tally | None,
    labels: Sequence[torch.Generator],
) -> float:
    """Compute the mean loss of all rows, and leave its gradients with the rotations.

    labels: one generator per row, from which its labels are drawn.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if len(rows) % world:
        raise LearningError(
            f"a batch of {len(rows)} samples cannot be divided among {world} processes: use a multiple (--batch)"
        )
    own, labels = rows[rank::world].to(device_of(model)), labels[rank::world]
    total = torch.zeros((), device=own.device, dtype=torch.float64)
    size = options.micro_batch or len(own)
    for first, part in zip(range(0, len(own), size), own.split(size), strict=True):
        if tally is not None:
            nll_of_own(model, part, labels[first : first + size]).backward()
            total += tally.take() / rows.numel()
        else:
            loss = _loss(model, attachment, part, options) * (len(part) / len(rows))
            loss.backward()
            total += loss.detach()
    if tally is not None:
        for m in moving.values():
            if m.skew.grad is not None:
                m.skew.grad.div_(rows.numel())
    if world > 1:
        dist.all_reduce(total)
        for m in moving.values():
            dist.all_reduce(m.skew.grad)
    if not total.isfinite():
        raise LearningError(f"the loss is {float(total)}: the model's weights are damaged, or {model.dtype} overflows")
    return float(total)


def _loss(model: Any, attachment: Attachment, rows: Tensor, options: EndToEndOptions) -> Tensor:
    """Mean loss over the predicted tokens of some rows."""
    if options.loss == "cross-entropy":
        logits = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    with torch.no_grad(), attachment.exact():
        exact = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
    top = exact.topk(min(options.top_tokens, exact.shape[-1]), dim=-1)
    target, rest = _with_rest(exact, top)
    logits = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
    found, found_rest = _with_rest(logits, top)
    divergence = (target.exp() * (target - found)).sum(-1) + rest.exp() * (rest - found_rest)
    return divergence.mean()


def _with_rest(logits: Tensor, top: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the top tokens, and of all other tokens together."""
    everything = logits.logsumexp(-1, keepdim=True)
    found = logits.gather(-1, top.indices) - everything
    rest = torch.log1p(-found.exp().sum(-1).clamp(max=1 - 1e-6))
    return found, rest
