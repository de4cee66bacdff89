"""A damaged source, or one that changed during a run, is refused by name before the output is replaced."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from models import SIZES
from spinquant import CheckpointError, Options, RotationSpec, parse_scheme, quantize_folder, rotate_folder
from spinquant.calibration.data import CalibrationText
from spinquant.checkpoint.checksums import FileHash, SourceHash
from spinquant.checkpoint.safetensors_io import file_hash

SPEC = RotationSpec("R1,R2")
QUICK = {"text": None, "options": Options(prove=False)}


@pytest.fixture
def model(tmp_path):
    """One layer in a few shards."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": 64}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="40KB")
    return path


def flip(path: Path, *, first: bool = False) -> None:
    """Flip a bit in the last number of a file, or in its first, without changing size or times."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") if first else -4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)


def sums(folder: Path) -> Path:
    """A list of the shards' checksums."""
    listed = folder.parent / "sums"
    lines = [f"{file_hash(path)} *{path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    listed.write_text("".join(lines))
    return listed


def test_a_listed_checksum_is_checked(model, tmp_path):
    listed = sums(model)
    result = rotate_folder(model, tmp_path / "a", SPEC, checksums=listed, **QUICK)
    assert result.record()["source_files"] == {p.name: file_hash(p) for p in model.glob("*.safetensors")}
    shard = max(model.glob("*.safetensors"))
    flip(shard)
    old = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged.*sums records"):
        rotate_folder(model, tmp_path / "a", SPEC, checksums=listed, force=True, **QUICK)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        quantize_folder(model, tmp_path / "b", parse_scheme("W4A16"), SPEC, checksums=listed, **QUICK)
    given = {"method": "gptq", "calibration_text": CalibrationText("generated", 2, 8), "checksums": listed}
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        quantize_folder(model, tmp_path / "b", parse_scheme("W4A16"), SPEC, **given, **QUICK)
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "model", "sums"]
    rotate_folder(model, tmp_path / "c", SPEC, **QUICK)  # no checksum is known


@pytest.mark.parametrize("text", ["", "no checksum\n", "0" * 64 + "  other.safetensors\n"])
def test_a_list_without_checksums_of_the_source_is_refused(text, model, tmp_path):
    (tmp_path / "sums").write_text(text)
    with pytest.raises(CheckpointError, match=r"no SHA-256|lists none"):
        rotate_folder(model, tmp_path / "out", SPEC, checksums=tmp_path / "sums", **QUICK)


def test_a_checksum_in_the_hubs_download_metadata_is_checked(model, tmp_path):
    shard = max(model.glob("*.safetensors"))
    noted = model / ".cache" / "huggingface" / "download" / f"{shard.name}.metadata"
    noted.parent.mkdir(parents=True)
    noted.write_text(f"{'0' * 40}\n{file_hash(shard)}\n1700000000.0\n")
    rotate_folder(model, tmp_path / "a", SPEC, **QUICK)
    flip(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged.*{shard.name}.metadata"):
        rotate_folder(model, tmp_path / "b", SPEC, **QUICK)
    noted.write_text(f"{'0' * 40}\n{'0' * 40}\n1700000000.0\n")  # the etag of a file outside large file storage
    rotate_folder(model, tmp_path / "b", SPEC, **QUICK)


def test_a_blob_of_the_hubs_cache_is_checked_against_its_name(model, tmp_path):
    home = tmp_path / "models--o--n"
    blobs = home / "blobs"
    blobs.mkdir(parents=True)
    (home / "snapshots").mkdir()
    model = model.rename(home / "snapshots" / "0a1b")
    shard = max(model.glob("*.safetensors"))
    blob = blobs / file_hash(shard)
    shard.rename(blob)
    shard.symlink_to(blob)
    rotate_folder(model, tmp_path / "a", SPEC, **QUICK)
    flip(blob)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged.*hub's cache"):
        rotate_folder(model, tmp_path / "b", SPEC, **QUICK)


@pytest.mark.parametrize("size", [None, 30_000])
def test_resuming_is_refused_after_the_source_changed(size, model, tmp_path):
    given = {**QUICK, "max_shard_size": size}
    done = []

    def stop(stage, now, total):
        done.append(now)
        if stage == "stream" and 4 * now > 3 * total:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        options = Options(prove=False, progress=stop)
        rotate_folder(model, tmp_path / "out", SPEC, **{**given, "options": options})
    finished = list((tmp_path / ".out.run" / "finished").glob("*.json"))
    assert finished and not (tmp_path / "out").exists()
    shard = min(model.glob("*.safetensors"))
    flip(shard, first=True)  # in a part that finished shards were computed from
    with pytest.raises(CheckpointError, match=f"{shard.name} has changed since this run began"):
        rotate_folder(model, tmp_path / "out", SPEC, **given)
    assert not (tmp_path / "out").exists()
    flip(shard, first=True)
    times = {path.name: path.stat().st_mtime_ns for path in finished}
    rotate_folder(model, tmp_path / "out", SPEC, **given)  # resumes after the finished shards
    kept = {f"{p.name}.json": p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    assert all(kept[name] < time for name, time in times.items())


def test_hashing_pieces_in_any_order_gives_the_hash_of_the_file(tmp_path):
    data = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.numpy().tobytes())
    for cuts in ([(100, 5000), (5000, 10_000)], [(5000, 10_000), (100, 5000)], [(0, 10), (0, 10), (5, 20)], []):
        found = FileHash(path)
        for start, end in cuts:
            found.add(start, data[start:end].clone())
        length, sha256 = found.prefix()
        assert sha256 == hashlib.sha256(data[:length].numpy().tobytes()).hexdigest()
        found.read_to(10_000)
        assert found.prefix() == (10_000, file_hash(path))
    whole = SourceHash(tmp_path, ["file"])
    whole.add("file", 200, data[200:300])
    assert whole.prefixes() == {"file": (300, hashlib.sha256(data[:300].numpy().tobytes()).hexdigest())}
