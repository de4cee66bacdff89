"""The command line as a user meets it: in this process, through the entry point."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, XGLMConfig

from conftest import byte_tokenizer, logits, tiny_model, tokens
from spinquant import cli, load


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spinquant", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", ["plan", "rotate", "quantize", "evaluate", "verify", "demo"])
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"spinquant {command}" in " ".join(out.split())


def test_plan(run, folder):
    code, out, _ = run("plan", folder)
    assert code == 0
    for word in ("R1", "R2", "R3", "R4", "down_proj", "v_proj", "Sylvester", "lm_head.weight"):
        assert word in out
    code, out, _ = run("plan", folder, "--json", "--rotations", "R1,R4")
    data = json.loads(out)
    assert [row["rotation"] for row in data["rotations"]] == ["R1", "R4"]
    assert data["rotations"][1]["online"] == [f"model.layers.{i}.mlp.down_proj (input)" for i in range(3)]
    assert "lm_head.weight" in [axis["tensor"] for axis in data["rotations"][0]["axes"]]


def test_plan_reads_headers_only(run, folder):
    """The numbers of the weights do not matter to it: here they are cut away from the file's end, and zeros."""
    path = folder / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(header)
        file.truncate(size)
    assert run("plan", folder)[0] == 0


def test_plan_of_the_impossible(run, folder):
    code, out, _ = run("plan", folder, "--block-size", "R2=5")
    assert code == 1
    assert "does not divide" in " ".join(out.split())


