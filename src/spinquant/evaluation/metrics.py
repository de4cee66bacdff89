"""How good a model still is: perplexity over windows of text, and agreement with a reference model.

Perplexity is exp of the mean negative log-likelihood of every predicted token, in nats, over windows that do not
overlap. Against a reference, per token: KL(reference || model) in nats, and how often both rank the same token first.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.errors import TextError
from spinquant.models.capture import device_of

# Tokens whose log-probabilities are held in float32 at once; 128 x 150k vocabulary is 77 MB.
SLICE = 128
NEAR = 0.03  # log-probabilities whose difference is taken as a series


@dataclass(frozen=True)
class Evaluation:
    """Results over all predicted tokens; the last three are None without a reference.

    kl in nats per token, top1 a fraction, reference_perplexity on the same tokens.
    """

    perplexity: float
    tokens: int
    seconds: float
    kl: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Differences of two models' logits, and of what they predict (see `Evaluation`)."""

    max_abs: float
    mean_abs: float
    relative: float
    kl: float
    top1: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Progress = Callable[[int, int], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module, windows: Tensor, *, reference: nn.Module | None = None, progress: Progress | None = None
) -> Evaluation:
    """Perplexity on windows of tokens, int64 (windows, length), and agreement with a reference model.

    `progress(done, total)` counts windows. Raises TextError for windows of fewer than two tokens.
    """
    _check_windows(windows)
    start = time.perf_counter()
    total = kl = agree = reference_nll = 0.0
    for done, window in enumerate(windows):
        logits = _logits(model, window)[:-1]
        targets = window[1:].to(logits.device)
        others = None if reference is None else _logits(reference, window)[:-1].to(logits.device)
        if others is not None:
            _check_vocabularies(others, logits)
        total += nll(logits, targets)
        if others is not None:
            reference_nll += nll(others, targets)
            kl += divergence(others, logits)
            agree += (others.argmax(-1) == logits.argmax(-1)).sum().item()
        if progress:
            progress(done + 1, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Evaluation(
        perplexity=perplexity_of(total / tokens),
        tokens=tokens,
        seconds=time.perf_counter() - start,
        kl=kl / tokens if reference is not None else None,
        top1=agree / tokens if reference is not None else None,
        reference_perplexity=perplexity_of(reference_nll / tokens) if reference is not None else None,
    )


@torch.inference_mode()
def compare_models(
    reference: nn.Module, other: nn.Module, windows: Tensor, *, progress: Progress | None = None
) -> Comparison:
    """Logit differences, KL and top-1 agreement of two models on the same windows of tokens.

    Raises TextError when their vocabularies differ.
    """
    _check_windows(windows)
    largest = total = squared = norm = kl = agree = 0.0
    count = 0
    for done, window in enumerate(windows):
        expected, found = _logits(reference, window), _logits(other, window)
        _check_vocabularies(expected, found)
        found = found.to(expected.device)
        for i in range(0, len(window), SLICE):
            e, f = wide(expected[i : i + SLICE]), wide(found[i : i + SLICE])
            delta = (f - e).abs()
            # A NaN must not vanish in max(): it would make a broken model look equal.
            largest = max(largest, delta.max().item()) if not delta.isnan().any() else math.nan
            total += delta.sum().item()
            squared += delta.square().sum().item()
            norm += e.square().sum().item()
            count += delta.numel()
        kl += divergence(expected, found)
        agree += (expected.argmax(-1) == found.argmax(-1)).sum().item()
        if progress:
            progress(done + 1, len(windows))
    tokens = windows.numel()
    return Comparison(
        max_abs=largest,
        mean_abs=total / count,
        relative=math.sqrt(squared / norm),
        kl=kl / tokens,
        top1=agree / tokens,
        tokens=tokens,
    )


def nll(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood of the targets, (tokens,), in nats, summed; logits are (tokens, vocabulary)."""
    parts = zip(logits.split(SLICE), targets.split(SLICE), strict=True)
    return -sum(wide(x).log_softmax(-1).gather(-1, t.unsqueeze(-1)).sum().item() for x, t in parts)


def divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || model) in nats, summed over tokens; both are logits, (tokens, vocabulary).

    Of both sums of probabilities being one follows KL = sum of p - q - q d with d = log p - log q, of which no term is
    negative: where models are all but the same, terms of q d alone would leave nothing but their rounding.
    """
    total = 0.0
    for q, p in zip(reference.split(SLICE), logits.split(SLICE), strict=True):
        log_q, log_p = wide(q).log_softmax(-1), wide(p).log_softmax(-1)
        share, d = log_q.exp(), log_p - log_q
        near = share * d.square() * (0.5 + d * (1 / 6 + d / 24))
        total += torch.where(d.abs() < NEAR, near, log_p.exp() - share - share * d).sum().item()
    return total


def perplexity_of(mean: float) -> float:
    """From the mean negative log-likelihood, in nats; infinite where it would overflow."""
    return math.exp(mean) if mean < 700 else math.inf


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens drawn from their probabilities, (.., vocabulary); (.., 1). generator: on the CPU.

    By where a uniform number falls in the cumulated probabilities: torch.multinomial draws a number for every entry.
    """
    reached = probabilities.cumsum(-1, dtype=torch.float32)
    at = torch.rand((*reached.shape[:-1], 1), generator=generator).to(reached.device)
    return torch.searchsorted(reached, at * reached[..., -1:]).clamp(max=reached.shape[-1] - 1)


def wide(logits: Tensor) -> Tensor:
    """At least in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_vocabularies(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise TextError(
            f"the models have vocabularies of {first.shape[-1]} and {second.shape[-1]} tokens: they cannot be compared"
        )


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and int(window.max()) >= size:
        raise TextError(f"the text has token {int(window.max())}, and a model knows {size}: wrong tokenizer or model")
    return model(input_ids=window.unsqueeze(0).to(device_of(model)), use_cache=False).logits[0]


def _check_windows(windows: Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise TextError(f"windows of shape {tuple(windows.shape)}: expected (windows, length) with length >= 2")
