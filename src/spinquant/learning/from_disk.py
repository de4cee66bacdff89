"""`learn --method closed-form` for a model larger than memory: walks through its blocks, one in memory at a time.

Everything is computed and decided as in memory (`learn.py`, `selection.py`), but candidates that are scored next to
each other there share a walk here, and every walk reads the checkpoint once:

    clip ratios      all ratios of activations in one walk, then all of the KV cache in another
    random           all random rotations in one walk
    moments          one walk forward and back (`walk.py`)
    kinds            scales, scales and values, .. in one walk, as if each was kept; after one that is not, the kinds
                     behind it again without it, and it once more after others were kept
    closed form      what is kept, with clip ratios of its own

That is at most `MOST_WALKS` walks, one of them forward and back, however large the model is. Everything found is a
piece on disk; a rerun goes on within the walk that was interrupted.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from spinquant.calibration.sequential import Home
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import LearningError
from spinquant.learning.closed_form_steps import moment_samples
from spinquant.learning.fake_quant import learning_scheme
from spinquant.learning.free_transforms import KINDS, closed_form_transforms, free_spaces, kind_of
from spinquant.learning.learn import CLIP_WINDOWS, baselines_of
from spinquant.learning.learn_run import CLOSED_FORM, selected
from spinquant.learning.moments import sites_of
from spinquant.learning.options import LearnOptions, Watch, check_used, learned_spaces, weights_share
from spinquant.learning.scoring import Candidate, Score, searched_clips
from spinquant.learning.selection import SCORES, KindsLeft
from spinquant.learning.walk import walked_moments
from spinquant.learning.walk_scores import walked_scores
from spinquant.models.context import check_context
from spinquant.models.modules import check_causal
from spinquant.models.tokens import check_tokens
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec, generator_for
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved, to_save
from spinquant.rotations.transforms import condition

METHODS = ("random", CLOSED_FORM)  # methods for which a model need not be in memory
# Clip ratios and scores of random rotations, and of what is kept in the end: 3 walks each; moments; and two walks for
# each kind but one, if one of them is kept at the end of the first round and each is tried alone.
MOST_WALKS = 2 * 3 + 1 + 2 * len(KINDS) - 1


def check_from_disk(options: LearnOptions, *, start: bool) -> None:
    """Raise LearningError for options that need the model in memory. start: whether initial rotations are given."""
    needs = {
        f"--method {options.method}": options.method not in METHODS,
        "--transforms": options.method == "random" and options.transforming,
        "--signs": bool(options.signs),
        "--moments weights": options.moments != "gradients",
        "--start": start,
    }
    wrong = next((name for name, needed in needs.items() if needed), None)
    if wrong is not None:
        raise LearningError(
            f"{wrong} needs the model in memory, where it does not fit: use --method closed-form, which reads it block "
            "by block, without --signs, --start, --moments and (with --method random) --transforms; or give more "
            "--memory, if there is more"
        )


def learn_from_disk(
    home: Home,
    plan: Plan,
    scheme: Scheme,
    spec: RotationSpec,
    tokens: Tensor,
    held_out: Tensor,
    options: LearnOptions,
    pieces: Pieces,
    *,
    watch: Watch,
) -> LearnedRotations:
    """Compute the transforms that cost nothing, in closed form, for a model whose blocks are loaded one at a time.

    Args:
        home: where the weights are, with the gains of norms fused (`gains_alone`), not rotated.
        plan: plan of the model.
        scheme: what the transforms are for.
        spec: which rotations; its seed is that of the random ones.
        tokens: training tokens, int64 (samples, length).
        held_out: tokens to score candidates on, int64 (windows, length).
        options: method closed-form or random.
        pieces: where the run is saved, and resumed from.
        watch: progress callbacks.

    Returns:
        The rotations and transforms of the least KL, with the record of `learn`; "walks" is how often the checkpoint
        was read in this run.

    Raises:
        LearningError: as `learn`, and for options that need the model in memory.
        ArchitectureError: blocks read more than hidden states.
        TextError: tokens are longer than the model's context.
    """
    check_from_disk(options, start=False)
    check_causal(home.model, "learning rotations, which are scored by the tokens that they predict,")
    check_tokens(tokens, home.model, "training tokens", LearningError, least=2)
    check_tokens(held_out, home.model, "held-out tokens", LearningError, least=2)
    check_context(home.model.config, max(tokens.shape[-1], held_out.shape[-1]), "give shorter samples")
    check_used(plan, spec, scheme, learned_spaces(plan, spec, scheme, options), options)
    run = _Run(home, plan, scheme, options, tokens, held_out, pieces, watch)
    run.score_random(baselines_of(plan, spec, options))
    if options.transforming:
        run.transform()
    record = {"options": options.to_dict(), "scheme": scheme.to_dict(), **run.record, "seconds": run.clock}
    return selected(plan, spec, run.candidates, run.scores, record)


class _Run:
    """Candidates and their scores, one walk after another.

    learning: the scheme during learning. walks: walks so far in this process.
    """

    def __init__(
        self,
        home: Home,
        plan: Plan,
        scheme: Scheme,
        options: LearnOptions,
        tokens: Tensor,
        held_out: Tensor,
        pieces: Pieces,
        watch: Watch,
    ):
        self.home, self.plan, self.scheme, self.options = home, plan, scheme, options
        self.tokens, self.held_out, self.pieces, self.watch = tokens, held_out, pieces, watch
        self.learning = learning_scheme(scheme, weights=False)
        self.judged, self.share = learning_scheme(scheme, weights=True), weights_share(options)
        kept = pieces.load(SCORES)
        self.found: dict[str, Any] = kept[1]["found"] if kept else {}
        self.candidates: dict[str, Candidate] = {}
        self.scores: dict[str, Score] = {}
        self.record: dict[str, Any] = {"walks": 0}
        self.clock: dict[str, float] = {}

    @property
    def leader(self) -> str:
        """Name of the best candidate so far."""
        return min(self.candidates, key=lambda name: self.scores[name].kl)

    def score_random(self, random: Mapping[str, Mapping[str, Transform]]) -> None:
        """Score random rotations with the clip ratios of the first."""
        first = next(iter(random))
        made = {name: Candidate(rotations) for name, rotations in random.items()}
        clipped = self._clipped("random rotations", made[first])
        self.candidates = {name: replace(clipped, rotations=one.rotations) for name, one in made.items()}
        self.scores = self._scores("random rotations", self.candidates, self.held_out)
        self.record["start"] = self.leader

    def _again(self, name: str, label: str, candidate: Candidate) -> None:
        """Give a candidate clip ratios of its own, if they are better than those that it was scored with."""
        own = self._clipped(label, candidate)
        if own.clips == candidate.clips:
            return
        score = self._scores(label, {name: own}, self.held_out)[name]
        if score.kl <= self.scores[name].kl:
            self.candidates[name], self.scores[name] = own, score

    def transform(self) -> None:
        """Compute the closed-form transforms, and keep each kind if it lowers KL."""
        leader = self.leader
        start, best = self.candidates[leader], self.scores[leader]
        spaces = free_spaces(self.plan, start.rotations, self.scheme)
        if not spaces:
            return
        found = self._closed_form([name for names in spaces.values() for name in names], start.rotations)
        parts: dict[str, dict[str, Transform]] = {}
        for kind in KINDS:
            part = {n: t for n, t in found.items() if kind_of(self.plan.space[n]) == kind}
            if part:
                parts[kind] = part
        judged: dict[str, dict[str, Any]] = {}
        free: dict[str, Transform] = {}
        left = KindsLeft(list(parts))
        while left.waiting:
            free, best = self._keep(left, parts, free, start, best, judged)
        self.record["closed_form"] = judged
        if free:
            self.candidates[CLOSED_FORM], self.scores[CLOSED_FORM] = replace(start, free=free), best
            self._again(CLOSED_FORM, CLOSED_FORM, self.candidates[CLOSED_FORM])

    def _keep(
        self,
        left: KindsLeft,
        parts: Mapping[str, Mapping[str, Transform]],
        free: Mapping[str, Transform],
        start: Candidate,
        best: Score,
        judged: dict[str, dict[str, Any]],
    ) -> tuple[dict[str, Transform], Score]:
        """Score kinds one on top of the other in one walk, and keep them up to the first that does not lower KL.

        Returns what is kept, and its score.
        """
        kinds, together, tried = list(left.waiting), dict(free), {}
        for kind in kinds:
            together = {**together, **parts[kind]}
            tried[kind] = replace(start, free=together)
        label = f"{CLOSED_FORM}: {', '.join(kinds)}" + (f" after {', '.join(judged)}" if judged else "")
        scores = self._scores(label, tried, self.held_out)
        kept = dict(free)
        for kind in kinds:
            lower = scores[kind].kl < best.kl
            about = {"spaces": len(parts[kind]), "condition": max(map(condition, parts[kind].values()))}
            about["moments"] = self.options.moments
            judged[kind] = {"kl": scores[kind].kl, "kept": lower, **about}
            left.tried(kind, kept=lower)
            if not lower:
                break
            kept, best = {**kept, **parts[kind]}, scores[kind]
        return kept, best

    def _closed_form(self, spaces: Sequence[str], rotations: Mapping[str, Transform]) -> dict[str, Transform]:
        kept = self.pieces.load(CLOSED_FORM)
        if kept is not None:
            return saved(kept[1]["about"], kept[0])

        scheme = learning_scheme(self.scheme, weights=True)
        with self._walking(CLOSED_FORM):
            moments = walked_moments(
                self.home,
                self.plan,
                sites_of(self.plan, spaces, scheme, rotations),
                scheme,
                moment_samples(self.tokens),
                self.pieces,
                generator=generator_for(self.options.seed, "moments"),
                share=weights_share(self.options),
                progress=lambda *n: self.watch.stage("collect moments", *n),
            )
            found = closed_form_transforms(self.plan, moments, dtype=self.home.model.dtype)
        about, tensors = to_save(found)
        self.pieces.save(CLOSED_FORM, tensors, {"about": about})
        return found

    def _clipped(self, label: str, candidate: Candidate) -> Candidate:
        """The candidate with the best clip ratios on the first training samples."""
        known: dict[str, float] = {}

        def errors(tried: Sequence[Candidate]) -> Callable[[Candidate], float]:
            new = {str(one.clips): one for one in tried if str(one.clips) not in known}
            part = "activations" if len({one.activation_clip for one in tried}) > 1 else "KV cache"
            scores = self._scores(f"{label}: clip ratios of {part}", new, self.tokens[:CLIP_WINDOWS])
            known.update({name: scores[name].kl for name in new})
            return lambda one: known[str(one.clips)]

        return searched_clips(candidate, self.learning, errors)

    def _scores(self, label: str, candidates: Mapping[str, Candidate], windows: Tensor) -> dict[str, Score]:
        """Scores of one walk, or those of an interrupted run."""
        if label not in self.found:
            with self._walking("judging"):
                scores = walked_scores(
                    self.home,
                    self.plan,
                    candidates,
                    self.judged,
                    windows,
                    share=self.share,
                    pieces=self.pieces,
                    label=label,
                    progress=lambda *n: self.watch.stage(f"score {label}", *n),
                )
            self.found[label] = {name: score.to_dict() for name, score in scores.items()}
            self.pieces.save(SCORES, {}, {"found": self.found})
        return {name: Score(**score) for name, score in self.found[label].items()}

    @contextmanager
    def _walking(self, name: str) -> Iterator[None]:
        """Count a walk, and add the seconds that it takes to the clock."""
        start = time.perf_counter()
        yield
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - start
        self.record["walks"] += 1
