"""Quantizing by streaming equals quantizing in memory: the same packed integers, the same logits."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import assert_same, digest, saved, weights
from models import CONFIGS, logits, tiny_model, tokens
from spinquant import (
    CheckpointError,
    Options,
    ProofError,
    Quantizer,
    RotationSpec,
    Scheme,
    SchemeError,
    load,
    parse_scheme,
    quantize,
    quantize_folder,
    save,
)
from spinquant.streaming.pipeline import Rotated

ALL = RotationSpec("R1,R2,R3,R4", seed=1)
UNPROVED = Options(prove=False)


pytestmark = pytest.mark.usefixtures("small_pieces")


def in_memory(folder, out, scheme, spec):
    """Quantize a folder in memory and save it."""
    result = quantize(load(folder), scheme, spec, options=UNPROVED)
    save(result, out)
    return result.model


def assert_equal_folders(folder, tmp_path, scheme, spec):
    quantize_folder(folder, tmp_path / "out", scheme, spec, text=None, options=UNPROVED)
    model = in_memory(folder, tmp_path / "expected", scheme, spec)
    assert_same(tmp_path / "out", tmp_path / "expected")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected")]
    assert configs[0].get("quantization_config") == configs[1].get("quantization_config")
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_quantizing_in_memory(name, tmp_path):
    folder = saved(tmp_path / "model", name, torch.float32, max_shard_size="60KB")
    assert_equal_folders(folder, tmp_path, parse_scheme("W4A4KV4"), ALL)


SCHEMES = {
    "groups": parse_scheme("W4g16A16"),
    "odd bits": parse_scheme("W3g8A6KV3"),
    "asymmetric": Scheme(weights=Quantizer(4, symmetric=False, group_size=16, clip="mse")),
    "no search": parse_scheme("W4A8", weight_clip=0.9),
    "the head too": parse_scheme("W4A4KV4", lm_head=True),
    "activations alone": parse_scheme("A8KV8"),
    "nothing": parse_scheme("none"),
    "fp8": parse_scheme("WFP8AFP8"),
    "nvfp4": parse_scheme("WNVFP4A16"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_equals_quantizing_in_memory(scheme, dtype, tmp_path):
    folder = saved(tmp_path / "model", "llama-tied", dtype)
    assert_equal_folders(folder, tmp_path, SCHEMES[scheme], ALL)


@pytest.mark.parametrize("rotations", ["none", "R1,R2", "R2", "R4"])
@pytest.mark.parametrize("lm_head", [False, True])
def test_every_choice_of_rotations_equals_quantizing_in_memory(rotations, lm_head, folder, tmp_path):
    assert_equal_folders(folder, tmp_path, parse_scheme("W4A16", lm_head=lm_head), RotationSpec(rotations))


def test_online_rotations_in_a_fixed_precision_equal_quantizing_in_memory(folder, tmp_path):
    options = Options(prove=False, precision=torch.float64)
    quantize_folder(folder, tmp_path / "out", parse_scheme("W4A8"), ALL, text=None, options=options)
    result = quantize(load(folder), "W4A8", ALL, options=options)
    save(result, tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(result.model, tokens()))


def test_scheme_none_writes_a_plain_hugging_face_folder(folder, tmp_path):
    quantize_folder(folder, tmp_path / "out", parse_scheme("none"), RotationSpec("R1,R2"), text="manual", format="hf")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.allclose(logits(load(tmp_path / "out"), tokens()), logits(load(folder), tokens()), atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotations_are_compared_on_real_tokens_before_anything_is_written(name, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", name, torch.float32)
    result = quantize_folder(folder, tmp_path / "out", parse_scheme("W4A4KV4"), ALL, text="manual", options=UNPROVED)
    assert result.real is not None and result.real.relative < 1e-4
    tensor = "model.layers.1.mlp.up_proj.weight"
    whole = Rotated.whole
    monkeypatch.setattr(Rotated, "whole", lambda self, name: whole(self, name) * (1.1 if name == tensor else 1))
    with pytest.raises(ProofError, match=r"layers\.1\.mlp\.up_proj"):
        quantize_folder(folder, tmp_path / "bad", parse_scheme("W4A4"), ALL, text="manual", options=UNPROVED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_group_that_does_not_divide_is_named_before_any_work(folder, tmp_path):
    with pytest.raises(SchemeError, match="q_proj"):
        quantize_folder(folder, tmp_path / "out", parse_scheme("W4g7A16"), ALL, text=None)
    assert not (tmp_path / "out").exists()


def test_shards_of_packed_weights(folder, tmp_path):
    scheme = parse_scheme("W4A4")
    quantize_folder(folder, tmp_path / "out", scheme, ALL, text=None, options=UNPROVED, max_shard_size=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = in_memory(folder, tmp_path / "expected", scheme, ALL)
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(model, tokens()))


def test_max_shard_size_is_refused_for_pickles(folder, tmp_path):
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    given = {"allow_pickle": True, "text": "manual", "max_shard_size": 1}
    with pytest.raises(CheckpointError, match="--max-shard-size"):
        quantize_folder(folder, tmp_path / "out", parse_scheme("W4A16"), ALL, **given)


def test_an_infinite_weight_is_named(folder, tmp_path):
    tensors = weights(folder)
    tensors["model.layers.0.self_attn.o_proj.weight"][1, 1] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight.*broken"):
        quantize_folder(folder, tmp_path / "out", parse_scheme("W4A16"), ALL, text=None, options=UNPROVED)


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    for out in ("a", "b"):
        quantize_folder(folder, tmp_path / out, parse_scheme("W4A4KV4"), ALL, text="manual")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_dtype_applies_to_everything_that_is_not_packed(tmp_path):
    folder = saved(tmp_path / "model", "llama-tied", torch.float32)
    quantize_folder(folder, tmp_path / "out", parse_scheme("W8A16"), ALL, text="manual", dtype=torch.bfloat16)
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    reference = logits(tiny_model("llama-tied", dtype=torch.float32), tokens())
    assert (logits(model, tokens()).float() - reference).norm() < 0.1 * reference.norm()
