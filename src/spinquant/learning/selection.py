"""Score candidate rotations by KL divergence and perplexity on held-out text, and select the best.

Candidates are scored as they will be used: with clip ratios found by a search, one for all activations and one for the
KV cache. The score is KL(16 bits || quantized) per token in nats, and perplexity. All candidates are scored window by
window, and the predictions of the 16-bit model are kept (`Exact`), so that it runs once per window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.evaluation.metrics import divergence, nll, perplexity_of
from spinquant.learning.fake_quant import rounding
from spinquant.learning.free_transforms import Fused, Kind, fuse_free, kind_of, with_free
from spinquant.models.capture import device_of
from spinquant.online.attachment import attachment_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Transform

SCORES = "scores"  # name of the saved scores (`Pieces`)
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # clip ratios that are searched
EXACT_BYTES = 1 << 30  # logits of the 16-bit model that are kept in memory, for each set of windows


@dataclass(frozen=True)
class Candidate:
    """What is scored: rotations by space, free transforms before them (`free_transforms.py`), and clip ratios."""

    rotations: Mapping[str, Transform]
    free: Mapping[str, Transform] = field(default_factory=dict)
    activation_clip: float = 1.0
    kv_clip: float = 1.0

    def scheme(self, scheme: Scheme) -> Scheme:
        """The scheme with these clip ratios."""
        pairs = (scheme.activations, self.activation_clip), (scheme.kv, self.kv_clip)
        activations, kv = (_clipped(quantizer, ratio) for quantizer, ratio in pairs)
        return replace(scheme, activations=activations, kv=kv)


def _clipped(quantizer: Quantizer | None, ratio: float) -> Quantizer | None:
    return None if quantizer is None else replace(quantizer, clip=ratio)


@dataclass(frozen=True)
class Score:
    """KL to the 16-bit model in nats per token, and perplexity, both over `tokens` predicted tokens."""

    kl: float
    perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


class Exact:
    """Predictions of the 16-bit model on windows, (windows, length): kept on the CPU if they take at most 1 GiB."""

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model, self.windows = model, windows
        self.kept: list[Tensor] | None = None
        self.fits: bool | None = None  # known after the first window

    @torch.no_grad()
    def fill(self) -> None:
        """Compute all predictions now, before the weights are changed by a transform that is fused into them.

        A run that is resumed then compares with the same numbers, to the last bit.
        """
        if self.kept is not None or self.fits is False:
            return
        kept: list[Tensor] = []
        for window in self.windows:
            found = self._computed(window)
            self.fits = found.numel() * found.element_size() * len(self.windows) <= EXACT_BYTES
            if not self.fits:
                return
            kept.append(found.cpu())
        self.kept = kept

    def __getitem__(self, number: int) -> Tensor:
        """Logits of a window, (length - 1, vocabulary), on the model's device."""
        self.fill()
        if self.kept is not None:
            return self.kept[number].to(device_of(self.model))
        return self._computed(self.windows[number])

    def _computed(self, window: Tensor) -> Tensor:
        assert attachment_of(self.model) is None, "a rounded model has no exact predictions"
        return _predictions(self.model, window.unsqueeze(0).to(device_of(self.model)))


