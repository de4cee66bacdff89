"""What a half-precision checkpoint gives on a processor that is slow in it: float32's results, in its own dtype."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import saved, weights
from models import tokens
from spinquant import (
    CalibrationText,
    LearnOptions,
    LocalOptions,
    Options,
    RotationSpec,
    learn_folder,
    load,
    parse_scheme,
    quantize,
    quantize_folder,
    rotate_folder,
)
from spinquant.calibration.blockwise import Calibration
from spinquant.calibration.data import calibration_tokens
from spinquant.checkpoint.folder import load_tokenizer
from spinquant.entrypoints.arithmetic import arithmetic_of, stored_in
from spinquant.entrypoints.request import LearnText

UNPROVED, SPEC, TEXT = Options(prove=False), RotationSpec("R1,R2,R3,R4"), CalibrationText("manual", 4, 16)


@pytest.fixture
def slow(monkeypatch):
    """A processor without instructions for half precision."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.fixture
def pair(request, tmp_path):
    """A half-precision folder (bfloat16 unless the test names another), and one with the same numbers in float32."""
    half = saved(tmp_path / "half", "llama", getattr(request, "param", torch.bfloat16))
    wide = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    saved(tmp_path / "wide", "llama")
    wide.save_pretrained(tmp_path / "wide")
    return half, tmp_path / "wide"


def learned(folder, out, method="local", **options):
    text = LearnText(CalibrationText("manual", 6, 16), windows=2)
    settings = LearnOptions(method, baselines=1, local=LocalOptions(steps=2))
    return learn_folder(folder, out, parse_scheme("W4A4"), RotationSpec("R1,R2"), settings, text=text, **options)


def test_learning_gives_the_rotations_of_the_float32_checkpoint(pair, slow, tmp_path):
    found, expected = (learned(folder, tmp_path / f"{folder.name}-learned") for folder in pair)
    assert found.record["arithmetic"]["dtype"] == "float32"
    assert found.record["scores"] == expected.record["scores"] and found.digest() == expected.digest()
    own = learned(pair[0], tmp_path / "own", "random", dtype=torch.bfloat16)
    assert own.record["arithmetic"] == {"dtype": "bfloat16", "reason": "as asked"}
    assert own.record["scores"]["random 0"] != expected.record["scores"]["random 0"]


def test_calibrating_computes_in_float32_and_writes_the_checkpoints_dtype(pair, slow, tmp_path):
    half, _ = pair
    dtype = load(half).dtype
    options = {"method": "gptaq", "options": UNPROVED, "text": None, "calibration_text": TEXT}
    options["calibration"] = Calibration(clips=True)
    result = quantize_folder(half, tmp_path / "out", "W4A8KV4", SPEC, **options)
    assert result.notes["arithmetic"]["calibration"]["dtype"] == "float32"
    own = quantize_folder(half, tmp_path / "own", "W4A8KV4", SPEC, dtype=dtype, **options)
    assert own.notes["arithmetic"]["calibration"]["reason"] == "as asked"
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "own")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    codes = [name for name in found if found[name].dtype == torch.int32]
    assert any(not torch.equal(found[name], expected[name]) for name in codes)  # the arithmetic was another one
    assert load(tmp_path / "out").dtype == dtype
    record = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())
    assert record["arithmetic"] == result.notes["arithmetic"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_calibrating_in_memory_gives_what_calibrating_from_disk_gives(pair, slow, tmp_path, method):
    half, _ = pair
    model, calibration = load(half), Calibration(clips=True)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    _, ids = calibration_tokens(model, load_tokenizer(half), TEXT)
    given = {"method": method, "calibration": calibration, "options": UNPROVED}
    result = quantize(model, "W4A8KV4", SPEC, tokens=ids, **given)
    assert result.notes["arithmetic"]["calibration"]["dtype"] == "float32"
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    model.save_pretrained(tmp_path / "memory")
    quantize_folder(half, tmp_path / "disk", "W4A8KV4", SPEC, calibration_text=TEXT, text=None, **given)
    found, expected = weights(tmp_path / "memory"), weights(tmp_path / "disk")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_rotated_logits_are_compared_in_float32(pair, slow, tmp_path):
    half, _ = pair
    result = rotate_folder(half, tmp_path / "out", RotationSpec("R1,R2"), text="manual", options=UNPROVED)
    assert result.notes["arithmetic"]["comparison"]["dtype"] == "float32"
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {load(half).dtype}
    own = rotate_folder(half, tmp_path / "own", RotationSpec("R1,R2"), dtype=load(half).dtype, options=UNPROVED)
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "own")
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # whatever they are compared in
    assert result.real.relative < own.real.relative  # which also rounds on the way


@pytest.mark.parametrize("pair", [torch.bfloat16, torch.float16], indirect=True)
def test_evaluating_gives_the_perplexity_of_the_float32_checkpoint(pair, slow, run):
    half, wide = pair
    command = ("--text", "manual", "--windows", "2", "--length", "16")
    found, expected = (json.loads(run("evaluate", folder, *command, "--json")[1]) for folder in pair)
    assert found["perplexity"] == expected["perplexity"]
    assert found["arithmetic"]["dtype"] == "float32"
    name = str(load(half).dtype).removeprefix("torch.")
    own = json.loads(run("evaluate", half, *command, "--json", "--dtype", name)[1])
    assert own["perplexity"] != expected["perplexity"] and own["arithmetic"] == {"dtype": name, "reason": "as asked"}
    _, out, errors = run("verify", half, wide, *command)
    assert "half: computing in float32" in errors and "arithmetic" in out
    assert json.loads(run("verify", half, wide, *command, "--json", "--dtype", "auto")[1])["max_abs"] == 0


def test_a_quantized_folder_counts_the_numbers_that_its_words_hold(tmp_path, slow):
    folder = saved(tmp_path / "model", "llama", torch.bfloat16)
    quantize_folder(folder, tmp_path / "out", "W4A16", RotationSpec(()), options=UNPROVED)
    (_, plain, _), (dtype, packed, fixed) = stored_in(folder, False), stored_in(tmp_path / "out", False)
    assert dtype == torch.bfloat16 and not fixed and plain <= packed < 1.2 * plain
    (computed,) = arithmetic_of(tmp_path / "out", device="cpu")
    assert computed.dtype == torch.float32
    ids = tokens(1, 8)
    assert load(tmp_path / "out", dtype=computed.dtype)(ids).logits.dtype == torch.float32
