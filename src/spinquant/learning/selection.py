"""Select the candidate with the least KL divergence on held-out text, in as few passes as it takes to tell.

Candidates race, with successive halving: all are scored on two windows, those left on four, and so on. One that is
clearly worse than the best (`CLEAR` standard errors, on the same tokens) drops out; of random rotations, which differ
little, the better half is left each time. The winner is scored on all windows. A candidate that dropped out gets the
score of the winner and what it was worse by, so that all scores are of the same windows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.learning.free_transforms import HALF, Fused, Kind, fuse_free, is_fused, kind_of
from spinquant.learning.scoring import (
    CLEAR,
    EXACT,
    Candidate,
    Exact,
    Observed,
    Rounded,
    Score,
    decides_alone,
    exact_score,
    observe,
    with_clips,
)
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.rotation import Transform

SCORES = "scores"  # name of the saved scores (`Pieces`)
FIRST_WINDOWS = 2  # windows that every candidate is scored on
AGAIN = " again"
ILL = (
    "the transforms of {what} move the logits by more than rounding in {dtype} explains: their matrices are too "
    "ill-conditioned for it. Learn in float32 (--dtype float32)"
)


def rounds(windows: int) -> list[int]:
    """Numbers of windows that candidates which are left have seen after each round of a race.

    Under torch.distributed all are seen at once: every process has to decide alike.
    """
    if not decides_alone():
        return [windows]
    found = [min(FIRST_WINDOWS, windows)]
    while found[-1] < windows:
        found.append(min(2 * found[-1], windows))
    return found


@dataclass
class KindsLeft:
    """Kinds of transforms in the order in which they are tried: those that are not kept once more, after others were.

    waiting: in order. again: those that are or were tried for a second time.
    """

    waiting: list[str]
    again: set[str] = field(default_factory=set)
    missed: list[str] = field(default_factory=list)

    def tried(self, kind: str, *, kept: bool) -> None:
        """Count a try of a kind that waits."""
        self.waiting.remove(kind)
        if kept:
            self.waiting += self.missed
            self.again |= set(self.missed)
            self.missed = []
        elif kind not in self.again:
            self.missed.append(kind)


class Selection:
    """Selection among candidates that are added one by one: the one with the least KL leads, the first if tied.

    model: with its gains fused. scheme: what is quantized. share: part of the squared error of weights that counts.
    clip_windows: tokens on which clip ratios are searched. held_out: tokens for scoring. stage: progress callback
    (name, done, total). pieces: where scores are saved, and a run resumes from.
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
        *,
        share: float = 1.0,
    ):
        self.model, self.plan, self.scheme, self.stage, self.pieces = model, plan, scheme, stage, pieces
        self.clip_windows, self.held_out = clip_windows, held_out
        self.rounded = Rounded(model, plan, scheme, share)
        self.exact = {"clips": Exact(model, clip_windows), "held-out": Exact(model, held_out)}
        saved = pieces.load(SCORES) if pieces else None
        self.found: dict[str, Any] = saved[1]["found"] if saved else {"clips": {}, "seen": {}}
        self.candidates: dict[str, Candidate] = {}
        self.scores: dict[str, Score] = {}  # including the 16-bit model
        # The free transforms of the leader; those of scales and values are fused into the model.
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
        """Score random rotations, with the clip ratios found for the first."""
        first = next(iter(rotations))
        clipped = self._clipped(first, Candidate(rotations[first]))
        made = {name: replace(clipped, rotations=found) for name, found in rotations.items()}
        if EXACT not in self.found:
            self.found[EXACT] = exact_score(self.rounded, self.exact["held-out"]).to_dict()
        self.scores |= {**self._race(made, halving=True), EXACT: Score(**self.found[EXACT])}
        self.candidates |= made

    def enter(self, name: str, rotations: Mapping[str, Transform], free: Mapping[str, Transform] | None = None) -> None:
        """Score one candidate.

        free: further transforms, which are fused into the model where they can be if the candidate leads.
        """
        both = {**self.free, **(free or {})}
        if not self._fits(both):
            raise LearningError(ILL.format(what=name, dtype=self.model.dtype))
        before = self.leader
        made = self._clipped(name, Candidate(rotations, both))
        self.scores |= self._race({before: self.candidates[before], name: made})
        self.candidates[name] = made
        if self.leader == name:
            self._keep(both)

    def set_aside(self, kinds: Sequence[Kind]) -> None:
        """Leave out kinds of transforms of the leader that belong to its rotations, before others are learned."""
        self.free = {name: found for name, found in self.free.items() if kind_of(self.plan.space[name]) not in kinds}

    def enter_kinds(
        self,
        name: str,
        parts: Sequence[Mapping[str, Transform]],
        kinds: Sequence[str],
        own_clips: Callable[[], bool] = lambda: True,
    ) -> dict[str, dict[str, Any]]:
        """Try parts of a candidate one after another, each kept if it lowers KL; what is kept is then a candidate.

        A part that is not kept is tried once more if others were kept after it: where one site costs most of KL, what
        others gain is lost in it.

        Args:
            name: of the candidate.
            parts: free transforms.
            kinds: what each part is called.
            own_clips: whether clip ratios are searched for what is kept; asked after the kinds were tried.

        Returns:
            For every part that is not empty, its KL (None if rounding alone would move the logits too much) and whether
            it was kept.
        """
        label, start = self.leader, replace(self.leading, free=self.free)
        best, given = self.scores[label], {kind: part for kind, part in zip(kinds, parts, strict=True) if part}
        if self.free != self.leading.free:  # some of the leader's are set aside
            label = f"{label} without what is set aside"
            best = self._race({label: start})[label]
        current, left = start, KindsLeft(list(given))
        found = {kind: {"kl": None, "kept": False} for kind in given}
        while left.waiting:
            kind = left.waiting[0]
            more = replace(current, free={**current.free, **given[kind]})
            lower = False
            if self._fits(more.free):
                tried = f"{name}: {kind}{AGAIN if kind in left.again else ''}"
                scores = self._race({label: current, tried: more}, known=best)
                lower = scores[tried].kl < scores[label].kl
                found[kind] = {"kl": scores[tried].kl, "kept": lower}
                label, current, best = (tried, more, scores[tried]) if lower else (label, current, scores[label])
            left.tried(kind, kept=lower)
        if current is start:
            return found
        own = self._clipped(name, current) if own_clips() else current
        self.candidates[name], self.scores[name] = self._better((label, current), (name, own))
        if self.leader == name:
            self._keep(current.free)
        else:  # all windows say otherwise than those that the kinds were tried on
            found = {kind: {**tried, "kept": False} for kind, tried in found.items()}
        return found

    def _better(self, known: tuple[str, Candidate], own: tuple[str, Candidate]) -> tuple[Candidate, Score]:
        """The better of two that differ in clip ratios alone: those found on a few samples are not always better."""
        (label, before), (name, after) = known, own
        if before.clips != after.clips:
            scores = self._race({label: before, name: after})
            if scores[name].kl < scores[label].kl:
                return after, scores[name]
        score = self._race({label: before})[label]
        self.found["seen"][_key(name, before)] = self.found["seen"][_key(label, before)]
        return before, score

    def _fits(self, free: Mapping[str, Transform]) -> bool:
        """Whether transforms can be fused into the model: in half precision, rounding must not move the logits much."""
        if self.model.dtype not in HALF:
            return True  # a move would be a wrong plan, which is an error when they are fused
        fused = self._fuse({name: found for name, found in free.items() if name not in self.rounded.fused})
        fits = fused.kept
        fused.undo()  # bit for bit
        return fits

    def _keep(self, free: Mapping[str, Transform]) -> None:
        """Make these the free transforms of the leader, and fuse those into the model that can be."""
        new = {
            name: found
            for name, found in free.items()
            if is_fused(self.plan.space[name]) and name not in self.rounded.fused
        }
        if new and not self._fuse(new).kept:
            raise LearningError(ILL.format(what=self.leader, dtype=self.model.dtype))
        self.rounded.fused |= set(new)
        self.free = free

    def _fuse(self, free: Mapping[str, Transform]) -> Fused:
        for exact in self.exact.values():  # before the weights change: a run that is resumed compares with the same
            self.rounded.hold(exact, range(len(exact)))
        self.rounded.close()
        return fuse_free(self.model, self.plan, free, self.clip_windows[:1])

    def _race(
        self, candidates: Mapping[str, Candidate], *, halving: bool = False, known: Score | None = None
    ) -> dict[str, Score]:
        """Scores of candidates, the first of which wins if they are tied.

        halving: only the better half is left after each round. known: the score of the first one, if it need not be
        known on all windows: that of the winner is not measured on the rest then.
        """
        seen = {name: self._seen(name, candidate) for name, candidate in candidates.items()}
        left = list(candidates)
        best, progress = left[0], _Progress(self.stage, list(candidates), seen, len(self.held_out), halving)
        try:
            for count in rounds(len(self.held_out)):
                self._observe({name: candidates[name] for name in left}, seen, count, progress)
                order = sorted(left, key=lambda name: seen[name].score(count).kl)  # of equals the first stays first
                best, most = order[0], math.ceil(len(left) / 2) if halving else len(left)
                # What is behind one that drops out drops out, too: all that is left is better than all that is not.
                left = list(takewhile(lambda name, best=best: seen[name].beyond(seen[best]) < CLEAR, order[:most]))
                if len(left) == 1:
                    break
            if known is None:
                self._observe({best: candidates[best]}, seen, len(self.held_out), progress)
        finally:
            self.rounded.close()
        progress.end()
        base = seen[best].score() if known is None else _moved(known, seen[next(iter(candidates))], seen[best])
        return {name: base if name == best else _moved(base, seen[best], seen[name]) for name in candidates}

    def _observe(
        self, candidates: Mapping[str, Candidate], seen: Mapping[str, Observed], count: int, progress: "_Progress"
    ) -> None:
        """Score candidates on the first windows, `count` in all. The model stays rounded (`Rounded.close`)."""
        exact = self.exact["held-out"]
        while missing := range(min(len(seen[name]) for name in candidates), count):
            held = self.rounded.hold(exact, missing)
            for name, candidate in candidates.items():
                wanted = [number for number in held if number >= len(seen[name])]
                for number in wanted:
                    observe(self.rounded, candidate, exact, [number], seen[name])
                    progress.step()
                if wanted:
                    self._save(name, candidate, seen[name])

    def _seen(self, name: str, candidate: Candidate) -> Observed:
        """What was measured of a candidate, in this run or an interrupted one."""
        return Observed(**self.found["seen"].get(_key(name, candidate), {}))

    def _save(self, name: str, candidate: Candidate, seen: Observed) -> None:
        self.found["seen"][_key(name, candidate)] = seen.to_dict()
        if self.pieces:
            self.pieces.save(SCORES, {}, {"found": self.found})

    def _clipped(self, name: str, candidate: Candidate) -> Candidate:
        """The candidate with clip ratios of its own, found on a few samples."""
        key = _key(name, candidate)
        if key not in self.found["clips"]:
            self.found["clips"][key] = with_clips(self.rounded, candidate, self.exact["clips"]).clips
            if self.pieces:
                self.pieces.save(SCORES, {}, {"found": self.found})
        return replace(candidate, **self.found["clips"][key])


