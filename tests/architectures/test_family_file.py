"""Family files: equal to the built-in table, or refused; a saved model no longer needs the file."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import acme
from families import config_of, shapes_of
from models import byte_tokenizer, logits, random_weights, tokens
from processes import run_source
from spinquant import (
    Options,
    RotationSpec,
    load,
    make_plan,
    plan_of,
    probe,
    prove,
    quantize,
    read_family,
    rotate,
    rotate_folder,
    save,
)
from spinquant.architectures import FAMILIES, RECORDED
from spinquant.architectures.family_file import FamilyFile, family_from
from spinquant.architectures.family_file_conversion import to_family
from spinquant.errors import ArchitectureError, CheckpointError, ProofError

acme.register()
EXAMPLES = Path(__file__).parents[2] / "examples" / "families"
ALL = RotationSpec(("R1", "R2", "R3", "R4"), "auto")
QUIET = Options(prove=False)


@pytest.fixture(scope="module")
def acme_family():
    return probe(acme.AcmeConfig()).family


@pytest.fixture(scope="module")
def acme_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("acme") / "model"
    random_weights(acme.AcmeForCausalLM(acme.AcmeConfig())).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_file_and_a_table_give_the_same_plan(path):
    """Except for the reasons of refusals, which are the user's text."""
    config = config_of(path.stem)
    shapes = shapes_of(config)
    table, found = make_plan(config, shapes), make_plan(config_of(path.stem), shapes, family=path)
    assert [name for name, _ in found.refused] == [name for name, _ in table.refused]
    assert ordered(found) == ordered(table)


def ordered(plan):
    """Without the reasons; spaces, axes and gains are sorted, because their order has no meaning."""
    spaces, axes = (tuple(sorted(part, key=repr)) for part in (plan.spaces, plan.axes))
    gains = tuple(sorted(plan.gains, key=repr))
    return replace(plan, spaces=spaces, axes=axes, gains=gains, refused=())


@pytest.mark.parametrize("table", FAMILIES, ids=lambda table: table.name)
def test_like_without_differences_is_the_built_in_table(table):
    """So the checks of family files pass for the built-in tables too."""
    file = FamilyFile(name=table.name, model_types=list(table.model_types), like=table.name)
    found = to_family(family_from(file.recorded(), "here"), [table])
    assert found == table


