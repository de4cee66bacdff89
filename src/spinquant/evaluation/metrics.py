"""Evaluate a model: perplexity on windows of text, and KL divergence and top-1 agreement with a reference model.

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

from spinquant.errors import CheckpointError, TextError
from spinquant.models.capture import device_of
from spinquant.models.context import check_context
from spinquant.models.modules import check_causal, in_eval_mode
from spinquant.models.tokens import check_reader, check_tokens

# Tokens whose log-probabilities are held in float32 at once; 128 x 150k vocabulary is 77 MB. On a CPU as many as have
# 2^18 of them, so that all passes find them in cache: half the time of 128.
SLICE, CACHED = 128, 1 << 18
NEAR = 0.03  # below this difference of log-probabilities the terms of KL are computed by a series


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model, and its agreement with a reference, over all predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; infinite if that overflows.
        tokens: Number of predicted tokens.
        seconds: Wall time.
        kl: KL(reference || model), nats per token; None without a reference.
        top1: Fraction of tokens at which both models rank the same token first; None without a reference.
        reference_perplexity: Perplexity of the reference on the same tokens; None without a reference.

    Example:
        >>> import spinquant
        >>> spinquant.Evaluation(perplexity=8.5, tokens=1022, seconds=1.0).to_dict()["kl"] is None
        True
    """

    perplexity: float
    tokens: int
    seconds: float
    kl: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Differences of two models' logits and predictions, over all tokens.

    Attributes:
        max_abs: Largest absolute difference of logits; NaN if any logit is.
        mean_abs: Mean absolute difference.
        relative: ||other - reference|| / ||reference||.
        kl: KL(reference || other), nats per token.
        top1: Fraction of tokens at which both models rank the same token first.
        tokens: Number of tokens.

    Example:
        >>> import spinquant
        >>> same = spinquant.Comparison(max_abs=0.0, mean_abs=0.0, relative=0.0, kl=0.0, top1=1.0, tokens=512)
        >>> same.to_dict()["top1"]
        1.0
    """

    max_abs: float
    mean_abs: float
    relative: float
    kl: float
    top1: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


Progress = Callable[[int, int], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module, windows: Tensor, *, reference: nn.Module | None = None, progress: Progress | None = None
) -> Evaluation:
    """Measure a model's perplexity, and its KL divergence and top-1 agreement with a reference model.

    Dropout is off meanwhile, whatever mode the models are in.

    Args:
        model: A causal language model.
        windows: Tokens, int64, (windows, length), as from `token_windows`. All tokens of a window but the first are
            predicted.
        reference: The model to compare with, usually the original at 16 bits; it runs on its own device. Default: none.
        progress: Called with (windows done, windows in all).

    Returns:
        Perplexity, and KL and top-1 agreement if there is a reference.

    Raises:
        TextError: Windows that are no integers, of fewer than two tokens or longer than a model's context, a token
            outside a model's vocabulary, or vocabularies of different sizes.
        ArchitectureError: What is passed as a model reads no `input_ids`.
        CheckpointError: A model's logits are not numbers (NaN).

    Example:
        >>> import spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> evaluation = spinquant.evaluate(model, torch.randint(64, (2, 16)), reference=model)
        >>> evaluation.tokens, evaluation.kl, evaluation.top1
        (30, 0.0, 1.0)
    """
    models = (model,) if reference is None else (model, reference)
    _check(windows, *models)
    check_causal(model, "perplexity")
    start = time.perf_counter()
    total = kl = agree = reference_nll = 0.0
    with in_eval_mode(*models):
        for done, window in enumerate(windows):
            logits = _logits(model, window)[:-1]
            targets = window[1:].to(logits.device)
            others = None if reference is None else _logits(reference, window)[:-1].to(logits.device)
            if others is not None:
                _check_vocabularies(others, logits)
            total += _checked(nll(logits, targets), model)
            if others is not None:
                reference_nll += _checked(nll(others, targets), reference)
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
    """Compare two models' logits on the same tokens: differences, KL divergence and top-1 agreement.

    Args:
        reference: The original model.
        other: The model that is compared with it.
        windows: Tokens, int64, (windows, length).
        progress: Called with (windows done, windows in all).

    Returns:
        Differences over all tokens.

    Raises:
        TextError: Windows that are no integers, of fewer than two tokens or longer than a model's context, a token
            outside a model's vocabulary, or vocabularies of different sizes.
        ArchitectureError: What is passed as a model reads no `input_ids`.

    Example:
        >>> import copy, spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> rotated = spinquant.rotate(copy.deepcopy(model)).model
        >>> spinquant.compare_models(model, rotated, torch.randint(64, (2, 16))).relative < 1e-4
        True
    """
    _check(windows, reference, other)
    check_causal(other, "a comparison of predictions")
    largest = total = squared = norm = kl = agree = 0.0
    count = 0
    with in_eval_mode(reference, other):
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
    """Summed negative log-likelihood of targets, (tokens,), in nats; logits are (tokens, vocabulary)."""
    rows = _rows_at_once(logits)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return -sum(wide(x).log_softmax(-1).gather(-1, t.unsqueeze(-1)).sum().item() for x, t in parts)


def _checked(found: float, model: Any) -> float:
    """A negative log-likelihood. Raises CheckpointError for NaN, which as a perplexity would be taken for infinity."""
    if math.isnan(found):
        dtype = next(model.parameters()).dtype
        raise CheckpointError(
            f"the logits of the {type(model).__name__} are not finite (NaN) on the text: its weights are damaged, or "
            f"it overflows {dtype}; try --dtype bfloat16 or float32"
        )
    return found


def divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || model) in nats, summed over tokens; both are logits, (tokens, vocabulary).

    Since both distributions sum to one, KL = sum of p - q - q d with d = log p - log q, of which no term is negative.
    For models that are almost equal, the sum of -q d alone would be lost in rounding error.
    """
    total, rows = 0.0, _rows_at_once(logits)
    for q, p in zip(reference.split(rows), logits.split(rows), strict=True):
        log_q, log_p = wide(q).log_softmax(-1), wide(p).log_softmax(-1)
        d = log_p - log_q
        share = log_q.exp_()
        near = (d / 24).add_(1 / 6).mul_(d).add_(0.5).mul_(d).mul_(d).mul_(share)
        far = log_p.exp_().sub_(share).addcmul_(share, d, value=-1)
        total += torch.where(d.abs_() < NEAR, near, far).sum().item()
    return total