class Selection:
    """Selection among candidates that are added one by one: the one with the least KL leads, the first if tied.

    model: with its gains fused. clip_windows: tokens on which clip ratios are searched. held_out: tokens for scoring.
    stage: progress callback (name, done, total). pieces: where scores are saved, and a run resumes from.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        scheme: Scheme,
        clip_windows: Tensor,
        held_out: Tensor,
        stage: Callable[[str, int, int], None] = lambda name, done, total: None,
        pieces: Pieces | None = None,
    ):
        self.model, self.plan, self.scheme, self.stage, self.pieces = model, plan, scheme, stage, pieces
        self.clip_windows, self.held_out = clip_windows, held_out
        self.exact = {"clips": Exact(model, clip_windows), "held-out": Exact(model, held_out)}
        saved = pieces.load(SCORES) if pieces else None
        self.found: dict[str, Any] = saved[1]["found"] if saved else {}
        self.candidates: dict[str, Candidate] = {}
        self.scores: dict[str, Score] = {}  # including the 16-bit model
        # The free transforms of the leader, those of scales and values fused into the model.
        self.free: Mapping[str, Transform] = {}

    @property
    def leader(self) -> str:
        """Name of the best candidate so far."""
        return min(self.candidates, key=lambda name: self.scores[name].kl)

    @property
    def leading(self) -> Candidate:
        """The best candidate so far."""
        return self.candidates[self.leader]

    def enter_all(self, rotations: Mapping[str, Mapping[str, Transform]]) -> None:
        """Score similar candidates with the clip ratios found for the first, then the leader with ratios of its own.

        The leader keeps the better of its two scores.
        """
        self._score("random rotations", {name: Candidate(made) for name, made in rotations.items()})
        leader = self.leader
        if leader != next(iter(rotations)):
            self._improve(f"{leader} again", leader, self.candidates[leader], self.scores[leader])

    def enter(self, name: str, rotations: Mapping[str, Transform], free: Mapping[str, Transform] | None = None) -> None:
        """Score one candidate.

        free: further transforms, fused into the model to score it, and removed again unless it leads.
        """
        before, fused = self.free, None
        if free:
            fused = self._fuse(free)
            if not fused.kept:
                raise LearningError(
                    f"the transforms of {name!r} move the logits by more than rounding in {self.model.dtype} explains: "
                    "their matrices are too ill-conditioned for it. Learn in float32 (--dtype float32)"
                )
            self.free = {**before, **free}
        self._score(name, {name: Candidate(rotations, self.free)})
        if fused is not None and self.leader != name:
            fused.undo()
            self.free = before

    def set_aside(self, kinds: Sequence[Kind]) -> None:
        """Leave out kinds of transforms of the leader that belong to its rotations, before others are learned."""
        self.free = {name: found for name, found in self.free.items() if kind_of(self.plan.space[name]) not in kinds}

    def enter_kinds(
        self, name: str, parts: Sequence[Mapping[str, Transform]], kinds: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Try parts of a candidate one after another, each kept if it lowers KL; what is kept is then a candidate.

        Args:
            name: of the candidate.
            parts: free transforms.
            kinds: what each part is called.

        Returns:
            For every part that is not empty, its KL (None if rounding alone would move the logits too much) and whether
            it was kept.
        """
        start, base = self.leading, self.free
        best, found = self.scores[self.leader], {}
        for kind, part in zip(kinds, parts, strict=True):
            if not part:
                continue
            fused = self._fuse(part)
            score = self._one(f"{name}: {kind}", replace(start, free={**self.free, **part})) if fused.kept else None
            kept = score is not None and score.kl < best.kl
            found[kind] = {"kl": None if score is None else score.kl, "kept": kept}
            if score is not None and kept:
                best, self.free = score, {**self.free, **part}
            else:
                fused.undo()
        if self.free != base:
            self._improve(name, name, replace(start, free=self.free), best)
        return found

    def _fuse(self, free: Mapping[str, Transform]) -> Fused:
        for exact in self.exact.values():
            exact.fill()
        return fuse_free(self.model, self.plan, free, self.clip_windows[:1])

    def _improve(self, what: str, name: str, known: Candidate, score: Score) -> None:
        """Search clip ratios near those of a candidate whose score is known, and keep the better of its two scores.

        Ratios found on a few samples are not always better.
        """
        self._score(what, {name: known}, score)
        if self.scores[name].kl > score.kl:
            self.candidates[name], self.scores[name] = known, score

    def _one(self, what: str, candidate: Candidate) -> Score:
        """Score of a candidate with the clip ratios that it has, or that of an interrupted run."""
        found = self.found.get(what)
        if found is None:
            progress = partial(self.stage, f"score {what}")
            scores = score_candidates(
                self.model, self.plan, {what: candidate}, self.scheme, self.exact["held-out"], progress=progress
            )
            self.found[what] = found = {"scores": {what: scores[what].to_dict()}}
            self._save()
        return Score(**found["scores"][what])

    def _save(self) -> None:
        if self.pieces:
            self.pieces.save(SCORES, {}, {"found": self.found})

    def _score(self, what: str, candidates: Mapping[str, Candidate], known: Score | None = None) -> None:
        """Score candidates with the clip ratios found for the first, or load the scores of an interrupted run.

        known: the score of the only candidate with the ratios that it has.
        """
        found = self.found.get(what)
        if found is None:
            first = next(iter(candidates.values()))
            clipped = with_clips(self.model, self.plan, first, self.scheme, self.exact["clips"])
            clips = {"activation_clip": clipped.activation_clip, "kv_clip": clipped.kv_clip}
            if known is not None and clipped == first:
                scores = dict.fromkeys(candidates, known)
            else:
                chosen = {name: replace(candidate, **clips) for name, candidate in candidates.items()}
                progress = partial(self.stage, f"score {what}")
                scores = score_candidates(
                    self.model, self.plan, chosen, self.scheme, self.exact["held-out"], progress=progress
                )
            found = {"clips": clips, "scores": {name: score.to_dict() for name, score in scores.items()}}
            self.found[what] = found
            self._save()
        self.scores |= {name: Score(**score) for name, score in found["scores"].items()}
        self.candidates |= {name: replace(candidate, **found["clips"]) for name, candidate in candidates.items()}


