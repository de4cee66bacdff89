"""Every family table: each kind of transform that a space allows leaves the logits unchanged."""

import pytest
import torch

from families import FAMILIES, tiny
from models import close, logits, tokens
from spinquant import Diagonal, Matrix, RotationSpec, attach, fuse_module, make_rotations, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits


def scales(space, generator):
    """Scales between 1/2 and 2."""
    return Diagonal(4 ** (torch.rand(space.size, generator=generator, dtype=torch.float64) - 0.5))


def matrices(space, generator):
    """A matrix for each head, with singular values between 1/2 and 2."""
    shape = (space.heads, space.size, space.size)
    left, right = (torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q for _ in "lr")
    values = 4 ** (torch.rand(shape[:2], generator=generator, dtype=torch.float64) - 0.5)
    return Matrix(left * values[:, None] @ right)


MADE = {"scales": ("diagonal", scales), "values": ("any", matrices)}


@pytest.mark.parametrize("rotated", [False, True], ids=["alone", "rotated"])
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_allowed_transform_leaves_the_logits_unchanged(name, kind, rotated):
    """Scales of factors and of the outputs of norms, and matrices of values, alone and beside rotations."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    allows, make = MADE[kind]
    generator = torch.Generator().manual_seed(0)
    refused = dict(plan.refused)
    chosen = [s for s in plan.spaces if s.allows == allows and s.rotation in ("", "R2") and s.rotation not in refused]
    if not chosen:
        pytest.skip(f"no space of this model takes {kind}")
    with Float64Arithmetic():
        before, generated = logits(model, ids), greedy_logits(model, ids)
    made = {space.name: make(space, generator) for space in chosen}
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
