"""Learning rotations for other families than Llama: LayerNorm, fused projections, refused rotations."""

import pytest
import torch

from families import tiny
from models import logits, tokens
from spinquant import (
    EndToEndOptions,
    LearningError,
    LearnOptions,
    LocalOptions,
    Options,
    RotationSpec,
    attach,
    fuse_module,
    learn,
    make_rotations,
    parse_scheme,
    plan_of,
    rotate,
)
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.learning.fake_quant import fuse_gains, rounding
from spinquant.rotations.mean_preserving import check_mean_preserving

NAMES = ["gpt_neox", "starcoder2", "cohere2", "olmo", "phi3", "gemma", "gemma2"]
CENTRED = ["gpt_neox", "starcoder2", "cohere2", "olmo"]


def spec_for(plan):
    refused = dict(plan.refused)
    return RotationSpec([n for n in ("R1", "R2", "R3", "R4") if n not in refused and plan.spaces_of(n)])


@pytest.mark.parametrize("name", NAMES)
def test_rounding_in_rotated_coordinates_equals_rounding_the_rotated_model(name):
    scheme, ids = parse_scheme("A5KV5"), tokens()
    model, plain = tiny(name), tiny(name)
    plan = plan_of(model)
    made = make_rotations(plan, spec_for(plan))
    fuse_module(model, plan, made)
    attach(model, plan, made, scheme)
    fuse_gains(plain, plan, made)
    before = logits(plain, ids)
    with Float64Arithmetic(), rounding(plain, plan, made, scheme):
        assert torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-9)
        assert not torch.allclose(logits(plain, ids), before, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_learned_rotations_leave_the_unquantized_logits_unchanged(name):
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    before = logits(model, ids)
    options = LearnOptions(
        "local+end-to-end",
        baselines=1,
        local=LocalOptions(steps=8, rows=32, batch=16),
        end_to_end=EndToEndOptions(steps=2, batch=2, lr=0.5),
    )
    learned = learn(model, parse_scheme("A4KV4"), spec_for(plan), tokens(8, 20), tokens(2, 20, seed=5), options)
    assert torch.allclose(logits(model, ids), before, atol=1e-6), "learning must not change the model"
    found = {**learned.rotations}
    check_mean_preserving(plan, found)
    fresh = tiny(name)
    with Float64Arithmetic():
        rotate(fresh, learned.spec, rotations=found, options=Options(prove=False))
        # Rotations are learned in float32.
        assert torch.allclose(logits(fresh, ids), before, atol=1e-4)


@pytest.mark.parametrize("name", CENTRED)
def test_every_learner_preserves_the_mean(name):
    model = tiny(name)
    plan = plan_of(model)
    for method in ("local", "end-to-end"):
        options = LearnOptions(
            method,
            baselines=1,
            local=LocalOptions(steps=20, rows=32, batch=16),
            end_to_end=EndToEndOptions(steps=3, batch=2, lr=2.0, optimizer="adam"),
        )
        learned = learn(model, parse_scheme("A3"), spec_for(plan), tokens(8, 20), tokens(2, 20, seed=5), options)
        assert method in learned.record["scores"]
        check_mean_preserving(plan, learned.rotations)
    options = LearnOptions("local", baselines=1, local=LocalOptions(solver="qr", rows=32))
    with pytest.raises(LearningError, match="mean"):
        learn(model, parse_scheme("A3"), spec_for(plan), tokens(8, 20), tokens(2, 20, seed=5), options)
