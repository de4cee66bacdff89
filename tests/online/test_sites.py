"""Transforms that are no rotations, at run time: keys get T, queries T^-T, and linears x T."""

import copy

import pytest
import torch
from transformers import DynamicCache

from families import tiny
from models import CACHE, CONFIGS, fuse_duals, logits, online_transforms, tiny_model, tokens, well_conditioned
from spinquant import Composed, Diagonal, Hadamard, Matrix, RotationError, attach, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits


def transformed(name="llama", *, heads=2, **options):
    """A model whose weights are transformed by hand, its plan and its online transforms."""
    model = tiny_model(name, **options)
    plan = plan_of(model)
    made = online_transforms(plan, heads=heads)
    fuse_duals(model, plan, made)
    return model, plan, made


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_online_transforms_leave_the_logits_as_they_are(name, heads):
    expected, ids = tiny_model(name), tokens()
    model, plan, made = transformed(name, heads=heads)
    before = logits(expected, ids)
    assert relative(logits(model, ids), before) > 1e-3  # R4 is in the weights
    with attach(model, plan, made):
        assert relative(logits(model, ids), before) < 1e-9
        with Float64Arithmetic(), torch.no_grad():
            assert relative(greedy_logits(model, ids, steps=3), greedy_logits(expected, ids, steps=3)) < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_keys_are_transformed(attention):
    expected, ids = tiny_model("llama", attention=attention), tokens()
    model, plan, made = transformed(attention=attention)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with attach(model, plan, made), torch.no_grad(), Float64Arithmetic():
        for one, cache in zip((model, expected), caches, strict=True):
            one(input_ids=ids, **{CACHE: cache})
    for i, (found, plain) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
        weight = made[f"layers.{i}.query_key"].weight
        assert torch.allclose(found.keys, torch.einsum("bhti,hij->bhtj", plain.keys, weight), atol=1e-10)
        assert torch.allclose(found.values, plain.values, atol=1e-10)


def test_products_with_a_hadamard_matrix_run_at_both_sites():
    expected, ids = tiny_model("llama"), tokens()
    model = tiny_model("llama")
    plan = plan_of(model)
    diagonal = [Diagonal(torch.rand(shape, dtype=torch.float64) + 0.5) for shape in ((2, 16), (80,))]
    kinds = {"R3": Composed(diagonal[0], Hadamard(16)), "R4": Composed(diagonal[1], Hadamard(80))}
    made = {space.name: kinds[space.rotation] for space in plan.spaces if space.rotation in kinds}
    fuse_duals(model, plan, made)
    with attach(model, plan, made):
        assert relative(logits(model, ids), logits(expected, ids)) < 1e-9


def test_stacked_experts_read_the_transformed_activation():
    expected, ids = tiny("mixtral"), tokens()
    model = copy.deepcopy(expected)
    plan = plan_of(model)
    made = online_transforms(plan)
    assert any(online.site == "experts" for online in plan.onlines)
    fuse_duals(model, plan, made)
    with attach(model, plan, made):
        assert relative(logits(model, ids), logits(expected, ids)) < 1e-9


@pytest.mark.parametrize("heads", [0, 2])
def test_quantizing_around_an_untransformed_model_equals_quantizing_the_transformed_one(heads):
    """The values' transform is that of the value space, which is fused here by hand into v and o."""
    ids, plain = tokens(), tiny_model("llama")
    model, plan, made = transformed(heads=heads)
    shape = (heads, 16, 16) if heads else (16, 16)
    made |= {f"layers.{i}.value": Matrix(well_conditioned(*shape, seed=9 + i)) for i in range(3)}
    with torch.no_grad():
        for i in range(3):
            attention, value = model.model.layers[i].self_attn, made[f"layers.{i}.value"]
            for tensor in (attention.v_proj.weight, attention.v_proj.bias):
                tensor.copy_(value.apply(tensor, dim=0))
            attention.o_proj.weight.copy_(value.dual().apply(attention.o_proj.weight))
    with attach(model, plan, made, "A8KV4"):
        expected = logits(model, ids)
    with attach(plain, plan, made, "A8KV4", around=True):
        found = logits(plain, ids)
    assert relative(found, expected) < 1e-9 and relative(found, logits(plain, ids)) > 1e-3


def test_a_transform_with_heads_that_do_not_fit_is_refused():
    model, plan, made = transformed(heads=3)
    with attach(model, plan, made), pytest.raises(RotationError, match="3 heads cannot be applied"):
        model(input_ids=tokens())
