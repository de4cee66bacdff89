"""Scores of candidates: how far the predictions of a quantized model are from those at 16 bits, on held-out text.

A candidate is scored as it will be used: weights rounded by as much as the method leaves of it (`weights_share`),
activations and KV cache with clip ratios found by a search, one for all activations and one for the cache. The score is
KL(16 bits || quantized) per token in nats, and perplexity. Predictions at 16 bits are kept (`Exact`), and the weights
of a candidate are rounded once for all windows that it is scored on (`Rounded`).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spinquant.compute.memory import available_memory
from spinquant.errors import LearningError
from spinquant.evaluation.metrics import divergence, nll, perplexity_of
from spinquant.learning.fake_quant import has_rounded_weights, rounded_weights, rounding
from spinquant.learning.free_transforms import composed
from spinquant.models.capture import device_of
from spinquant.online.attachment import attachment_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # clip ratios that are searched
USUAL, USUAL_BITS = 0.9, 5  # where the search starts for quantizers of fewer bits; others start without clipping
EXACT = "16-bit"  # name of the score of the model itself
EXACT_BYTES = 1 << 30  # logits of the 16-bit model that are kept in memory, for each set of windows
BLOCKS = 8  # parts of a window whose KL is compared: what neighbouring tokens lose is not independent
CLEAR = 2.0  # standard errors by which candidates differ clearly


@dataclass(frozen=True)
class Candidate:
    """What is scored: rotations by space, free transforms before them (`free_transforms.py`), and clip ratios.

    The ratios are None before they are searched.
    """

    rotations: Mapping[str, Transform]
    free: Mapping[str, Transform] = field(default_factory=dict)
    activation_clip: float | None = None
    kv_clip: float | None = None

    @property
    def clips(self) -> dict[str, float | None]:
        """Its clip ratios, by name of the field."""
        return {"activation_clip": self.activation_clip, "kv_clip": self.kv_clip}

    def scheme(self, scheme: Scheme) -> Scheme:
        """The scheme with these clip ratios; without clipping, where they were not searched."""
        pairs = (scheme.activations, self.activation_clip), (scheme.kv, self.kv_clip)
        activations, kv = (quantizer and replace(quantizer, clip=ratio or 1.0) for quantizer, ratio in pairs)
        return replace(scheme, activations=activations, kv=kv)


@dataclass(frozen=True)
class Score:
    """KL to the 16-bit model in nats per token, and perplexity, both measured on `tokens` predicted tokens.

    Of a candidate that was clearly worse before it had seen all windows, they are those of the better one and the
    difference on the windows that both have seen.
    """

    kl: float
    perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


@dataclass
class Observed:
    """What was measured of a candidate: by window, KL of its parts, negative log-likelihood, number of tokens."""

    kl: list[list[float]] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.nll)

    def add(self, exact: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Measure a window: logits of the 16-bit model and the candidate's, (tokens, vocabulary), and next tokens."""
        parts = zip(exact.chunk(BLOCKS), logits.chunk(BLOCKS), strict=True)
        self.kl.append([_finite(divergence(*part)) for part in parts])
        self.nll.append(_finite(nll(logits, targets)))
        self.tokens.append(len(logits))

    def score(self, windows: int | None = None) -> Score:
        """The score on the first windows, or on all that were seen."""
        tokens = sum(self.tokens[:windows])
        kl = math.fsum(x for blocks in self.kl[:windows] for x in blocks)
        return Score(kl / tokens, perplexity_of(math.fsum(self.nll[:windows]) / tokens), tokens)

    def beyond(self, other: "Observed") -> float:
        """KL above that of another, on the windows that both have seen, in standard errors; 0 if they are equal."""
        pairs = [
            pair for mine, theirs in zip(self.kl, other.kl, strict=False) for pair in zip(mine, theirs, strict=True)
        ]
        wild = [any(math.isinf(pair[i]) for pair in pairs) for i in (0, 1)]
        if any(wild):
            return 0.0 if all(wild) else math.copysign(math.inf, wild[0] - 0.5)
        differences = [mine - theirs for mine, theirs in pairs]
        mean = statistics.fmean(differences)
        if len(differences) < 2 or mean == 0:
            return 0.0
        error = statistics.stdev(differences) / len(differences) ** 0.5
        return mean / error if error else math.copysign(math.inf, mean)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


