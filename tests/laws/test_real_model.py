"""The real 135M model: logits after fusing, perplexity with 4-bit activations, the 4-bit KV cache, the plan command."""

import pytest
import torch

import spinquant
from models import CACHE
from spinquant import RotationSpec, load, load_tokenizer, parse_scheme, rotate, token_windows
from spinquant.cli import main as cli
from spinquant.evaluation.metrics import compare_models, evaluate
from spinquant.quantization.integer import fake_quantize

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def windows(real_folder):
    _, text = spinquant.load_text("manual")
    return token_windows(load_tokenizer(real_folder), text, length=256, count=2)


def test_fused_logits_move_by_less_than_a_thousandth(real_folder, windows):
    model = load(real_folder)
    result = rotate(model, RotationSpec("R1,R2"), sample=windows[:1])
    difference = compare_models(load(real_folder), model, windows)
    assert result.real is not None and result.real.max_abs < 1e-3
    assert difference.max_abs < 1e-3
    assert difference.top1 > 0.999


def test_rotation_makes_four_bit_activations_usable(real_folder, windows):
    model = load(real_folder)
    plan, scheme = spinquant.plan_of(model), parse_scheme("A4")
    base = evaluate(model, windows).perplexity
    with spinquant.attach(model, plan, {}, scheme):
        plain = evaluate(model, windows).perplexity
    rotated = evaluate(spinquant.quantize(model, scheme, RotationSpec("R1,R2,R4")).model, windows).perplexity
    assert base < rotated < 2.5 * base
    assert plain > 4 * rotated


def test_a_four_bit_cache_takes_a_quarter_and_generates(real_folder, windows):
    model = load(real_folder, dtype=torch.bfloat16)
    scheme = parse_scheme("KV4")
    assert scheme.kv is not None
    spinquant.quantize(model, scheme, RotationSpec("R3"))
    cache = spinquant.QuantizedCache(model.config, scheme.kv)
    with torch.no_grad():
        model(input_ids=windows[:1], **{CACHE: cache})
    config = model.config
    sixteen_bit = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * windows.shape[1]
    assert cache.nbytes / sixteen_bit < 0.28
    generated = model.generate(windows[:1, :64], max_new_tokens=8, do_sample=False)
    assert generated.shape == (1, 72)


def test_quantizing_a_head_of_keys_does_not_depend_on_other_heads():
    keys = torch.randn(1, 3, 5, 64)
    rounded = fake_quantize(keys, parse_scheme("KV4").kv)
    assert torch.equal(fake_quantize(keys[:, 1:2], parse_scheme("KV4").kv), rounded[:, 1:2])


def test_the_plan_command_prints_the_hidden_size(real_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["spinquant", "plan", str(real_folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "576" in capsys.readouterr().out