def _rows_at_once(logits: Tensor) -> int:
    return SLICE if logits.device.type != "cpu" else min(SLICE, max(1, CACHED // logits.shape[-1]))


def perplexity_of(mean: float) -> float:
    """Perplexity from the mean negative log-likelihood, in nats; infinite if it would overflow."""
    return math.exp(mean) if mean < 700 else math.inf


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Sample tokens from probabilities, (.., vocabulary); int64, (.., 1). generator: on the CPU.

    Inverts the cumulative distribution, which takes one random number per sample; torch.multinomial draws one for every
    entry of the vocabulary.
    """
    reached = probabilities.cumsum(-1, dtype=torch.float32)
    at = torch.rand((*reached.shape[:-1], 1), generator=generator).to(reached.device)
    return torch.searchsorted(reached, at * reached[..., -1:]).clamp(max=reached.shape[-1] - 1)


def wide(logits: Tensor) -> Tensor:
    """The logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_vocabularies(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise TextError(
            f"the models have vocabularies of {first.shape[-1]} and {second.shape[-1]} tokens and cannot be compared: "
            "both must use one tokenizer"
        )


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    return model(input_ids=window.unsqueeze(0).to(device_of(model)), use_cache=False).logits[0]


def _check(windows: Tensor, *models: Any) -> None:
    for model in models:
        check_reader(model)
        check_tokens(windows, model, "windows", TextError, least=2)
        if (config := getattr(model, "config", None)) is not None:
            check_context(config, windows.shape[1], "give shorter windows")
