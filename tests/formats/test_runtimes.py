"""The table of runtimes: claims are backed, the docs page says what the data says, refusals come before work."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from models import tiny_model
from spinquant import Quantizer, RotationError, RotationSpec, Scheme, SchemeError, parse_scheme, plan_of
from spinquant.formats.runtimes import (
    RUNTIMES,
    Claim,
    check_runtime,
    format_for,
    ignored_cache,
    runtime_rows,
    scheme_names,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "runtimes.md"


def client_cases():
    spec = importlib.util.spec_from_file_location("clients_run", ROOT / "clients" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["clients_run"] = module
    spec.loader.exec_module(module)
    return {f"clients: {case.client} {case.name}" for case in module.CASES}


def claims():
    for name, runtime in RUNTIMES.items():
        for what, claim in [*runtime.rotations.items(), *runtime.schemes.items()]:
            yield name, what, claim


def test_every_claim_is_backed_by_a_test_that_exists_or_a_source():
    cases = client_cases()
    for name, what, claim in claims():
        assert bool(claim.test) != bool(claim.cites), (name, what)
        if claim.test.startswith("clients:"):
            assert claim.test in cases, (name, what)
        elif claim.test:
            file, _, function = claim.test.partition("::")
            assert f"def {function}(" in (ROOT / file).read_text(), (name, what)


def markdown():
    """The tables of docs/reference/runtimes.md."""
    lines = ["| runtime | `--runtime` | folder | how to load it |", "|---|---|---|---|"]
    for name, runtime in RUNTIMES.items():
        lines.append(f"| {runtime.title} | `{name}` | {runtime.format or 'none'} | {runtime.how} |")
    lines += ["", "| `--runtime` | what | runs | backed by |", "|---|---|---|---|"]
    for name, runtime in RUNTIMES.items():
        backed = {}
        for what, claim in [*runtime.rotations.items(), *runtime.schemes.items()]:
            backed.setdefault(claim, []).append(what)
        for claim, what in backed.items():
            lines.append(f"| `{name}` | {', '.join(what)} | {'yes' if claim.runs else '**no**'} | {claim.backing} |")
    return "\n".join(lines)


def test_the_page_says_what_the_data_says():
    """To write it anew: python tests/formats/test_runtimes.py"""
    assert markdown() in PAGE.read_text(encoding="utf-8")


SHORT = ("--calibration", "manual", "--samples", "4", "--sample-length", "16")


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_a_runtime_lists_it_accepts_and_the_rest_it_refuses(name):
    runtime = RUNTIMES[name]
    if runtime.format is None:
        with pytest.raises(SchemeError, match="writes no folder"):
            check_runtime(name, parse_scheme("none"), RotationSpec("R1"))
        return
    for scheme in [*runtime.schemes, "W4A4KV4"]:
        parsed = parse_scheme("W4A4KV4" if scheme == "any" else scheme)
        if name == "transformers-ct" and parsed.kv and ignored_cache():
            continue
        if set(scheme_names(parsed)) <= {*runtime.schemes, "none"} or "any" in runtime.schemes:
            check_runtime(name, parsed, RotationSpec("R1,R2"))
        else:
            with pytest.raises(SchemeError, match="Instead: "):
                check_runtime(name, parsed, RotationSpec("R1,R2"))
    for rotation in ("R3", "R4"):
        spec = RotationSpec(rotation, "hadamard", 16)
        if runtime.rotations.get(rotation, Claim(False)).runs:
            check_runtime(name, parse_scheme("none"), spec)
        else:
            with pytest.raises(RotationError, match=r"Instead: --rotations none, or --runtime .*spinquant"):
                check_runtime(name, parse_scheme("none"), spec)


def test_a_cache_that_the_library_would_not_round_is_refused(monkeypatch):
    """compressed-tensors looks for the cache by the name of a parameter, which transformers 5.24 has changed."""
    initialize = pytest.importorskip("compressed_tensors.quantization.lifecycle.initialize")
    monkeypatch.setattr(initialize, "is_cached_attention_module", lambda module: False, raising=False)
    with pytest.raises(SchemeError, match=r"leaves it at 16 bits without a word\). Instead: transformers 5\.23"):
        check_runtime("transformers-ct", parse_scheme("KVFP8"), RotationSpec("R1"))
    check_runtime("transformers-ct", parse_scheme("W4A16"), RotationSpec("R1"))
    check_runtime("vllm", parse_scheme("KVFP8"), RotationSpec("R1"))
    monkeypatch.setattr(initialize, "is_cached_attention_module", lambda module: True, raising=False)
    check_runtime("transformers-ct", parse_scheme("KVFP8"), RotationSpec("R1"))


def test_what_would_work_instead_works():
    for name, runtime in RUNTIMES.items():
        if runtime.format is None:
            continue
        for row in runtime_rows(name, RotationSpec("R1,R2,R3,R4")):
            if not row["runs"] and row["instead"].startswith("--rotations"):
                kept = row["instead"].removeprefix("--rotations ").split(", or")[0]
                check_runtime(
                    name, parse_scheme("none"), RotationSpec(kept, {"R3": "hadamard"} if "R3" in kept else "hadamard")
                )


def test_limits_of_the_model_are_seen_in_its_plan():
    plan = plan_of(tiny_model("llama"))  # down_proj has a bias, and 80 inputs
    spec = RotationSpec("R4", "random-matrix")
    check_runtime("vllm", parse_scheme("none"), spec, plan_of(tiny_model("mistral")))
    with pytest.raises(RotationError, match=r"bias.*vllm-plugin"):
        check_runtime("vllm", parse_scheme("none"), spec, plan)
    check_runtime("vllm-plugin", parse_scheme("none"), spec, plan)
    with pytest.raises(RotationError, match="--type R3=hadamard"):
        check_runtime("vllm-plugin", parse_scheme("none"), RotationSpec("R3"), plan)
    row = runtime_rows("executorch", RotationSpec("R4", "hadamard"), plan=plan)[0]
    assert not row["runs"] and row["instead"] == "--block-size R4=16"


def test_plain_rotations_need_no_format():
    assert format_for("vllm", parse_scheme("none"), RotationSpec("R1,R2")) == "hf"
    assert format_for("vllm", parse_scheme("none"), RotationSpec("R1,R4")) == "compressed-tensors"
    assert format_for("spinquant", parse_scheme("W4A4"), RotationSpec("R1")) == "native"


def test_names_leave_out_what_does_not_matter_to_a_kernel():
    names = {
        "W4g128A16": ("W4A16",),
        "W8A8": ("W8A8",),
        "FP8_DYNAMIC": ("WFP8AFP8",),
        "KV4": ("none", "KV4"),
        "NVFP4KVFP8": ("WNVFP4ANVFP4", "KVFP8"),
        "none": ("none",),
    }
    assert {text: scheme_names(parse_scheme(text)) for text in names} == names
    assert scheme_names(Scheme(weights=Quantizer(4, group_size=16))) == ("W4A16_ASYM",)


def test_plan_tells_what_a_runtime_runs(run, folder):
    code, out, _ = run("plan", folder, "--runtime", "vllm-cpu", "--scheme", "W8A8", "--json")
    rows = {row["what"]: row for row in json.loads(out)["runtime"]}
    assert code == 1  # R3 and R4 are among the default rotations
    assert [rows[what]["runs"] for what in ("R1", "R2", "R3", "R4", "W8A8")] == [True, True, False, False, True]
    assert "--rotations R1,R2" in rows["R4"]["instead"]
    code, out, _ = run("plan", folder, "--runtime", "vllm-cpu", "--rotations", "R1,R2")
    assert code == 0 and "vLLM on a CPU" in out
    code, _, errors = run("plan", folder, "--scheme", "W8A8")
    assert code == 1 and "--runtime" in errors


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--scheme", "W4A4", "--runtime", "vllm-cpu", "--rotations", "R1"], "vllm-cpu runs"),
        (["--scheme", "W8A8", "--runtime", "vllm-cpu"], "--rotations R1,R2"),
        (["--scheme", "W8A8KVFP8", "--runtime", "vllm-cpu", "--rotations", "R1"], "does not run KVFP8"),
        (["--scheme", "W8A8KV8", "--format", "compressed-tensors", "--rotations", "R1"], "KVFP8"),
        (["--scheme", "W8A8", "--runtime", "ctranslate2", "--rotations", "R1"], "--format hf"),
        (["--scheme", "none", "--runtime", "executorch"], "writes no folder"),
        (["--scheme", "W8A8", "--runtime", "tensorrt"], "unknown runtime"),
        (["--scheme", "W8A8", "--runtime", "vllm", "--format", "native", "--rotations", "R1"], "leave --format out"),
        (["--scheme", "W8A8", "--format", "gguf"], "unknown format"),
        (["--scheme", "W8A8", "--format", "hf", "--rotations", "R1"], "16-bit"),
        (["--scheme", "none", "--format", "hf"], "R3, R4 are online rotations"),
    ],
)
def test_refusals_come_before_work(run, folder, tmp_path, arguments, word):
    code, _, errors = run("quantize", folder, tmp_path / "out", *arguments)
    assert code == 1
    assert word in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_quantize_for_a_runtime_writes_its_format(run, folder, tmp_path):
    for name, arguments, method in (
        ("a", ("--scheme", "W8A8", "--runtime", "vllm-cpu", "--rotations", "R1,R2"), "compressed-tensors"),
        ("b", ("--scheme", "none", "--format", "hf", "--rotations", "R1,R2"), None),
        ("c", ("--scheme", "W4A4", "--runtime", "spinquant"), "spinquant"),
        ("d", ("--scheme", "NVFP4KVFP8", "--runtime", "vllm", "--rotations", "R1", *SHORT), "compressed-tensors"),
    ):
        code, _, errors = run("quantize", folder, tmp_path / name, *arguments, "--text", "manual", "--no-proof")
        assert code == 0, errors
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") == method
        if name == "a":  # W8A8 there means symmetric activations
            group = config["quantization_config"]["config_groups"]["group_0"]
            assert group["input_activations"]["symmetric"] is True


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index("| runtime |"), text.index("\n\n## ", text.index("| `--runtime` | what |"))
    PAGE.write_text(text[:start] + markdown() + text[end:], encoding="utf-8")
