"""Tune a quantized model towards the 16-bit one: Adam on what is continuous, KL of the predictions as the loss.

    1  Before the model is changed: its most likely tokens, with their probabilities, on the calibration tokens and on
       windows that nothing is calibrated on (`predictions`).
    2  After it is rotated and quantized: KL on the held-out windows; some steps of Adam on weight scales, norms, biases
       and clip ratios (`continuous.py`), with gradients straight through the quantizers; KL again.
    3  Where KL is not lower, everything is written back as it was, bit for bit.

The codes of the weights stay, so the result takes no more memory and no more time than without tuning. KL is that over
the most likely tokens of the 16-bit model and all others as one. Memory beside the model: 8 bytes per token and likely
token for the predictions, the packed weights, the gradient of one weight, and the activations of one sample (with
gradient checkpointing, the inputs of the decoder blocks and the activations of one).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.compute.values import check_seed
from spinquant.errors import CalibrationError, LearningError
from spinquant.evaluation.metrics import wide
from spinquant.learning.continuous import Kind, Movable, movables, tuned_clips
from spinquant.learning.end_to_end import rows_of, with_rest
from spinquant.learning.fake_quant import checkpointed
from spinquant.learning.layerwise import cosine
from spinquant.learning.option_checks import check_numbers
from spinquant.models.capture import device_of
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotations.rotation import Rotation

STATE = "tuning"  # name of the saved state (`Pieces`)
BETAS = (0.9, 0.99)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # state of Adam
WARM_UP = 5  # first steps, whose length grows to the full one


@dataclass(frozen=True)
class TuneOptions:
    """Options of tuning: how long, and how it is judged.

    Attributes:
        steps: Number of steps. Default: 100.
        batch: Samples of a step. They are computed one by one. Default: 1.
        lr: Largest relative change of a number in one step. Default: 0.002.
        windows: Held-out windows: the last ones of the calibration tokens, which are then not calibrated on, nor is the
            one before them. Default: 8.
        top_tokens: Most likely tokens of the 16-bit model over which KL is computed. Default: 256.
        checkpointing: Gradient checkpointing of the decoder blocks: less memory, a third more time. Default: False.
        seed: Of the order of samples. Default: 0.
        save_every: Steps between two saves of the state. Default: 5.

    Raises:
        LearningError: An option has an invalid value.

    Example:
        >>> import spinquant
        >>> spinquant.TuneOptions(steps=50).windows
        8
    """

    steps: int = 100
    batch: int = 1
    lr: float = 0.002
    windows: int = 8
    top_tokens: int = 256
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 5

    def __post_init__(self):
        check_numbers(self, counts=("steps", "batch", "windows", "top_tokens", "save_every"), positive=("lr",))
        check_seed(self.seed, LearningError)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Predictions:
    """What the 16-bit model predicts on windows of tokens.

    Attributes:
        windows: Int64, (windows, length).
        values: Log-probabilities of the most likely tokens, float32 (windows, length - 1, top).
        tokens: These tokens, int32, like `values`.
    """

    windows: Tensor
    values: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Tuned:
    """Clip ratios after tuning, and the record of it: KL before and after, whether it was kept, and the losses."""

    clips: Clips
    record: Mapping[str, Any]


def split_held_out(tokens: Tensor, options: TuneOptions | None) -> tuple[Tensor, Tensor]:
    """Calibration tokens, and the held-out windows at their end; the one between them is dropped.

    Without tuning none are held out. Raises CalibrationError if nothing would be left to calibrate on.
    """
    if options is None:
        return tokens, tokens[:0]
    if len(tokens) < options.windows + 2:
        raise CalibrationError(
            f"there are {len(tokens)} calibration samples: too few to tune on some and to judge it by "
            f"{options.windows} others, with one between them. Give at least {options.windows + 2} (--samples, or a "
            "longer text), or fewer windows"
        )
    return tokens[: -options.windows - 1], tokens[-options.windows :]


@torch.no_grad()
def predictions(
    model: Any, windows: Tensor, options: TuneOptions, *, progress: Callable[[int, int], None] | None = None
) -> Predictions:
    """The most likely tokens of a model that is not quantized yet, on windows of tokens, int64 (windows, length).

    progress: called with (windows done, windows in all).
    """
    values, tokens = [], []
    for done, window in enumerate(windows):
        found = wide(_logits(model, window)).log_softmax(-1)
        top = found.topk(min(options.top_tokens, found.shape[-1]), dim=-1)
        values.append(top.values.float().cpu())
        tokens.append(top.indices.to(torch.int32).cpu())
        if progress:
            progress(done + 1, len(windows))
    return Predictions(windows, torch.stack(values), torch.stack(tokens))


def tune(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    scheme: Scheme,
    clips: Clips,
    trained: Predictions,
    held_out: Predictions,
    options: TuneOptions,
    *,
    tune_clips: bool = True,
    pieces: Pieces | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Tune a rotated and quantized model in place, and keep the result if it lowers KL on held-out windows.

    Args:
        model: The model with nothing attached, in evaluation mode.
        plan: Where it is rotated.
        rotations: By space; the online ones are attached meanwhile.
        scheme: What is quantized.
        clips: Clip ratios found by calibration.
        trained: What the 16-bit model predicts on the samples to tune on.
        held_out: What it predicts on the windows that decide.
        options: Options.
        tune_clips: Whether the format that the model will be saved in stores clip ratios.
        pieces: Where the state is saved, and a run resumes from. Default: not saved.
        progress: Called with (steps done, steps in all).

    Returns:
        The clip ratios, tuned if that was kept, and the record.

    Raises:
        LearningError: The loss is not finite; the model is then as it was.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    kinds: tuple[Kind, ...] = ("scales", "norms", "biases", *(("clips",) if tune_clips else ()))
    try:
        with attach(model, plan, rotations, scheme, clips) as attachment:
            found = movables(model, plan, scheme, attachment, kinds=kinds)
            before = _mean_kl(model, held_out)
            try:
                history = _descend(model, plan, found, trained, options, pieces, progress)
            except BaseException:
                _write_back(found)
                raise
        moved = tuned_clips(found, clips)
        with attach(model, plan, rotations, scheme, moved):
            after = _mean_kl(model, held_out)
        kept = after < before
        if not kept:
            _write_back(found)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    counts = {kind: sum(one.theta.numel() for one in found if one.kind == kind) for kind in kinds}
    record = {
        "options": options.to_dict(),
        "samples": len(trained.windows),
        "numbers": {kind: count for kind, count in counts.items() if count},
        "kl": {"before": before, "after": after},
        "kept": kept,
        "losses": history,
    }
    return Tuned(moved if kept else clips, record)


def _write_back(found: list[Movable]) -> None:
    for one in found:
        one.theta.zero_()
        one.write()


def _descend(
    model: Any,
    plan: Plan,
    found: list[Movable],
    trained: Predictions,
    options: TuneOptions,
    pieces: Pieces | None,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    """Make all steps, or those that an interrupted run has not made; the loss of each."""
    adam = torch.optim.Adam([one.theta for one in found], lr=options.lr, betas=BETAS)
    names = [f"{one.kind}/{one.name}" for one in found]
    history = _restore(names, found, adam, options, pieces)
    for one in found:
        one.write()
    with ExitStack() as stack:
        stack.enter_context(checkpointed(model, plan, options.checkpointing))
        for one in found:
            stack.enter_context(one.listening())
        for number in range(len(history), options.steps):
            adam.zero_grad()
            history.append(
                _backward(model, trained, rows_of(number, len(trained.windows), options.batch, options.seed))
            )
            length = cosine(number, options.steps) * min(1, (number + 1) / WARM_UP)
            adam.param_groups[0]["lr"] = options.lr * length
            adam.step()
            for one in found:
                one.write()
            last = number + 1 == options.steps
            if pieces is not None and ((number + 1) % options.save_every == 0 or last):
                about = {"options": options.to_dict(), "history": history}
                pieces.save(STATE, _state(names, found, adam), about)
            if progress:
                progress(number + 1, options.steps)
    return history


def _backward(model: Any, trained: Predictions, rows: Tensor) -> float:
    """The mean loss of some samples; adds to the gradients. Raises LearningError if it is not finite."""
    total = 0.0
    for row in rows.tolist():
        loss = _kl(model, trained, row) / len(rows)
        loss.backward()
        total += float(loss.detach())
    if not torch.tensor(total).isfinite():
        raise LearningError(
            f"the loss of tuning is {total}: the model's weights are damaged, or {model.dtype} overflows. Leave --tune "
            "out, or use --dtype float32"
        )
    return total


def _kl(model: Any, wanted: Predictions, row: int) -> Tensor:
    """Mean KL per token of one window."""
    device = device_of(model)
    values, tokens = wanted.values[row].to(device), wanted.tokens[row].to(device, torch.int64)
    rest = torch.log1p(-values.exp().sum(-1).clamp(max=1 - 1e-6))
    logits = wide(_logits(model, wanted.windows[row]))
    found, found_rest = with_rest(logits, tokens)
    return ((values.exp() * (values - found)).sum(-1) + rest.exp() * (rest - found_rest)).mean()


@torch.no_grad()
def _mean_kl(model: Any, wanted: Predictions) -> float:
    return sum(float(_kl(model, wanted, row)) for row in range(len(wanted.windows))) / len(wanted.windows)


def _logits(model: Any, window: Tensor) -> Tensor:
    """Logits at all tokens of a window, (length,), but the last: (length - 1, vocabulary)."""
    return model(input_ids=window.unsqueeze(0).to(device_of(model)), use_cache=False).logits[0, :-1]


def _state(names: list[str], found: list[Movable], adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Theta and the moments of Adam by name."""
    tensors = {}
    for name, one in zip(names, found, strict=True):
        tensors[f"theta/{name}"] = one.theta.detach()
        tensors |= {f"{part}/{name}": value for part, value in adam.state[one.theta].items()}
    return tensors


def _restore(
    names: list[str], found: list[Movable], adam: torch.optim.Adam, options: TuneOptions, pieces: Pieces | None
) -> list[float]:
    """Load the state of an interrupted run; the losses of its steps, none if there is no such run."""
    saved = None if pieces is None else pieces.load(STATE)
    if saved is None or saved[1]["options"] != options.to_dict():
        return []
    tensors, about = saved
    for name, one in zip(names, found, strict=True):
        one.theta.copy_(tensors[f"theta/{name}"])
        moments = {part: tensors[f"{part}/{name}"] for part in MOMENTS if f"{part}/{name}" in tensors}
        adam.state[one.theta] = {k: v if k == "step" else v.to(one.theta.device) for k, v in moments.items()}
    return list(about["history"])
