"""Several processes, started as torchrun starts them, write the bytes of one, and all end when one of them ends."""

import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import digest
from models import SIZES
from processes import run_together
from spinquant import RotationSpec, parse_scheme, quantize_folder
from spinquant.architectures import make_plan
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.streaming.partition import bands_in_order, shared
from spinquant.streaming.shards import Change, make_shards

# The command line with small bands; process DYING is killed at its AFTER-th write.
WORKER = """
import os, sys
import spinquant.checkpoint.direct_io, spinquant.streaming.pipeline, spinquant.rotations.fuse
spinquant.checkpoint.direct_io.WRITE_BUFFER = 4096
spinquant.rotations.fuse.SLICE = 600
spinquant.streaming.pipeline.BAND, spinquant.streaming.pipeline.IN_FLIGHT = 5000, 20_000
dying, after = int(os.environ["DYING"]), int(os.environ["AFTER"])
if dying == int(os.environ["RANK"]):
    real, count = os.pwrite, 0
    def pwrite(file, data, offset):
        global count
        count += 1
        if count > after:
            real(file, memoryview(data)[: len(data) // 2], offset)
            os._exit(9)
        return real(file, data, offset)
    os.pwrite = pwrite
from spinquant.cli.main import main
main()
"""


def launch(command: list[str], *, dying: int = -1, after: int = 0):
    return run_together(WORKER, command, {"DYING": str(dying), "AFTER": str(after)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("processes") / "model"
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="90KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Slices as in the worker, since they decide the last bits; the number of threads does not (torchrun sets one)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr("spinquant.rotations.fuse.SLICE", 600)
    yield
    torch.set_num_threads(threads)


def test_a_killed_process_is_named_by_the_others_and_a_rerun_resumes(model, text, tmp_path):
    """The result has the bytes of a single process."""
    spec, scheme = RotationSpec("R1,R2,R4"), parse_scheme("W4A4KV4")
    quantize_folder(model, tmp_path / "one", scheme, spec, text=str(text), command="spinquant quantize")
    command = ["quantize", str(model), str(tmp_path / "two"), "--scheme", "W4A4KV4", "--rotations", "R1,R2,R4"]
    command += ["--text", str(text), "--json"]
    run = launch(command, dying=1, after=40)
    assert run.returncode != 0
    assert "process 1 of 2 ended before its work was done" in run.stderr, run.stderr[-3000:]
    assert not (tmp_path / "two").exists()
    finished = list((tmp_path / ".two.run" / "finished").glob("*.json"))
    assert finished
    times = {p.stem: (tmp_path / ".two.run" / "data" / p.stem).stat().st_mtime_ns for p in finished}
    again = launch(command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    assert {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in times} == times
    assert json.loads(again.stdout)["seconds"]["processes"] == 2, "printed once"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_an_error_of_one_process_is_printed_once(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    broken = None
    with closing(Source(folder, load_config(folder))) as source:
        change = Change(make_plan(load_config(model), source.shapes), {}, {})
        shards = make_shards(source, change)
        bands = {shard.file: bands_in_order(source, change, shard, 5000) for shard in shards}
        for file, inside in shared(bands, 2, dict.fromkeys(bands, False))[1].items():
            broken = broken or next(((file, band.job.name) for band in inside if "proj" in band.job.name), None)
    assert broken is not None
    tensors = load_file(folder / broken[0])
    tensors[broken[1]][0, 0] = float("nan")
    save_file(tensors, folder / broken[0], metadata={"format": "pt"})
    run = launch(["rotate", str(folder), str(tmp_path / "out"), "--no-compare", "--no-proof"])
    assert run.returncode != 0
    assert run.stderr.count("values that are NaN") == 1 and broken[1] in run.stderr, run.stderr[-3000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_bands_are_assigned_once_and_evenly(model, processes):
    source = Source(model, load_config(model))
    change = Change(make_plan(load_config(model), source.shapes), {}, {})
    bands = {shard.file: bands_in_order(source, change, shard, 1000) for shard in make_shards(source, change)}
    files = list(bands)
    taken = shared(bands, processes, {file: file == files[0] for file in files})
    for file in files[1:]:
        places = [bands[file].index(band) for mine in taken for band in mine[file]]
        assert sorted(places) == list(range(len(bands[file])))
        assert all(
            [bands[file].index(b) for b in m[file]] == sorted(bands[file].index(b) for b in m[file]) for m in taken
        )
    assert not any(mine[files[0]] for mine in taken)
    loads = [sum(band.nbytes for inside in mine.values() for band in inside) for mine in taken]
    assert max(loads) - min(loads) < 0.05 * sum(loads)
    source.close()
