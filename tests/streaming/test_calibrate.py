"""Calibrating from disk gives the packed integers and clips of calibrating in memory, in the memory of a few blocks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import assert_same, digest, from_disk
from families import FAMILIES
from models import byte_tokenizer, logits, random_weights, tiny_model, tokens
from processes import run_source
from spinquant import Options, RotationSpec, load, parse_scheme, quantize, quantize_folder
from spinquant.calibration.blockwise import Calibration
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.calibration.hidden_states import HiddenStates
from spinquant.checkpoint.folder import load_tokenizer
from spinquant.quantization.gptq import GPTQOptions

ALL = RotationSpec("R1,R2,R3,R4")
TEXT = CalibrationText("manual", 5, 16)
UNPROVED = Options(prove=False)


pytestmark = pytest.mark.usefixtures("small_pieces")


def saved(path, name, dtype):
    """A tiny model of a family on disk, in several shards."""
    if name in FAMILIES:
        model = random_weights(AutoModelForCausalLM.from_config(FAMILIES[name].config(), dtype=dtype))
    else:
        model = tiny_model(name, dtype=dtype)
    model.save_pretrained(path, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(path)
    return path


def in_memory(folder, out, scheme, spec, method, calibration):
    """What the in-memory walk makes of a folder, and its clips."""
    model = load(folder)
    _, ids = calibration_tokens(model, load_tokenizer(folder), TEXT)
    options = {"method": method, "tokens": ids, "calibration": calibration, "options": UNPROVED}
    found = quantize(model, scheme, spec, **options)
    model.save_pretrained(out)
    return model, found


# Those that the checkpoint holds one by one and the model's class stacks; DeepSeek's with dense layers before.
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
CASES = {
    "gptq": ("gptq", Calibration(), "W4A8KV4"),
    "gptaq": ("gptaq", Calibration(clips=True), "W3g8A4KV4"),
    "sequential": ("gptaq", Calibration(GPTQOptions(0.02, True), sequential=True, round_inputs=False), "W4A4"),
    "rtn": ("rtn", Calibration(clips=True), "W4A4KV4"),
}


# Every case on a dense family and on one with experts, and one case for every other layout of weights.
TRIED = {
    "llama": (torch.float32, tuple(CASES)),
    "mixtral": (torch.float32, tuple(CASES)),
    "phi3": (torch.bfloat16, ("gptaq",)),
    "opt": (torch.float32, ("gptq",)),
    "gpt2": (torch.float32, ("sequential",)),
    "gpt_oss": (torch.float32, ("rtn",)),
    "qwen3_moe": (torch.bfloat16, ("gptq",)),
    "deepseek_v3": (torch.float32, ("gptaq",)),
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (_, cases) in TRIED.items() for case in cases])
def test_calibrating_from_disk_equals_calibrating_in_memory_bit_for_bit(name, case, tmp_path):
    dtype = TRIED[name][0]
    method, calibration, words = CASES[case]
    spec = RotationSpec(FAMILIES[name].allowed) if name in EXPERTS else ALL
    spec = RotationSpec("R1,R2") if name in ("opt", "gpt2") else spec
    scheme = parse_scheme(words, lm_head=case == "gptq")
    folder = saved(tmp_path / "model", name, dtype)
    assert from_disk(folder)
    given = {"method": method, "calibration": calibration, "calibration_text": TEXT, "text": None}
    # A memory limit so small that hidden states spill to a file.
    options = replace(UNPROVED, memory=2000)
    result = quantize_folder(folder, tmp_path / "out", scheme, spec, **given, options=options)
    model, found = in_memory(folder, tmp_path / "expected", scheme, spec, method, calibration)
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert result.clips == found.clips and result.model is None
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "model", "out"]


def test_max_shard_size_and_record_of_a_calibrated_run(folder, tmp_path):
    given = {"method": "gptq", "calibration_text": TEXT, "text": "manual", "max_shard_size": 40_000}
    result = quantize_folder(folder, tmp_path / "out", parse_scheme("W4A16"), ALL, **given, options=UNPROVED)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    record = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())
    assert record["method"] == "gptq" and record["calibration_text"]["samples"] == 5
    assert record["proof"]["real_tokens"]["relative"] < 1e-4
    assert result.seconds is not None and result.seconds["calibrate"] > 0


@pytest.mark.parametrize("stage", ["calibrate", "stream"])
def test_an_interrupted_run_resumes_to_the_same_bytes(stage, folder, tmp_path):
    given = {"method": "gptaq", "calibration_text": TEXT, "text": None, "max_shard_size": 40_000}
    scheme = parse_scheme("W4A8KV4", lm_head=True)
    quantize_folder(folder, tmp_path / "expected", scheme, ALL, **given, options=UNPROVED)
    store = tmp_path / ".out.run" / "calibration"

    def stop(name, done, total):
        if name == stage and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "out", scheme, ALL, **given, options=replace(UNPROVED, progress=stop))
    kept = {path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}
    assert len(kept) == {"calibrate": 2, "stream": 4}[stage]
    seen = []

    def watch(name, done, total):
        if name == "calibrate" and done == 1:
            seen.append({path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")})

    quantize_folder(folder, tmp_path / "out", scheme, ALL, **given, options=replace(UNPROVED, progress=watch))
    assert seen == [kept], "what was finished is not done again"
    assert digest(tmp_path / "out") == digest(tmp_path / "expected")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "model", "out"]


@pytest.mark.parametrize("room", [None, 0, 3 * 4 * 40, 10**6])
def test_spilled_hidden_states_are_unchanged(room, tmp_path):
    states, expected = HiddenStates(room, tmp_path), [torch.randn(1, 4, 10) for _ in range(7)]
    for state in expected:
        states.append(state.clone())
    other = states.copy()
    expected[2], expected[6] = torch.ones(1, 4, 10), torch.zeros(1, 4, 10)
    states[2], states[6] = expected[2].clone(), expected[6].clone()
    assert states.spilt == {None: 0, 0: 7, 3 * 4 * 40: 4, 10**6: 0}[room]
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert not torch.equal(other[6], states[6])
    assert list(tmp_path.iterdir()) == []


PEAK = """
import ctypes
import sys
from pathlib import Path
from spinquant import Options, RotationSpec, quantize_folder, parse_scheme
from spinquant.calibration.data import CalibrationText
from spinquant.calibration.blockwise import Calibration
allocator = ctypes.CDLL(None)  # of glibc: what one thread has freed is free for all, and large tensors go back at once
getattr(allocator, "mallopt", lambda *_: None)(-8, 1)  # M_ARENA_MAX
getattr(allocator, "mallopt", lambda *_: None)(-3, 1 << 18)  # M_MMAP_THRESHOLD
text = CalibrationText(sys.argv[1], 4, 64)
options = Options(prove=False, memory=1 << 20)
for folder in sys.argv[2:]:  # the smaller one first
    quantize_folder(folder, f"{folder}-out", parse_scheme("W4A16", weight_clip=1.0), RotationSpec("R1,R2"),
                    method="gptq", calibration_text=text, text=None, options=options)
    status = Path("/proc/self/status").read_text()
    print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    sizes = {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 1024, "head_dim": 64}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    folders, text = [tmp_path / "3", tmp_path / "9"], tmp_path / "text"
    text.write_text(PEAK)
    for folder in folders:
        config = LlamaConfig(**sizes, num_hidden_layers=int(folder.name))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    bytes_ = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert bytes_[1] - bytes_[0] > 150e6
    run = run_source(PEAK, [text, *folders])
    assert run.returncode == 0, run.stderr
    peaks = [int(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("peak")]
    # Three blocks are in memory at most: the peak of one to two is lower by the size of those that are missing.
    assert peaks[1] - peaks[0] < 0.25 * (bytes_[1] - bytes_[0]), peaks
