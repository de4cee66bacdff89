"""Streaming writes the same bytes as rotating in memory, in bounded memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import assert_same, digest, quantize_to_fp8, saved, weights
from models import CONFIGS, SIZES, byte_tokenizer, logits, tiny_model, tokens
from spinquant import CheckpointError, Options, RotationSpec, load, load_tokenizer, rotate, rotate_folder
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.cli.options import parse_size
from spinquant.rotations import fast_transform as kronecker
from spinquant.streaming.pipeline import IN_FLIGHT

SPEC = RotationSpec("R1,R2")


def in_memory(folder, out, spec):
    """Rotate a folder in memory and save it."""
    model = load(folder)
    rotate(model, spec, options=Options(prove=False))
    model.save_pretrained(out)
    return out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Cut even tiny tensors into several slices and bands."""
    monkeypatch.setattr("spinquant.rotations.fuse.SLICE", 600)
    monkeypatch.setattr("spinquant.streaming.pipeline.BAND", 5000)
    monkeypatch.setattr("spinquant.streaming.pipeline.IN_FLIGHT", 20_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_streaming_equals_rotating_in_memory_bit_for_bit(name, dtype, tmp_path):
    folder = saved(tmp_path / "model", name, dtype, max_shard_size="60KB")
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual", options=Options(prove=False))
    assert_same(tmp_path / "out", in_memory(folder, tmp_path / "expected", SPEC))
    if dtype in (torch.float64, torch.float32):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]
        assert torch.allclose(logits(load(tmp_path / "out"), tokens()), logits(load(folder), tokens()), atol=tolerance)


