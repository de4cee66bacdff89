"""Learned rotations, held against what needs no learning: the best of several random rotations of the same kind.

    1  random rotations of several seeds, with clip ratios, are judged on held-out text
    2  spaces that can have scales get those with which rounding costs least
    3  from the best of them, or from what was learned before, rotations are learned: on captured activations, end to
       end, or one after the other
    4  what was learned is judged on the same text; whatever has the least KL to the 16-bit model is kept

A learned rotation that loses is not kept: the record says which was, and all scores.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.calibrate import device_of
from spinquant.errors import LearningError
from spinquant.learning.end_to_end import FROM_LOCAL, EndToEndOptions, Step, learn_end_to_end
from spinquant.learning.judge import Candidate, Score, judge, with_clips
from spinquant.learning.local import LocalOptions, learn_locally, rounding_errors
from spinquant.learning.network import fuse_gains, learning_scheme, shard_blocks
from spinquant.learning.samples import Site, collect
from spinquant.learning.scales import Sums, add_up, fuse_scales, scale_sums, unscale, watches
from spinquant.learning.sensitivity import predicted_kl, sensitive_sites
from spinquant.learning.state import StateFile
from spinquant.module import plan_of
from spinquant.plan import Plan
from spinquant.quantization.progress import digest
from spinquant.quantization.scheme import Scheme
from spinquant.rotation import Hadamard, Rotation, RotationSpec, generator_for, make_rotations, random_signs
from spinquant.saved_rotations import to_save
from spinquant.wrapped import Scaled, bare, check_given

Method = Literal["random", "local", "end-to-end", "local+end-to-end", "auto"]
METHODS = get_args(Method)
LARGEST_ONLINE = 512  # order of a learned R4: it is a dense product at every token
CLIP_WINDOWS = 2
ROWS_OF_A_SAMPLE = 32  # rows of a site that one sample gives, so that they come from many
DRAWN_OF_A_SAMPLE = 16  # of rows that are drawn by what they count, few of which count much
SCALED_BY = 32  # samples that scales are computed from, where the rows of local learning are not taken anyway


@dataclass(frozen=True)
class LearnOptions:
    """How rotations are learned and judged.

    method: random (the best of the random rotations, nothing learned), local, end-to-end, one after the other, or auto:
    local, and end-to-end after it only if local does not beat the random rotations. rotations: those that are learned,
    by default R1, R2, and R3 unless it is to be a plain Hadamard matrix; R3 and R4 become dense products at run time,
    so R4 needs a block size. signs: draws of random signs per layer for a Hadamard R3 or R4 that is not learned, of
    which the one with the least error of rounding is taken; 0 leaves them. scales: of spaces that can have them
    (`Plan.scalings`), kept where they lessen KL; by default where gradients are taken anyway, which they need.
    baselines: random rotations to beat. shard: under torch.distributed, every process keeps a share of the weights
    (FSDP2); end-to-end alone, since local needs one decoder block at a time anyway.
    """

    method: Method = "auto"
    rotations: tuple[str, ...] | None = None
    baselines: int = 5
    signs: int = 0
    scales: bool | None = None
    shard: bool = False
    local: LocalOptions = field(default_factory=LocalOptions)
    end_to_end: EndToEndOptions = field(default_factory=EndToEndOptions)
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise LearningError(f"unknown method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.baselines < 1 or self.signs < 0:
            raise LearningError("expected at least one random rotation to beat, and no negative number of draws")
        if self.shard and (self.method != "end-to-end" or self.signs or self.scales or self.end_to_end.weights):
            raise LearningError(
                "a sharded model is learned end to end, without signs or scales, its weights not rounded"
            )

    @property
    def scaling(self) -> bool:
        """Whether scales are computed."""
        if self.scales is None:
            return self.differentiates or ("end-to-end" in self.method and not self.shard)
        return self.scales

    @property
    def differentiates(self) -> bool:
        """Whether local learning takes gradients through the model."""
        return self.method in ("local", "local+end-to-end", "auto") and self.local.weighting == "fisher"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LearnedRotations:
    """Rotations by space, what they are an instance of, and how they came about.

    spec: rotations, types and block sizes that describe them. record: scores of all candidates, which was kept, steps,
    errors of rounding per site before and after, seconds, settings.
    """

    rotations: Mapping[str, Rotation]
    spec: RotationSpec
    record: dict[str, Any]

    def digest(self) -> str:
        """A short name for the rotations' numbers."""
        _, tensors = to_save(self.rotations)
        return hashlib.sha256("".join(digest(tensors[name]) for name in sorted(tensors)).encode()).hexdigest()[:16]

    @property
    def kept(self) -> str:
        """The name of the candidate that these rotations are."""
        return self.record["kept"]


