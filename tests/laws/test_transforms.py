"""Every family table: each kind of transform that a space allows leaves the logits unchanged."""

import pytest
import torch

from families import FAMILIES, tiny
from models import close, logits, tokens
from spinquant import RotationSpec, attach, fuse_module, make_rotations, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.rotations.transforms import Diagonal


def scales_everywhere(plan, generator):
    """Scales between 1/2 and 2 for every space that takes scales alone."""
    spaces = [space for space in plan.spaces if space.allows == "diagonal"]
    return {s.name: Diagonal(4 ** (torch.rand(s.size, generator=generator, dtype=torch.float64) - 0.5)) for s in spaces}


@pytest.mark.parametrize("rotated", [False, True], ids=["alone", "rotated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scales_of_factors_and_norms_leave_the_logits_unchanged(name, rotated):
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    with Float64Arithmetic():
        before, generated = logits(model, ids), greedy_logits(model, ids)
    allowed = FAMILIES[name].allowed if rotated else ()
    rotations = make_rotations(plan, RotationSpec(allowed, "auto", randomize=True)) if allowed else {}
    transforms = {**rotations, **scales_everywhere(plan, torch.Generator().manual_seed(0))}
    if transforms == rotations:
        pytest.skip("no space of this model takes scales")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fuse_module(model, plan, transforms)
    with attach(model, plan, transforms), Float64Arithmetic():
        assert close(logits(model, ids), before)
        assert close(greedy_logits(model, ids), generated)
    written = {
        axis.tensor for axis in plan.axes if axis.space in transforms and plan.space[axis.space].allows == "diagonal"
    }
    parameters = dict(model.named_parameters())
    assert all(not torch.equal(parameters[n], weights[n]) for n in written if n in weights)
