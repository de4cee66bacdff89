"""End-to-end learning of rotations through the quantized network: Cayley SGD or Adam (SpinQuant, arXiv 2405.16406).

The model's weights are frozen and not rotated (`fake_quant.py`); gradients reach the rotations by the straight-through
estimator. The loss is the expected cost of rounding (`quantization/rotated_rounding.py`), KL to the 16-bit model on its
most likely tokens, or next-token cross-entropy. The step length decays. Scales of norms that R1 starts with are learned
together with it, by Adam on their logarithms. The samples of each step depend on the seed alone, so that a run can
resume at any step. Under torch.distributed the samples of a step are divided among the processes and gradients are
averaged: several processes make the same steps as one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.evaluation.metrics import wide
from spinquant.learning.cayley import OPTIMIZERS, Descent, Optimizer
from spinquant.learning.fake_quant import checkpointed, learning_scheme, rounding
from spinquant.learning.free_transforms import kind_of
from spinquant.learning.layerwise import cosine
from spinquant.learning.option_checks import check_choices, check_numbers, check_unused
from spinquant.learning.scale_descent import JointDescent, ScaleDescent
from spinquant.learning.sensitivity import sampled_nll
from spinquant.models.capture import device_of
from spinquant.online.attachment import Attachment
from spinquant.plan import Plan
from spinquant.quantization.moving import Moving, MovingScales, Tally, leaf_of
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import ORTHOGONAL, Transform, matrix, off_orthogonal
from spinquant.rotations.transforms import Diagonal, compose

Loss = Literal["fisher", "kl", "cross-entropy"]
Schedule = Literal["cosine", "linear", "constant"]
LOSSES, SCHEDULES = get_args(Loss), get_args(Schedule)
FROM_RANDOM, FROM_LOCAL = 0.5, 0.15  # default step lengths, from random and from locally learned rotations
STATE = "end-to-end"  # name of the saved optimizer state (`Pieces`)


@dataclass(frozen=True)
class EndToEndOptions:
    """Options of end-to-end learning: rotations that minimize a loss of the quantized network.

    Attributes:
        loss: `fisher` (the default): the KL that rounding errors of random direction cost to second order, with
            gradients through quantization ranges alone. `kl` to the 16-bit model, or next-token `cross-entropy`: the
            loss of the network itself, with the paper's gradients and, if `range_gradient`, those through ranges.
        steps: Number of steps. Default: 100.
        batch: Samples of a step, over all processes. Default: 4.
        micro_batch: Samples of one forward and backward pass. Default: all samples that a process has of a step.
        lr: Length of the first step, ||A||. Default: 0.5, or 0.15 after local learning or from learned rotations.
        schedule: Decay of the step length: `cosine` (the default), `linear` or `constant`.
        optimizer: `adam` (the default) or `sgd`.
        momentum: Of sgd, in [0, 1). Default: 0.
        top_tokens: Most likely tokens of the 16-bit model over which `kl` is computed. Default: 256.
        range_gradient: Add the gradients through quantization ranges to those of `kl` and `cross-entropy`. Default:
            True.
        weights: Quantize weights too, again at every step. Default: False.
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
        check_choices(self, {"loss": LOSSES, "schedule": SCHEDULES, "optimizer": OPTIMIZERS})
        check_numbers(self, counts=("steps", "batch", "micro_batch", "top_tokens", "save_every"), positive=("lr",))
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise LearningError(
                f"micro_batch is {self.micro_batch}: expected at most the {self.batch} samples of a step "
                "(--micro-batch, --batch)"
            )
        if not 0 <= self.momentum < 1:
            raise LearningError(f"momentum is {self.momentum}: expected a number in [0, 1)")
        unused = {"fisher": ("top_tokens", "range_gradient"), "cross-entropy": ("top_tokens",)}.get(self.loss, ())
        check_unused(self, unused, f"loss {self.loss}")

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
    rotations: Mapping[str, Transform],
    learned: Mapping[str, str],
    scheme: Scheme,
    tokens: Tensor,
    options: EndToEndOptions,
    *,
    keys: Mapping[str, Transform] | None = None,
    seed: int = 0,
    pieces: Pieces | None = None,
    report: Callable[[Step], None] | None = None,
) -> tuple[dict[str, Transform], list[Step]]:
    """Learn rotations through the quantized network.

    Args:
        model: The original model, with its gains fused (`fuse_gains`); its weights are not changed.
        plan: Where it can be rotated.
        rotations: Initial rotations by space, and scales of norms.
        learned: The spaces whose rotation is learned, with a name for it; spaces of one name share one rotation. The
            scales of norms are learned with R1.
        scheme: What is quantized.
        tokens: Training tokens, int64 (samples, length).
        options: Options of end-to-end learning.
        keys: Transforms that come before R3, by space; they are not changed. Default: none.
        seed: Of samples and labels.
        pieces: Where the run is saved, and resumed from. Default: not saved.
        report: Called after every step.

    Returns:
        The rotations and scales by space, learned or as given, and the steps.

    Raises:
        LearningError: The loss is not finite, a rotation is no longer orthogonal, or a batch cannot be divided among
            the processes.
    """
    tally = Tally() if options.loss == "fisher" else None
    moving = _moving(model, rotations, learned, tally, options)
    scaled = _scaled(model, plan, rotations, learned, tally, options)
    used: dict[str, Transform] = {
        space: moving[learned[space]] if space in learned else scaled.get(space, r) for space, r in rotations.items()
    }
    applied = {space: compose(keys[space], r) if keys and space in keys else r for space, r in used.items()}
    centred = frozenset(name for space, name in learned.items() if plan.space[space].centred)
    descent = Descent({name: m.weight for name, m in moving.items()}, options.optimizer, options.momentum, centred)
    both = JointDescent(descent, ScaleDescent({name: m.logs for name, m in scaled.items()}))
    training = _Training(model, moving, scaled, tally, both, tokens, options, seed)
    history: list[Step] = []
    if pieces is not None and (saved := pieces.load(STATE)) is not None:
        history = [Step(**step) for step in saved[1]["history"]]
        both.restore(saved[0], len(history))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with (
            rounding(model, plan, applied, learning_scheme(scheme, weights=options.weights)) as attachment,
            checkpointed(model, plan, options.checkpointing),
        ):
            for number in range(len(history), options.steps):
                history.append(training.step(number, attachment))
                if pieces is not None and ((number + 1) % options.save_every == 0 or number + 1 == options.steps):
                    pieces.save(STATE, both.tensors(), {"history": [asdict(step) for step in history]})
                if report:
                    report(history[-1])
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return {space: r.frozen() if isinstance(r, Moving | MovingScales) else r for space, r in used.items()}, history


