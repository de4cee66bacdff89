"""R1 with the scales of norms as a step of `learn`: which spaces are learned together, their start, and the result."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.learning.activations import quantized_spaces, scales_after
from spinquant.learning.free_transforms import free_spaces
from spinquant.learning.joint import Scales, closed_form_scales, held_out_costs, learn_jointly, sorted_start
from spinquant.learning.joint_sites import JointSite
from spinquant.learning.layerwise import LocalOptions
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotations.rotation import Orthogonal, Transform, matrix, nearest_orthogonal
from spinquant.rotations.transforms import Diagonal

Found = tuple[dict[str, Transform], dict[str, Transform]]  # rotations, and scales of norms, by space


def joint_spaces(plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme) -> list[str]:
    """The spaces whose rotation can be learned together with the scales of norms: not those rotated in blocks.

    scheme: what is quantized during learning.
    """
    norms = free_spaces(plan, rotations, scheme).get("norms", [])
    spaces = [s.name for s in plan.spaces_of("R1") if s.name in rotations and rotations[s.name].order == s.size]
    read = quantized_spaces(plan, spaces, scheme)
    return list(dict.fromkeys(space.name for site, (space, _) in read.items() if scales_after(plan, site) in norms))


def start_of(
    plan: Plan,
    space: str,
    sites: Sequence[JointSite],
    rotations: Mapping[str, Transform],
    weights: Quantizer | None,
    given: Mapping[str, Transform] | None,
    device: torch.device | str,
) -> tuple[Tensor, Scales]:
    """The rotation that joint learning of a space starts from, and the log of the scales.

    The rotation is sorted (`sorted_start`), or the one in `rotations` where there is no sorted one. With `given`, it is
    the latter with the scales in `given`, as far as there are any. Scales are those in closed form.
    """
    r = None
    if given is None:
        about = plan.space[space]
        r = sorted_start(sites, about.size, weights, centred=about.centred)
    r = (matrix(rotations[space]) if r is None else r).float().to(device)
    scales = closed_form_scales(sites, r, weights, device=device)
    for name in scales:
        if given and isinstance(found := given.get(name), Diagonal):
            scales[name] = found.scale.abs().log().float().flatten()
    return r, scales


def transforms_of(space: str, r: Tensor, scales: Scales) -> Found:
    """A rotation and log scales as transforms by space."""
    rotation = Orthogonal(nearest_orthogonal(r.double().cpu()))
    return {space: rotation}, {name: Diagonal(logs.double().exp()) for name, logs in scales.items()}


def learn_together(
    plan: Plan,
    sites: Mapping[str, Sequence[JointSite]],
    rotations: Mapping[str, Transform],
    weights: Quantizer | None,
    options: LocalOptions,
    *,
    given: Mapping[str, Transform] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    pieces: Pieces | None = None,
    report: Callable[[str, int], None] | None = None,
) -> tuple[Found, dict[str, list[float]], dict[str, Any]]:
    """Learn the rotation of every space together with the scales of its norms.

    Args:
        plan: Where the model can be rotated.
        sites: What is learned from, by space.
        rotations: Initial rotations by space.
        weights: How weights are quantized; None if they are not.
        options: Options of local learning.
        given: Scales to start from with the initial rotations. Default: from a sorted rotation.
        seed: Of the batches.
        device: Where to compute.
        pieces: Where the state of each space is saved, and resumed from. Default: not saved.
        report: Called with (space, step) after every step.

    Returns:
        Rotations and scales by space, the losses of all steps, and by space the expected cost of rounding activations
        and weights on rows that were not learned from, before and after. Where it is no less, the start is returned.
    """
    turned, scaled, curves, costs = {}, {}, {}, {}
    for space, own in sites.items():
        initial = start_of(plan, space, own, rotations, weights, given, device)
        before = held_out_costs(own, *initial, weights)
        r, scales, curves[space] = learn_jointly(
            own,
            *initial,
            weights,
            options,
            centred=plan.space[space].centred,
            seed=seed,
            device=device,
            pieces=pieces,
            space=space,
            report=None if report is None else lambda step, loss, space=space: report(space, step),
        )
        after = held_out_costs(own, r.to(device), scales, weights)
        costs[space] = {"before": before, "after": after}
        # From a good start, steps of a given length may lead away from it.
        one, other = transforms_of(space, *((r, scales) if sum(after.values()) < sum(before.values()) else initial))
        turned |= one
        scaled |= other
    return (turned, scaled), curves, costs
