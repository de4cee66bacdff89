"""A model that runs block by block is the model, whatever its blocks give besides hidden states."""

import pytest
import torch

from conftest import random_weights, tokens
from families import FAMILIES
from spinquant.blocks import after_blocks, block_calls, run_block
from spinquant.module import model_class, plan_of

# Blocks that give hidden states alone, a tuple of one, and of two of which the model takes the first or both.
NAMES = ["olmo2", "gptj", "codegen", "gpt_neo", "falcon", "bloom", "mpt", "bamba", "falcon_h1", "mamba2"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_block_by_block_is_the_model(name):
    config = FAMILIES[name].config()
    model = random_weights(model_class(config).from_config(config, dtype=torch.float64)).eval()
    ids, blocks = tokens(2, 20), plan_of(model).blocks
    calls = block_calls(model, blocks, ids)
    for sample, states in enumerate([calls.hidden[i] for i in range(len(ids))]):
        for block in blocks:
            states = run_block(model.get_submodule(block), states, calls.arguments[block])
        found = after_blocks(model, blocks, states)
        expected = model.base_model(ids[sample : sample + 1], use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
