"""Streaming to compressed-tensors folders equals the in-memory export, tensor by tensor."""

import json
from dataclasses import replace

import pytest
import torch

from checkpoints import assert_same
from families import FAMILIES
from models import byte_tokenizer, logits, random_weights, tiny_model, tokens
from spinquant import Options, RotationSpec, load, parse_scheme, quantize, quantize_folder, save
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.checkpoint.folder import load_tokenizer
from spinquant.formats.compressed_config import as_stored
from spinquant.models.modules import model_class

pytest.importorskip("compressed_tensors")

SPEC = RotationSpec("R1,R2,R4", "hadamard", block_size={"R4": 16})
TEXT = CalibrationText("manual", 4, 16)
UNPROVED = Options(prove=False)


pytestmark = pytest.mark.usefixtures("small_pieces")


def saved(path, dtype):
    """A tiny model in several shards whose linears fit every group size of the cases."""
    model = tiny_model("llama-tied", dtype=dtype)
    model.save_pretrained(path, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(path)
    return path


def symmetric(words: str, **options):
    """The scheme that the command line makes for this format."""
    return as_stored(parse_scheme(words, activation_symmetric=True, **options))


CASES = {
    "packed": ("W4g16A16", "rtn", torch.bfloat16, {}),
    "asymmetric": ("W4g16A16", "gptq", torch.float32, {}),
    "bytes": ("W4A8", "rtn", torch.float32, {"lm_head": True}),
    "gptq": ("W8A8", "gptaq", torch.bfloat16, {"lm_head": True}),
    "fp8": ("FP8_DYNAMIC", "rtn", torch.bfloat16, {}),
    "nvfp4": ("NVFP4", "gptq", torch.bfloat16, {}),
    "online": ("none", "rtn", torch.float32, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_streaming_equals_the_in_memory_export(case, tmp_path):
    words, method, dtype, options = CASES[case]
    scheme = symmetric(words, **options)
    if case == "asymmetric" and scheme.weights is not None:
        scheme = replace(scheme, weights=replace(scheme.weights, symmetric=False))
    folder = saved(tmp_path / "model", dtype)
    calibrated = {} if method == "rtn" else {"calibration_text": TEXT}
    given = {"method": method, "format": "compressed-tensors", "text": None, "options": UNPROVED}
    quantize_folder(folder, tmp_path / "out", scheme, SPEC, **given, **calibrated)
    model = load(folder)
    _, ids = calibration_tokens(model, load_tokenizer(folder), TEXT)
    result = quantize(model, scheme, SPEC, method=method, tokens=ids if calibrated else None, options=UNPROVED)
    save(result, tmp_path / "expected", format="compressed-tensors")
    assert_same(tmp_path / "out", tmp_path / "expected")
    written, expected = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("out", "expected")
    )
    assert written == expected
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(load(tmp_path / "expected"), tokens()))


def described(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["llava", "gemma3-vision", "smolvlm", "qwen2_vl", "qwen3_vl"])
def test_vision_language_models_load_to_the_last_bit(name, tmp_path):
    """Their checkpoints name tensors otherwise than the modules, which the config names."""
    config, folder = FAMILIES[name].config(), tmp_path / "model"
    random_weights(model_class(config).from_config(config, dtype=torch.float32)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rotations = [rotation for rotation in ("R1", "R2", "R4") if rotation in FAMILIES[name].allowed]
    spec = RotationSpec(rotations, "hadamard", block_size={"R4": 16}, randomize=False)
    given = {"format": "compressed-tensors", "options": UNPROVED}
    scheme = symmetric("W8A8", lm_head=True)
    quantize_folder(folder, tmp_path / "out", scheme, spec, text=None, **given)
    result = quantize(load(folder), scheme, spec, **given)
    save(result, tmp_path / "expected", format="compressed-tensors")
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert described(tmp_path / "out") == described(tmp_path / "expected")
    ignored = described(tmp_path / "out")["ignore"]
    assert any("vision" in linear or "visual" in linear for linear in ignored)
    assert not any("down_proj" in linear or "lm_head" in linear for linear in ignored if "vis" not in linear)
    again = load(tmp_path / "out")
    assert type(again) is type(result.model)
    assert torch.equal(logits(again, tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_neox", "mimo_v2_flash"])
def test_models_whose_checkpoints_have_other_names_load_to_the_last_bit(name, tmp_path):
    """Experts that a checkpoint stores one by one are stacked when it is loaded."""
    config, folder = FAMILIES[name].config(), tmp_path / "model"
    random_weights(model_class(config).from_config(config, dtype=torch.float32)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    given = {"format": "compressed-tensors", "options": UNPROVED}
    quantize_folder(folder, tmp_path / "out", "KVFP8", RotationSpec("R2"), text=None, calibration_text=TEXT, **given)
    model = load(folder)
    _, ids = calibration_tokens(model, load_tokenizer(folder), TEXT)
    result = quantize(model, "KVFP8", RotationSpec("R2"), tokens=ids, **given)
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("words", ["W8A8KVFP8", "NVFP4KVFP8"])
def test_words_mean_the_same_in_python_and_on_the_command_line(words, run, tmp_path):
    folder = saved(tmp_path / "model", torch.float32)
    options = ["--rotations", "R1,R2", "--type", "hadamard", "--format", "compressed-tensors", "--no-proof"]
    text = ["--calibration", "manual", "--samples", "4", "--sample-length", "16", "--no-compare"]
    code, _, errors = run("quantize", folder, tmp_path / "line", "--scheme", words, *options, *text)
    assert code == 0, errors
    spec, given = RotationSpec("R1,R2", "hadamard"), {"format": "compressed-tensors", "options": UNPROVED}
    quantize_folder(folder, tmp_path / "out", words, spec, text=None, calibration_text=TEXT, **given)
    assert_same(tmp_path / "out", tmp_path / "line")
    model = load(folder)
    _, ids = calibration_tokens(model, load_tokenizer(folder), TEXT)
    save(quantize(model, words, spec, tokens=ids, **given), tmp_path / "memory", format="compressed-tensors")
    assert_same(tmp_path / "memory", tmp_path / "line")
    assert described(tmp_path / "memory") == described(tmp_path / "out") == described(tmp_path / "line")
