"""Models whose context is shorter than the samples that are taken by default."""

import json

import pytest
import torch

from families import FAMILIES
from models import byte_tokenizer, random_weights, tokens
from spinquant import (
    CalibrationText,
    LearnOptions,
    Options,
    RotationSpec,
    TextError,
    evaluate,
    learn_folder,
    load,
    prove,
    quantize,
    quantize_folder,
    rotate_folder,
)
from spinquant.entrypoints.request import LearnText
from spinquant.models.modules import model_class

CONTEXT = 64
FUSED = RotationSpec("R1,R2", "auto")
UNPROVED = Options(prove=False)


def saved(path, name, *, context=CONTEXT, tokenizer=True):
    config = FAMILIES[name].config()
    config.max_position_embeddings = context
    random_weights(model_class(config).from_config(config, dtype=torch.float32)).save_pretrained(path)
    if tokenizer:
        byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_context_shorter_than_the_samples(name, run, tmp_path):
    folder = saved(tmp_path / "model", name)
    rotated = rotate_folder(folder, tmp_path / "rotated", FUSED, text="manual", options=UNPROVED)
    assert rotated.real is not None and rotated.real.relative < 1e-4
    text = CalibrationText("manual", samples=3)
    given = {"method": "gptq", "calibration_text": text, "text": "manual", "options": UNPROVED}
    result = quantize_folder(folder, tmp_path / "out", "W4A8KV8", FUSED, **given)
    assert result.notes["calibration_text"]["length"] == CONTEXT
    options, wanted = LearnOptions("random", baselines=1, transforms=False), LearnText(text, windows=1)
    learned = learn_folder(folder, tmp_path / "learned", "A4", FUSED, options, text=wanted)
    assert learned.record["tokens"]["samples"][1] == CONTEXT
    code, out, errors = run("evaluate", tmp_path / "out", "--text", "manual", "--windows", "2", "--json")
    assert code == 0, errors
    assert json.loads(out)["length"] == CONTEXT


def test_samples_without_a_tokenizer_fit_the_context_too(tmp_path):
    folder = saved(tmp_path / "model", "gpt2", tokenizer=False)
    assert rotate_folder(folder, tmp_path / "out", FUSED, options=UNPROVED).real is not None


def test_longer_texts_are_refused_when_they_are_asked_for(run, tmp_path):
    folder = saved(tmp_path / "model", "gpt2")
    model, long = load(folder), tokens(1, CONTEXT + 1)
    with pytest.raises(TextError, match=r"65 tokens.*context of 64"):
        evaluate(model, long)
    with pytest.raises(TextError, match=r"65 tokens.*context of 64"):
        quantize(model, "W4", FUSED, method="gptq", tokens=long, options=UNPROVED)
    code, _, errors = run("evaluate", folder, "--length", str(CONTEXT + 1), "--text", "manual")
    assert code != 0 and "context of 64" in " ".join(errors.split()) and "--length" in errors


def test_a_context_shorter_than_the_tokens_of_the_proof():
    config = FAMILIES["gpt2"].config()
    config.max_position_embeddings = 8
    assert prove(config, RotationSpec(FAMILIES["gpt2"].allowed, "auto")).relative < 1e-9