def _moving(
    model: Any,
    rotations: Mapping[str, Transform],
    learned: Mapping[str, str],
    tally: Tally | None,
    options: EndToEndOptions,
) -> dict[str, Moving]:
    """The rotations to learn, by name, in float32 or more."""
    dtype, device = torch.promote_types(model.dtype, torch.float32), device_of(model)
    how: dict[str, Any] = {"range_gradient": options.range_gradient, "tally": tally}
    return {name: Moving.starting(matrix(rotations[space], dtype).to(device), **how) for space, name in learned.items()}


def _scaled(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    learned: Mapping[str, str],
    tally: Tally | None,
    options: EndToEndOptions,
) -> dict[str, MovingScales]:
    """The scales of norms, which are learned together with R1, by space; none if R1 is not learned."""
    if "R1" not in learned.values():
        return {}
    dtype, device = torch.promote_types(model.dtype, torch.float32), device_of(model)
    how: dict[str, Any] = {"range_gradient": options.range_gradient, "tally": tally}
    return {
        space: MovingScales.starting(found.scale.abs().flatten().to(device, dtype), **how)
        for space, found in rotations.items()
        if kind_of(plan.space[space]) == "norms" and isinstance(found, Diagonal)
    }


def rows_of(step: int, samples: int, batch: int, seed: int) -> Tensor:
    """Indices of the samples of a step; every epoch is a new permutation of all samples."""
    first, last = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(first // samples, (last - 1) // samples + 1):
        parts.append(torch.randperm(samples, generator=generator_for(seed, f"epoch {epoch}")))
    stream, offset = torch.cat(parts), first // samples * samples
    return stream[first - offset : last - offset]


@dataclass(frozen=True)
class _Training:
    """The steps of one run.

    moving: the rotations that are learned, by name. scaled: the scales, by space. tally: of the expected cost of
    rounding, with loss fisher.
    """

    model: Any
    moving: Mapping[str, Moving]
    scaled: Mapping[str, MovingScales]
    tally: Tally | None
    descent: JointDescent
    tokens: Tensor
    options: EndToEndOptions
    seed: int

    @property
    def leaves(self) -> list[Tensor]:
        """What receives gradients."""
        return [leaf_of(transform) for transform in (*self.moving.values(), *self.scaled.values())]

    def step(self, number: int, attachment: Attachment) -> Step:
        """Make one step, counted from zero. Raises LearningError if a rotation is no longer orthogonal."""
        start = time.perf_counter()
        rows = rows_of(number, len(self.tokens), self.options.batch, self.seed)
        labels = [generator_for(self.seed, f"labels {number}/{place}") for place in range(len(rows))]
        loss = self._backward(self.tokens[rows], labels, attachment)
        gradients = {name: m.skew.grad for name, m in self.moving.items() if m.skew.grad is not None}
        slopes = {name: m.shift.grad for name, m in self.scaled.items() if m.shift.grad is not None}
        self.descent.step(gradients, slopes, self.options.length_of(number))
        for leaf in self.leaves:
            leaf.grad = None
        error = max(off_orthogonal(m.weight) for m in self.moving.values())
        if not error < ORTHOGONAL:
            raise LearningError(f"after step {number + 1} a rotation is not orthogonal: |R^T R - I| is {error:.1e}")
        seconds = time.perf_counter() - start
        return Step(number + 1, loss, error, len(rows) * self.tokens.shape[1] / seconds)

    def _backward(self, rows: Tensor, labels: Sequence[torch.Generator], attachment: Attachment) -> float:
        """Compute the mean loss per token of rows, (batch, length), and accumulate its gradients in the rotations.

        Every process of torch.distributed computes its share of the rows. labels: one generator per row, from which
        its labels are sampled.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(rows) % world:
            raise LearningError(
                f"a batch of {len(rows)} samples cannot be divided among {world} processes: use a multiple (--batch)"
            )
        own, labels = rows[rank::world].to(device_of(self.model)), labels[rank::world]
        total = torch.zeros((), device=own.device, dtype=torch.float64)
        size = self.options.micro_batch or len(own)
        for first, part in zip(range(0, len(own), size), own.split(size), strict=True):
            if self.tally is not None:
                sampled_nll(self.model, part, labels[first : first + size]).backward()
                total += self.tally.take() / rows.numel()
            else:
                loss = _loss(self.model, attachment, part, self.options) * (len(part) / len(rows))
                loss.backward()
                total += loss.detach()
        if self.tally is not None:
            for leaf in self.leaves:
                if leaf.grad is not None:
                    leaf.grad.div_(rows.numel())
        if world > 1:
            dist.all_reduce(total)
            for leaf in self.leaves:
                if leaf.grad is not None:  # of scales that no quantizer reads, in no process
                    dist.all_reduce(leaf.grad)
        if not total.isfinite():
            raise LearningError(
                f"the loss is {float(total)}: the model's weights are damaged, or {self.model.dtype} overflows"
            )
        return float(total)


def _loss(model: Any, attachment: Attachment, rows: Tensor, options: EndToEndOptions) -> Tensor:
    """Mean loss per predicted token of rows, (batch, length): KL to the 16-bit model, or cross-entropy."""
    if options.loss == "cross-entropy":
        logits = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    with torch.no_grad(), attachment.exact():
        exact = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
    top = exact.topk(min(options.top_tokens, exact.shape[-1]), dim=-1)
    target, rest = with_rest(exact, top.indices)
    logits = wide(model(input_ids=rows, use_cache=False).logits[:, :-1])
    found, found_rest = with_rest(logits, top.indices)
    divergence = (target.exp() * (target - found)).sum(-1) + rest.exp() * (rest - found_rest)
    return divergence.mean()


def with_rest(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some tokens, int64 (.., tokens), and that of all other tokens together."""
    everything = logits.logsumexp(-1, keepdim=True)
    found = logits.gather(-1, top) - everything
    rest = torch.log1p(-found.exp().sum(-1).clamp(max=1 - 1e-6))
    return found, rest