@dataclass(frozen=True)
class Watch:
    """Who is told how learning goes. stage(name, done, total); step(name of the learner, step, steps in all)."""

    stage: Callable[[str, int, int], None] = lambda name, done, total: None
    step: Callable[[str, Step, int], None] = lambda name, step, steps: None


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
    rounds = learning_scheme(scheme, weights=options.end_to_end.weights)
    clock: dict[str, float] = {}
    settings = [*settings, scheme, spec, options, digest(tokens), digest(held_out)]
    given: Mapping[str, Rotation] = {}
    if start is not None:
        settings.append(start.digest())
        given = _given(start, plan, spec, options)
    random = _baselines(plan, spec, options)
    first = next(iter(random.values()))
    fuse_gains(model, plan, first)
    if options.shard:
        shard_blocks(model, plan)

    with _timed(clock, "baselines"):
        clipped = with_clips(model, plan, first, rounds, tokens[:CLIP_WINDOWS])
        candidates = {name: replace(clipped, rotations=made) for name, made in random.items()}
        scores = judge(
            model, plan, candidates, rounds, held_out, progress=lambda *n: watch.stage("judge random rotations", *n)
        )
    best = _best(candidates, scores)

    def add(name: str, rotations: Mapping[str, Rotation]) -> None:
        with _timed(clock, "judging"):
            candidates[name] = with_clips(model, plan, rotations, rounds, tokens[:CLIP_WINDOWS])
            one = {name: candidates[name]}
            scores.update(
                judge(model, plan, one, rounds, held_out, progress=lambda *n: watch.stage(f"judge {name}", *n))
            )

    scales = {space: rotation.scale for space, rotation in given.items() if isinstance(rotation, Scaled)}
    scaled: set[str] = set()  # candidates that are nothing without the scales
    if given:
        fuse_scales(model, plan, scales, tokens[:1])
        add("given", {space: bare(rotation) for space, rotation in given.items()})
        scaled |= {"given"} if scales else set()
        if scores["given"].kl >= scores[best].kl:
            unscale(model, plan, scales)
            scales = {}
        else:
            best = "given"
    begin = candidates[best].rotations
    record: dict[str, Any] = {"options": options.to_dict(), "scheme": scheme.to_dict(), "start": best, "steps": []}
    local_too = options.method in ("local", "local+end-to-end", "auto")
    sums = scale_sums(plan, begin, rounds) if options.scaling and not scales else {}
    sites: list[Site] | None = None
    if sums and options.differentiates and not set(sums) & set(_sampled(plan, names, options, spec)):
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
        scales = {space: both.scale() for space, both in sums.items()}
        fuse_scales(model, plan, scales, tokens[:1])
        add("scaled", begin)
        if scores["scaled"].kl >= scores[best].kl:
            unscale(model, plan, scales)
            scales = {}
    unscaled = set(candidates) - {"scaled"} - scaled
    record["scales"] = {space: [float(s.min()), float(s.max())] for space, s in scales.items()}
    if local_too or options.signs:
        with _timed(clock, "local"):
            sites = _collect(model, plan, names, rounds, tokens, options, spec, watch) if sites is None else sites
            begin = _with_signs(plan, begin, sites, options, names)
        if options.signs:
            add("random signs", begin)
    if local_too:
        assert sites is not None
        with _timed(clock, "local"):
            own = [site for site in sites if site.space in names]
            local = learn_locally(
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
        add("local", {**begin, **local})
        record["errors"] = {
            "before": rounding_errors(own, begin),
            "after": rounding_errors(own, candidates["local"].rotations),
        }
        if options.local.weighting == "fisher":
            record["predicted_kl"] = {
                "before": predicted_kl(own, begin),
                "after": predicted_kl(own, candidates["local"].rotations),
            }
    leading = _best(candidates, scores)
    if options.method in ("end-to-end", "local+end-to-end") or (options.method == "auto" and leading != "local"):
        name = "end-to-end" if options.method == "end-to-end" else "local+end-to-end"
        begin, through_options = candidates[leading].rotations, options.end_to_end
        if (leading == "local" or best == "given") and through_options.lr is None:
            through_options = replace(through_options, lr=FROM_LOCAL)
        taken = replace(through_options, lr=through_options.length)
        record["options"] = replace(options, end_to_end=taken).to_dict()
        with _timed(clock, "end-to-end"):
            through, steps = learn_end_to_end(
                model,
                plan,
                begin,
                names,
                scheme,
                tokens,
                through_options,
                seed=options.seed,
                state=StateFile(store / "end-to-end.safetensors", settings) if store else None,
                report=lambda step: watch.step(name, step, options.end_to_end.steps),
            )
        record["steps"] = [asdict(step) for step in steps]
        add(name, through)
    kept = _best(candidates, scores)
    rotations = candidates[kept].rotations
    found = described(plan, rotations, spec)
    if kept not in unscaled:
        rotations = {n: Scaled(r, scales[n]) if n in scales else r for n, r in rotations.items()}
    record |= {
        "kept": kept,
        "learned": kept not in random,
        "clips": {n: {"activations": c.activation_clip, "kv": c.kv_clip} for n, c in candidates.items()},
        "scores": {name: score.to_dict() for name, score in scores.items()},
        "seconds": clock,
    }
    return LearnedRotations(rotations, found, record)


def learned_spaces(plan: Plan, spec: RotationSpec, scheme: Scheme, options: LearnOptions) -> dict[str, str]:
    """The name of the rotation of every space that is to be learned; raises LearningError for what cannot be."""
    inputs = scheme.activations is not None or options.end_to_end.weights
    seen = {"R1": inputs, "R2": inputs or scheme.kv is not None, "R3": scheme.kv is not None, "R4": inputs}
    usual = [n for n in ("R1", "R2", "R3") if n in spec.rotations and seen[n]]
    if "R3" in usual and spec.type_of("R3") == "hadamard":
        usual.remove("R3")
    chosen = usual if options.rotations is None else options.rotations
    missing = [name for name in chosen if name not in spec.rotations]
    if scheme.activations is None and scheme.kv is None and not options.end_to_end.weights:
        raise LearningError(
            f"scheme {scheme} rounds neither activations nor the cache, and with weights at 16 bits while learning no "
            "rotation makes a difference: use a scheme such as W4A4KV4, or round weights too (--weights)"
        )
    if missing or not chosen:
        wanted, rotated = (", ".join(names) or "nothing" for names in (missing, spec.rotations))
        raise LearningError(f"{wanted} is to be learned, and {rotated} is rotated")
    blind = [name for name in chosen if not seen[name]]
    if blind:
        raise LearningError(f"{blind[0]} is to be learned, and scheme {scheme} rounds nothing that it rotates")
    plan.rotated(spec.rotations)
    names: dict[str, str] = {}
    for rotation in chosen:
        for space in plan.spaces_of(rotation):
            order = spec.block_of(rotation) or space.size
            if rotation == "R4" and order > LARGEST_ONLINE:
                raise LearningError(
                    f"a learned R4 of order {order} is a dense product of that size at every token: give it blocks of "
                    f"at most {LARGEST_ONLINE} (--block-size R4=64), or leave R4 out of what is learned"
                )
            names[space.name] = "R1" if rotation == "R1" else space.name
    return names


def described(plan: Plan, rotations: Mapping[str, Rotation], spec: RotationSpec) -> RotationSpec:
    """The spec of what was kept: dense matrices where rotations are learned, one per layer."""
    types = {name: spec.type_of(name) for name in spec.rotations}
    for space in plan.spaces:
        if space.name in rotations and rotations[space.name].describe()["kind"] == "orthogonal":
            types[space.rotation] = "random-matrix"
    sizes = {name: size for name in spec.rotations if (size := spec.block_of(name)) is not None}
    return RotationSpec(spec.rotations, types, sizes or None, False, spec.seed)


def _given(start: LearnedRotations, plan: Plan, spec: RotationSpec, options: LearnOptions) -> Mapping[str, Rotation]:
    """The rotations to start from. Raises LearningError where they are not of what is rotated now."""
    sizes = [{name: one.block_of(name) for name in one.rotations} for one in (start.spec, spec)]
    if sizes[0] != sizes[1]:
        found, asked = (
            ", ".join(f"{name} in blocks of {size}" if size else name for name, size in one.items()) for one in sizes
        )
        raise LearningError(f"the rotations to start from are of {found}, and {asked} is asked for: take the same")
    check_given(plan, spec, start.rotations)
    if options.shard and any(isinstance(rotation, Scaled) for rotation in start.rotations.values()):
        raise LearningError(
            "the rotations to start from have scales, which are fused into weights, and a sharded model's stay as "
            "they are: start from rotations without scales (--no-scales), or do not shard"
        )
    return start.rotations


def _baselines(plan: Plan, spec: RotationSpec, options: LearnOptions) -> dict[str, dict[str, Rotation]]:
    """Random rotations by name; one where nothing about them is random."""
    fixed = all(spec.type_of(name) == "hadamard" for name in spec.rotations)
    count = 1 if fixed else options.baselines
    return {f"random {i}": make_rotations(plan, replace(spec, seed=spec.seed + i)) for i in range(count)}


def _best(candidates: Mapping[str, Candidate], scores: Mapping[str, Score]) -> str:
    """The name of the candidate with the least KL; the first of two that are equal."""
    return min(candidates, key=lambda name: scores[name].kl)


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
) -> list[Site]:
    """Rows to learn from. sums: what is added up on the way, where gradients are taken."""
    spaces = _sampled(plan, names, options, spec)
    given: dict[str, Any] = {"rows": options.local.rows, "generator": generator_for(options.seed, "rows")}
    given["progress"] = lambda *n: watch.stage("capture activations", *n)
    if options.local.weighting == "fisher":
        tokens = tokens[: max(1, options.local.rows // DRAWN_OF_A_SAMPLE)]
        given["checkpointing"] = options.local.checkpointing
        return sensitive_sites(model, plan, spaces, scheme, tokens, beside=watches(sums or {}), **given)
    return collect(model, plan, spaces, scheme, tokens[: max(1, options.local.rows // ROWS_OF_A_SAMPLE)], **given)


def _sampled(plan: Plan, names: Mapping[str, str], options: LearnOptions, spec: RotationSpec) -> list[str]:
    """The spaces whose rows are learned from, or decide on signs."""
    online = [s.name for r in ("R3", "R4") if r in spec.rotations and options.signs for s in plan.spaces_of(r)]
    return [*names, *(space for space in online if space not in names)]


def _with_signs(
    plan: Plan,
    rotations: Mapping[str, Rotation],
    sites: Sequence[Site],
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
