"""A model that runs block by block is the model, whatever its blocks give besides hidden states."""

import pytest
import torch

from conftest import random_weights, tokens
from families import FAMILIES
from spinquant.blocks import after_blocks, block_calls, body_of, run_block
from spinquant.module import model_class, plan_of
from spinquant.proof import exact_experts

# Not XGLM, whose mask transformers cannot make in float64.
NAMES = [name for name in FAMILIES if name != "xglm"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_block_by_block_is_the_model(name):
    config = FAMILIES[name].config()
    model = model_class(config).from_config(config, dtype=torch.float64)
    exact_experts(model)
    model = random_weights(model.double()).eval()
    ids, blocks = tokens(1, 20), plan_of(model).blocks
    calls = block_calls(model, blocks, ids)
    states = calls.hidden[0]
    for block in blocks:
        states = run_block(model.get_submodule(block), states, calls.arguments[block])
    expected = body_of(model)(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(after_blocks(model, blocks, states), expected, atol=1e-9, rtol=1e-9)
