"""Learned rotations, held against what needs no learning: the best of several random rotations of the same kind.

    1  random rotations of several seeds, with clip ratios, are judged on held-out text
    2  spaces that can have scales get those with which rounding costs least
    3  from the best of them, or from what was learned before, rotations are learned: on captured activations, end to
       end, or one after the other
    4  what was learned is judged on the same text; whatever has the least KL to the 16-bit model is kept

A learned rotation that loses is not kept: the record says which was, and all scores.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.checkpoint.run_directory import Pieces
from spinquant.compute.distributed import is_first
from spinquant.compute.hashing import digest
from spinquant.errors import LearningError
from spinquant.learning.activations import ActivationSite, collect
from spinquant.learning.channel_scaling import Sums, add_up, scale_sums, watches
from spinquant.learning.end_to_end import FROM_LOCAL, Step, learn_end_to_end
from spinquant.learning.fake_quant import fuse_gains, learning_scheme, shard_blocks
from spinquant.learning.layerwise import learn_locally, rounding_errors
from spinquant.learning.learned import described, to_start_from
from spinquant.learning.options import LearnOptions, Watch, check_used, learned_spaces
from spinquant.learning.selection import Selection
from spinquant.learning.sensitivity import predicted_kl, sensitive_sites
from spinquant.models.capture import device_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec, generator_for, make_rotations, random_signs
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Hadamard, Rotation
from spinquant.rotations.wrappers import Scaled, bare

LEARNED = ("given", "local", "end-to-end", "local+end-to-end")  # candidates that are neither random nor scales alone
CLIP_WINDOWS = 2
ROWS_OF_A_SAMPLE = 32  # rows of a site that one sample gives, so that they come from many
DRAWN_OF_A_SAMPLE = 16  # of rows that are drawn by what they count, few of which count much
SEEN_SAMPLES, SEEN_ROWS = 4, 256  # that errors of rounding are measured on where no rows were learned from
SCALED_BY = 32  # samples that scales are computed from, where the rows of local learning are not taken anyway


def learn(
    model: Any,
    scheme: Scheme,
    spec: RotationSpec,
    tokens: Tensor,
    held_out: Tensor,
    options: LearnOptions | None = None,
    *,
    start: LearnedRotations | None = None,
    store: Path | None = None,
    settings: Sequence[Any] = (),
    watch: Watch | None = None,
    family: FamilyLike | None = None,
) -> LearnedRotations:
    """Learn rotations for a model and a scheme, and keep them where they beat random ones on held-out text.

    The model's gains are fused and tied heads untied; its function stays.

    Args:
        model: a causal LM.
        scheme: what the rotations are for; its activations and KV cache are rounded while learning.
        spec: which rotations, of which type and block size; its seed draws the random rotations to beat.
        tokens: to learn from, int64 (samples, length).
        held_out: to score candidates on, int64 (windows, length).
        options: method and its settings; `LearnOptions()` by default.
        start: rotations learned for this model before, with their scales. They are scored like the random ones, and
            learned from where they win.
        store: a folder where the run is saved; the same call resumes from it.
        settings: whatever else the run depends on, such as a digest of the model's files.
        watch: what is told of stages and steps.
        family: a file that explains the model where no table does, see `use_family`.

    Returns:
        The rotations of least KL divergence, with scores of all candidates in their record.

    Raises:
        LearningError: there is nothing to learn, or a loss is not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import LearnOptions, LocalOptions, RotationSpec, learn, parse_scheme
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
        >>> options = LearnOptions("local", baselines=2, local=LocalOptions(steps=4))
        >>> learned = learn(LlamaForCausalLM(config), parse_scheme("A4"), RotationSpec("R1,R2"), tokens[:6],
        ...                 tokens[6:], options)
        >>> sorted(learned.rotations)
        ['layers.0.value', 'residual']
    """
    options, watch = options or LearnOptions(), watch or Watch()
    plan = plan_of(model, family=family)
    names = learned_spaces(plan, spec, scheme, options)
    if options.end_to_end.weights and scheme.weights is None:
        raise LearningError(f"scheme {scheme} leaves weights at 16 bits: there is nothing to round while learning")
    check_used(plan, spec, names, options)
    settings = [*settings, scheme, spec, options, digest(tokens), digest(held_out)]
    given: Mapping[str, Rotation] = {}
    if start is not None:
        settings.append(start.digest())
        given = to_start_from(start, plan, spec, options)
    pieces = None if store is None else Pieces(store, settings, writes=is_first())
    random = _baselines(plan, spec, options)
    fuse_gains(model, plan, next(iter(random.values())))
    if options.shard:
        shard_blocks(model, plan)
    rounds = learning_scheme(scheme, weights=options.end_to_end.weights)
    candidates = Selection(model, plan, rounds, tokens[:CLIP_WINDOWS], held_out, watch.stage, pieces)
    run = _Run(model, plan, scheme, rounds, spec, names, tokens, options, candidates, pieces, watch)
    run.score_baselines(random, given)
    sites = run.scale_channels()
    begin, sites = run.draw_signs(sites)
    if run.is_local:
        assert sites is not None
        run.learn_layerwise(begin, sites)
    if run.is_end_to_end:
        run.learn_end_to_end()
    return run.result()


@dataclass
class _Run:
    """One call of `learn`: what all of its steps work on, and what they have found.

    rounds: what of the scheme is rounded while learning. names: the rotation that each learned space belongs to. start:
    the candidate that learning starts from.
    """

    model: Any
    plan: Plan
    scheme: Scheme
    rounds: Scheme
    spec: RotationSpec
    names: Mapping[str, str]
    tokens: Tensor
    options: LearnOptions
    candidates: Selection
    pieces: Pieces | None
    watch: Watch
    start: str = ""
    steps: list[Step] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether rotations are learned on captured activations; of weights alone none are captured."""
        sampled = self.scheme.activations is not None or self.scheme.kv is not None
        return self.options.method in ("local", "local+end-to-end", "auto") and sampled

    @property
    def is_end_to_end(self) -> bool:
        """Whether rotations are learned through the quantized network; with `auto` where local learning lost."""
        method = self.options.method
        return method in ("end-to-end", "local+end-to-end") or (method == "auto" and self.candidates.leader != "local")

    def score_baselines(self, random: Mapping[str, Mapping[str, Rotation]], given: Mapping[str, Rotation]) -> None:
        """Score the random rotations, and those that were given to start from."""
        with _timed(self.clock, "baselines"):
            self.candidates.enter_all(random)
        if given:
            scales = {space: rotation.scale for space, rotation in given.items() if isinstance(rotation, Scaled)}
            self._score("given", {space: bare(rotation) for space, rotation in given.items()}, scales)
        self.start = self.candidates.leader
        self.record |= {"options": self.options.to_dict(), "scheme": self.scheme.to_dict(), "start": self.start}

    def scale_channels(self) -> list[ActivationSite] | None:
        """Find and score scales of channels; the rows to learn from, where one pass through the model serves both."""
        plan, options, candidates = self.plan, self.options, self.candidates
        begin, sites = candidates.leading.rotations, None
        sums = scale_sums(plan, begin, self.rounds) if options.scaling and not candidates.scales else {}
        sampled = set(_sampled(plan, self.names, options, self.spec))
        if sums and self.is_local and options.differentiates and not set(sums) & sampled:
            # What scales change is not among the rows.
            with _timed(self.clock, "local"):
                sites = self._collect(sums)
        elif sums:
            with _timed(self.clock, "scales"):
                add_up(
                    self.model,
                    plan,
                    sums,
                    self.rounds,
                    self.tokens[:SCALED_BY],
                    generator=generator_for(options.seed, "scales"),
                    checkpointing=options.local.checkpointing or options.end_to_end.checkpointing,
                    progress=lambda *n: self.watch.stage("find scales", *n),
                )
        if sums:
            self._score("scaled", begin, {space: both.scale() for space, both in sums.items()})
        self.record["scales"] = {space: [float(s.min()), float(s.max())] for space, s in candidates.scales.items()}
        return sites

    def draw_signs(
        self, sites: list[ActivationSite] | None
    ) -> tuple[Mapping[str, Rotation], list[ActivationSite] | None]:
        """The rotations to learn from, with the best of several signs for R3 and R4; and the rows to learn from."""
        begin = self.candidates.candidates[self.start].rotations
        if self.is_local or self.options.signs:
            with _timed(self.clock, "local"):
                sites = self._collect() if sites is None else sites
                begin = _with_signs(self.plan, begin, sites, self.options, self.names)
            if self.options.signs:
                self._score("random signs", begin)
        return begin, sites

    def learn_layerwise(self, begin: Mapping[str, Rotation], sites: Sequence[ActivationSite]) -> None:
        """Learn each space on its own activations, and score the result."""
        local = self.options.local
        own = [site for site in sites if site.space in self.names]
        with _timed(self.clock, "local"):
            found, curves = learn_locally(
                own,
                begin,
                local,
                centred=[space for space in self.names if self.plan.space[space].centred],
                seed=self.options.seed,
                device=device_of(self.model),
                pieces=self.pieces,
                report=lambda space, step, loss: self.watch.stage(f"learn {space}", step, local.steps),
            )
        learned = {**begin, **found}
        self._score("local", learned)
        self.record["errors"] = {"before": rounding_errors(own, begin), "after": rounding_errors(own, learned)}
        self.record["local_steps"] = curves
        if local.weighting == "fisher":
            self.record["predicted_kl"] = {"before": predicted_kl(own, begin), "after": predicted_kl(own, learned)}

    def learn_end_to_end(self) -> None:
        """Learn through the quantized network from what leads so far, and score the result."""
        options, candidates = self.options, self.candidates
        name = "end-to-end" if options.method == "end-to-end" else "local+end-to-end"
        through = options.end_to_end
        if candidates.leader == "local" or self.start == "given":
            through = replace(through, lr=FROM_LOCAL) if through.lr is None else through
        taken = replace(through, lr=through.length)
        self.record["options"] = replace(options, end_to_end=taken).to_dict()
        with _timed(self.clock, "end-to-end"):
            found, self.steps = learn_end_to_end(
                self.model,
                self.plan,
                candidates.leading.rotations,
                self.names,
                self.scheme,
                self.tokens,
                through,
                seed=options.seed,
                pieces=self.pieces,
                report=lambda step: self.watch.step(name, step, options.end_to_end.steps),
            )
        self._score(name, found)
        if not options.shard:  # blocks of a sharded model are not run one by one
            with _timed(self.clock, "judging"):
                seen = _seen(self.model, self.plan, self.names, self.rounds, self.tokens, options)
                before = candidates.candidates[self.start].rotations
                self.record["errors"] = {"before": rounding_errors(seen, before), "after": rounding_errors(seen, found)}

    def result(self) -> LearnedRotations:
        """The candidate that leads, and the record of all."""
        plan, candidates = self.plan, self.candidates
        kept = candidates.leading
        rotations = {n: Scaled(r, kept.scales[n]) if n in kept.scales else r for n, r in kept.rotations.items()}
        clips = {n: {"activations": c.activation_clip, "kv": c.kv_clip} for n, c in candidates.candidates.items()}
        record = self.record | {
            "rotation_of": {space.name: space.rotation for space in plan.spaces if space.name in rotations},
            "steps": [asdict(step) for step in self.steps],
            "kept": candidates.leader,
            "learned": candidates.leader in LEARNED,
            "clips": clips,
            "scores": {name: score.to_dict() for name, score in candidates.scores.items()},
            "seconds": self.clock,
        }
        return LearnedRotations(rotations, described(plan, kept.rotations, self.spec), record)

    def _score(self, name: str, rotations: Mapping[str, Rotation], scales: Mapping[str, Tensor] | None = None) -> None:
        with _timed(self.clock, "judging"):
            self.candidates.enter(name, rotations, scales)

    def _collect(self, sums: Mapping[str, Sums] | None = None) -> list[ActivationSite]:
        """Rows to learn from. sums: what is added up on the way, where gradients are taken."""
        local, watch = self.options.local, self.watch
        spaces = _sampled(self.plan, self.names, self.options, self.spec)
        given: dict[str, Any] = {"rows": local.rows, "generator": generator_for(self.options.seed, "rows")}
        given["progress"] = lambda *n: watch.stage("capture activations", *n)
        if local.weighting == "fisher":
            tokens = self.tokens[: max(1, local.rows // DRAWN_OF_A_SAMPLE)]
            given["checkpointing"] = local.checkpointing
            beside = watches(sums or {})
            return sensitive_sites(self.model, self.plan, spaces, self.rounds, tokens, beside=beside, **given)
        tokens = self.tokens[: max(1, local.rows // ROWS_OF_A_SAMPLE)]
        return collect(self.model, self.plan, spaces, self.rounds, tokens, **given)


def _baselines(plan: Plan, spec: RotationSpec, options: LearnOptions) -> dict[str, dict[str, Rotation]]:
    """Random rotations by name; one where nothing about them is random."""
    fixed = all(spec.type_of(name) == "hadamard" for name in spec.rotations)
    count = 1 if fixed else options.baselines
    return {f"random {i}": make_rotations(plan, replace(spec, seed=spec.seed + i)) for i in range(count)}


def _seen(
    model: Any, plan: Plan, names: Mapping[str, str], scheme: Scheme, tokens: Tensor, options: LearnOptions
) -> list[ActivationSite]:
    """A few rows of all that was learned, for errors of rounding before and after."""
    generator = generator_for(options.seed, "seen")
    return collect(model, plan, list(names), scheme, tokens[:SEEN_SAMPLES], rows=SEEN_ROWS, generator=generator)


def _sampled(plan: Plan, names: Mapping[str, str], options: LearnOptions, spec: RotationSpec) -> list[str]:
    """The spaces whose rows are learned from, or decide on signs."""
    online = [s.name for r in ("R3", "R4") if r in spec.rotations and options.signs for s in plan.spaces_of(r)]
    return [*names, *(space for space in online if space not in names)]


def _with_signs(
    plan: Plan,
    rotations: Mapping[str, Rotation],
    sites: Sequence[ActivationSite],
    options: LearnOptions,
    names: Mapping[str, str],
) -> Mapping[str, Rotation]:
    """Hadamard rotations at run time get the best of several random signs, layer by layer."""
    found = dict(rotations)
    for space, rotation in rotations.items() if options.signs else ():
        own = [site for site in sites if site.space == space]
        if plan.space[space].rotation not in ("R3", "R4") or space in names or not isinstance(rotation, Hadamard):
            continue
        generator = generator_for(options.seed, f"signs {space}")
        draws = [Hadamard(rotation.order, random_signs(rotation.order, generator)) for _ in range(options.signs)]

        errors = [sum(rounding_errors(own, {space: candidate}).values()) for candidate in (rotation, *draws)]
        found[space] = (rotation, *draws)[errors.index(min(errors))]
    return found


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a block to a clock."""
    start = time.perf_counter()
    try:
        yield
    finally:
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