@torch.no_grad()
def score_candidates(
    model: nn.Module,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    scheme: Scheme,
    exact: Exact,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Score]:
    """Score candidates on the windows of `exact`, int64 (windows, length).

    Returns the scores by name of the candidate, and that of the 16-bit model as "16-bit".
    """
    sums = {name: [0.0, 0.0] for name in (*candidates, "16-bit")}
    windows = exact.windows
    for done, window in enumerate(windows):
        row = window.unsqueeze(0).to(device_of(model))
        targets = row[0, 1:]
        reference = exact[done]
        sums["16-bit"][1] += nll(reference, targets)
        for name, candidate in candidates.items():
            rounded = with_free(plan, candidate.rotations, candidate.free)
            with rounding(model, plan, rounded, candidate.scheme(scheme)):
                found = _predictions(model, row)
            sums[name][0] += divergence(reference, found)
            sums[name][1] += nll(found, targets)
        if progress:
            progress(done + 1, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {name: Score(kl / tokens, perplexity_of(nll / tokens), tokens) for name, (kl, nll) in sums.items()}


@torch.no_grad()
def with_clips(model: nn.Module, plan: Plan, best: Candidate, scheme: Scheme, exact: Exact) -> Candidate:
    """The candidate with the clip ratios of least KL on the windows of `exact`; see `searched_clips`."""
    rotations = with_free(plan, best.rotations, best.free)
    rows = [w.unsqueeze(0).to(device_of(model)) for w in exact.windows]
    references = [exact[i] for i in range(len(rows))]
    tried: dict[tuple[float, float], float] = {}

    def error(candidate: Candidate) -> float:
        key = (candidate.activation_clip, candidate.kv_clip)
        if key not in tried:
            with rounding(model, plan, rotations, candidate.scheme(scheme)):
                pairs = zip(references, rows, strict=True)
                tried[key] = sum(divergence(reference, _predictions(model, row)) for reference, row in pairs)
        return tried[key]

    return searched_clips(best, scheme, lambda candidates: error)


def searched_clips(
    best: Candidate, scheme: Scheme, errors: Callable[[Sequence[Candidate]], Callable[[Candidate], float]]
) -> Candidate:
    """The candidate with the best clip ratios: first of activations, then of the KV cache.

    The search is one-dimensional for each: from 1 down, or to both sides of the ratio that the candidate has. errors:
    given the candidates that may be tried, the error of each of them.
    """
    fresh = best.activation_clip == best.kv_clip == RATIOS[0]
    for part, quantizer in (("activation_clip", scheme.activations), ("kv_clip", scheme.kv)):
        if quantizer is not None:
            choices = [replace(best, **{part: ratio}) for ratio in RATIOS]
            start, error = RATIOS.index(getattr(best, part)), errors(choices)
            best = _first_minimum(choices, error) if fresh else _nearest_minimum(choices, start, error)
    return best


def _first_minimum(candidates: Sequence[Candidate], error: Callable[[Candidate], float]) -> Candidate:
    """The best candidate, searched in order until the error grows twice in a row: it has one minimum, up to noise."""
    best, lowest, worse = candidates[0], error(candidates[0]), 0
    for candidate in candidates[1:]:
        found = error(candidate)
        worse = worse + 1 if found >= lowest else 0
        if found < lowest:
            best, lowest = candidate, found
        if worse == 2:
            break
    return best


def _nearest_minimum(candidates: Sequence[Candidate], start: int, error: Callable[[Candidate], float]) -> Candidate:
    """The best candidate, searched from one of them to both sides for as long as the error falls."""
    best = candidates[start]
    for side in (candidates[start + 1 :], candidates[:start][::-1]):
        for candidate in side:
            if error(candidate) >= error(best):
                break
            best = candidate
    return best


def _predictions(model: nn.Module, row: Tensor) -> Tensor:
    """Logits at all tokens of a row, (1, length), but the last, which has no next token: (length - 1, vocabulary)."""
    return model(input_ids=row, use_cache=False).logits[0, :-1]