class Exact:
    """Predictions of the 16-bit model on windows, (windows, length): as many are kept as take 1 GiB at most."""

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model, self.windows = model, windows
        self.kept: dict[int, Tensor] = {}
        self.bytes: int | None = None  # of one window, known after the first

    def __len__(self) -> int:
        return len(self.windows)

    @torch.no_grad()
    def hold(self, numbers: Sequence[int]) -> Sequence[int]:
        """Compute the predictions of the first of these windows, as many as fit, and return which they are.

        What is held already and fits stays. The model must not be rounded meanwhile.
        """
        held: list[int] = []
        for number in numbers:
            most = None if self.bytes is None else max(1, EXACT_BYTES // max(self.bytes, 1))
            if most is not None and len(held) == most:
                break
            if number not in self.kept:
                others = [n for n in self.kept if n not in held]
                while most is not None and len(self.kept) >= most and others:
                    self.kept.pop(others.pop())
                found = self._computed(number)
                self.bytes = found.numel() * found.element_size()
                self.kept[number] = found.cpu()
            held.append(number)
        return held

    def __getitem__(self, number: int) -> Tensor:
        """Logits of a window that is held, (length - 1, vocabulary), on the model's device."""
        return self.kept[number].to(device_of(self.model))

    def _computed(self, number: int) -> Tensor:
        rounded = attachment_of(self.model) is not None or has_rounded_weights(self.model)
        assert not rounded, "a rounded model has no exact predictions"
        return predictions(self.model, self.windows[number].unsqueeze(0).to(device_of(self.model)))


def _fits_twice(model: nn.Module) -> bool:
    """Whether rounded weights fit beside the model's own, with a quarter of the free memory left for everything else.

    If not, they are rounded for every window.
    """
    device, size = device_of(model), sum(p.numel() * p.element_size() for p in model.parameters())
    free = available_memory() if device.type == "cpu" else torch.get_device_module(device).mem_get_info(device)[0]
    return 4 * size <= 3 * free


class Rounded:
    """A model with the weights of a candidate rounded, one candidate at a time.

    Args:
        model: with its gains fused.
        plan: its plan.
        scheme: what is quantized; of the squared error of weights rounded to nearest, `share` is made.
        share: see `rounded_weights`.
    """

    def __init__(self, model: nn.Module, plan: Plan, scheme: Scheme, share: float):
        self.model, self.plan, self.share = model, plan, share
        self.weights = replace(scheme, activations=None, kv=None)
        self.others = replace(scheme, weights=None)
        self.fused: set[str] = set()  # spaces whose free transforms are fused into the model
        self._stack, self._open, self._transforms = ExitStack(), None, {}

    @torch.no_grad()
    def observe(self, candidate: Candidate, row: Tensor) -> Tensor:
        """Logits of a row of tokens, (1, length), at all of them but the last: (length - 1, vocabulary)."""
        wanted = candidate.rotations, candidate.free  # candidates that differ in clip ratios have the same weights
        if self._open != wanted:
            self.close()
            free = {name: found for name, found in candidate.free.items() if name not in self.fused}
            made = composed(candidate.rotations, free)
            self._stack.enter_context(rounded_weights(self.model, self.plan, made, self.weights, self.share))
            if _fits_twice(self.model):
                self._stack.enter_context(parametrize.cached())
            self._open, self._transforms = wanted, made
        with rounding(self.model, self.plan, self._transforms, candidate.scheme(self.others)):
            return predictions(self.model, row)

    def hold(self, exact: Exact, numbers: Sequence[int]) -> Sequence[int]:
        """`exact.hold`, with the weights of the model restored if predictions have to be computed."""
        if any(number not in exact.kept for number in numbers):
            self.close()
        return exact.hold(numbers)

    def close(self) -> None:
        """Restore the model."""
        self._stack.close()
        self._open, self._transforms = None, {}


def decides_alone() -> bool:
    """Whether there is no other process that has to decide alike, for instance which candidate drops out."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def observe(rounded: Rounded, candidate: Candidate, exact: Exact, numbers: Sequence[int], seen: Observed) -> None:
    """Add what is measured of a candidate on windows that `exact` holds."""
    for number in numbers:
        row = exact.windows[number].unsqueeze(0).to(device_of(rounded.model))
        seen.add(exact[number], rounded.observe(candidate, row), row[0, 1:])


def _finite(measured: float) -> float:
    """Infinity in the place of NaN, which no comparison would find to be worse."""
    return math.inf if math.isnan(measured) else measured


def observed(rounded: Rounded, candidate: Candidate, exact: Exact) -> Observed:
    """What is measured of a candidate on all windows. The model stays rounded (`Rounded.close`)."""
    seen = Observed()
    while len(seen) < len(exact):
        observe(rounded, candidate, exact, rounded.hold(exact, range(len(seen), len(exact))), seen)
    return seen


def exact_score(rounded: Rounded, exact: Exact) -> Score:
    """The score of the 16-bit model itself."""
    total = tokens = 0.0
    for number in range(len(exact)):
        rounded.hold(exact, [number])
        targets = exact.windows[number, 1:].to(device_of(exact.model))
        total, tokens = total + nll(exact[number], targets), tokens + len(targets)
    if not math.isfinite(total):
        raise LearningError(
            f"the predictions of the {type(exact.model).__name__} are not finite on held-out text: its weights are "
            f"damaged, or it overflows {exact.model.dtype}; try --dtype bfloat16 or float32"
        )
    return Score(0.0, perplexity_of(total / tokens), int(tokens))


def with_clips(rounded: Rounded, candidate: Candidate, exact: Exact) -> Candidate:
    """The candidate with the clip ratios of least KL on the windows of `exact`; see `searched_clips`.

    Ratios that are clearly worse than the best so far do not see all windows.
    """
    tried: dict[tuple[float | None, ...], tuple[Observed, float]] = {}

    def error(one: Candidate) -> float:
        key = tuple(one.clips.values())
        if key not in tried:
            seen, best = Observed(), min(tried.values(), key=lambda found: found[1], default=None)
            while len(seen) < len(exact):
                held = rounded.hold(exact, range(len(seen), len(exact)))
                observe(rounded, one, exact, held[:1] if decides_alone() else held, seen)
                if best is not None and len(seen) < len(exact) and seen.beyond(best[0]) >= CLEAR:
                    break
            kl = seen.score().kl
            if best is not None and len(seen) < len(exact):  # as much worse on all windows as on those that it has seen
                kl += best[1] - best[0].score(len(seen)).kl
            tried[key] = seen, kl
        return tried[key][1]

    try:
        return searched_clips(candidate, rounded.others, lambda candidates: error)
    except BaseException:
        rounded.close()
        raise


def searched_clips(
    best: Candidate, scheme: Scheme, errors: Callable[[Sequence[Candidate]], Callable[[Candidate], float]]
) -> Candidate:
    """The candidate with the best clip ratios: first of activations, then of the KV cache.

    The search is one-dimensional for each, to both sides of the ratio that the candidate has, or of a usual one.
    errors: given the candidates that may be tried, the error of each of them.
    """
    pairs = {"activation_clip": scheme.activations, "kv_clip": scheme.kv}
    best = replace(best, **{part: _start(getattr(best, part), quantizer) for part, quantizer in pairs.items()})
    for part, quantizer in pairs.items():
        if quantizer is not None:
            choices = [replace(best, **{part: ratio}) for ratio in RATIOS]
            best = _nearest_minimum(choices, RATIOS.index(getattr(best, part)), errors(choices))
    return best


def _start(ratio: float | None, quantizer: Quantizer | None) -> float:
    """Where the search for a clip ratio starts."""
    if ratio is not None:
        return ratio
    return USUAL if quantizer is not None and quantizer.bits < USUAL_BITS else 1.0


def _nearest_minimum(candidates: Sequence[Candidate], start: int, error: Callable[[Candidate], float]) -> Candidate:
    """The best candidate, searched from one of them to both sides for as long as the error falls."""
    best = candidates[start]
    for side in (candidates[start + 1 :], candidates[:start][::-1]):
        for candidate in side:
            if error(candidate) >= error(best):
                break
            best = candidate
    return best


def predictions(model: nn.Module, row: Tensor) -> Tensor:
    """Logits at all tokens of a row, (1, length), but the last, which has no next token: (length - 1, vocabulary)."""
    return model(input_ids=row, use_cache=False).logits[0, :-1]
