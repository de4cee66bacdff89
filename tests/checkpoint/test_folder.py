import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models import tiny_model
from processes import run_source, start_source
from spinquant import CheckpointError, RotationSpec, load, load_tokenizer, read_headers, rotate_folder
from spinquant.checkpoint.atomic import check_free, is_full, why_full
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.checkpoint.folder import load_config, weight_files


def test_headers_match_the_tensors_of_the_files(folder):
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
    if kind == "wrong shape":
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 47)
        save_file(tensors, weights, metadata={"format": "pt"})
        return "model.layers.0.mlp.up_proj.weight"
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
    "wrong shape",
    "nan",
    "inf",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_raises_an_error_that_names_the_damage(folder, kind):
    word = damage(folder, kind)
    with pytest.raises(CheckpointError, match=word.replace(".", r"\.")):
        load(folder)


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "a_part"])
def test_a_config_that_describes_a_quantization_is_refused(folder, tmp_path, place):
    """Runtimes read each of these, and would take the rotated weights for quantized ones."""
    path = folder / "config.json"
    found = {"quantization_config": GPTQ} if place == "a_part" else GPTQ
    path.write_text(json.dumps({**json.loads(path.read_text()), place: found}))
    with pytest.raises(CheckpointError, match=r"is quantized already \(gptq\)"):
        rotate_folder(folder, tmp_path / "out", RotationSpec("R1"), text=None)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_describes_a_quantization_is_refused(folder, tmp_path, file):
    """ModelOpt, AutoGPTQ and AutoAWQ describe it beside the config."""
    (folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"is described as quantized by {file}, .* or remove {file} if"):
        rotate_folder(folder, tmp_path / "out", RotationSpec("R1"), text=None)
    assert not (tmp_path / "out").exists()


def test_the_index_of_a_variant_is_not_copied(tmp_path):
    """Its shards are not copied either: they hold the unrotated weights."""
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="60KB")
    assert (tmp_path / "model/model.safetensors.index.fp16.json").exists()
    rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), text=None)
    assert not list((tmp_path / "out").glob("*fp16*"))


def test_allow_pickle_loads_pickles(folder):
    model = load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load(folder, allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_an_index_is_checked_once_a_file(tmp_path, monkeypatch):
    """Not once a tensor: an index of 18,867 experts in 16 files took 2 of 3 seconds before any work."""
    looked, usual = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **more: (looked.append(path), usual(path, **more))[1])
    counts = []
    for number in (2, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {str(i): torch.zeros(1) for i in range(number)}
        save_file(tensors, folder / "model-1.safetensors", metadata={"format": "pt"})
        index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        looked.clear()
        assert weight_files(folder) == ["model-1.safetensors"]
        counts.append(len(looked))
    assert 0 < counts[0] == counts[1]


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_hub_id_that_cannot_be_downloaded_is_an_error():
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        load_config("nobody/nothing")


def test_a_folder_is_written_atomically(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_no_files(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_only_models(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("1")
    with pytest.raises(CheckpointError, match="--force does not replace it"), atomic_folder(out, force=True):
        pass
    assert (out / "thesis.txt").exists()


def test_the_source_of_a_run_is_never_replaced(folder, tmp_path):
    for out in (folder, folder.parent, folder / ".." / "model"):
        with pytest.raises(CheckpointError, match="choose another folder"):
            check_free(out, force=True, source=folder)
    check_free(folder / "rotated", source=folder)


def test_outputs_inside_the_source_folder_are_not_copied(folder, tmp_path):
    for name in ("first", "second"):
        rotate_folder(folder, folder / name, RotationSpec("R1"), text=None)
    rotate_folder(folder, tmp_path / "out", RotationSpec("R1"), text=None)
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (folder / "second", tmp_path / "out")]
    assert files[0] == files[1] and not any("first" in name for name in files[0])


def test_a_folder_created_during_the_run_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="--force"), atomic_folder(out):
        out.mkdir()
        (out / "precious").write_text("1")
    assert (out / "precious").exists()


def test_an_interrupted_replacement_keeps_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    replace, calls = Path.replace, []

    def interrupted(self, target):
        calls.append(target)
        result = replace(self, target)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, force=True) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["file/out", "dangling/out"])
def test_an_unwritable_output_folder_is_refused_before_the_run(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    with pytest.raises(CheckpointError, match="cannot write"):
        check_free(tmp_path / place)


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o077)
    try:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("1")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o600


def test_an_unavailable_device_is_refused(folder):
    with pytest.raises(CheckpointError, match="cuda:77"):
        load(folder, device="cuda:77")


def test_an_existing_folder_is_replaced_only_with_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("1")
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
from spinquant.entrypoints.folders import rotate_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is an error, as on a full disk
for limit, out in ((20_000, sys.argv[2]), (500_000, sys.argv[3])):  # while the weights are written, and after them
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        rotate_folder(sys.argv[1], out, spinquant.RotationSpec("R1"), text=sys.argv[4])
    except spinquant.CheckpointError as error:
        print("refused:", error)
"""


def test_full_disk_quota_and_file_size_limit_are_distinguished():
    for number, word in ((errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit")):
        for error in (OSError(number, "full"), SafetensorError(f"cannot write (os error {number})")):
            assert is_full(error) and word in why_full(error)
    assert not is_full(OSError(errno.EACCES, "not yours"))


def test_a_full_disk_is_an_error_and_finished_files_are_kept(folder, tmp_path):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"].update({f"word{i}": 256 + i for i in range(30_000)})
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))  # larger than the weights
    early, late = tmp_path / "early", tmp_path / "late"
    (folder / "text").write_text("A quick brown fox jumps over the lazy dog. " * 100)
    run = run_source(FULL_DISK, [folder, early, late, folder / "text"])
    assert run.stdout.count("refused: a file exceeds the file size limit") == 2, run.stdout + run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".late.run", "model"]
    for out in (early, late):
        rotate_folder(folder, out, RotationSpec("R1"), text=str(folder / "text"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["early", "late", "model"]


INTERRUPTED = """
import signal, sys, time
# A shell's background jobs, and so whatever they start, have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from spinquant.entrypoints import stream as streamed_folders
from spinquant.cli.main import main

def slow(result, folder, **_):  # the weights are written by now
    assert (Path(folder) / "model.safetensors").exists()
    print("writing", flush=True)
    time.sleep(60)

streamed_folders.write_record = slow
sys.argv = ["spinquant", "rotate", *sys.argv[1:3], "--text", sys.argv[3]]
main()
"""


def test_an_interrupt_writes_no_folder_and_exits_with_130(folder, tmp_path):
    out = tmp_path / "out"
    (folder / "text").write_text("A quick brown fox jumps over the lazy dog. " * 100)
    process = start_source(INTERRUPTED, [folder, out, folder / "text"], {}, folder)
    while not (folder / "out").exists() or "writing" not in (folder / "out").read_text():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    errors = (folder / "err").read_text()
    assert process.exitcode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.run", "model"]
