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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.compute.hashing import digest
from spinquant.errors import LearningError
from spinquant.learning.activations import ActivationSite, collect
from spinquant.learning.channel_scaling import Sums, add_up, scale_sums, watches
from spinquant.learning.end_to_end import FROM_LOCAL, Step, learn_end_to_end
from spinquant.learning.fake_quant import fuse_gains, learning_scheme, shard_blocks
from spinquant.learning.layerwise import learn_locally, rounding_errors
from spinquant.learning.learned import described, to_start_from
from spinquant.learning.options import LearnOptions, Watch, check_used, learned_spaces
from spinquant.learning.selection import Contest
from spinquant.learning.sensitivity import predicted_kl, sensitive_sites
from spinquant.learning.training_state import JUDGED, JudgedFile, StateFile
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
    """Learn rotations for a model and a scheme on tokens, int64 (samples, length), and judge them on others.

    The model's gains are fused, and tied heads untied; its function stays. start: what was learned for this model
    before, with its scales; it is judged like the random rotations and learned from where it beats them. store: a
    folder where the run is kept, and taken up by the same call; `settings` are whatever else it depends on, such as
    the model's files. family: a file that explains the model where no table does, see `use_family`. Raises
    LearningError for what cannot be learned.
    """
    options, watch = options or LearnOptions(), watch or Watch()
    plan = plan_of(model, family=family)
    names = learned_spaces(plan, spec, scheme, options)
    if options.end_to_end.weights and scheme.weights is None:
        raise LearningError(f"scheme {scheme} leaves weights at 16 bits: there is nothing to round while learning")
    check_used(plan, spec, names, options)
    rounds = learning_scheme(scheme, weights=options.end_to_end.weights)
    clock: dict[str, float] = {}
    settings = [*settings, scheme, spec, options, digest(tokens), digest(held_out)]
    given: Mapping[str, Rotation] = {}
    if start is not None:
        settings.append(start.digest())
        given = to_start_from(start, plan, spec, options)
    random = _baselines(plan, spec, options)
    fuse_gains(model, plan, next(iter(random.values())))
    if options.shard:
        shard_blocks(model, plan)
    judged = JudgedFile(store / JUDGED, settings) if store else None
    contest = Contest(model, plan, rounds, tokens[:CLIP_WINDOWS], held_out, watch.stage, judged)
    with _timed(clock, "baselines"):
        contest.enter_all(random)
    if given:
        with _timed(clock, "judging"):
            scales = {space: rotation.scale for space, rotation in given.items() if isinstance(rotation, Scaled)}
            contest.enter("given", {space: bare(rotation) for space, rotation in given.items()}, scales)
    begin = contest.leading.rotations
    record: dict[str, Any] = {"options": options.to_dict(), "scheme": scheme.to_dict(), "start": contest.leader}
    from_given = contest.leader == "given"
    # Of weights alone no activations are sampled.
    sampled = scheme.activations is not None or scheme.kv is not None
    local_too = options.method in ("local", "local+end-to-end", "auto") and sampled
    sums = scale_sums(plan, begin, rounds) if options.scaling and not contest.scales else {}
    sites: list[ActivationSite] | None = None
    if sums and local_too and options.differentiates and not set(sums) & set(_sampled(plan, names, options, spec)):
        # What scales change is not among the rows, so one pass through the model serves both.
        with _timed(clock, "local"):
            sites = _collect(model, plan, names, rounds, tokens, options, spec, watch, sums)
    elif sums:
        with _timed(clock, "scales"):
            add_up(
                model,
                plan,
                sums,
                rounds,
                tokens[:SCALED_BY],
                generator=generator_for(options.seed, "scales"),
                checkpointing=options.local.checkpointing or options.end_to_end.checkpointing,
                progress=lambda *n: watch.stage("find scales", *n),
            )
    if sums:
        with _timed(clock, "judging"):
            contest.enter("scaled", begin, {space: both.scale() for space, both in sums.items()})
    record["scales"] = {space: [float(s.min()), float(s.max())] for space, s in contest.scales.items()}
    if local_too or options.signs:
        with _timed(clock, "local"):
            sites = _collect(model, plan, names, rounds, tokens, options, spec, watch) if sites is None else sites
            begin = _with_signs(plan, begin, sites, options, names)
        if options.signs:
            with _timed(clock, "judging"):
                contest.enter("random signs", begin)
    if local_too:
        assert sites is not None
        with _timed(clock, "local"):
            own = [site for site in sites if site.space in names]
            found, curves = learn_locally(
                own,
                begin,
                options.local,
                centred=[space for space in names if plan.space[space].centred],
                seed=options.seed,
                device=device_of(model),
                store=store / "local" if store else None,
                settings=settings,
                report=lambda space, step, loss: watch.stage(f"learn {space}", step, options.local.steps),
            )
        local = {**begin, **found}
        with _timed(clock, "judging"):
            contest.enter("local", local)
        record["errors"] = {"before": rounding_errors(own, begin), "after": rounding_errors(own, local)}
        record["local_steps"] = curves
        if options.local.weighting == "fisher":
            record["predicted_kl"] = {"before": predicted_kl(own, begin), "after": predicted_kl(own, local)}
    steps: list[Step] = []
    from_local = contest.leader == "local"
    if options.method in ("end-to-end", "local+end-to-end") or (options.method == "auto" and not from_local):
        name = "end-to-end" if options.method == "end-to-end" else "local+end-to-end"
        through_options = options.end_to_end
        if (from_local or from_given) and through_options.lr is None:
            through_options = replace(through_options, lr=FROM_LOCAL)
        taken = replace(through_options, lr=through_options.length)
        record["options"] = replace(options, end_to_end=taken).to_dict()
        with _timed(clock, "end-to-end"):
            through, steps = learn_end_to_end(
                model,
                plan,
                contest.leading.rotations,
                names,
                scheme,
                tokens,
                through_options,
                seed=options.seed,
                state=StateFile(store / "end-to-end.safetensors", settings) if store else None,
                report=lambda step: watch.step(name, step, options.end_to_end.steps),
            )
        with _timed(clock, "judging"):
            contest.enter(name, through)
        if not options.shard:  # blocks of a sharded model are not run one by one
            with _timed(clock, "judging"):
                seen = _seen(model, plan, names, rounds, tokens, options)
                before = contest.candidates[record["start"]].rotations
                record["errors"] = {"before": rounding_errors(seen, before), "after": rounding_errors(seen, through)}
    kept = contest.leading
    rotations = {n: Scaled(r, kept.scales[n]) if n in kept.scales else r for n, r in kept.rotations.items()}
    record |= {
        "rotation_of": {space.name: space.rotation for space in plan.spaces if space.name in rotations},
        "steps": [asdict(step) for step in steps],
        "kept": contest.leader,
        "learned": contest.leader in LEARNED,
        "clips": {n: {"activations": c.activation_clip, "kv": c.kv_clip} for n, c in contest.candidates.items()},
        "scores": {name: score.to_dict() for name, score in contest.scores.items()},
        "seconds": clock,
    }
    return LearnedRotations(rotations, described(plan, kept.rotations, spec), record)