def test_rotate_then_verify(run, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("rotate", folder, out, "--rotations", "R1,R2", "--text", "manual", "--json")
    assert code == 0, errors
    record = json.loads(printed)
    assert record["proof"]["real_tokens"]["relative"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(model.model.embed_tokens.weight, load(folder).model.embed_tokens.weight)
    code, printed, _ = run("verify", folder, out, "--text", "manual", "--json", "--tolerance", "1e-3")
    assert code == 0
    assert json.loads(printed)["max_abs"] < 1e-3
    code, _, errors = run("verify", folder, out, "--text", "manual", "--tolerance", "1e-12")
    assert code == 1
    assert "logits differ" in errors
    assert run("rotate", folder, out, "--text", "manual")[0] == 1
    assert run("rotate", folder, out, "--text", "manual", "--force")[0] == 0


def test_pickle_weights_are_evaluated_when_asked(run, folder):
    torch.save(load(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    options = ("--text", "manual", "--length", "32", "--windows", "1")
    assert run("evaluate", folder, *options)[0] == 1
    assert run("evaluate", folder, *options, "--allow-pickle")[0] == 0
    assert run("verify", folder, folder, *options, "--allow-pickle")[0] == 0


def test_plan_of_a_quantized_folder_says_so(run, folder, tmp_path):
    assert run("quantize", folder, tmp_path / "out", "--scheme", "W4A4", "--text", "manual")[0] == 0
    code, _, errors = run("plan", tmp_path / "out")
    assert code == 1
    assert "quantized already" in errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_rotate_writes_the_dtype_asked_for(run, folder, tmp_path, dtype):
    assert run("rotate", folder, tmp_path / "out", "--dtype", dtype, "--text", "manual")[0] == 0
    assert load(tmp_path / "out").dtype == getattr(torch, dtype)


def test_quantize_then_evaluate(run, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("quantize", folder, out, "--scheme", "W4A8KV4", "--text", "manual", "--seed", "3")
    assert code == 0, errors
    assert "W4A8KV4" in printed
    options = ("--reference", folder, "--text", "manual", "--length", "64", "--windows", "2", "--json")
    code, printed, _ = run("evaluate", out, *options)
    data = json.loads(printed)
    assert code == 0
    assert data["kl"] > 0
    assert data["tokens"] == 126
    assert data["text"] == "manual"


def test_the_same_seed_writes_the_same_bytes(run, folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command = ("quantize", folder, tmp_path / name, "--scheme", "W4A4KV4", "--seed", seed, "--randomize")
        assert run(*command, "--text", "manual")[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


MISTAKES = {
    "no folder": (["rotate", "/nowhere/at/all", "{out}"], "does not exist"),
    "unknown rotation": (["rotate", "{model}", "{out}", "--rotations", "R1,R5"], "R5"),
    "online in a plain folder": (["rotate", "{model}", "{out}", "--rotations", "R1,R4"], "spinquant quantize"),
    "unknown type": (["rotate", "{model}", "{out}", "--type", "fourier"], "fourier"),
    "block that does not divide": (["rotate", "{model}", "{out}", "--block-size", "7"], "does not divide"),
    "block that is no number": (["rotate", "{model}", "{out}", "--block-size", "big"], "big"),
    "order without Hadamard": (["rotate", "{model}", "{out}", "--block-size", "R1=6", "--rotations", "R1"], "6"),
    "unknown scheme": (["quantize", "{model}", "{out}", "--scheme", "INT4"], "INT4"),
    "unknown method": (["quantize", "{model}", "{out}", "--scheme", "W4A4", "--method", "magic"], "magic"),
    "group that does not divide": (["quantize", "{model}", "{out}", "--scheme", "W4g7A16"], "q_proj"),
    "unknown dtype": (["rotate", "{model}", "{out}", "--dtype", "int3"], "int3"),
    "text too short": (["evaluate", "{model}", "--text", "{short}"], "too short"),
    "missing text": (["evaluate", "{model}", "--text", "/nowhere.txt"], "nowhere.txt"),
    "missing reference": (["verify", "{model}", "/nowhere"], "nowhere"),
    "half a mapping": (["rotate", "{model}", "{out}", "--type", "R1=hadamard,random-matrix"], "random-matrix"),
    "negative windows": (["evaluate", "{model}", "--text", "manual", "--windows", "-1"], "-1"),
    "unknown device": (["verify", "{model}", "{model}", "--text", "manual", "--device", "cuda:9"], "cuda:9"),
    "output over the source": (["rotate", "{model}", "{model}", "--force"], "choose another"),
    "unknown clip": (["quantize", "{model}", "{out}", "--scheme", "W4", "--weight-clip", "tight"], "tight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_error(run, folder, tmp_path, mistake):
    arguments, word = MISTAKES[mistake]
    (tmp_path / "short.txt").write_text("brief")
    out = tmp_path / "out"
    places = {"model": folder, "out": out, "short": tmp_path / "short.txt"}
    code, _, errors = run(*(argument.format(**places) for argument in arguments))
    assert code == 1
    assert word in errors
    assert "Traceback" not in errors
    assert errors.strip().startswith("error:")
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()
    assert (folder / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_debug_shows_the_traceback(run):
    from spinquant import CheckpointError

    with pytest.raises(CheckpointError):
        run("plan", "/nowhere/at/all", "--debug")


def test_an_unknown_architecture_is_refused_by_name(run, tmp_path):
    config = XGLMConfig(d_model=32, ffn_dim=32, num_layers=1, attention_heads=2, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "xglm")
    for command in (["plan"], ["rotate", tmp_path / "out"], ["quantize", tmp_path / "out", "--scheme", "W4A4"]):
        code, _, errors = run(command[0], tmp_path / "xglm", *command[1:])
        assert code == 1
        assert "xglm" in errors


def test_a_folder_without_tokenizer_can_be_rotated(run, tmp_path):
    model = tiny_model("mistral", dtype=torch.float32)
    model.save_pretrained(tmp_path / "bare")
    assert run("rotate", tmp_path / "bare", tmp_path / "out")[0] == 0
    assert torch.allclose(logits(load(tmp_path / "out"), tokens()), logits(model, tokens()), atol=1e-3)


def test_tasks_need_their_extra(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, errors = run("evaluate", folder, "--tasks", "hellaswag")
    assert code == 1
    assert "spinquant[lm-eval]" in errors


def test_the_tokenizer_is_written_too(run, folder, tmp_path):
    from spinquant import load_tokenizer

    assert run("rotate", folder, tmp_path / "out", "--text", "manual")[0] == 0
    text = "Grüße, 世界"
    assert load_tokenizer(tmp_path / "out")(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
