"""Quantizing with calibration in several processes: one calibrates, all write, and the bytes are those of one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from checkpoints import digest
from families import FAMILIES
from models import byte_tokenizer, random_weights
from processes import run_together
from spinquant.compute.distributed import Processes, check_same
from spinquant.errors import ProcessError

# The command line; process DYING is killed as soon as KEPT blocks are finished.
WORKER = """
import os, sys, threading, time
from pathlib import Path
dying, kept = int(os.environ["DYING"]), int(os.environ["KEPT"])
if dying == int(os.environ["RANK"]):
    store = Path(os.environ["STORE"])

    def watch():
        while len(list(store.glob("*.safetensors"))) < kept:
            time.sleep(0.005)
        os._exit(9)

    threading.Thread(target=watch, daemon=True).start()
if kept:
    from spinquant.calibration.block_store import BlockStore
    save = BlockStore.save

    def slowly(self, *arguments):
        save(self, *arguments)
        while dying == int(os.environ["RANK"]) and len(list(store.glob("*.safetensors"))) >= kept:
            time.sleep(0.1)  # until it is killed, before the next block is finished

    BlockStore.save = slowly
from spinquant.cli.main import main
main()
"""
COMMAND = ("--scheme", "W4A8KV4", "--rotations", "R1,R2,R4", "--method", "gptq", "--clips", "--samples", "4")
LENGTH = ("--sample-length", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrating") / "model"
    config = FAMILIES["mixtral"].config()
    config.num_hidden_layers = 3
    random_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(path, max_shard_size="90KB")
    byte_tokenizer().save_pretrained(path)
    return path


def launch(model: Path, out: Path, *, text, dying: int = -1, kept: int = 0, more=()):
    store = out.parent / f".{out.name}.run" / "calibration"
    environment = {"DYING": str(dying), "KEPT": str(kept), "STORE": str(store)}
    return run_together(WORKER, ["quantize", str(model), str(out), *COMMAND, *text, *more], environment)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Options that select the text of calibration and comparison."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A quick brown fox jumps over the lazy dog. " * 100)
    return ("--calibration", str(path), "--text", str(path), *LENGTH)


@pytest.fixture
def one_thread():
    """As in processes of torchrun, because the number of threads decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_resume_a_killed_calibration_to_the_bytes_of_one(model, text, tmp_path, run):
    assert run("quantize", model, tmp_path / "alone", *COMMAND, *text)[0] == 0
    out, store = tmp_path / "out", tmp_path / ".out.run" / "calibration"
    ended = launch(model, out, text=text, dying=0, kept=2)
    assert ended.returncode != 0 and not out.exists()
    assert "process 0 of 2 ended before its work was done" in ended.stderr, ended.stderr[-3000:]
    assert len(list(store.glob("*.safetensors"))) == 2
    again = launch(model, out, text=text)
    assert again.returncode == 0, again.stderr[-3000:]
    assert digest(out) == digest(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_a_calibration_error_is_printed_once_and_leaves_no_files(model, text, tmp_path):
    run = launch(model, tmp_path / "out", text=text, more=("--damping", "0", "--sample-length", "2"))
    assert run.returncode != 0
    assert run.stderr.count("is singular") == 1, run.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == []


def test_processes_share_the_rotations_they_learn(model, text, tmp_path):
    run = launch(model, tmp_path / "out", text=text, more=("--learn", "local", "--samples", "20"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "out" / "spinquant" / "record.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_processes_with_different_settings_are_refused_by_name():
    """Paths and fingerprints of the model may differ between machines; nothing else may."""

    def found(settings):
        store = dist.HashStore()
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(check_same, one, Processes(i, 2, store=store)) for i, one in enumerate(settings)]
        return [future.exception() for future in futures]

    asked = {"model": "/a", "files": "12ab", "dtype": "None", "learned": "0123"}
    assert found([asked, {**asked, "model": "/b", "files": "34cd"}]) == [None, None]
    for error in found([asked, {**asked, "learned": "3210"}]):
        assert isinstance(error, ProcessError) and "differ in learned:" in str(error)
