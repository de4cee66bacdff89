import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from models import byte_tokenizer, tiny_model, tokens
from spinquant import CalibrationText, CheckpointError, TextError, compare_models, evaluate, load_text, token_windows
from spinquant.calibration.data import generate_tokens
from spinquant.evaluation.metrics import divergence, drawn
from spinquant.models.capture import captured


class Constant(nn.Module):
    """A model that predicts the same distribution for every token."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    assert evaluate(Constant(torch.zeros(50)), tokens() % 50).perplexity == pytest.approx(50)


def test_perplexity_is_exp_of_the_mean_nll():
    model, ids = tiny_model("llama", dtype=torch.float32), tokens(3, 300)
    with torch.no_grad():
        expected = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).mean().exp()
    found = evaluate(model, ids)
    assert found.perplexity == pytest.approx(expected.item(), rel=1e-4)
    assert found.tokens == 3 * 299
    assert found.kl is None


def test_dropout_is_off_and_every_mode_is_restored():
    """`from_config` gives a model in training mode, and GPT-2 has dropout by default."""
    config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=6, n_positions=64)  # its BOS token is 50256
    trained = AutoModelForCausalLM.from_config(config)
    model, ids = copy.deepcopy(trained).eval(), tokens(2, 32)
    assert trained.training
    assert evaluate(trained, ids, reference=model).kl == 0
    assert evaluate(trained, ids).perplexity == evaluate(model, ids).perplexity
    assert compare_models(trained, model, ids).max_abs == 0
    assert trained.training and not model.training
    text = CalibrationText("generated", samples=2, length=8)
    assert torch.equal(generate_tokens(trained, text), generate_tokens(model, text))


def test_logits_that_overflow_are_no_infinite_perplexity():
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM are not finite .* overflows torch\.float16"):
        evaluate(model, tokens())
    with pytest.raises(CheckpointError, match="are not finite"):
        evaluate(tiny_model("llama", dtype=torch.float16), tokens(), reference=model)


def test_tokens_are_sampled_with_their_probabilities():
    logits = torch.tensor([0.0, 2.0, float("-inf"), 1.0, -3.0])
    found = drawn(logits.softmax(-1).expand(2, 50_000, 5), torch.Generator().manual_seed(0))
    assert found.shape == (2, 50_000, 1)
    often = torch.bincount(found.flatten(), minlength=5) / found.numel()
    assert torch.allclose(often, logits.softmax(-1), atol=0.01) and often[2] == 0
    again = drawn(logits.softmax(-1).expand(2, 50_000, 5), torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_kl_and_top1_against_a_known_reference():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    found = evaluate(Constant(p.log()), tokens() % 3, reference=Constant(q.log()))
    assert found.kl == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-5)
    assert found.top1 == 0
    same = evaluate(Constant(p.log()), tokens() % 3, reference=Constant(p.log() + 5))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    assert same.reference_perplexity == pytest.approx(same.perplexity)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-4, 1e-2, 0.3, 30.0])
def test_kl_is_accurate_for_almost_equal_models(size):
    """KL of float32 logits agrees with float64, and is never negative."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(300, 4000, generator=generator) * 3
    second = first + size * torch.randn(first.shape, generator=generator)
    exact = divergence(first.double(), second.double())
    q, p = first.double().log_softmax(-1), second.double().log_softmax(-1)
    assert exact == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-7, abs=1e-10)
    found = divergence(first, second)
    # Logits of size 10 are rounded at 1e-6 of themselves.
    assert found == pytest.approx(exact, rel=1e-4, abs=300 * 1e-11) and found >= 0


def test_comparison_of_logits():
    a = torch.tensor([1.0, 2.0, 3.0])
    found = compare_models(Constant(a), Constant(a + torch.tensor([0.0, 0.0, -0.3])), tokens() % 3)
    assert found.max_abs == pytest.approx(0.3)
    assert found.mean_abs == pytest.approx(0.1)
    assert found.relative == pytest.approx(0.3 / math.sqrt(14))
    assert found.top1 == 1
    broken = compare_models(Constant(a), Constant(a * float("nan")), tokens() % 3)
    assert math.isnan(broken.max_abs)
    assert math.isnan(broken.kl)


