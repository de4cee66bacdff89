"""Transforms that cost nothing at run time, in closed form, as steps of `learn`: each is kept if it lowers KL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spinquant.learning.fake_quant import learning_scheme
from spinquant.learning.free_transforms import Kind, closed_form_transforms, free_spaces, kind_of
from spinquant.learning.learn_run import CLOSED_FORM, Run
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.options import weights_share
from spinquant.learning.weight_moments import collect_weight_moments
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import condition

MOMENT_SAMPLES = 8  # samples for the moments of transforms


def transform_in_closed_form(run: Run, name: str, kinds: Sequence[Kind], samples: int = MOMENT_SAMPLES) -> None:
    """Compute the free transforms of some kinds, and keep each kind if it lowers KL on held-out text.

    name: of the candidate that has them. samples: that moments are summed over.

    Kinds are tried one after another with the clip ratios of the leader; what is kept gets ratios of its own.
    """
    plan, candidates = run.plan, run.candidates
    rotations = candidates.leading.rotations
    spaces = free_spaces(plan, rotations, run.scheme)
    wanted = [name for kind in kinds for name in spaces.get(kind, ()) if name not in candidates.free]
    if not wanted:
        return
    with run.timed(CLOSED_FORM):
        free = run.saved_or(name, lambda: _closed_form(run, wanted, rotations, samples))
    parts = [{n: t for n, t in free.items() if kind_of(plan.space[n]) == kind} for kind in kinds]
    with run.timed("judging"):
        tried = candidates.enter_kinds(name, parts, kinds, lambda: run.allowed.own_clips(name))
    for kind, part in zip(kinds, parts, strict=True):
        if kind in tried:
            tried[kind] |= {"spaces": len(part), "condition": max(map(condition, part.values()))}
            tried[kind]["moments"] = run.options.moments
    run.record["closed_form"] = {**run.record.get("closed_form", {}), **tried}


def moment_samples(tokens: Tensor, count: int = MOMENT_SAMPLES) -> Tensor:
    """Samples that moments are summed over, spread evenly over those that are given."""
    if len(tokens) <= count:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]


def _closed_form(
    run: Run, spaces: Sequence[str], rotations: Mapping[str, Transform], samples: int
) -> dict[str, Transform]:
    """The closed-form transforms of spaces."""
    scheme = learning_scheme(run.scheme, weights=True)
    given: dict[str, Any] = {"progress": lambda *n: run.watch.stage("collect moments", *n)}
    given["share"] = weights_share(run.options)
    if run.options.moments == "gradients":
        given["generator"] = generator_for(run.options.seed, "moments")
        given["checkpointing"] = run.options.checkpointing
    moments = (collect_moments if run.options.moments == "gradients" else collect_weight_moments)(
        run.model,
        run.plan,
        sites_of(run.plan, spaces, scheme, rotations),
        scheme,
        moment_samples(run.tokens, samples),
        **given,
    )
    return closed_form_transforms(run.plan, moments, dtype=next(run.model.parameters()).dtype)
