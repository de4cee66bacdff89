"""What a user asks of learning, which of a model's spaces follow from it, and who is told how it goes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from spinquant.errors import LearningError
from spinquant.learning.end_to_end import EndToEndOptions, Step
from spinquant.learning.layerwise import LocalOptions, check_numbers
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec

Method = Literal["random", "local", "end-to-end", "local+end-to-end", "auto"]
METHODS = get_args(Method)
HADAMARD = ("hadamard", "random-hadamard", "auto")
LARGEST_ONLINE = 512  # order of a learned R4: it is a dense product at every token


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
        check_numbers(self, counts=("baselines",), positive=())
        if self.signs < 0:
            raise LearningError(f"signs is {self.signs}: expected a number of draws, 0 for none (--signs)")
        if self.shard and (self.method != "end-to-end" or self.signs or self.scales or self.end_to_end.weights):
            raise LearningError(
                "a sharded model is learned end to end, without signs or scales, its weights not rounded: give --shard "
                f"--method end-to-end (it is {self.method}) without --signs, --scales and --weights"
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
class Watch:
    """Who is told how learning goes. stage(name, done, total); step(name of the learner, step, steps in all)."""

    stage: Callable[[str, int, int], None] = lambda name, done, total: None
    step: Callable[[str, Step, int], None] = lambda name, step, steps: None


def check_used(plan: Plan, spec: RotationSpec, names: Mapping[str, str], options: LearnOptions) -> None:
    """Raise LearningError for signs and scales that no rotation of this model and spec would have."""
    plain = [name for name in ("R3", "R4") if name in spec.rotations and spec.type_of(name) in HADAMARD]
    if options.signs and not any(space.name not in names for name in plain for space in plan.spaces_of(name)):
        raise LearningError(
            "--signs would do nothing: they are drawn for a Hadamard R3 or R4 that is not learned, and here is none. "
            "Leave it out"
        )
    rotated = {space.name for name in spec.rotations for space in plan.spaces_of(name)}
    if options.scales and not any(scaling.space in rotated for scaling in plan.scalings):
        raise LearningError(
            "--scales would do nothing: scales go before a rotated R4 whose input is a product of linears, and here is "
            "none. Leave it out"
        )


def learned_spaces(plan: Plan, spec: RotationSpec, scheme: Scheme, options: LearnOptions) -> dict[str, str]:
    """The name of the rotation of every space that is to be learned; raises LearningError for what cannot be."""
    inputs = scheme.activations is not None or options.end_to_end.weights
    seen = {"R1": inputs, "R2": inputs or scheme.kv is not None, "R3": scheme.kv is not None, "R4": inputs}
    usual = [n for n in ("R1", "R2", "R3") if n in spec.rotations and seen[n]]
    if "R3" in usual and spec.type_of("R3") == "hadamard":
        usual.remove("R3")
    chosen = usual if options.rotations is None else options.rotations
    missing = [name for name in chosen if name not in spec.rotations]
    rounds = scheme.activations is not None or scheme.kv is not None
    if not rounds and scheme.weights is None:
        raise LearningError(f"scheme {scheme} rounds nothing, so no rotation makes a difference: give one that does")
    if not rounds and options.end_to_end.weights and options.method == "local":
        raise LearningError(
            f"local learning looks at activations and cache, and scheme {scheme} rounds neither: learn end to end "
            "(--method end-to-end)"
        )
    if not rounds and not options.end_to_end.weights:
        raise LearningError(
            f"scheme {scheme} rounds neither activations nor the cache, and with weights at 16 bits while learning no "
            "rotation makes a difference: use a scheme such as W4A4KV4, or round weights too while learning "
            "(`spinquant learn --weights`, and its result with --learned)"
        )
    if missing or not chosen:
        wanted, rotated = (", ".join(names) or "nothing" for names in (missing, spec.rotations))
        raise LearningError(
            f"{wanted} is to be learned, and rotations are {rotated}: --learn takes some of --rotations"
        )
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
