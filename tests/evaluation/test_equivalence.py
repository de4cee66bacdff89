from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, SmolLM3Config

from models import CONFIGS, tiny_model, tokens
from spinquant import ProofError, RotationSpec, fuse_module, make_rotations, plan_of, prove
from spinquant.architectures import llama
from spinquant.evaluation.equivalence import Float64Arithmetic, check, compare, snapshot
from spinquant.evaluation.tiny_model import make_tiny_model, tiny_config
from spinquant.models.modules import named_tensor


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix", "auto"])
def test_every_family_is_proved_on_a_tiny_model(name, kind):
    deviation = prove(CONFIGS[name](), RotationSpec("R1,R2,R3,R4", kind, randomize=kind != "hadamard"))
    assert deviation.relative < 1e-12


@pytest.mark.parametrize("block_size", [64, {"R1": 2048, "R4": 4096, "R2": 32}])
def test_the_tiny_model_is_small_for_any_config(block_size):
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    tiny = make_tiny_model(config)
    assert sum(p.numel() for p in tiny.parameters()) < 300_000
    prove(config, RotationSpec("R1,R2,R3,R4", block_size=block_size))


def test_the_tiny_model_has_every_kind_of_layer():
    config = tiny_config(SmolLM3Config(num_hidden_layers=36, pad_token_id=None))
    assert set(config.no_rope_layers) == {0, 1}
    config = Qwen2Config(num_hidden_layers=8, use_sliding_window=True, sliding_window=4096, max_window_layers=4)
    assert set(tiny_config(config).layer_types) == {"full_attention", "sliding_attention"}
    assert tiny_config(config).sliding_window < 12
    assert tiny_config(LlamaConfig(num_hidden_layers=1)).num_hidden_layers == 2


def test_the_tiny_model_has_biases_and_gains():
    tiny = make_tiny_model(Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert tiny.model.layers[0].self_attn.v_proj.bias.abs().min() > 0
    assert (tiny.model.norm.weight - 1).abs().max() > 0.1


def broken(monkeypatch, change) -> None:
    """Make the Llama table wrong in one place."""
    table = {**llama.LLAMA.tensors}
    change(table)
    monkeypatch.setattr("spinquant.architectures.FAMILIES", (replace(llama.LLAMA, tensors=table),))


def test_a_value_bias_that_is_not_rotated_is_caught(monkeypatch):
    """This mistake raised the perplexity of a released tool from 42 to 1.5 million."""
    broken(monkeypatch, lambda table: table.update({"model.layers.{i}.self_attn.v_proj.bias?": (None,)}))
    with pytest.raises(ProofError, match=r"layers\.0\.self_attn\.v_proj"):
        prove(CONFIGS["qwen2"](), RotationSpec("R2"))
    prove(CONFIGS["mistral"](), RotationSpec("R2"))  # has no bias


def test_a_writer_that_is_not_rotated_is_named(monkeypatch):
    key = "model.layers.{i}.self_attn.o_proj.weight"
    broken(monkeypatch, lambda table: table.update({key: (None, table[key][1])}))
    with pytest.raises(ProofError, match=r"layers\.0\.mlp\.gate_proj|layers\.0\.self_attn\.o_proj"):
        prove(CONFIGS["mistral"](), RotationSpec("R1"))


def test_a_gain_that_is_not_fused_is_caught(monkeypatch):
    gains = {k: () if "post_attention" in k else v for k, v in llama.LLAMA.gains.items()}
    monkeypatch.setattr("spinquant.architectures.FAMILIES", (replace(llama.LLAMA, gains=gains),))
    with pytest.raises(ProofError, match=r"layers\.0\.mlp\.gate_proj"):
        prove(CONFIGS["llama"](), RotationSpec("R1"))


def test_a_missing_online_rotation_is_caught(monkeypatch):
    onlines = {k: v for k, v in llama.LLAMA.onlines.items() if "down_proj" not in k}
    monkeypatch.setattr("spinquant.architectures.FAMILIES", (replace(llama.LLAMA, onlines=onlines),))
    with pytest.raises(ProofError, match="down_proj"):
        prove(CONFIGS["llama"](), RotationSpec("R4"))


@pytest.mark.parametrize("module", ["layers.1.self_attn.v_proj", "layers.2.mlp.up_proj", "layers.0.self_attn.o_proj"])
def test_the_first_deviating_module_is_named(module):
    model = tiny_model("llama", dtype=torch.float32)
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2"))
    before = snapshot(model, plan, tokens())
    fuse_module(model, plan, rotations)
    assert compare(before, model, plan, rotations).module is None
    with torch.no_grad():
        named_tensor(model, f"model.{module}.weight")[1].mul_(1.5)
    deviation = compare(before, model, plan, rotations)
    assert deviation.module == f"model.{module}"
    with pytest.raises(ProofError, match=module):
        check(deviation, torch.float32, what="this model")


def test_nan_fails_the_comparison():
    model = tiny_model("llama", dtype=torch.float32)
    plan = plan_of(model)
    before = snapshot(model, plan, tokens())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ProofError, match="down_proj"):
        check(compare(before, model, plan, {}), torch.float32, what="this model")


def test_float64_arithmetic_replaces_casts_to_float32():
    """Norms and softmax compute in float32 in a model of any dtype, so that it is exact to 1e-7 only."""
    x = torch.randn(4, dtype=torch.float64)
    with Float64Arithmetic():
        assert x.to(torch.float32).dtype == torch.float64
        assert x.float().dtype == torch.float64
        assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
    assert x.float().dtype == torch.float32