MISTAKES = {
    "no file": (None, "cannot read the family file"),
    "no TOML": ("name = ", "not TOML"),
    "unknown key": ('name = "x"\nmodel_types = ["acme"]\nlike = "llama"\nheadd = "a"', "key headd"),
    "no name": ('model_types = ["acme"]\nlike = "llama"', "key name: Field required"),
    "no layer": ('name = "x"\nmodel_types = ["acme"]\nembedding = "tok"\nhead = "out"', "layer is missing"),
    "both ways": ('name = "x"\nmodel_types = ["acme"]\nlike = "llama"\nhead = "out"', "head describes a family"),
    "unknown like": ('name = "x"\nmodel_types = ["acme"]\nlike = "lama"', "no built-in family is called 'lama'"),
    "two stars": ('name = "x"\nmodel_types = ["acme"]\nlike = "llama"\n[norms]\n"a.*.*" = ["b"]', "at most one"),
    "no output": (
        'name = "x"\nmodel_types = ["acme"]\nlayer = "a.*"\nembedding = "e"\nhead = "h"\n[attention]\nmodule = "m"\n'
        'q = "q"\nk = "k"\nv = "v"',
        "key attention.o: Field required",
    ),
    "odd inputs": (
        'name = "x"\nmodel_types = ["acme"]\nlayer = "a.*"\nembedding = "e"\nhead = "h"\n[attention]\nmodule = "m"\n'
        'q = "q"\no = "o"',
        "expected q, k and v",
    ),
    "unknown rotation": (
        'name = "x"\nmodel_types = ["acme"]\nlike = "llama"\n[[refused]]\nrotation = "R7"\nreason = "r"',
        "key refused.0.rotation: .*'R7'",
    ),
    "unknown space": (
        'name = "x"\nmodel_types = ["acme"]\nlike = "llama"\n[tensors]\n"a.weight" = ["stream"]',
        "'a.weight' is in space 'stream'",
    ),
    "a reader outside": (
        'name = "x"\nmodel_types = ["acme"]\nlike = "llama"\n[norms]\n"n.weight" = ["model.layers.*.nothing"]',
        r"read by 'model\.layers\.\*\.nothing'",
    ),
    "other models": ('name = "x"\nmodel_types = ["other"]\nlike = "llama"', "key model_types: expected one of other"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_file_and_key(mistake, tmp_path):
    text, match = MISTAKES[mistake]
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArchitectureError, match=match) as error:
        make_plan(acme.AcmeConfig(), {}, family=path)
    assert "mine.toml" in str(error.value) or mistake in ("unknown like", "unknown space", "a reader outside")


def test_a_file_that_does_not_fit_the_model_is_refused_with_the_tensors_name(acme_family):
    config = acme.AcmeConfig(trap="stream")
    with pytest.raises(ArchitectureError, match=r"core\.stack\.0\.keep"):
        make_plan(config, shapes_of(config), family=acme_family)


def changed(family, **changes):
    return family_from({**family.recorded(), **changes}, "changed")


def wrong_families(family):
    data = family.recorded()
    norms, attention = data["norms"], data["attention"]
    pre, mid = "core.stack.*.pre.gain", "core.stack.*.mid.gain"
    q, k, v = (attention[name] for name in "qkv")
    yield "w for 1 + w", changed(family, norm_offset=0.0), "R1"
    yield "a reader that is not named", changed(family, norms={**norms, mid: ["core.stack.*.w1"]}), "R1"
    yield "keys for values", changed(family, attention={**attention, "k": v, "v": k}), "R2"
    yield "another norm", changed(family, norms={**norms, mid: [q, k, v], pre: norms[mid]}), "R1"


@pytest.mark.parametrize("case", range(4))
def test_a_wrong_file_is_refused_by_the_proof_on_a_tiny_model(acme_family, case):
    """It fits names and shapes, so only the logits differ. The message names the first module that departs."""
    what, family, rotation = list(wrong_families(acme_family))[case]
    with pytest.raises(ProofError, match=r"first module that deviates is '(core\.stack\.\d+|out)") as error:
        prove(acme.AcmeConfig(), RotationSpec(rotation, "auto"), family=family)
    assert error.value, what
    assert prove(acme.AcmeConfig(), RotationSpec(rotation, "auto"), family=acme_family).relative < 1e-12


def test_streaming_with_a_family_file_equals_rotating_in_memory(acme_family, acme_folder, tmp_path):
    """The family is stored in the config, so a second step needs no file."""
    spec = RotationSpec(("R1", "R2"), "auto", seed=3)
    with pytest.raises(ArchitectureError, match=r"--probe.*--family"):
        rotate_folder(acme_folder, tmp_path / "refused", spec)
    rotate_folder(acme_folder, tmp_path / "streamed", spec, family=acme_family)
    model = load(acme_folder, family=acme_family)
    rotate(model, spec, options=QUIET)
    streamed = load(tmp_path / "streamed")
    for (name, mine), theirs in zip(model.named_parameters(), streamed.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert plan_of(streamed) == plan_of(model)
    assert json.loads((tmp_path / "streamed" / "config.json").read_text())[RECORDED]["name"] == "acme"


def test_an_interrupted_run_is_not_resumed_with_another_family(acme_family, acme_folder, tmp_path, monkeypatch):
    spec = RotationSpec("R1", "auto")
    monkeypatch.setattr("spinquant.entrypoints.stream.write_record", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rotate_folder(acme_folder, tmp_path / "out", spec, family=acme_family, text=None)
    other = changed(acme_family, name="another")
    with pytest.raises(CheckpointError, match="family"):
        rotate_folder(acme_folder, tmp_path / "out", spec, family=other, text=None)


LOADING = """
import sys, torch
sys.path.insert(0, {tests!r})
import acme, spinquant
acme.register()
for folder in {folders!r}:
    model = spinquant.load(folder)
    with torch.no_grad():
        torch.save(model(torch.load({ids!r})).logits, folder + ".logits")
"""


def test_a_saved_model_loads_in_another_process_without_the_family_file(acme_family, acme_folder, tmp_path):
    """With R3 and R4 attached again."""
    ids = tokens(1, 20)
    torch.save(ids, tmp_path / "ids")
    before, after = logits(load(acme_folder), ids), {}
    for scheme in ("none", "W8A8KV8"):
        result = quantize(load(acme_folder), scheme, ALL, family=acme_family, options=QUIET)
        save(result, tmp_path / scheme)
        after[scheme] = logits(result.model, ids)
    folders = [str(tmp_path / scheme) for scheme in after]
    text = LOADING.format(tests=str(Path(__file__).parents[1]), folders=folders, ids=str(tmp_path / "ids"))
    run = run_source(text)
    assert run.returncode == 0, run.stderr
    for scheme, mine in after.items():
        assert torch.equal(torch.load(tmp_path / f"{scheme}.logits"), mine)
        assert (mine - before).norm() / before.norm() < (1e-4 if scheme == "none" else 0.2)
    assert {online.site for online in plan_of(load(tmp_path / "none")).onlines} == {"input", "query_key"}


def test_command_line_from_draft_to_quantized_model(run, tmp_path, monkeypatch):
    """For a model class of transformers whose table is hidden."""
    others = tuple(table for table in FAMILIES if "nanochat" not in table.model_types)
    monkeypatch.setattr("spinquant.architectures.FAMILIES", others)
    config = AutoConfig.for_model(
        "nanochat",
        **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None},
    )
    folder, toml, rotated, small = (tmp_path / name for name in ("model", "mine.toml", "rotated", "small"))
    random_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    code, _, errors = run("rotate", folder, rotated)
    assert code == 1 and "nanochat" in errors and "--probe" in errors
    code, out, _ = run("plan", folder, "--probe")
    assert code == 0 and "R1: the residual stream can be rotated" in out
    assert run("plan", folder, "--probe", "--draft", toml)[0] == 0
    assert toml.read_text() == out and read_family(toml).name == "nanochat"
    code, _, errors = run("plan", folder, "--probe", "--draft", toml)
    assert code == 1 and "may contain your corrections" in errors
    assert run("plan", folder, "--draft", toml)[0] == 1
    code, out, _ = run("plan", folder, "--family", toml, "--json")
    assert code == 0 and json.loads(out)["plan"]["family"] == "nanochat"
    assert run("rotate", folder, rotated, "--family", toml)[0] == 0
    assert run("verify", folder, rotated, "--tolerance", "0.001", "--length", "32", "--windows", "1")[0] == 0
    arguments = ["--scheme", "W4A8KV8", "--family", toml, "--method", "gptq", "--samples", "4", "--sample-length", "16"]
    assert run("quantize", folder, small, *arguments)[0] == 0
    code, out, _ = run("evaluate", small, "--length", "32", "--windows", "1", "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1
    learning = ["--scheme", "W4A4", "--family", toml, "--steps", "2", "--baselines", "1", "--windows", "1"]
    learning += ["--samples", "4", "--sample-length", "16", "--method", "local"]
    assert run("learn", folder, tmp_path / "learned", *learning)[0] == 0


def test_the_documentation_names_every_key():
    text = (Path(__file__).parents[2] / "docs" / "reference" / "family-files.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", text))
    assert set(FamilyFile.model_fields) - {"mlp", "attention"} <= documented
