"""Learning on several processes of torch.distributed gives the same result as on one."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import byte_tokenizer, tiny_model, tokens
from processes import run_together
from spinquant import LearnOptions, RotationSpec, learn, parse_scheme
from spinquant.rotations.rotation import matrix

sys.path.insert(0, str(Path(__file__).parent))
from test_learn import ALL, FAST, prepared  # the model and options of the tests on one process

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from safetensors.torch import save_file
from test_distributed import CASES, learned

dist.init_process_group("gloo")
for loss, how in CASES.items():
    found = learned(loss, shard=how == "shard")
    if dist.get_rank() == 0:
        save_file(found, f"{sys.argv[2]}/{loss}.safetensors")
    dist.barrier()
dist.destroy_process_group()
"""
CASES = {"fisher": "plain", "kl": "shard"}


def learned(loss, *, shard=False):
    """Rotations and losses after three steps, from the same model in every process."""
    through = replace(FAST, batch=2, steps=3, loss=loss)
    transforms = None if CASES[loss] == "plain" else False  # the weights of a sharded model stay as they are
    options = LearnOptions("end-to-end", baselines=2, shard=shard, transforms=transforms, end_to_end=through)
    model, *_ = prepared(dtype=torch.float64)
    # Without a 4-bit cache, which makes numbers equal: with a tie for the largest, the gradient is not unique.
    found = learn(model, parse_scheme("A4"), RotationSpec(ALL), tokens(8, 24), tokens(2, 24, seed=9), options)
    if shard:  # the outermost group, embedding and head, stays whole after a forward pass
        blocks = [parameter for parameter in model.model.layers.parameters()]
        own = sum(parameter.to_local().numel() for parameter in blocks)
        assert own < 0.55 * sum(parameter.numel() for parameter in blocks), own
    losses = torch.tensor([step["loss"] for step in found.record["steps"]], dtype=torch.float64)
    return {**{space: matrix(r) for space, r in found.rotations.items()}, "losses": losses}


def test_two_processes_take_the_same_steps_as_one_process(tmp_path):
    """Also if each process holds half of the weights."""
    run = run_together(WORKER, [Path(__file__).parent, tmp_path])
    assert run.returncode == 0, run.stderr[-3000:]
    for loss in CASES:
        one, two = learned(loss), load_file(tmp_path / f"{loss}.safetensors")
        assert torch.allclose(one["losses"], two["losses"], atol=1e-6)
        for space, r in one.items():
            torch.testing.assert_close(two[space], r, atol=1e-5, rtol=0)
        assert len(one) > 4


def rank_of(pid):
    try:
        return re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_killed_process_is_named_and_the_run_resumes_on_one_process(run, tmp_path):
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text"
    text.write_text(" ".join(f"word{i % 97}" for i in range(400)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spinquant"]
    command += ["learn", str(tmp_path / "model"), str(tmp_path / "out"), "--scheme", "A4KV4", "--text", str(text)]
    command += ["--samples", "6", "--sample-length", "24", "--windows", "2", "--baselines", "1", "--no-transforms"]
    command += ["--method", "end-to-end", "--batch", "2", "--steps", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kind = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment}
    job = subprocess.Popen(command, **kind)
    state = tmp_path / ".out.run" / "learning" / "end-to-end.safetensors"
    try:
        while not state.exists():
            assert job.poll() is None, job.stderr.read()[-3000:]
            time.sleep(0.05)
        children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and f" {job.pid} " in parent(p)]
        second = next(pid for pid in children if (rank := rank_of(pid)) and rank.group(1) == b"1")
        os.kill(second, signal.SIGKILL)
        errors = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert job.returncode != 0 and "error: process 1 of 2 ended before its work was done" in errors
    assert "Connection closed by peer" not in errors
    code, _, errors = run(*command[command.index("learn") :])  # one process resumes the run of two
    assert code == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text"]


def parent(process):
    """The second half of /proc/PID/stat, which begins with the state and the parent."""
    try:
        return (process / "stat").read_text().rpartition(")")[2]
    except OSError:
        return ""
