"""The rows that rotations learn from and are judged by, and the random signs that are selected on them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spinquant.learning.activations import ActivationSite, collect
from spinquant.learning.layerwise import LocalOptions, rounding_errors
from spinquant.learning.options import LearnOptions
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec, generator_for, random_signs
from spinquant.rotations.rotation import Hadamard, Transform

ROWS_PER_SAMPLE = 32  # rows of a site taken from one sample; few, so that they come from many samples
FISHER_ROWS_PER_SAMPLE = 16  # the same where rows are sampled by weight; fewer, since few rows weigh much
ERROR_SAMPLES, ERROR_ROWS = 4, 256  # samples and rows for rounding errors before and after end-to-end learning


def row_samples(local: LocalOptions) -> int:
    """Number of samples that the rows of local learning come from."""
    share = FISHER_ROWS_PER_SAMPLE if local.weighting == "fisher" else ROWS_PER_SAMPLE
    return max(1, local.rows // share)


def error_rows(
    model: Any,
    plan: Plan,
    names: Mapping[str, str],
    scheme: Scheme,
    tokens: Tensor,
    options: LearnOptions,
    keys: Mapping[str, Transform],
) -> list[ActivationSite]:
    """A few rows of every learned space, to measure rounding errors before and after learning.

    keys: transforms that come before R3, by space.
    """
    generator = generator_for(options.seed, "seen")
    some = tokens[:ERROR_SAMPLES]
    return collect(model, plan, list(names), scheme, some, rows=ERROR_ROWS, generator=generator, keys=keys)


def sampled_spaces(plan: Plan, names: Mapping[str, str], options: LearnOptions, spec: RotationSpec) -> list[str]:
    """The spaces whose rows are captured: to learn from, or to select signs by."""
    online = [s.name for r in ("R3", "R4") if r in spec.rotations and options.signs for s in plan.spaces_of(r)]
    return [*names, *(space for space in online if space not in names)]


def with_signs(
    plan: Plan,
    rotations: Mapping[str, Transform],
    sites: Sequence[ActivationSite],
    options: LearnOptions,
    names: Mapping[str, str],
) -> Mapping[str, Transform]:
    """For every online Hadamard rotation that is not learned, select the signs of least rounding error."""
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
