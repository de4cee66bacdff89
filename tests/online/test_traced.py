"""Traced by torch.compile, transforms and a model with online parts compute what they compute eagerly."""

import pytest
import torch

from models import tiny_model, tokens
from spinquant import RotationSpec, attach, fuse_module, make_rotations, parse_scheme, plan_of
from spinquant.rotations.hadamard import hadamard_transform


@pytest.mark.parametrize("order", [12, 64, 96, 172])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_traced_transform_is_the_eager_one(order, transpose):
    x = torch.randn(3, 2 * order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hadamard_transform(x, order, transpose=transpose)
    traced = torch.compile(lambda x: hadamard_transform(x, order, transpose=transpose), backend="eager")
    assert torch.allclose(traced(x), expected, atol=1e-13)


# torch warns of itself: it instantiates every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_with_online_parts_computes_what_it_computes_eagerly():
    model, ids = tiny_model("llama"), tokens(1, 6)
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec(("R3", "R4"), "auto"))
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations, parse_scheme("A8")), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-10)
