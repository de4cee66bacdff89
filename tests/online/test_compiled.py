"""Rotated and quantized models can be compiled and exported, with the numbers of eager execution."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from models import SIZES, random_weights, tokens
from spinquant import OnlineError, RotationSpec, attach, fuse_module, make_rotations, parse_scheme, plan_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch's tracers
SMALL = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def quantized(intermediate=96, scheme="A4KV4", dtype=torch.float64, type="auto"):
    config = LlamaConfig(**{**SMALL, "intermediate_size": intermediate})
    model = random_weights(AutoModelForCausalLM.from_config(config, dtype=dtype))
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2,R3,R4", type))
    fuse_module(model, plan, rotations)
    attach(model, plan, rotations, parse_scheme(scheme))
    return model.requires_grad_(False)


class Logits(nn.Module):
    """What torch.export takes: a module of tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("order", [96, 11008])
def test_every_order_of_r4_is_exported(order, strict):
    model, ids = Logits(quantized(order)), tokens(2, 6)
    exported = torch.export.export(model, (ids,), strict=strict)
    assert relative(exported.module()(ids), model(ids)) < 1e-12


@pytest.mark.parametrize("type", ["hadamard", "random-hadamard", "random-matrix", "auto"])
def test_every_type_of_rotation_is_exported(type):
    model, ids = Logits(quantized(96, type=type)), tokens(2, 6)
    exported = torch.export.export(model, (ids,))
    assert relative(exported.module()(ids), model(ids)) < 1e-12


def test_a_compiled_model_is_one_graph_without_a_cache():
    """And its numbers are those of eager execution."""
    model, ids = quantized(), tokens(2, 6)
    compiled = torch.compile(Logits(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(ids), Logits(model)(ids)) < 1e-12


def test_a_site_that_does_not_fire_is_an_error_while_tracing():
    model, ids = quantized(), tokens(2, 6)

    class ByWeight(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    model.model.layers[1].mlp.down_proj = ByWeight(model.model.layers[1].mlp.down_proj)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"down_proj"):
            torch.export.export(Logits(model), (ids,), strict=strict)
    with pytest.raises(OnlineError, match=r"layers\.1\.mlp\.down_proj"):
        torch.compile(Logits(model), backend="eager")(ids)
