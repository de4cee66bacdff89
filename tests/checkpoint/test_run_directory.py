"""A run may be killed at any moment: an unfinished result is never taken for a finished one, and a rerun resumes."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import digest
from models import SIZES
from processes import start_source
from spinquant import CheckpointError, Options, RotationSpec, rotate_folder
from spinquant.checkpoint.atomic import write_file
from spinquant.checkpoint.checksums import check_checksums
from spinquant.checkpoint.run_directory import RunDirectory, opened_run
from spinquant.checkpoint.safetensors_io import file_hash

SPEC = RotationSpec("R1,R2")
QUICK = {"text": None, "options": Options(prove=False)}


@pytest.fixture(autouse=True)
def page_by_page(monkeypatch):
    """Tiny shards take several writes too."""
    monkeypatch.setattr("spinquant.checkpoint.direct_io.WRITE_BUFFER", 4096)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One layer in a few shards."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "model"
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": 64}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def undisturbed(small):
    """The output of an uninterrupted run."""
    out = small.parent / "undisturbed"
    rotate_folder(small, out, SPEC, **QUICK)
    return digest(out)


class Death(BaseException):
    """The simulated kill of the process."""


CALLS = ("write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "rmdir", "mkdir")


class Mortal:
    """Within the block, a kill at the n-th change of the file system, which happens half or not at all."""

    def __init__(self, after: int | None = None):
        self.after, self.count, self.dead = after, 0, False
        self.real = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> "Mortal":
        for name in CALLS:
            setattr(os, name, self.call(name))
        return self

    def __exit__(self, *error) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def call(self, name: str):
        def function(*args, **kwargs):
            if self.dead:
                raise Death
            self.count += 1
            if self.after is not None and self.count > self.after:
                self.dead = True
                if name in ("write", "pwrite"):
                    file, data, *rest = args
                    self.real[name](file, memoryview(data)[: len(data) // 2], *rest)
                raise Death
            return self.real[name](*args, **kwargs)

        return function


def changes_of_a_run(run) -> int:
    with Mortal() as mortal:
        run()
    return mortal.count


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_killed_at_any_file_system_call_resumes_to_the_same_bytes(small, undisturbed, tmp_path, replaced):
    """Kills a run at every write, fsync, rename, unlink and mkdir."""

    def run(out: Path) -> None:
        rotate_folder(small, out, SPEC, force=replaced, **QUICK)

    def place(name: str) -> Path:
        out = tmp_path / name / "out"
        out.parent.mkdir()
        if replaced:
            out.mkdir()
            write_file(out / "config.json", b"old")
        return out

    first = place("first")
    total = changes_of_a_run(lambda: run(first))
    assert digest(first) == undisturbed
    old = digest(place("old")) if replaced else None
    assert total > 60
    # An old folder changes only the beginning and the end.
    for after in (*range(15), *range(total - 40, total)) if replaced else range(total):
        out = place(str(after))
        with Mortal(after), pytest.raises(Death):
            run(out)
        if out.exists():  # the complete old folder, or the complete new one
            assert digest(out) in (old, undisturbed), after
        try:
            run(out)
        except CheckpointError as error:
            # Killed between the last rename and the cleanup: the folder is complete, and a rerun does not replace it.
            assert "exists" in str(error) and digest(out) == undisturbed, after
            continue
        assert digest(out) == undisturbed, after
        assert [p.name for p in out.parent.iterdir()] == ["out"], after


@pytest.mark.parametrize("after", range(15))
def test_a_failed_write_is_never_taken_for_a_finished_shard(small, undisturbed, tmp_path, monkeypatch, after):
    """Later writes succeed, and must not complete the shard."""
    out, pwrite, count = tmp_path / "out", os.pwrite, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == after + 1:
            time.sleep(0.05)  # until more has been given to the writer
            raise OSError(5, "Input/output error")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="Input/output"):
        rotate_folder(small, out, SPEC, **QUICK)
    assert not out.exists()
    rotate_folder(small, out, SPEC, **QUICK)
    assert digest(out) == undisturbed


def test_a_kill_during_cleanup_after_an_error_leaves_no_result(small, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    write_file(out / "config.json", b"old")

    def run() -> None:
        with pytest.raises(CheckpointError, match=f"{name}.*broken"):
            rotate_folder(folder, out, SPEC, force=True, **QUICK)

    total = changes_of_a_run(run)
    for after in range(total):
        # How many writes there are before the error depends on how the threads take turns.
        with Mortal(after), pytest.raises((Death, CheckpointError)):
            rotate_folder(folder, out, SPEC, force=True, **QUICK)
        run()
        assert (out / "config.json").read_bytes() == b"old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"], after


def killed_half_way(small, out, **more) -> Path:
    """A run into `out` that was killed behind its second shard; its folder."""

    for after in range(10, 1000):
        with Mortal(after), pytest.raises(Death):
            rotate_folder(small, out, SPEC, **QUICK, **more)
        home = out.parent / f".{out.name}.run"
        if len(list((home / "finished").glob("*.json"))) == 2:
            return home
    raise AssertionError


def test_finished_shards_are_not_written_again(small, undisturbed, tmp_path):
    out = tmp_path / "out"
    home = killed_half_way(small, out)
    times = {p.name: p.stat().st_mtime_ns for p in (home / "data").glob("*.safetensors")}
    assert len(times) == 2
    rotate_folder(small, out, SPEC, **QUICK)
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert digest(out) == undisturbed


def test_a_finished_shard_that_was_damaged_is_written_again(small, undisturbed, tmp_path):
    out = tmp_path / "out"
    home = killed_half_way(small, out)
    shard = min((home / "data").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    rotate_folder(small, out, SPEC, **QUICK)
    assert digest(out) == undisturbed


def test_resuming_with_other_settings_names_what_differs(small, undisturbed, tmp_path):
    out = tmp_path / "out"
    home = killed_half_way(small, out)
    for options, word in (
        ({"spec": RotationSpec("R1,R2", seed=7)}, "seed was 0 and is 7"),
        ({"spec": SPEC, "dtype": torch.bfloat16}, "dtype was 'None' and is 'torch.bfloat16'"),
        ({"spec": SPEC, "max_shard_size": 50_000}, "max_shard_size was None and is 50000"),
    ):
        with pytest.raises(CheckpointError, match=f"{word}.*--force, or delete"):
            rotate_folder(small, out, **QUICK, **options)
    assert len(list((home / "finished").glob("*.json"))) == 2
    rotate_folder(small, out, RotationSpec("R1,R2", seed=7), **QUICK, force=True)
    assert digest(out) != undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_source_that_changed_is_refused(small, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    killed_half_way(folder, tmp_path / "out")
    os.utime(folder / "config.json", ns=(1, 1))
    with pytest.raises(CheckpointError, match="files was"):
        rotate_folder(folder, tmp_path / "out", SPEC, **QUICK)


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    with opened_run(tmp_path / "out", {"a": 1}), pytest.raises(CheckpointError, match="another run"):
        RunDirectory(tmp_path / "out").acquire({"a": 1})
    with opened_run(tmp_path / "out", {"a": 1}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_created_during_the_run_is_not_replaced(small, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def appear(result, folder, **_) -> None:
        out.mkdir()
        (out / "precious").write_text("1")

    monkeypatch.setattr("spinquant.entrypoints.stream.write_record", appear)
    with pytest.raises(CheckpointError, match="--force"):
        rotate_folder(small, out, SPEC, **QUICK)
    assert (out / "precious").exists()


def test_check_checksums_names_changed_files(small, tmp_path):
    out = tmp_path / "out"
    rotate_folder(small, out, SPEC, **QUICK)
    assert check_checksums(out) == []
    check = ["sha256sum", "--quiet", "-c", "spinquant/checksums.sha256"]
    assert subprocess.run(check, cwd=out, check=False).returncode == 0
    shard = max(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (out / "config.json").unlink()
    assert check_checksums(out) == sorted(["config.json", shard.name])
    with pytest.raises(CheckpointError, match="checksums"):
        check_checksums(small)


def test_a_truncated_source_shard_is_named_before_the_output_is_replaced(small, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    out.mkdir()
    write_file(out / "config.json", b"old")
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=shard.name):
        rotate_folder(folder, out, SPEC, force=True, **QUICK)
    assert (out / "config.json").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


RUN = """
import sys, time
from pathlib import Path
from spinquant import Options, RotationSpec, rotate_folder
from spinquant.streaming import pipeline as stream
checked, finished = stream._checked, Path(sys.argv[3])
def slow(*args):
    while len(list(finished.glob("*.json"))) >= 2:
        time.sleep(0.1)  # until it is killed
    time.sleep(0.1)  # for the writer to finish what it has been given
    return checked(*args)
stream._checked = slow
rotate_folder(sys.argv[1], sys.argv[2], RotationSpec("R1,R2"), text=None, options=Options(prove=False))
"""


def test_a_run_resumes_after_sigkill(small, undisturbed, tmp_path):
    out, finished = tmp_path / "out", tmp_path / ".out.run" / "finished"
    process = start_source(RUN, [small, out, finished], {}, small.parent)
    while len(list(finished.glob("*.json"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not out.exists()
    shards = {p.name: file_hash(p) for p in (tmp_path / ".out.run" / "data").glob("*.safetensors")}
    assert shards
    rotate_folder(small, out, SPEC, **QUICK)
    assert digest(out) == undisturbed
    assert all(file_hash(out / name) == value for name, value in shards.items())
    assert load_file(out / next(iter(shards)))