def _key(name: str, candidate: Candidate) -> str:
    return f"{name} {candidate.activation_clip} {candidate.kv_clip}"


def _moved(base: Score, one: Observed, other: Observed) -> Score:
    """The score of another candidate, from that of one and what they differ by on the windows that both have seen."""
    both = min(len(one), len(other))
    mine, theirs = one.score(both), other.score(both)
    if len(other) == len(one) and one.score() == base:
        return other.score()
    factor = theirs.perplexity / mine.perplexity if math.isfinite(theirs.perplexity) else math.inf
    return Score(base.kl + theirs.kl - mine.kl, base.perplexity * factor, other.score().tokens)


class _Progress:
    """Windows scored in a race, of those that it takes at most."""

    def __init__(
        self,
        stage: Callable[[str, int, int], None],
        names: Sequence[str],
        seen: Mapping[str, Observed],
        windows: int,
        halving: bool,
    ):
        self.stage, self.name = stage, f"score {'random rotations' if halving and len(names) > 1 else names[-1]}"
        self.done, self.total, before, left = 0, 0, 0, len(names)
        for count in rounds(windows):
            self.total += left * (count - before)
            before, left = count, math.ceil(left / 2) if halving else left
        self.total -= min(self.total, sum(map(len, seen.values())))

    def step(self) -> None:
        """Count a window."""
        self.done += 1
        self.stage(self.name, min(self.done, self.total), self.total)

    def end(self) -> None:
        """The rest is not needed."""
        if 0 < self.done < self.total:
            self.stage(self.name, self.total, self.total)
