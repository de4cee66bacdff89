"""Options of `learn`, the spaces that are learned with them, and callbacks for progress."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, get_args

from spinquant.calibration.blockwise import Method as Rounding
from spinquant.compute.values import check_seed
from spinquant.errors import LearningError
from spinquant.learning.end_to_end import EndToEndOptions, Step
from spinquant.learning.free_transforms import free_spaces
from spinquant.learning.joint_sites import HELD_OUT
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.option_checks import check_choices, check_numbers
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotation_names import ONLINE_R1
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import Hadamard

Method = Literal["random", "closed-form", "local", "end-to-end", "local+end-to-end", "auto"]
MomentsOf = Literal["gradients", "weights"]
METHODS, MOMENTS, ROUNDINGS = get_args(Method), get_args(MomentsOf), get_args(Rounding)
# Part of the squared error of weights rounded to nearest that costs as much KL as the way to round them: all of it for
# round-to-nearest; for GPTQ and GPTAQ the geometric means of what was measured on two texts other than the one that
# they were calibrated on (SmolLM2, W4A16: 0.17 and 0.29, 0.15 and 0.26; `docs/experiments/learning.md`), GPTAQ with an
# asymmetry of 0.25.
WEIGHTS_SHARE: Mapping[Rounding, float] = {"rtn": 1.0, "gptq": 0.22, "gptaq": 0.2}
HADAMARD = ("hadamard", "random-hadamard", "auto")
LARGEST_ONLINE = 512  # largest order of a learned R4 or online R1, which is a dense matrix product for every token


@dataclass(frozen=True)
class LearnOptions:
    """Options of `learn`: the method, which rotations are learned, and the random baselines they have to beat.

    Attributes:
        method: `random` (the best of the random rotations, nothing is learned), `closed-form` (the best transforms
            that cost nothing at run time, from one pass forward and back), `local` (on captured activations),
            `end-to-end` (through the quantized network), `local+end-to-end` (one after the other), or `auto`, the
            default: local, and end-to-end after it only if local does not beat the random rotations.
        rotations: The rotations that are learned. Default: R1, R2, and R3 unless its type is `hadamard`. Learned R3
            and R4 are dense matrix products at inference, so R4 needs a block size.
        baselines: Number of random rotations to beat. Default: 5.
        signs: Random sign vectors to try per layer for a Hadamard R3 or R4 that is not learned; the one with the
            least rounding error is kept. Default: 0, none.
        transforms: Compute the transforms that cost nothing, in closed form: channel scales and a matrix for each head
            of values before rotations are learned, those of keys after them, scales of norms after or together with R1
            (`joint.py`). A kind of them is kept if it lowers KL. Default: only if gradients are computed anyway, or
            with moments of weights.
        moments: What the transforms are computed from: `gradients` (the default; one pass forward and back), or
            `weights`, whose second moments stand in the place of those of gradients (WUSH, arXiv 2512.00956): forward
            passes alone, for a model that a backward pass is impossible for.
        rounding: How the weights will be rounded: `rtn`, `gptq` or `gptaq`, which decides how much their rounding
            counts (`weights_share`). Default: the method of `quantize_folder`, or `gptq` where there is none.
        budget: Seconds that the call may take, only with method `auto`: random rotations, closed form, local and
            end-to-end learning are tried in this order, each if it ends in time, its score included, with fewer steps
            where needed. Default: no limit.
        shard: Shard the weights over the processes of torch.distributed (FSDP2). Only with method end-to-end, since
            local learning needs one decoder block at a time anyway. Default: False.
        local: Options of local learning.
        end_to_end: Options of end-to-end learning.
        seed: Seed of everything random in learning. Default: 0.

    Raises:
        LearningError: An option has an invalid value, or two contradict each other.

    Example:
        >>> import spinquant
        >>> options = spinquant.LearnOptions("local", local=spinquant.LocalOptions(steps=50))
        >>> options.baselines, options.local.steps
        (5, 50)
    """

    method: Method = "auto"
    rotations: tuple[str, ...] | None = None
    baselines: int = 5
    signs: int = 0
    transforms: bool | None = None
    moments: MomentsOf = "gradients"
    rounding: Rounding | None = None
    budget: float | None = None
    shard: bool = False
    local: LocalOptions = field(default_factory=LocalOptions)
    end_to_end: EndToEndOptions = field(default_factory=EndToEndOptions)
    seed: int = 0

    def __post_init__(self):
        check_choices(self, {"method": METHODS, "moments": MOMENTS, "rounding": (None, *ROUNDINGS)})
        check_numbers(self, counts=("baselines",), positive=("budget",))
        check_seed(self.seed, LearningError)
        if self.signs < 0:
            raise LearningError(f"signs is {self.signs}: expected the number of random signs to try, or 0 (--signs)")
        if self.method == "closed-form" and self.transforms is False:
            raise LearningError(
                "method closed-form computes transforms and nothing else: leave out --no-transforms, or choose another "
                "method"
            )
        if self.budget is not None and self.method != "auto":
            raise LearningError(
                f"a budget of {self.budget:g} s with method {self.method}: only method auto chooses what it does by "
                "the time given. Use method auto (learn --method auto, quantize --learn auto), or leave out --budget"
            )
        if self.moments == "weights" and (self.transforms is False or self.shard):
            other = "--shard" if self.shard else "--no-transforms"
            raise LearningError(
                f"moments of weights are for closed-form transforms, which {other} rules out: leave out --moments "
                f"weights, or {other}"
            )
        if self.shard and (self.method != "end-to-end" or self.signs or self.transforms or self.end_to_end.weights):
            raise LearningError(
                "a sharded model supports only end-to-end learning, without signs, transforms or quantized weights: "
                f"use --shard with --method end-to-end (it is {self.method}), without --signs, --transforms and "
                "--weights"
            )

    @property
    def transforming(self) -> bool:
        """Whether closed-form transforms are computed."""
        if self.transforms is None:
            asked = self.method == "closed-form" or self.moments == "weights"
            return asked or self.differentiates or (self.is_through and not self.shard)
        return self.transforms

    @property
    def is_through(self) -> bool:
        """Whether the method goes through the quantized network."""
        return "end-to-end" in self.method

    @property
    def differentiates(self) -> bool:
        """Whether local learning computes gradients through the whole model."""
        return self.method in ("local", "local+end-to-end", "auto") and self.local.weighting == "fisher"

    @property
    def checkpointing(self) -> bool:
        """Whether gradients through the model are computed with checkpointing of the decoder blocks."""
        return self.local.checkpointing or self.end_to_end.checkpointing

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Watch:
    """Progress callbacks of `learn`.

    Attributes:
        stage: Called with (name of the stage, done, total).
        step: Called with (name of the candidate, step, steps in all) after every step of end-to-end learning.
    """

    stage: Callable[[str, int, int], None] = lambda name, done, total: None
    step: Callable[[str, Step, int], None] = lambda name, step, steps: None


def weights_share(options: LearnOptions) -> float:
    """Part of the squared error of weights rounded to nearest that counts, since GPTQ compensates for some of it."""
    return WEIGHTS_SHARE[options.rounding or "gptq"]


def for_rounding(options: LearnOptions, scheme: Scheme | None, method: Rounding) -> LearnOptions:
    """The options, for weights that a method will round, unless they name another or weights stay at 16 bits."""
    if options.rounding is not None or scheme is None or scheme.weights is None or options.shard:
        return options
    return replace(options, rounding=method)


def learns_r1(plan: Plan, names: Mapping[str, str], options: LearnOptions) -> bool:
    """Whether R1 is learned, which the scales of norms belong to the coordinates of.

    names: the spaces that are learned (`learned_spaces`).
    """
    return options.method not in ("random", "closed-form") and any(plan.space[one].rotation == "R1" for one in names)


def learns_scales(options: LearnOptions) -> bool:
    """Whether local learning learns R1 together with the scales of norms, where there are any."""
    local = options.local
    usual = local.objective == "error" and local.solver == "cayley" and local.weighting == "fisher"
    return usual and options.transforming and local.rows >= HELD_OUT


def check_used(plan: Plan, spec: RotationSpec, scheme: Scheme, names: Mapping[str, str], options: LearnOptions) -> None:
    """Raise LearningError for options that would have no effect: quantized weights, signs or transforms."""
    if options.rounding is not None and scheme.weights is None:
        raise LearningError(
            f"scheme {scheme} leaves weights at 16 bits, so how they are rounded (--rounding {options.rounding}) would "
            "have no effect: leave it out, or use a scheme such as W4A4KV4"
        )
    if options.end_to_end.weights and scheme.weights is None:
        raise LearningError(
            f"scheme {scheme} leaves weights at 16 bits, so quantizing weights during learning (--weights) would have "
            "no effect: leave it out, or use a scheme such as W4A4KV4"
        )
    if options.rounding is not None and options.shard:
        raise LearningError(
            "--rounding would have no effect: a sharded model is scored with weights at 16 bits. Leave out one of the "
            "two (--shard, --rounding)"
        )
    plain = [name for name in ("R3", "R4") if name in spec.rotations and spec.type_of(name) in HADAMARD]
    if options.signs and not any(space.name not in names for name in plain for space in plan.spaces_of(name)):
        raise LearningError(
            "--signs would have no effect: random signs are tried for a Hadamard R3 or R4 that is not learned, and "
            "there is none. Leave it out"
        )
    # Only the orders count, and whether R3 is a plain Hadamard matrix: large rotations are not made for a check.
    orders = {space.name: spec.block_of(n) or space.size for n in spec.rotations for space in plan.spaces_of(n)}
    rotated: dict[str, Any] = {name: SimpleNamespace(order=order) for name, order in orders.items()}
    if "R3" in spec.rotations and spec.type_of("R3") == "hadamard":
        rotated |= {space.name: Hadamard(1) for space in plan.spaces_of("R3")}
    asked = {
        "--transforms": options.transforms,
        "--method closed-form": options.method == "closed-form",
        "--moments weights": options.moments == "weights",
    }
    if any(asked.values()) and not free_spaces(plan, rotated, scheme):
        what = next(name for name, wanted in asked.items() if wanted)
        raise LearningError(
            f"{what} would have no effect: no space that is rotated and quantized allows more than a rotation. Leave "
            "it out"
        )


def learned_spaces(plan: Plan, spec: RotationSpec, scheme: Scheme, options: LearnOptions) -> dict[str, str]:
    """The spaces to learn, each with the name of its rotation: R1 is shared by all its spaces, others are not.

    Raises LearningError for a scheme that rotations make no difference to, for a rotation that is not in `spec` or
    rotates nothing that is quantized, and for an R4 or online R1 too large to be dense.
    """
    _check_scheme(scheme, options)
    inputs = scheme.activations is not None or options.end_to_end.weights
    quantized = {"R1": inputs, "R2": inputs or scheme.kv is not None, "R3": scheme.kv is not None, "R4": inputs}
    quantized[ONLINE_R1] = inputs
    usual = [n for n in ("R1", "R2", "R3") if n in spec.rotations and quantized[n]]
    if "R3" in usual and spec.type_of("R3") == "hadamard":
        usual.remove("R3")
    chosen = usual if options.rotations is None else options.rotations
    if options.rotations is None and not usual and options.method in ("closed-form", "random"):
        plan.rotated(spec.rotations)
        return {}  # these methods learn no rotation
    if ONLINE_R1 in chosen and options.method != "end-to-end":
        raise LearningError(
            f"method {options.method} cannot learn {ONLINE_R1}: learn it end to end (--method end-to-end --learn "
            f"{ONLINE_R1} --block-size {ONLINE_R1}=64), or leave it out of --learn"
        )
    missing = [name for name in chosen if name not in spec.rotations]
    if missing or not chosen:
        wanted, rotated = (", ".join(names) or "nothing" for names in (missing, spec.rotations))
        raise LearningError(
            f"cannot learn {wanted}: the rotations are {rotated}, and --learn takes a subset of --rotations; by "
            "default R1, R2 and R3 are learned, where something that they rotate is quantized"
        )
    unquantized = [name for name in chosen if not quantized[name]]
    if unquantized:
        raise LearningError(f"cannot learn {unquantized[0]}: scheme {scheme} quantizes nothing that it rotates")
    plan.rotated(spec.rotations)
    names: dict[str, str] = {}
    for rotation in chosen:
        for space in plan.spaces_of(rotation):
            order = spec.block_of(rotation) or space.size
            if rotation in ("R4", ONLINE_R1) and order > LARGEST_ONLINE:
                raise LearningError(
                    f"a learned {rotation} of order {order} is a dense matrix product of that size for every token: "
                    f"use blocks of at most {LARGEST_ONLINE} (--block-size {rotation}=64), or do not learn {rotation}"
                )
            names[space.name] = "R1" if rotation == "R1" else space.name
    return names


def _check_scheme(scheme: Scheme, options: LearnOptions) -> None:
    """Raise LearningError for a scheme under which no rotation makes a difference during learning."""
    if not rounds_weights_alone(scheme):
        return
    if scheme.weights is None:
        raise LearningError(
            f"scheme {scheme} quantizes nothing, so no rotation makes a difference: use a scheme such as W4A4KV4"
        )
    if options.method == "local":
        raise LearningError(
            f"local learning needs quantized activations or KV cache, and scheme {scheme} has neither: compute the "
            "transforms that cost nothing (--method closed-form), or learn end to end (--method end-to-end --weights)"
        )
    if options.method not in ("random", "closed-form") and not options.end_to_end.weights:
        raise LearningError(
            f"scheme {scheme} quantizes neither activations nor the KV cache, and with weights at 16 bits during "
            "learning no rotation makes a difference: use a scheme such as W4A4KV4, compute the transforms that cost "
            "nothing (--method closed-form), or quantize weights during learning too (`spinquant learn --weights`, and "
            "its result with --learned)"
        )


def rounds_weights_alone(scheme: Scheme) -> bool:
    """Whether a scheme quantizes neither activations nor the KV cache."""
    return scheme.activations is None and scheme.kv is None
