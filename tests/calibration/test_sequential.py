"""Running a model block by block gives its outputs, for every family."""

import pytest
import torch

from families import FAMILIES
from models import random_weights, tiny_model, tokens
from spinquant.calibration.sequential import after_blocks, block_calls, body_of, run_block
from spinquant.errors import CalibrationError
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.capture import captured
from spinquant.models.modules import model_class
from spinquant.rotations.fuse_module import plan_of

# XGLM is left out, because transformers cannot make its mask in float64.
NAMES = [name for name in FAMILIES if name != "xglm"]


def tiny(name):
    config = FAMILIES[name].config()
    model = model_class(config).from_config(config, dtype=torch.float64)
    exact_experts(model)
    return random_weights(model.double()).eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_running_block_by_block_equals_the_model(name):
    model = tiny(name)
    ids, blocks = tokens(2, 20), plan_of(model).blocks
    calls = block_calls(model, blocks, ids)
    for number, states in enumerate(calls.hidden):
        for block in blocks:
            states = run_block(model.get_submodule(block), states, calls.arguments[block][number])
        expected = body_of(model)(ids[number : number + 1], use_cache=False).last_hidden_state
        torch.testing.assert_close(after_blocks(model, blocks, states), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bloom-slow"])  # does not call all its linears
@torch.no_grad()
def test_linears_run_in_the_order_of_the_plan(name):
    """Calibration relies on this order: it stops a block after its last group, and quantizes group after group."""
    model = tiny(name)
    plan = plan_of(model)
    with captured(model, [linear for group in plan.linears for linear in group]) as outputs:
        body_of(model)(tokens(1, 20), use_cache=False)
    order = {linear: place for place, linear in enumerate(outputs)}
    for block in plan.blocks:
        groups = [group for group in plan.linears if group[0].startswith(f"{block}.")]
        first = [min(order[linear] for linear in group if linear in order) for group in groups]
        assert first == sorted(first)


@torch.no_grad()
def test_arguments_are_those_of_the_sample_and_one_object_where_they_are_the_same():
    model = tiny("zamba")
    blocks = plan_of(model).blocks
    shared = block_calls(model, blocks, tokens(1, 20).expand(3, -1)).arguments
    assert all(one is found[0] for found in shared.values() for one in found)
    found = block_calls(model, blocks, tokens(3, 20)).arguments
    own = {name for name, (first, *others) in found.items() if any(one is not first for one in others)}
    assert own and all("original_hidden_states" in found[name][1] for name in own)
    for name in own:
        first, second, _ = found[name]
        assert not torch.equal(first["original_hidden_states"], second["original_hidden_states"])
        assert all(first[key] is second[key] for key in first if key != "original_hidden_states")


@torch.no_grad()
def test_a_block_that_runs_twice_in_a_pass_is_refused(monkeypatch):
    model = random_weights(tiny_model("llama"))
    body, blocks = body_of(model), plan_of(model).blocks
    monkeypatch.setattr(body.config, "num_hidden_layers", 3)
    body.layers = torch.nn.ModuleList([body.layers[0], body.layers[1], body.layers[0]])
    with pytest.raises(CalibrationError, match=r"layers.0 is called more than once in a pass through a LlamaFor"):
        block_calls(model, blocks[:2], tokens(1, 20))
