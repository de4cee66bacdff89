import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from spinquant import CheckpointError, load, load_tokenizer, read_headers
from spinquant.checkpoint import atomic_folder, load_config


def test_headers_are_what_is_in_the_files(folder):
    tensors = load_file(folder / "model.safetensors")
    headers = read_headers(folder)
    assert {n: i.shape for n, i in headers.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {i.dtype for i in headers.values()} == {"F32"}


def test_shards_are_read_through_the_index(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert set(read_headers(tmp_path)) == set(model.state_dict())
    loaded = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def damage(folder, kind: str) -> str:
    """Damage a folder in one way; returns what the error must mention."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "no folder":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        return "does not exist"
    if kind == "no config":
        config.unlink()
        return "config.json"
    if kind == "config is not JSON":
        config.write_text("{")
        return "not valid JSON"
    if kind == "config without an architecture":
        config.write_text("{}")
        return "model_type"
    if kind == "unknown architecture":
        config.write_text(json.dumps({"model_type": "perceptron9000"}))
        return "perceptron9000"
    if kind == "no weights":
        weights.unlink()
        return "no weights"
    if kind == "truncated weights":
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        return "model.safetensors"
    if kind == "garbage weights":
        weights.write_bytes(b"\xff" * 1000)
        return "model.safetensors"
    if kind == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        return "--allow-pickle"
    if kind == "lost shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model-00001-of-00002.safetensors"
    if kind == "lost tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        return "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] = float("nan" if kind == "nan" else "inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    return "model.layers.2.self_attn.k_proj.weight"


DAMAGES = [
    "no folder",
    "no config",
    "config is not JSON",
    "config without an architecture",
    "unknown architecture",
    "no weights",
    "truncated weights",
    "garbage weights",
    "pickle",
    "lost shard",
    "lost tensor",
    "nan",
    "inf",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(folder, kind):
    word = damage(folder, kind)
    with pytest.raises(CheckpointError, match=word.replace(".", r"\.")):
        load(folder)


def test_pickle_is_loaded_when_asked(folder):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load(folder, allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_folder_without_tokenizer_says_so(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_hub_id_that_cannot_be_had_says_so():
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        load_config("nobody/nothing")


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(CheckpointError, match="--force"), atomic_folder(out):
        pass
    with pytest.raises(RuntimeError), atomic_folder(out, force=True):
        raise RuntimeError
    assert (out / "old").exists()
    with atomic_folder(out, force=True) as partial:
        (partial / "new").write_text("2")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FULL_DISK = """
import resource, signal, sys
import spinquant
from spinquant.pipeline import rotate_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    rotate_folder(sys.argv[1], sys.argv[2], spinquant.RotationSpec("R1"), text="manual")
except spinquant.CheckpointError as error:
    print("refused:", error)
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, tmp_path):
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), str(out)], capture_output=True, text=True, check=False
    )
    assert "refused: no space left" in run.stdout, run.stdout + run.stderr
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


INTERRUPTED = """
import sys, time
from spinquant.checkpoint import atomic_folder
from spinquant.cli import main
import spinquant.cli as cli

def slow(model, out, *rest, **options):
    with atomic_folder(out) as partial:
        (partial / "half").write_text("written")
        print("writing", flush=True)
        time.sleep(60)

cli.rotate_folder = slow
sys.argv = ["spinquant", "rotate", sys.argv[1], sys.argv[2]]
main()
"""


def test_an_interrupt_leaves_nothing_and_exits_with_130(folder, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "writing" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
