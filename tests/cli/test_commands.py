"""The commands end to end, through the entry point in this process: results, JSON, and errors."""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO

import pytest
import torch
from transformers import AutoModelForCausalLM, CTRLConfig

from models import byte_tokenizer, logits, tiny_model, tokens
from processes import start_source
from spinquant import load, read_learned
from spinquant.cli import main as cli


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
    """The values of the weights do not matter: here they are cut off, and the file is extended with zeros."""
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


def test_an_asymmetry_of_zero_is_gptq(run, folder, tmp_path):
    weights = {}
    for name, more in {
        "gptq": ["--method", "gptq"],
        "zero": ["--method", "gptaq", "--asymmetry", "0"],
        "default": ["--method", "gptaq"],
    }.items():
        command = ["quantize", folder, tmp_path / name, "--scheme", "W4A4", "--text", "manual", "--no-proof", *more]
        code, _, errors = run(*command, "--calibration", "manual", "--samples", "4", "--sample-length", "16")
        assert code == 0, errors
        weights[name] = load(tmp_path / name).get_submodule("model.layers.2.mlp.down_proj").weight
    assert torch.equal(weights["gptq"], weights["zero"])
    assert not torch.equal(weights["gptq"], weights["default"])


def test_checksums_are_verified(run, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("rotate", folder, out, "--max-shard-size", "40KB", "--no-compare", "--json")
    assert code == 0, errors
    assert json.loads(printed)["seconds"]["total"] > 0
    assert len(list(out.glob("*.safetensors"))) > 2
    code, printed, _ = run("verify", "--checksums", out)
    assert code == 0 and "unchanged" in printed
    (out / "config.json").write_text("{}")
    code, printed, _ = run("verify", "--checksums", out, "--json")
    assert code == 1 and json.loads(printed)["damaged"] == ["config.json"] and not json.loads(printed)["missing"]
    (out / "config.json").unlink()
    code, printed, _ = run("verify", "--checksums", out)
    assert code == 1 and "missing" in printed and "changed" not in printed
    code, _, errors = run("verify", "--checksums", tmp_path / "nowhere")
    assert code == 1 and "does not exist" in errors
    assert run("verify", "--checksums", folder)[0] == 1


MISTAKES = {
    "no folder": (["rotate", "/nowhere/at/all", "{out}"], "does not exist"),
    "unknown rotation": (["rotate", "{model}", "{out}", "--rotations", "R1,R5"], "R5"),
    "online in a plain folder": (["rotate", "{model}", "{out}", "--rotations", "R1,R4"], "spinquant quantize"),
    "unknown type": (["rotate", "{model}", "{out}", "--type", "fourier"], "fourier"),
    "block that does not divide": (["rotate", "{model}", "{out}", "--block-size", "7"], "does not divide"),
    "block that is no number": (["rotate", "{model}", "{out}", "--block-size", "big"], "big"),
    "order without Hadamard": (
        ["rotate", "{model}", "{out}", "--block-size", "R1=6", "--rotations", "R1", "--type", "random-hadamard"],
        "order 6",
    ),
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
    "output that exists": (["rotate", "{model}", "{taken}"], "taken exists"),
    "output over the source": (["rotate", "{model}", "{model}", "--force"], "choose another"),
    "clips that no runtime knows": (
        ["quantize", "{model}", "{out}", "--scheme=W4A4", "--rotations=R1", "--clips", "--format=compressed-tensors"],
        "clip ratios",
    ),
    "calibration that nobody reads": (
        ["quantize", "{model}", "{out}", "--scheme", "W4A4", "--samples", "4"],
        "leave it out",
    ),
    "an option of another method": (
        ["quantize", "{model}", "{out}", "--scheme", "W4A4", "--act-order"],
        "the method is rtn",
    ),
    "unknown size": (["rotate", "{model}", "{out}", "--max-shard-size", "5 parsecs"], "parsecs"),
    "one model to compare": (["verify", "{model}"], "two models to compare"),
    "two folders to check": (["verify", "{model}", "{model}", "--checksums"], "one folder"),
    "unknown clip": (["quantize", "{model}", "{out}", "--scheme", "W4", "--weight-clip", "tight"], "tight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_error(run, folder, tmp_path, mistake):
    arguments, word = MISTAKES[mistake]
    (tmp_path / "short.txt").write_text("brief")
    out = tmp_path / "out"
    places = {"model": folder, "out": out, "short": tmp_path / "short.txt", "taken": tmp_path / "taken"}
    places["taken"].mkdir()
    code, _, errors = run(*(argument.format(**places) for argument in arguments))
    assert code == 1
    assert word in errors
    assert "Traceback" not in errors
    assert errors.strip().startswith("error:")
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()
    assert (folder / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("more", [("--scheme", "W4A4"), ("--scheme", "W4A4", "--method", "gptq"), None])
@pytest.mark.parametrize("compare", ["--compare", "--no-compare"])
def test_a_weight_that_is_not_finite_is_named(run, tmp_path, more, compare):
    """The error names the tensor, not the rotation or a later module; nothing is left behind."""
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = ("--calibration", "manual", "--samples", "4", "--sample-length", "32") if more and "gptq" in more else ()
    command = ("quantize",) if more else ("rotate",)
    command += (tmp_path / "model", tmp_path / "out", "--text", "manual", compare, *(more or ()), *text)
    code, _, errors = run(*command)
    assert code == 1 and "'model.layers.1.mlp.up_proj.weight'" in errors and "download it again" in errors, errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_debug_shows_the_traceback(run):
    from spinquant import CheckpointError

    with pytest.raises(CheckpointError):
        run("plan", "/nowhere/at/all", "--debug")


def test_an_unknown_architecture_is_refused_by_name(run, tmp_path):
    config = CTRLConfig(n_embd=32, dff=32, n_layer=1, n_head=2, vocab_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "ctrl")
    for command in (["plan"], ["rotate", tmp_path / "out"], ["quantize", tmp_path / "out", "--scheme", "W4A4"]):
        code, _, errors = run(command[0], tmp_path / "ctrl", *command[1:])
        assert code == 1
        assert "ctrl" in errors


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


LEARN = ("--text", "manual", "--samples", "6", "--sample-length", "24", "--windows", "2", "--baselines", "2")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a model and rotations learned for it, and what `learn --json` printed."""
    place = tmp_path_factory.mktemp("learned")
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    command = ["learn", place / "model", place / "out", "--scheme", "W4A4KV4", "--method", "local+end-to-end"]
    command += [*LEARN, "--steps", "6", "--batch", "2", "--rows", "32", "--json"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", ["spinquant", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return place, json.loads(printed.getvalue())


def test_learn_records_what_it_kept_and_why(learned):
    place, data = learned
    assert data["kept"] in data["scores"] and {"random 0", "random 1", "16-bit"} < set(data["scores"])
    assert data["scores"][data["kept"]]["kl"] == min(s["kl"] for n, s in data["scores"].items() if n != "16-bit")
    assert len(data["steps"]) == 6 and all(step["orthogonality"] < 1e-5 for step in data["steps"])
    assert sorted(p.name for p in (place / "out").iterdir() if p.suffix != ".png") == [
        "README.md",
        "learned.json",
        "rotations.safetensors",
    ]
    assert not list(place.glob(".*")), "nothing is left beside it"
    if find_spec("matplotlib"):
        assert {"curve.png", "errors.png"} <= {p.name for p in (place / "out").iterdir()}


def test_learned_rotations_are_used(run, learned, tmp_path):
    place, _ = learned
    made = read_learned(place / "out")
    options = ("--learned", place / "out", "--text", "manual", "--no-proof")
    code, _, errors = run("quantize", place / "model", tmp_path / "q", "--scheme", "W4A8KV4", *options)
    assert code == 0, errors
    assert "were learned for W4A4KV4, not for W4A8KV4" in " ".join(errors.split())
    model = load(tmp_path / "q")
    assert torch.isfinite(logits(model, tokens())).all()
    record = json.loads((tmp_path / "q" / "spinquant" / "record.json").read_text())
    assert record["learned"]["kept"] == made.kept and record["spec"] == json.loads(json.dumps(made.spec.to_dict()))
    code, _, errors = run("rotate", place / "model", tmp_path / "r", *options)
    assert code == 1 and "R3, R4" in errors and "--rotations R1,R2" in errors  # learned too, and online
    code, _, errors = run("rotate", place / "model", tmp_path / "r", *options, "--rotations", "R1,R2", "--type", "auto")
    assert code == 1 and "--type cannot be combined with --learned" in errors and "--rotations" not in errors
    code, _, errors = run("rotate", place / "model", tmp_path / "r", *options, "--rotations", "R1,R2", "--seed", "0")
    assert code == 1 and "--seed cannot be combined with --learned" in errors
    code, _, errors = run("rotate", place / "model", tmp_path / "r", *options, "--rotations", "R1,R2")
    assert code == 0, errors
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "r")
    assert torch.allclose(logits(plain, tokens()), logits(load(place / "model"), tokens()), atol=1e-3)
    record = json.loads((tmp_path / "r" / "spinquant" / "record.json").read_text())
    assert record["spec"]["rotations"] == ["R1", "R2"] and "seconds" not in record["learned"]
    shutil.rmtree(tmp_path / "r")
    code, _, errors = run("rotate", place / "model", tmp_path / "r", "--learned", place / "model")
    assert code == 1 and "spinquant learn" in errors


def test_an_interrupted_learn_resumes_and_other_options_are_refused(run, learned, tmp_path):
    """After kill -9 between steps a rerun resumes; other options are refused, and so are two runs at once."""
    place, _ = learned
    steps = ("--rotations", "R1,R2", "--method", "end-to-end", "--steps", "30", "--batch", "2", "--no-transforms")
    # A file, since the short manual of the tests is patched into this process only.
    (tmp_path / "text").write_text(" ".join(f"word{i % 97}" for i in range(400)))
    from_file = ("--text", tmp_path / "text", *LEARN[2:])
    command = ("learn", place / "model", tmp_path / "out", "--scheme", "A4KV4", *from_file, *steps)
    state, streams = tmp_path / ".out.run" / "learning" / "end-to-end.safetensors", tmp_path / "streams"
    streams.mkdir()
    process = start_source("from spinquant.cli.main import main; main()", command, {}, streams)
    try:
        while not state.exists():
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)  # it has its lock, and is paused
        code, _, errors = run(*command)
        assert code == 1 and "another run is writing" in errors
    finally:
        process.kill()
        process.join()
    code, _, errors = run(*(*command, "--seed", "1"))
    assert code == 1 and "seed was 0 and is 1; options.seed was 0 and is 1; text.calibration.seed" in errors
    assert "rows" not in errors  # which is the same and "--force" in errors and state.exists()
    from safetensors import safe_open

    with safe_open(state, "pt") as file:
        before = len(json.loads(file.metadata()["about"])["history"])
    assert 0 < before < 30
    code, text, errors = run(*command, "--json")
    assert code == 0 and "score random" not in errors, errors
    assert len(json.loads(text)["steps"]) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "streams", "text"]


def test_rotations_of_another_model_get_a_note(run, learned, tmp_path):
    place, _ = learned
    shutil.copytree(place / "model", tmp_path / "same")
    tiny_model("llama-tied", dtype=torch.float32, seed=4).save_pretrained(tmp_path / "other")
    options = ("--learned", place / "out", "--rotations", "R1,R2", "--no-compare", "--no-proof")
    for name in ("same", "other"):
        code, _, errors = run("rotate", tmp_path / name, tmp_path / f"{name}-rotated", *options)
        assert code == 0 and ("has other weights" in errors) == (name == "other")


def test_plain_folders_take_learned_rotations(run, learned, tmp_path):
    place, _ = learned
    more = ("--rotations", "R1,R2", "--method", "local", "--steps", "4", "--rows", "32")
    code, _, errors = run("learn", place / "model", tmp_path / "out", "--scheme", "A4KV4", *LEARN, *more)
    assert code == 0, errors
    code, _, errors = run("rotate", place / "model", tmp_path / "r", "--learned", tmp_path / "out", "--text", "manual")
    assert code == 0, errors
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "r")
    assert torch.allclose(logits(plain, tokens()), logits(load(place / "model"), tokens()), atol=1e-3)
    assert not torch.allclose(plain.lm_head.weight, load(place / "model").lm_head.weight, atol=1e-2)


def test_quantize_learns_in_one_go(run, learned, tmp_path):
    place, _ = learned
    short = ("--calibration", "manual", "--samples", "12", "--sample-length", "24", "--text", "manual", "--no-proof")
    command = ("quantize", place / "model", tmp_path / "out", "--scheme", "W4A4", "--learn", "local", *short)
    code, _, errors = run(*command)
    assert code == 0, errors
    record = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())["learned"]
    assert record["scores"]["local"] and record["options"]["rounding"] == "rtn"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--damping", "0.1"], "damping"),
        (["--format", "hf"], "plain 16-bit checkpoint"),
        (["--method", "gptq", "--scheme", "A4"], "method rtn"),
        (["--runtime", "vllm"], "vllm"),
        (["--learned", "elsewhere"], "Give one of them"),
        (["--budget", "10m"], "with method local"),
    ],
)
def test_what_quantizing_would_refuse_is_refused_before_learning(run, learned, tmp_path, monkeypatch, more, word):
    monkeypatch.setattr("spinquant.entrypoints.folders.learn_from", lambda *_, **__: pytest.fail("it learned first"))
    command = ["quantize", learned[0] / "model", tmp_path / "out", "--scheme", "W4A4KV4", "--learn", "local", *more]
    code, _, errors = run(*command)
    assert code == 1 and word in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(("more", "word"), [(["--budget", "10m"], "auto"), (["--moments", "weights"], "closed-form")])
def test_options_of_learning_need_learning(run, folder, tmp_path, more, word):
    code, _, errors = run("quantize", folder, tmp_path / "out", "--scheme", "W4A4KV4", *more)
    assert code == 1 and f"{more[0]} is an option of learning: give --learn {word}" in errors


LEARN_MISTAKES = {
    "unknown method": (["--method", "global"], "global"),
    "unknown objective": (["--objective", "l1"], "l1"),
    "unknown loss": (["--loss", "mse"], "mse"),
    "not rotated": (["--rotations", "R1", "--learn", "R2"], "cannot learn R2"),
    "a dense R4": (["--learn", "R4", "--block-size", "R4=7"], "does not divide"),
    "nothing to learn from": (["--scheme", "W4A16"], "--weights"),
    "text too short": (["--text", "{short}"], "too short"),
    "sharded alone": (["--method", "end-to-end", "--shard"], "torchrun"),
    "sharded and local": (["--method", "local", "--shard"], "end-to-end"),
    "an option of end-to-end": (
        ["--method", "local", "--loss", "kl", "--weights"],
        "--loss, --weights cannot",
    ),
    "an option of local": (["--method", "end-to-end", "--massive", "2"], "--massive cannot"),
    "nothing to choose": (["--method", "random", "--steps", "3"], "--steps cannot"),
    "nothing to learn": (["--method", "random", "--learn", "R1"], "--learn cannot"),
    "no windows": (["--windows", "0"], "--windows"),
    "a sample alone": (["--samples", "1", "--method", "local"], "Give more --samples"),
    "longer than the context": (["--sample-length", "3000"], "max_position_embeddings"),
    "massive rows count nothing": (["--method", "local", "--massive", "0"], "(--massive)"),
    "no steps": (["--steps", "0"], "(--steps)"),
    "no time": (["--budget", "10"], "such as 90s, 10m or 1h"),
    "time for one method": (["--method", "local", "--budget", "10m"], "only method auto"),
    "unknown moments": (["--moments", "hessians"], "gradients, weights"),
    "moments of no transforms": (["--moments", "weights", "--no-transforms"], "--no-transforms rules out"),
    "no rows": (["--method", "local", "--rows", "-3"], "rows is -3"),
    "no rotation to beat": (["--baselines", "0"], "(--baselines)"),
    "an infinite step": (["--lr", "inf"], "(--lr)"),
    "no gradients to save memory of": (
        ["--method", "local", "--weighting", "uniform", "--checkpointing"],
        "--weighting fisher without",
    ),
    "moments without a backward pass": (
        ["--method", "closed-form", "--moments", "weights", "--checkpointing"],
        "--checkpointing cannot",
    ),
    "R1 online and not": (["--rotations", "R2", "--online", "R1"], "R1 is to run online, and the rotations are R2"),
    "online R1 from rows": (
        ["--method", "local", "--online", "R1", "--learn", "online-R1", "--block-size", "R1=8"],
        "learn it end to end",
    ),
    "a rate for procrustes": (["--method", "local", "--solver", "procrustes", "--lr", "2"], "does not use lr"),
}


@pytest.mark.parametrize("mistake", LEARN_MISTAKES)
def test_a_mistake_in_learning_gives_one_clear_error(run, folder, tmp_path, mistake):
    arguments, word = LEARN_MISTAKES[mistake]
    scheme = [] if "--scheme" in arguments else ["--scheme", "A4KV4"]
    (tmp_path / "short.txt").write_text("brief")
    arguments = [argument.format(short=tmp_path / "short.txt") for argument in arguments]
    code, _, errors = run("learn", folder, tmp_path / "out", *LEARN, *scheme, *arguments)
    assert code == 1
    assert word in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