def _baselines(plan: Plan, spec: RotationSpec, options: LearnOptions) -> dict[str, dict[str, Rotation]]:
    """Random rotations by name; one where nothing about them is random."""
    fixed = all(spec.type_of(name) == "hadamard" for name in spec.rotations)
    count = 1 if fixed else options.baselines
    return {f"random {i}": make_rotations(plan, replace(spec, seed=spec.seed + i)) for i in range(count)}


def _collect(
    model: Any,
    plan: Plan,
    names: Mapping[str, str],
    scheme: Scheme,
    tokens: Tensor,
    options: LearnOptions,
    spec: RotationSpec,
    watch: Watch,
    sums: Mapping[str, Sums] | None = None,
) -> list[ActivationSite]:
    """Rows to learn from. sums: what is added up on the way, where gradients are taken."""
    spaces = _sampled(plan, names, options, spec)
    given: dict[str, Any] = {"rows": options.local.rows, "generator": generator_for(options.seed, "rows")}
    given["progress"] = lambda *n: watch.stage("capture activations", *n)
    if options.local.weighting == "fisher":
        tokens = tokens[: max(1, options.local.rows // DRAWN_OF_A_SAMPLE)]
        given["checkpointing"] = options.local.checkpointing
        return sensitive_sites(model, plan, spaces, scheme, tokens, beside=watches(sums or {}), **given)
    return collect(model, plan, spaces, scheme, tokens[: max(1, options.local.rows // ROWS_OF_A_SAMPLE)], **given)


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