def test_different_vocabularies_are_refused():
    for compare in (compare_models, lambda a, b, ids: evaluate(a, ids, reference=b)):
        with pytest.raises(TextError, match=r"\d and \d tokens"):
            compare(Constant(torch.zeros(3)), Constant(torch.zeros(4)), tokens() % 3)
    with pytest.raises(TextError, match="300"):
        evaluate(tiny_model("llama"), torch.full((1, 4), 300))


def test_float64_models_are_compared_in_float64():
    a = torch.zeros(3, dtype=torch.float64)
    b = a + torch.tensor([0, 0, 1e-12], dtype=torch.float64)
    assert compare_models(Constant(a + 1), Constant(b + 1), tokens() % 3).max_abs == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (4,)])
def test_windows_without_a_predicted_token_are_refused(shape):
    with pytest.raises(TextError):
        evaluate(Constant(torch.zeros(3)), torch.zeros(shape, dtype=torch.int64))


def test_windows_tile_the_text():
    tokenizer = byte_tokenizer()
    text = "abcdefghij" * 10
    windows = token_windows(tokenizer, text, length=20)
    assert tokenizer.decode(windows.flatten()) == text
    with pytest.raises(TextError, match="windows is -1"):
        token_windows(tokenizer, text, length=20, count=-1)
    few = token_windows(tokenizer, text, length=20, count=3)
    assert [row.tolist() for row in few] == [windows[i].tolist() for i in (0, 2, 4)]


def test_windows_start_with_the_bos_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert token_windows(tokenizer, "abcdef" * 10, length=6).shape == (
        10,
        6,
    )  # the tokenizer has a bos token but does not add it
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    windows = token_windows(tokenizer, "abcdef" * 10, length=7)
    assert windows.shape == (10, 7)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert all(tokenizer.decode(row[1:]) == "abcdef" for row in windows)


def test_a_bos_token_that_the_text_has_is_not_doubled():
    """Chat templates write it themselves, and the tokenizer would add another."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    windows = token_windows(tokenizer, "<s>abcdefghij" * 3, length=7)
    texts = ["<s>abcdef", "<s>ghij<s>a", "<s>bcdefg", "<s>hij<s>ab", "<s>cdefgh"]
    assert [tokenizer.decode(row) for row in windows] == texts
    assert (windows[:, 0] == tokenizer.bos_token_id).all() and (windows[:, 1] != tokenizer.bos_token_id).all()


def test_the_error_for_a_short_text_states_its_length():
    with pytest.raises(TextError, match=r"5 tokens.*window of 20"):
        token_windows(byte_tokenizer(), "hello", length=20)


def test_load_text_reads_every_kind_of_source(tmp_path, monkeypatch):
    monkeypatch.undo()  # the whole manual, which a fixture shortens
    assert load_text("manual")[0] == "manual"
    assert len(load_text("manual")[1]) > 100_000
    assert load_text("manual") == load_text("manual")
    assert load_text("auto")[0] == "manual"  # HF_HUB_OFFLINE is set for the tests
    (tmp_path / "text.txt").write_text("some words")
    assert load_text(str(tmp_path / "text.txt")) == ("text.txt", "some words")
    (tmp_path / "empty.txt").write_text("  ")
    with pytest.raises(TextError, match="empty"):
        load_text(str(tmp_path / "empty.txt"))
    with pytest.raises(TextError, match=r"missing\.txt"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="binary"):
        load_text(str(tmp_path / "binary"))


def test_a_missing_datasets_extra_is_an_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TextError, match=r"spinquant\[datasets\]"):
        load_text("wikitext")


def test_a_local_dataset_is_read(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"story": "one"}\n{"story": "two"}\n')
    _, text = load_text(f"dataset:{tmp_path / 'data'}::train:story")
    assert text == "one\n\ntwo"
    with pytest.raises(TextError, match="nowhere"):
        load_text(f"dataset:{tmp_path / 'nowhere'}")


def test_capturing_leaves_no_hook():
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    with captured(model, [name]) as outputs, captured(model, [name], inputs=True) as inputs, torch.no_grad():
        model(input_ids=tokens())
    assert torch.allclose(model.get_submodule(name)(inputs[name]), outputs[name])
    assert not model.get_submodule(name)._forward_hooks
    assert not model.get_submodule(name)._forward_pre_hooks
