"""A disk that is full from some write on: one error that says so, no half-written folder, and a rerun that resumes."""

import errno
import os
import shutil

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from models import byte_tokenizer, tiny_model
from spinquant import (
    CalibrationText,
    CheckpointError,
    LearnOptions,
    LocalOptions,
    Options,
    RotationSpec,
    learn_folder,
    quantize_folder,
    rotate_folder,
)
from spinquant.checkpoint import direct_io, run_pieces
from spinquant.entrypoints.request import LearnText

QUICK = {"text": None, "options": Options(prove=False)}
TEXT = CalibrationText("manual", 2, 16)
SPEC = RotationSpec("R1,R2")
LOCAL = LearnOptions("local", baselines=1, local=LocalOptions(steps=2))


class Disk:
    """Counts writes of this process, and fails all those after the first `room` ones."""

    def __init__(self, patch, room):
        self.room = room
        patch.setattr(os, "write", self.counted(os.write))
        patch.setattr(direct_io, "write_at", self.counted(direct_io.write_at))
        for module in (run_pieces, safetensors.torch):  # the library's writes are no calls of Python
            patch.setattr(module, "save_file", self.counted(module.save_file, self.refuse))

    def counted(self, write, refuse=None):
        def call(*given, **options):
            self.room -= 1
            if self.room < 0:
                (refuse or self.no_space)()
            return write(*given, **options)

        return call

    def no_space(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(self):
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, the same with pickled weights, and the same rotated, with an adapter for it."""
    home = tmp_path_factory.mktemp("full")
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(home / "model", max_shard_size="200KB")
    byte_tokenizer().save_pretrained(home / "model")
    shutil.copytree(home / "model", home / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(model.state_dict(), home / "pickled/pytorch_model.bin")
    return home


ACTIONS = {
    "rotate": lambda home, out: rotate_folder(home / "model", out, SPEC, **QUICK),
    "calibrate": lambda home, out: quantize_folder(
        home / "model", out, "W4A16", SPEC, method="gptq", calibration_text=TEXT, **QUICK
    ),
    "in memory": lambda home, out: rotate_folder(home / "pickled", out, SPEC, allow_pickle=True, **QUICK),
    "learn": lambda home, out: learn_folder(
        home / "model", out, "W4A4", SPEC, LOCAL, text=LearnText(CalibrationText("manual", 4, 16), windows=2)
    ),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_full_disk_is_said_and_a_rerun_finishes(name, home, tmp_path):
    act, out, room, failed = ACTIONS[name], tmp_path / "out", 0, 0
    act(home, tmp_path / "whole")
    while not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, room)
            try:
                act(home, out)
            except CheckpointError as error:
                assert "no space left on the disk" in str(error)
                assert not out.exists()
                failed += 1
        room = room * 3 // 2 + 1
    assert failed > 2
    assert not (tmp_path / ".out.run").exists()
    found, expected = contents(out), contents(tmp_path / "whole")
    assert set(found) == set(expected)
    weights = [path for path in found if path.suffix == ".safetensors"]
    assert weights and all(found[path] == expected[path] for path in weights)
