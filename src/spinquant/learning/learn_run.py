"""One call of `learn`: its inputs, the steps that learn rotations, and what they have found so far."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.learning.activations import ActivationSite, collect
from spinquant.learning.auto import Allowed
from spinquant.learning.end_to_end import FROM_LOCAL, Step, learn_end_to_end
from spinquant.learning.free_transforms import Kind, composed, kind_of, parted
from spinquant.learning.joint_sites import JointSite, collect_jointly
from spinquant.learning.joint_steps import joint_spaces, learn_together
from spinquant.learning.layerwise import learn_locally, rounding_errors
from spinquant.learning.learned import spec_of
from spinquant.learning.options import LearnOptions, Watch, learns_r1, learns_scales, weights_share
from spinquant.learning.rows import error_rows, row_samples, sampled_spaces, with_signs
from spinquant.learning.scoring import Candidate, Score
from spinquant.learning.selection import Selection
from spinquant.learning.sensitivity import predicted_kl
from spinquant.models.capture import device_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec, generator_for
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved, to_save

# Candidates: transforms in closed form, and those of the rotations that were kept.
CLOSED_FORM, AFTER = "closed-form", "closed-form after learning"
LEARNED = ("given", CLOSED_FORM, AFTER, "local", "end-to-end", "local+end-to-end")  # those that were learned


@dataclass
class Run:
    """One call of `learn`: the inputs of all its steps, and their results so far.

    learning: the scheme during learning (`learning_scheme`). names: the name of the rotation of each learned space.
    start: name of the candidate that learning starts from. joint: what R1 and the scales of norms are learned from, by
    space. clock: seconds by step.
    """

    model: Any
    plan: Plan
    scheme: Scheme
    learning: Scheme
    spec: RotationSpec
    names: Mapping[str, str]
    tokens: Tensor
    options: LearnOptions
    candidates: Selection
    pieces: Pieces | None
    watch: Watch
    allowed: Allowed
    start: str = ""
    joint: dict[str, list[JointSite]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)

    @property
    def asks_local(self) -> bool:
        """Whether the method learns on captured activations, which needs quantized activations or KV cache."""
        sampled = self.scheme.activations is not None or self.scheme.kv is not None
        return self.options.method in ("local", "local+end-to-end", "auto") and sampled

    @property
    def is_local(self) -> bool:
        """Whether rotations are learned on captured activations: the method does, and there is time for it."""
        return self.asks_local and self.allowed.local(self.options.local) is not None

    @property
    def is_end_to_end(self) -> bool:
        """Whether rotations are learned end to end; with method `auto`, if there is time or local does not lead."""
        method, allowed = self.options.method, self.allowed
        wanted = allowed.is_limited or self.candidates.leader != "local"
        asked = method in ("end-to-end", "local+end-to-end") or (method == "auto" and wanted)
        return asked and allowed.end_to_end(self.options.end_to_end) is not None

    @property
    def learns_r1(self) -> bool:
        """Whether R1 is learned."""
        return learns_r1(self.plan, self.names, self.options)

    @property
    def joint_spaces(self) -> list[str]:
        """The spaces whose rotation local learning learns together with the scales of norms."""
        if not (learns_scales(self.options) and self.asks_local):
            return []
        rotations = self.candidates.candidates[self.start].rotations
        return [space for space in joint_spaces(self.plan, rotations, self.learning) if space in self.names]

    @property
    def keeps_scales(self) -> bool:
        """Whether scales of norms still fit after learning: R1 is learned with them, or not on captured activations."""
        return bool(self.joint_spaces) or not (self.asks_local and self.learns_r1)

    @property
    def keys(self) -> dict[str, Transform]:
        """The transforms of keys of the leader, which come before R3, by space."""
        return self._free_of("keys")

    def _free_of(self, kind: Kind) -> dict[str, Transform]:
        return {name: found for name, found in self.candidates.free.items() if kind_of(self.plan.space[name]) == kind}

    def score_baselines(self, random: Mapping[str, Mapping[str, Transform]], given: Mapping[str, Transform]) -> None:
        """Score the random rotations, and the initial ones if there are any; learning starts from the best."""
        with self.timed("baselines"):
            self.candidates.enter_all(random)
        if given:
            rotations, free = parted(self.plan, given)
            self.score("given", rotations, free)
        self.start = self.candidates.leader
        self.record |= {"options": self.options.to_dict(), "scheme": self.scheme.to_dict(), "start": self.start}

    def saved_or(self, name: str, compute: Callable[[], dict[str, Transform]]) -> dict[str, Transform]:
        """Transforms by space, or those that an interrupted run had computed."""
        piece = name.replace(" ", "-")
        kept = self.pieces.load(piece) if self.pieces else None
        if kept is not None:
            return saved(kept[1]["about"], kept[0])
        found = compute()
        if self.pieces:
            about, tensors = to_save(found)
            self.pieces.save(piece, tensors, {"about": about})
        return found

    def draw_signs(self) -> tuple[Mapping[str, Transform], list[ActivationSite] | None]:
        """Search random signs for R3 and R4 if asked for; returns the initial rotations, and the rows to learn from."""
        initial, sites = self.candidates.candidates[self.start].rotations, None
        if self.is_local or self.options.signs:
            with self.timed("local"):
                sites = self._collect_local()
                initial = with_signs(self.plan, initial, sites, self.options, self.names)
            if self.options.signs:
                self.score("random signs", initial)
        return initial, sites

    def learn_layerwise(self, initial: Mapping[str, Transform], sites: Sequence[ActivationSite]) -> None:
        """Learn the rotation of each space on its captured activations, and score the result."""
        local, joint = self.allowed.local(self.options.local), self.joint_spaces
        assert local is not None
        own = [site for site in sites if site.space in self.names]
        common: dict[str, Any] = {"seed": self.options.seed, "device": device_of(self.model), "pieces": self.pieces}
        free: dict[str, Transform] = {}
        with self.timed("local"):
            found, curves = learn_locally(
                [site for site in own if site.space not in joint],
                initial,
                local,
                centred=[space for space in self.names if self.plan.space[space].centred],
                report=lambda space, step, losses: self.watch.stage(f"learn {space}", step, local.steps),
                **common,
            )
            if joint:
                (turned, free), losses, costs = learn_together(
                    self.plan,
                    self.joint,
                    initial,
                    self.scheme.weights,
                    local,
                    given=self.candidates.free if self.start == "given" else None,
                    report=lambda space, step: self.watch.stage(f"learn {space}", step, local.steps),
                    **common,
                )
                found, curves = {**found, **turned}, {**curves, **losses}
                self.record["joint"] = costs
        learned = {**initial, **found}
        self.score("local", learned, free)
        after = {**learned, **free}
        self.record["errors"] = {"before": rounding_errors(own, initial), "after": rounding_errors(own, after)}
        self.record["local_steps"] = curves
        if local.weighting == "fisher":
            self.record["predicted_kl"] = {"before": predicted_kl(own, initial), "after": predicted_kl(own, after)}

    def learn_end_to_end(self) -> None:
        """Learn through the quantized network, starting from the best candidate so far, and score the result."""
        options, candidates = self.options, self.candidates
        through = self.allowed.end_to_end(options.end_to_end)
        assert through is not None
        # Local learning may have been left out: for want of time, or because nothing is quantized that it sees.
        alone = options.method == "end-to-end" or "local" not in candidates.candidates
        name = "end-to-end" if alone else "local+end-to-end"
        if candidates.leader == "local" or self.start == "given":
            through = replace(through, lr=FROM_LOCAL) if through.lr is None else through
        norms = self._free_of("norms")
        initial = candidates.leading.rotations
        taken = replace(through, lr=through.length)
        self.record["options"] = replace(options, end_to_end=taken).to_dict()
        with self.timed("end-to-end"):
            found, self.steps = learn_end_to_end(
                self.model,
                self.plan,
                {**initial, **norms},
                self.names,
                self.scheme,
                self.tokens,
                through,
                keys=self.keys,
                seed=options.seed,
                pieces=self.pieces,
                report=lambda step: self.watch.step(name, step, through.steps),
            )
        self.score(name, {space: found[space] for space in initial}, {space: found[space] for space in norms})
        if not options.shard:  # capturing activations runs block by block, which a sharded model does not support
            with self.timed("judging"):
                rows = error_rows(self.model, self.plan, self.names, self.learning, self.tokens, options, self.keys)
                before = candidates.candidates[self.start].rotations
                self.record["errors"] = {"before": rounding_errors(rows, before), "after": rounding_errors(rows, found)}

    def result(self) -> LearnedRotations:
        """The best candidate, with the record of the run."""
        record = self.record | {"steps": [asdict(step) for step in self.steps], "seconds": self.clock}
        record |= self.allowed.budget.to_record()
        return selected(self.plan, self.spec, self.candidates.candidates, self.candidates.scores, record)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that a `with` block takes to the clock."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - start

    def score(self, name: str, rotations: Mapping[str, Transform], free: Mapping[str, Transform] | None = None) -> None:
        with self.timed("judging"):
            self.candidates.enter(name, rotations, free)

    def _collect_local(self) -> list[ActivationSite]:
        """Capture the rows that local learning learns from, and that signs are selected on."""
        local = self.options.local
        spaces = sampled_spaces(self.plan, self.names, self.options, self.spec)
        tokens = self.tokens[: row_samples(local)]
        how: dict[str, Any] = {"rows": local.rows, "generator": generator_for(self.options.seed, "rows")}
        how["keys"] = self.keys
        how["progress"] = lambda *n: self.watch.stage("capture activations", *n)
        if local.weighting != "fisher":
            return collect(self.model, self.plan, spaces, self.learning, tokens, **how)
        sites, self.joint = collect_jointly(
            self.model,
            self.plan,
            spaces,
            self.joint_spaces,
            self.learning,
            tokens,
            weights=self.scheme.weights,
            share=weights_share(self.options),
            seed=self.options.seed,
            checkpointing=self.options.checkpointing,
            **how,
        )
        return sites


def selected(
    plan: Plan,
    spec: RotationSpec,
    candidates: Mapping[str, Candidate],
    scores: Mapping[str, Score],
    record: Mapping[str, Any],
) -> LearnedRotations:
    """The candidate with the least KL, the first if tied, with the record of the run."""
    leader = min(candidates, key=lambda name: scores[name].kl)
    kept = candidates[leader]
    rotations = composed(kept.rotations, kept.free)
    # Scales of norms are in the coordinates of R1, or of the model if R1 is not applied: then they go with any.
    beside = {s.name: name for name in reversed(spec.rotations) for s in plan.scales_beside(name)}
    about = {
        "rotation_of": {s.name: s.rotation or beside.get(s.name, "") for s in plan.spaces if s.name in rotations},
        "kept": leader,
        "learned": leader in LEARNED,
        "clips": {n: {"activations": c.activation_clip, "kv": c.kv_clip} for n, c in candidates.items()},
        "scores": {name: score.to_dict() for name, score in scores.items()},
    }
    return LearnedRotations(rotations, spec_of(plan, kept.rotations, spec), {"steps": [], **record, **about})
