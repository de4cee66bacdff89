"""`learn`: learn rotations for a quantization scheme, and keep them only if they beat random ones on held-out text.

    1  Score random rotations of several seeds on held-out text, with clip ratios found by a search.
    2  Compute the transforms that cost nothing, in closed form, and keep those that lower KL.
    3  Learn from the best candidate so far, or from rotations learned before: on captured activations (local), end to
       end through the quantized network, or one after the other.
    4  Score the learned rotations on the same text, compute the transforms that depend on them, and select the
       candidate with the lowest KL to the 16-bit model.

The record lists the scores of all candidates and which one was selected.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.compute.distributed import is_first
from spinquant.compute.hashing import digest
from spinquant.errors import LearningError
from spinquant.learning.activations import ActivationSite, collect
from spinquant.learning.end_to_end import FROM_LOCAL, Step, learn_end_to_end
from spinquant.learning.fake_quant import fuse_gains, learning_scheme, shard_blocks
from spinquant.learning.free_transforms import (
    KINDS,
    Kind,
    closed_form_transforms,
    composed,
    free_spaces,
    kind_of,
    parted,
)
from spinquant.learning.joint_sites import JointSite, collect_jointly
from spinquant.learning.joint_steps import joint_spaces, learn_together, start_of, transforms_of
from spinquant.learning.layerwise import learn_locally, rounding_errors
from spinquant.learning.learned import initial_rotations, spec_of
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.options import LearnOptions, Watch, check_used, learned_spaces
from spinquant.learning.rows import error_rows, sampled_spaces, with_signs
from spinquant.learning.selection import Selection
from spinquant.learning.sensitivity import predicted_kl
from spinquant.models.capture import device_of
from spinquant.models.context import check_context
from spinquant.models.modules import check_causal, check_changeable, in_eval_mode
from spinquant.models.tokens import check_model, check_tokens
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme, parse_scheme
from spinquant.rotations.factory import RotationSpec, generator_for, make_rotations
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved, to_save
from spinquant.rotations.transforms import condition

FIRST: tuple[Kind, ...] = ("scales", "values")  # closed-form transforms that rotations are learned after
AFTER = "closed-form after learning"  # the candidate with the others, in the coordinates of the rotations kept
CLIP_WINDOWS = 2  # training samples that clip ratios are searched on
ROWS_PER_SAMPLE = 32  # rows of a site taken from one sample; few, so that they come from many samples
FISHER_ROWS_PER_SAMPLE = 16  # the same where rows are sampled by weight; fewer, since few rows weigh much
MOMENT_SAMPLES = 32  # samples for the moments of closed-form transforms
CLOSED_FORM = "closed-form"  # the candidate, and the name of its saved transforms
SORTED = "closed-form R1"  # the candidate whose R1 and scales of norms are in closed form (`joint.py`)
SORTED_SAMPLES = 16  # samples that it is made from
LEARNED = (
    "given",
    CLOSED_FORM,
    SORTED,
    AFTER,
    "local",
    "end-to-end",
    "local+end-to-end",
)  # candidates that were learned


def learn(
    model: Any,
    scheme: Scheme | str,
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
    """Learn rotations for a model and a scheme, and keep them if they beat random rotations on held-out text.

    The gains of norms, and the scales and matrices of values that are kept, are fused into the model's weights and a
    tied head is untied, in place; its function is unchanged. It is not rotated: pass the rotations found to `rotate` or
    `quantize`, with a newly loaded model.

    Args:
        model: A causal language model of transformers.
        scheme: The quantization scheme to learn for, such as "W4A4KV4". Its activations and KV cache are quantized
            during learning, weights only if the options ask for it.
        spec: Which rotations, of which type and block size; its seed is that of the random baselines.
        tokens: Training tokens, int64 (samples, length).
        held_out: Tokens to score candidates on, int64 (windows, length).
        options: The method and its settings. Default: `LearnOptions()`.
        start: Rotations learned for this model before, with their scales. They are scored like the random ones, and
            learning starts from them if they score best.
        store: Folder where the run is saved; repeat the call to resume. Default: not saved.
        settings: Whatever else the run depends on, such as a digest of the model's files. A run with other settings
            is not resumed.
        watch: Progress callbacks.
        family: A family file for a model without a built-in table, see `use_family`.

    Returns:
        The rotations with the lowest KL divergence, and the scores of all candidates in their record.

    Raises:
        LearningError: There is nothing to learn, an option would have no effect, or a loss is not finite.
        ArchitectureError: As in `rotate`.
        CheckpointError: Weights are not in memory.
        TextError: Tokens are longer than the model's context.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import LearnOptions, LocalOptions, RotationSpec, learn, parse_scheme
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
        >>> options = LearnOptions("local", baselines=2, transforms=False, local=LocalOptions(steps=4))
        >>> learned = learn(LlamaForCausalLM(config), parse_scheme("A4"), RotationSpec("R1,R2"), tokens[:6],
        ...                 tokens[6:], options)
        >>> sorted(learned.rotations)
        ['layers.0.value', 'residual']
    """
    options, watch = options or LearnOptions(), watch or Watch()
    scheme = parse_scheme(scheme)
    check_model(model)
    check_causal(model, "learning rotations, which are scored by the tokens that they predict,")
    check_tokens(tokens, model, "training tokens", LearningError, least=2)
    check_tokens(held_out, model, "held-out tokens", LearningError, least=2)
    check_context(model.config, max(tokens.shape[-1], held_out.shape[-1]), "give shorter samples")
    plan = plan_of(model, family=family)
    check_changeable(model, plan)
    names = learned_spaces(plan, spec, scheme, options)
    check_used(plan, spec, scheme, names, options)
    settings = [*settings, scheme, spec, options, digest(tokens), digest(held_out)]
    given: Mapping[str, Transform] = {}
    if start is not None:
        settings.append(start.digest())
        given = initial_rotations(start, plan, spec, options)
    pieces = None if store is None else Pieces(store, settings, writes=is_first())
    random = _baselines(plan, spec, options)
    fuse_gains(model, plan, next(iter(random.values())))
    if options.shard:
        shard_blocks(model, plan)
    learning = learning_scheme(scheme, weights=options.end_to_end.weights)
    with in_eval_mode(model):
        candidates = Selection(model, plan, learning, tokens[:CLIP_WINDOWS], held_out, watch.stage, pieces)
        run = _Run(model, plan, scheme, learning, spec, names, tokens, options, candidates, pieces, watch)
        run.score_baselines(random, given)
        if options.method not in ("random", CLOSED_FORM):
            candidates.set_aside(["keys"] if run.keeps_scales else ["keys", "norms"])
        if options.transforming:
            run.transform_in_closed_form(CLOSED_FORM, KINDS if options.method == CLOSED_FORM else FIRST)
            if options.method in (CLOSED_FORM, "end-to-end"):
                run.sort_channels()
        initial, sites = run.draw_signs()
        if run.is_local:
            assert sites is not None
            run.learn_layerwise(initial, sites)
        if run.is_end_to_end:
            run.learn_end_to_end()
        if options.transforming and options.method != CLOSED_FORM:
            run.transform_in_closed_form(AFTER, [kind for kind in KINDS if kind not in FIRST])
        return run.result()


@dataclass
class _Run:
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
    start: str = ""
    joint: dict[str, list[JointSite]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether rotations are learned on captured activations, which needs quantized activations or KV cache."""
        sampled = self.scheme.activations is not None or self.scheme.kv is not None
        return self.options.method in ("local", "local+end-to-end", "auto") and sampled

    @property
    def is_end_to_end(self) -> bool:
        """Whether rotations are learned end to end; with method `auto`, only if local learning does not lead."""
        method = self.options.method
        return method in ("end-to-end", "local+end-to-end") or (method == "auto" and self.candidates.leader != "local")

    @property
    def joint_spaces(self) -> list[str]:
        """The spaces whose rotation local learning learns together with the scales of norms."""
        local = self.options.local
        usual = local.objective == "error" and local.solver == "cayley" and local.weighting == "fisher"
        if not (usual and self.is_local and self.options.transforming):
            return []
        rotations = self.candidates.candidates[self.start].rotations
        return [space for space in joint_spaces(self.plan, rotations, self.learning) if space in self.names]

    @property
    def keeps_scales(self) -> bool:
        """Whether scales of norms still fit after learning: R1 is learned with them, or not on captured activations."""
        alone = self.is_local and any(self.plan.space[space].rotation == "R1" for space in self.names)
        return bool(self.joint_spaces) or not alone

    def score_baselines(self, random: Mapping[str, Mapping[str, Transform]], given: Mapping[str, Transform]) -> None:
        """Score the random rotations, and the initial ones if there are any; learning starts from the best."""
        with _timed(self.clock, "baselines"):
            self.candidates.enter_all(random)
        if given:
            rotations, free = parted(self.plan, given)
            self._score("given", rotations, free)
        self.start = self.candidates.leader
        self.record |= {"options": self.options.to_dict(), "scheme": self.scheme.to_dict(), "start": self.start}

    def transform_in_closed_form(self, name: str, kinds: Sequence[Kind]) -> None:
        """Compute the free transforms of some kinds, and keep each kind if it lowers KL on held-out text.

        name: of the candidate that has them.

        Kinds are tried one after another with the clip ratios of the leader; what is kept gets ratios of its own.
        """
        plan, candidates = self.plan, self.candidates
        rotations = candidates.leading.rotations
        spaces = free_spaces(plan, rotations, self.learning)
        wanted = [name for kind in kinds for name in spaces.get(kind, ()) if name not in candidates.free]
        if not wanted:
            return
        with _timed(self.clock, CLOSED_FORM):
            free = self._saved(name, lambda: self._closed_form(wanted, rotations))
        parts = [{n: t for n, t in free.items() if kind_of(plan.space[n]) == kind} for kind in kinds]
        with _timed(self.clock, "judging"):
            tried = candidates.enter_kinds(name, parts, kinds)
        for kind, part in zip(kinds, parts, strict=True):
            if kind in tried:
                tried[kind] |= {"spaces": len(part), "condition": max(map(condition, part.values()))}
        self.record["closed_form"] = {**self.record.get("closed_form", {}), **tried}

    def sort_channels(self) -> None:
        """Score R1 that mixes channels that want like scales, with the scales of norms in closed form after it."""
        plan, candidates = self.plan, self.candidates
        rotations = candidates.leading.rotations
        spaces = [space for space in joint_spaces(plan, rotations, self.learning) if space in self.names]
        if not spaces:
            return

        def compute() -> dict[str, Transform]:
            count = SORTED_SAMPLES * FISHER_ROWS_PER_SAMPLE * 4
            self._collect(spaces, spaces, count, self.tokens[:SORTED_SAMPLES])
            found = {}
            for space, sites in self.joint.items():
                how = rotations, self.scheme.weights, None, device_of(self.model)
                turned, scaled = transforms_of(space, *start_of(plan, space, sites, *how))
                found |= {**turned, **scaled}
            return found

        with _timed(self.clock, CLOSED_FORM):
            found = self._saved(SORTED, compute)
        free = {name: transform for name, transform in found.items() if name not in rotations}
        self._score(SORTED, {**rotations, **{name: found[name] for name in spaces}}, free)
        kept = candidates.leader == SORTED
        self.start = self.record["start"] = SORTED if kept else self.start
        tried = {"kl": candidates.scores[SORTED].kl, "kept": kept, "spaces": len(free)}
        tried["condition"] = max(map(condition, free.values()))
        self.record["closed_form"] = {**self.record.get("closed_form", {}), "R1 and norms": tried}

    def _saved(self, name: str, compute: Callable[[], dict[str, Transform]]) -> dict[str, Transform]:
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

    def _closed_form(self, spaces: Sequence[str], rotations: Mapping[str, Transform]) -> dict[str, Transform]:
        """The closed-form transforms of spaces."""
        moments = collect_moments(
            self.model,
            self.plan,
            sites_of(self.plan, spaces, self.learning, rotations),
            replace(self.learning, weights=self.scheme.weights),
            self.tokens[:MOMENT_SAMPLES],
            generator=generator_for(self.options.seed, "moments"),
            checkpointing=self.options.local.checkpointing or self.options.end_to_end.checkpointing,
            progress=lambda *n: self.watch.stage("collect moments", *n),
        )
        return closed_form_transforms(self.plan, moments, dtype=next(self.model.parameters()).dtype)

    def draw_signs(self) -> tuple[Mapping[str, Transform], list[ActivationSite] | None]:
        """Search random signs for R3 and R4 if asked for; returns the initial rotations, and the rows to learn from."""
        initial, sites = self.candidates.candidates[self.start].rotations, None
        if self.is_local or self.options.signs:
            with _timed(self.clock, "local"):
                sites = self._collect_local()
                initial = with_signs(self.plan, initial, sites, self.options, self.names)
            if self.options.signs:
                self._score("random signs", initial)
        return initial, sites

    def learn_layerwise(self, initial: Mapping[str, Transform], sites: Sequence[ActivationSite]) -> None:
        """Learn the rotation of each space on its captured activations, and score the result."""
        local, joint = self.options.local, self.joint_spaces
        own = [site for site in sites if site.space in self.names]
        common: dict[str, Any] = {"seed": self.options.seed, "device": device_of(self.model), "pieces": self.pieces}
        free: dict[str, Transform] = {}
        with _timed(self.clock, "local"):
            found, curves = learn_locally(
                [site for site in own if site.space not in joint],
                initial,
                local,
                centred=[space for space in self.names if self.plan.space[space].centred],
                report=lambda space, step, loss: self.watch.stage(f"learn {space}", step, local.steps),
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
                    report=lambda space, step: self.watch.stage(
                        f"learn {space} and scales of norms", step, local.steps
                    ),
                    **common,
                )
                found, curves = {**found, **turned}, {**curves, **losses}
                self.record["joint"] = costs
        learned = {**initial, **found}
        self._score("local", learned, free)
        after = {**learned, **free}
        self.record["errors"] = {"before": rounding_errors(own, initial), "after": rounding_errors(own, after)}
        self.record["local_steps"] = curves
        if local.weighting == "fisher":
            self.record["predicted_kl"] = {"before": predicted_kl(own, initial), "after": predicted_kl(own, after)}

    def learn_end_to_end(self) -> None:
        """Learn through the quantized network, starting from the best candidate so far, and score the result."""
        options, candidates = self.options, self.candidates
        name = "end-to-end" if options.method == "end-to-end" else "local+end-to-end"
        through = options.end_to_end
        if candidates.leader == "local" or self.start == "given":
            through = replace(through, lr=FROM_LOCAL) if through.lr is None else through
        norms = {name: t for name, t in candidates.free.items() if kind_of(self.plan.space[name]) == "norms"}
        initial = candidates.leading.rotations
        taken = replace(through, lr=through.length)
        self.record["options"] = replace(options, end_to_end=taken).to_dict()
        with _timed(self.clock, "end-to-end"):
            found, self.steps = learn_end_to_end(
                self.model,
                self.plan,
                {**initial, **norms},
                self.names,
                self.scheme,
                self.tokens,
                through,
                seed=options.seed,
                pieces=self.pieces,
                report=lambda step: self.watch.step(name, step, options.end_to_end.steps),
            )
        self._score(name, {space: found[space] for space in initial})
        if not options.shard:  # capturing activations runs block by block, which a sharded model does not support
            with _timed(self.clock, "judging"):
                rows = error_rows(self.model, self.plan, self.names, self.learning, self.tokens, options)
                before = candidates.candidates[self.start].rotations
                before = {**before, **(norms if self.start == SORTED else {})}
                self.record["errors"] = {"before": rounding_errors(rows, before), "after": rounding_errors(rows, found)}

    def result(self) -> LearnedRotations:
        """The best candidate, with the record of the run."""
        plan, candidates = self.plan, self.candidates
        kept = candidates.leading
        rotations = composed(kept.rotations, kept.free)
        # Scales of norms are in the coordinates of R1, or of the model if R1 is not applied: then they go with any.
        beside = {s.name: name for name in self.spec.rotations for s in plan.scales_beside(name)}
        clips = {n: {"activations": c.activation_clip, "kv": c.kv_clip} for n, c in candidates.candidates.items()}
        record = self.record | {
            "rotation_of": {s.name: s.rotation or beside.get(s.name, "") for s in plan.spaces if s.name in rotations},
            "steps": [asdict(step) for step in self.steps],
            "kept": candidates.leader,
            "learned": candidates.leader in LEARNED,
            "clips": clips,
            "scores": {name: score.to_dict() for name, score in candidates.scores.items()},
            "seconds": self.clock,
        }
        return LearnedRotations(rotations, spec_of(plan, kept.rotations, self.spec), record)

    def _score(
        self, name: str, rotations: Mapping[str, Transform], free: Mapping[str, Transform] | None = None
    ) -> None:
        with _timed(self.clock, "judging"):
            self.candidates.enter(name, rotations, free)

    def _collect_local(self) -> list[ActivationSite]:
        """Capture the rows that local learning learns from, and that signs are selected on."""
        local = self.options.local
        spaces = sampled_spaces(self.plan, self.names, self.options, self.spec)
        if local.weighting == "fisher":
            tokens = self.tokens[: max(1, local.rows // FISHER_ROWS_PER_SAMPLE)]
            return self._collect(spaces, self.joint_spaces, local.rows, tokens)
        how: dict[str, Any] = {"rows": local.rows, "generator": generator_for(self.options.seed, "rows")}
        how["progress"] = lambda *n: self.watch.stage("capture activations", *n)
        tokens = self.tokens[: max(1, local.rows // ROWS_PER_SAMPLE)]
        return collect(self.model, self.plan, spaces, self.learning, tokens, **how)

    def _collect(self, spaces: Sequence[str], joint: Sequence[str], rows: int, tokens: Tensor) -> list[ActivationSite]:
        """Capture rows by their cost, and in the spaces `joint` what their rotation is learned from with scales."""
        sites, self.joint = collect_jointly(
            self.model,
            self.plan,
            spaces,
            joint,
            self.learning,
            tokens,
            weights=self.scheme.weights,
            seed=self.options.seed,
            rows=rows,
            generator=generator_for(self.options.seed, "rows"),
            checkpointing=self.options.local.checkpointing or self.options.end_to_end.checkpointing,
            progress=lambda *n: self.watch.stage("capture activations", *n),
        )
        return sites


def _baselines(plan: Plan, spec: RotationSpec, options: LearnOptions) -> dict[str, dict[str, Transform]]:
    """Random rotations by name; a single one if all are of type hadamard, which is deterministic."""
    fixed = all(spec.type_of(name) == "hadamard" for name in spec.rotations)
    count = 1 if fixed else options.baselines
    return {f"random {i}": make_rotations(plan, replace(spec, seed=spec.seed + i)) for i in range(count)}


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a `with` block takes to a clock."""
    start = time.perf_counter()
    try:
        yield
    finally:
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
