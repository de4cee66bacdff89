"""Every family table: each kind of transform that a space allows leaves the logits unchanged."""

import pytest
import torch

from families import FAMILIES, tiny
from models import close, logits, tokens
from spinquant import RotationSpec, attach, fuse_module, make_rotations, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.rotations.random_transforms import random_transforms

KINDS = {"scales": ("scales of R1", "scales of R2", "scales of R4"), "values": ("R2",)}


@pytest.mark.parametrize("rotated", [False, True], ids=["alone", "rotated"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_allowed_transform_leaves_the_logits_unchanged(name, kind, rotated):
    """Scales of factors and of the outputs of norms, and matrices of values, alone and beside rotations."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    refused = {name for name, _ in plan.refused}
    made = random_transforms(plan, KINDS[kind])
    made = {name: made[name] for name in made if plan.space[name].rotation not in refused}
    if not made:
        pytest.skip(f"no space of this model takes {kind}")
    with Float64Arithmetic():
        before, generated = logits(model, ids), greedy_logits(model, ids)
    spec = RotationSpec(FAMILIES[name].allowed if rotated else (), "auto", randomize=True)
    transforms = {**make_rotations(plan, spec), **made}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fuse_module(model, plan, transforms)
    with attach(model, plan, transforms), Float64Arithmetic():
        assert close(logits(model, ids), before)
        assert close(greedy_logits(model, ids), generated)
    parameters = dict(model.named_parameters())
    changed = {axis.tensor for axis in plan.axes if axis.space in made} & set(weights)
    assert changed and all(not torch.equal(parameters[n], weights[n]) for n in changed)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "R3" in FAMILIES[name].allowed])
def test_a_matrix_for_each_head_of_keys_leaves_the_logits_unchanged(name):
    """Keys have T, queries T^-T; a key-value head's matrix is that of all query heads that share it."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    with Float64Arithmetic():
        before, generated = logits(model, ids), greedy_logits(model, ids)
    transforms = random_transforms(plan, ("R3",))
    assert transforms
    fuse_module(model, plan, transforms)
    with attach(model, plan, transforms), Float64Arithmetic():
        assert close(logits(model, ids), before)
        assert close(greedy_logits(model, ids), generated)