@pytest.mark.parametrize("least", [0, 1 << 40])
def test_streaming_and_in_memory_use_compiled_kernels_alike(least, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    sizes = {**SIZES, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    applied, real = [], kronecker._butterflies
    monkeypatch.setattr(kronecker, "_butterflies", lambda *given: applied.append(given) or real(*given))
    monkeypatch.setattr("spinquant.rotations.hadamard.KERNELS_FROM", 128)
    monkeypatch.setattr(kronecker, "COMPILED_FROM", least)
    rotate_folder(tmp_path / "model", tmp_path / "out", SPEC, text=None, options=Options(prove=False))
    assert bool(applied) == (least == 0)
    assert_same(tmp_path / "out", in_memory(tmp_path / "model", tmp_path / "expected", SPEC))


@pytest.mark.parametrize(
    "spec",
    [
        RotationSpec("R1"),
        RotationSpec("R2"),
        RotationSpec("R1,R2", "random-matrix", randomize=True),
        RotationSpec("R1,R2", block_size={"R1": 16}, seed=3),
        RotationSpec(()),
    ],
    ids=str,
)
def test_every_kind_of_rotation_equals_rotating_in_memory(spec, folder, tmp_path):
    rotate_folder(folder, tmp_path / "out", spec, text="manual", options=Options(prove=False))
    assert_same(tmp_path / "out", in_memory(folder, tmp_path / "expected", spec))
    tied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("R1" not in spec.rotations)


def test_the_file_equals_that_of_save_pretrained(folder, tmp_path):
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    expected = in_memory(folder, tmp_path / "expected", SPEC) / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected.read_bytes()


def test_shards_and_copied_files_are_those_of_the_source(tmp_path):
    folder = saved(tmp_path / "model", "llama-tied", max_shard_size="60KB")
    (folder / "README.md").write_text("a model")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    for stale in ("consolidated.safetensors", "pytorch_model.bin", "extra/model.gguf", ".hidden"):
        (folder / stale).write_bytes(b"unrotated")
    result = rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    before, after = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (folder, tmp_path / "out"))
    assert set(after["weight_map"].values()) == set(before["weight_map"].values())
    assert {k: v for k, v in after["weight_map"].items() if k != "lm_head.weight"} == before["weight_map"]
    found = weights(tmp_path / "out")
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert (tmp_path / "out" / "README.md").read_text().endswith("\na model\n")  # below the new model card
    for name in ("extra/notes.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    for stale in ("consolidated.safetensors", "pytorch_model.bin", "extra/model.gguf", ".hidden"):
        assert not (tmp_path / "out" / stale).exists()
    assert load_tokenizer(tmp_path / "out")("x")["input_ids"] == byte_tokenizer()("x")["input_ids"]
    assert result.model is None
    assert result.real is not None and result.real.relative < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("size", [1, 30_000, 10**9])
def test_max_shard_size(size, folder, tmp_path):
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual", max_shard_size=size)
    expected = in_memory(folder, tmp_path / "expected", SPEC)
    assert_same(tmp_path / "out", expected)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(weights(expected))
    assert len(files) == {1: count, 10**9: 1}.get(size, len(files))
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= size
    assert torch.allclose(logits(load(tmp_path / "out"), tokens()), logits(load(folder), tokens()), atol=1e-3)


def test_sizes_are_parsed():
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", "10", "2kb")] == [5 * 10**9, 3 * 2**19, 10, 2000]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_equals_rotating_in_memory(dtype, folder, tmp_path):
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual", dtype=dtype)
    model = load(folder)
    wide = model.to(torch.float64) if dtype == torch.float64 else model
    rotate(wide, SPEC, options=Options(prove=False))
    wide.to(dtype).save_pretrained(tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert load(tmp_path / "out").dtype == dtype


def test_a_norm_may_be_in_another_shard_than_the_linears_it_is_fused_into(folder, tmp_path):
    tensors = weights(folder)
    norms = {name: t for name, t in tensors.items() if "norm" in name}
    (folder / "model.safetensors").unlink()
    parts = {"z.safetensors": norms, "a.safetensors": {n: t for n, t in tensors.items() if n not in norms}}
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"by": "hand"}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    assert_same(tmp_path / "out", in_memory(folder, tmp_path / "expected", SPEC))
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["by"] == "hand"


def test_a_tied_head_that_is_stored_is_rotated(folder, tmp_path):
    tensors = weights(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    assert_same(tmp_path / "out", in_memory(folder, tmp_path / "expected", SPEC))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_fp8_blocks_are_dequantized_and_rotated(name, tmp_path):
    folder = saved(tmp_path / "model", name, torch.bfloat16)
    plain = shutil.copytree(folder, tmp_path / "plain")
    exact = quantize_to_fp8(folder)
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    result = rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    assert result.real is not None and result.real.relative < 0.1
    model = load(plain)
    rotate(model, SPEC, options=Options(prove=False))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "bfloat16"
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_fp8_that_transformers_cannot_load_is_dequantized_with_rotations_none(tmp_path):
    """Blocks of 32 columns in a weight of 80; the output is loaded, and has the dequantized numbers."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    expected = quantize_to_fp8(tmp_path / "model")
    with pytest.raises(CheckpointError, match="--rotations none"):
        load(tmp_path / "model")
    rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec(()), dtype=torch.float32, text=None)
    found = load(tmp_path / "out").state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.float())


def test_fp8_scales_that_do_not_fit_are_named(tmp_path):
    folder = saved(tmp_path / "model", "llama", torch.bfloat16)
    quantize_to_fp8(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 8]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scale_inv.*blocks of \(8, 8\)"):
        Source(folder, load_config(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_written(value, folder, tmp_path):
    tensors = weights(folder)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight.*1 values.*broken"):
        rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_overflow_suggests_a_wider_dtype(folder, tmp_path):
    tensors = weights(folder)
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"overflows torch\.float16.*bfloat16"):
        rotate_folder(folder, tmp_path / "out", SPEC, text="manual", dtype=torch.float16)


def test_the_record_has_rotations_and_proof(folder, tmp_path):
    result = rotate_folder(folder, tmp_path / "out", SPEC, text="manual")
    record = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())
    assert record["proof"]["twin"]["relative"] < 1e-9
    assert record["proof"]["real_tokens"]["relative"] < 1e-4
    assert record["sample_text"] == "manual"
    assert result.seconds is not None and result.seconds["total"] > 0
    stored = load_file(tmp_path / "out" / "spinquant" / "rotations.safetensors")
    assert {"0.signs", "1.signs"} == set(stored)


def test_the_comparison_can_be_left_out(folder, tmp_path):
    result = rotate_folder(folder, tmp_path / "out", SPEC, text=None)
    assert result.real is None and result.twin is not None


PEAK = """
import sys
from pathlib import Path
import spinquant.entrypoints.folders
from spinquant import RotationSpec, quantize_folder, parse_scheme
status = Path("/proc/self/status").read_text()
print("start", int(status.split("VmRSS:")[1].split()[0]) * 1024)
for folder in sys.argv[1:]:  # the smaller one first
    quantize_folder(folder, f"{folder}-out", parse_scheme("W4A4"), RotationSpec("R1,R2,R4"), text=None)
    status = Path("/proc/self/status").read_text()
    print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024)
print("numba" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    folders = [tmp_path / "1", tmp_path / "9"]
    for folder in folders:
        config = LlamaConfig(**sizes, num_hidden_layers=int(folder.name))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    bytes_ = [(folder / "model.safetensors").stat().st_size for folder in folders]
    given = {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1"}  # else each thread keeps what it has freed
    command = [sys.executable, "-c", PEAK, *folders]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **given})
    assert run.stdout.split()[-1] == "False", "numba and its compiler would exceed the memory bound of a small model"
    start, *peaks = [int(line.split()[-1]) for line in run.stdout.splitlines() if line[:5] in ("start", "peak ")]
    assert bytes_[1] - bytes_[0] > 230e6
    assert peaks[1] - peaks[0] < IN_FLIGHT < 0.3 * (bytes_[1] - bytes_[0]), peaks
    largest = 4 * sizes["vocab_size"] * sizes["hidden_size"]
    assert peaks[1] - start < 2 * IN_FLIGHT + 3 * largest, (start, peaks)  # of which libraries are no part


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    for out in ("a", "b"):
        rotate_folder(folder, tmp_path / out, SPEC, text="manual")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
