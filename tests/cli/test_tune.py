"""`spinquant quantize --tune`, from a folder to a folder: what is written, what resumes, and what is refused."""

import json

import pytest
import torch

from models import logits, tokens
from spinquant import load
from spinquant.learning import tuning

TEXT = ("--calibration", "manual", "--samples", "8", "--sample-length", "24", "--no-compare", "--no-proof")
TUNE = ("--tune", "4", "--tune-batch", "2", "--tune-lr", "0.01")


def test_tuning_is_written_and_told(run, folder, tmp_path):
    out = tmp_path / "out"
    command = ("quantize", folder, out, "--scheme", "W4A4KV4", "--method", "gptq", "--clips", *TEXT, *TUNE)
    code, printed, errors = run(*command, "--json")
    assert code == 0, errors
    record = json.loads((out / "spinquant" / "record.json").read_text())
    tuned = record["tuning"]
    assert tuned == json.loads(printed)["tuning"]
    assert tuned["options"]["steps"] == len(tuned["losses"]) == 4
    assert tuned["samples"] == record["calibration_text"]["samples"] == 8
    assert tuned["kept"] and tuned["kl"]["after"] < tuned["kl"]["before"]
    card = (out / "README.md").read_text()
    assert "4 steps of 2" in card and f"{tuned['kl']['after']:#.4g} after" in card
    code, printed, _ = run(*command[:2], tmp_path / "again", *command[3:])
    assert code == 0 and "tuned, 4 steps" in printed
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, tokens()), logits(load(out), tokens()))
    plain = run("quantize", folder, tmp_path / "plain", "--scheme", "W4A4KV4", "--method", "gptq", "--clips", *TEXT)
    assert plain[0] == 0
    assert not torch.equal(logits(load(tmp_path / "plain"), tokens()), logits(again, tokens()))
    assert "tuning" not in json.loads((tmp_path / "plain" / "spinquant" / "record.json").read_text())


def test_a_killed_tuning_leaves_no_folder_and_resumes(run, folder, tmp_path, monkeypatch):
    steps, backward = [], tuning._backward

    def counted(*arguments):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        return backward(*arguments)

    command = ("quantize", folder, tmp_path / "out", "--scheme", "W4A8", *TEXT, "--tune", "9")
    monkeypatch.setattr(tuning, "_backward", counted)
    assert run(*command)[0] != 0
    assert not (tmp_path / "out").exists()
    code, _, errors = run(*command, "--tune-lr", "0.02")
    assert code == 1 and "other settings" in errors
    steps.clear()
    code, _, errors = run(*command)
    assert code == 0, errors
    assert len(steps) == 9 - 5  # the state is saved every five steps
    losses = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())["tuning"]["losses"]
    assert len(losses) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "none", *TUNE), "quantizes nothing"),
        (("--scheme", "W4A8", "--tune-lr", "0.1"), "--tune-lr is an option of tuning"),
        (("--scheme", "W4A8", "--checkpointing"), "--checkpointing is an option of tuning"),
        (("--scheme", "W4A8", "--tune", "0"), "steps is 0"),
        (("--scheme", "W4A8", *TUNE, "--max-shard-size", "1MB"), "tuning needs the model in memory"),
    ],
)
def test_refusals(run, folder, tmp_path, options, words):
    code, _, errors = run("quantize", folder, tmp_path / "out", *options)
    assert code == 1
    assert words in " ".join(errors.split())
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_refused_before_any_work(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("spinquant.entrypoints.validation.available_memory", lambda: 1000)
    monkeypatch.setattr("spinquant.entrypoints.folders.load_model", None)
    code, _, errors = run("quantize", folder, tmp_path / "out", "--scheme", "W4A8", *TEXT, *TUNE)
    assert code == 1
    assert "tuning needs the model in memory" in " ".join(errors.split())
    assert run("quantize", folder, tmp_path / "out", "--scheme", "W4A8", "--text", "manual")[0] == 0  # streamed
