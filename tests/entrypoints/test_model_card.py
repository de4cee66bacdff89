"""Laws of model cards: they say what was done, the same for the same request, and name no path of a machine."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from checkpoints import saved
from models import logits, tiny_model, tokens
from spinquant import LearnOptions, RotationSpec, learn, load, parse_scheme, quantize_folder, rotate_folder
from spinquant.entrypoints.loading import LOADING, runtimes_of
from spinquant.entrypoints.local_paths import public_command
from spinquant.entrypoints.model_card import ORIGINAL, learned_card, model_card
from spinquant.entrypoints.source_card import CARD, LARGEST_CARD, read_card, split_card
from spinquant.formats.runtimes import RUNTIMES, format_for, runtime_rows
from spinquant.quantization.scheme import Scheme

SOURCE_CARD = """---
base_model: acme/Base-1B
license: apache-2.0
language:
- en
- no
pipeline_tag: text-generation
tags:
- chat
- gguf
model-index:
- name: theirs
  results: []
---

# Theirs

| a | b |
|---|---|

## Usage

```python
print("---")
```
"""
KEYS = {
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "library_name",
    "license",
    "license_link",
    "license_name",
    "pipeline_tag",
    "tags",
}
ALL = "R1,R2,R3,R4"
ASKED = {  # format, scheme, rotations
    "rotated": ("hf", None, "R1,R2"),
    "native": ("native", "W4A4KV4", ALL),
    "online": ("native", "none", ALL),
    "compressed": ("compressed-tensors", "W4A16", "R1,R2"),
    "compressed-R4": ("compressed-tensors", "W4A16", "R1,R2,R4"),
    "kv": ("native", "KV4", "R1"),
    "floating": ("compressed-tensors", "WFP8AFP8", "R1,R2"),
}
EXTRA = ("compressed", "compressed-R4", "floating")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (result, format, source folder, out), each made once."""
    home = tmp_path_factory.mktemp("home-of-someone")
    source = saved(home / "model", "llama-tied")
    (source / CARD).write_text(SOURCE_CARD)
    done = {}

    def make(name):
        if name not in done:
            if name in EXTRA:
                pytest.importorskip("compressed_tensors")
            format, scheme, rotations = ASKED[name]
            spec, out = RotationSpec(rotations), home / name
            if scheme is None:
                result = rotate_folder(source, out, spec, text="manual")
            else:
                result = quantize_folder(source, out, parse_scheme(scheme), spec, text="manual", format=format)
            done[name] = (result, format, source, out)
        return done[name]

    return make


@pytest.fixture(scope="module")
def learned():
    ids = tokens(12, 24)
    options = LearnOptions(method="random", baselines=2)
    found = learn(tiny_model("llama"), parse_scheme("W4A4KV4"), RotationSpec(ALL), ids[:8], ids[8:], options)
    about = {"text": "manual", "samples": [8, 24], "held_out": "/home/me/judge.txt", "judged": [4, 24]}
    return replace(found, record={**found.record, "model": "/home/me/model", "tokens": about, "given": "/home/me/old"})


def card_of(made, name, **options):
    result, format, source, _ = made(name)
    options = {"source": str(source), "source_card": read_card(source), **options}
    return model_card(result, format=format, **options)


def ours(card):
    return card.split(f"\n# {ORIGINAL}\n")[0]


def loaded_by(card):
    """Runtimes that a card names, with what to do in each."""
    part = ours(card).split("## How to load it")[1].split("\n## ")[0]
    return dict(re.findall(r"### [^\n]*\(`([\w.-]+)`\)\n\n```\w+\n(.*?)\n```", part, re.DOTALL))


@pytest.mark.parametrize("name", ASKED)
def test_the_front_matter_is_that_of_the_hub(name, made):
    data = ModelCard(card_of(made, name)).data.to_dict()
    _, scheme, _ = ASKED[name]
    assert set(data) <= KEYS
    assert data["base_model"] == "acme/Base-1B"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "no"]
    assert data["pipeline_tag"] == "text-generation"
    assert {"spinquant", "rotation", "chat"} <= set(data["tags"])
    assert not {"gguf", "none"} & set(data["tags"])
    quantized = scheme not in (None, "none")
    assert ("quantized" in data["tags"]) == quantized
    assert data.get("base_model_relation") == ("quantized" if quantized else None)
    assert not quantized or scheme.lower() in data["tags"]
    assert data["library_name"] == ("spinquant" if ASKED[name][0] == "native" else "transformers")


@pytest.mark.parametrize("name", ASKED)
def test_a_card_says_what_was_done_and_measured(name, made):
    result, _, _, out = made(name)
    text = ours(card_of(made, name))
    for rotation in result.spec.rotations:
        assert re.search(rf"^\| {rotation} \|", text, re.MULTILINE), rotation
    assert f"{result.twin.max_abs:.1e}" in text and f"{result.real.max_abs:.1e}" in text
    assert "seed: 0" in text
    for file in re.findall(r"`(spinquant/[\w.]+)`", text):
        assert (out / file).is_file(), file
    assert ("before quantization" in text) == ("quantized" in card_of(made, name).split("---")[1])


@pytest.mark.parametrize("name", ASKED)
def test_a_card_names_the_runtimes_that_run_the_folder_and_no_other(name, made):
    result, format, _, _ = made(name)
    scheme, named = result.scheme or Scheme(), loaded_by(card_of(made, name))
    assert named
    for runtime, about in RUNTIMES.items():
        runs = about.format is not None and format_for(runtime, scheme, result.spec) == format
        runs &= all(row["runs"] for row in runtime_rows(runtime, result.spec, scheme, result.plan))
        assert (runtime in named) == runs, runtime
        assert "FOLDER" in named.get(runtime, "FOLDER")
    titles = [about.title for runtime, about in RUNTIMES.items() if runtime not in named]
    for runtime in named:
        rows = runtime_rows(runtime, result.spec, scheme, result.plan)
        about = card_of(made, name).split(f"(`{runtime}`)")[1].split("###")[0]
        assert ("Not tested" in about) == any(not row["why"].startswith("test: ") for row in rows), runtime
    assert not [title for title in titles if f"### {title} (" in card_of(made, name)]


@pytest.mark.parametrize("name", ["rotated", "native", "online", "compressed"])
def test_what_a_card_says_loads_the_folder(name, made):
    _, _, _, out = made(name)
    expected = logits(load(out), tokens())
    run = [lines for lines in loaded_by(card_of(made, name)).values() if "import " in lines]
    assert run
    for lines in run:
        found: dict[str, Any] = {}
        exec(lines.replace("FOLDER", str(out)), found)
        assert found["tokenizer"]("x")["input_ids"]
        assert (logits(found["model"], tokens()) - expected).abs().max() < 1e-3


def test_loading_is_told_of_runtimes_that_there_are():
    assert set(LOADING) <= set(RUNTIMES)
    everywhere = runtimes_of("hf", RotationSpec("R1,R2"), Scheme(), None)
    assert set(everywhere) == {name for name, about in RUNTIMES.items() if about.format}


def test_a_plain_folder_is_plain_whatever_its_format_is_called(made):
    result, _, source, _ = made("rotated")
    cards = [model_card(result, format=f, source=str(source), source_card=None) for f in ("hf", "native")]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("name", ASKED)
def test_the_card_of_the_source_is_kept_below(name, made):
    body = SOURCE_CARD.split("---\n", 2)[2].strip("\n")
    card = card_of(made, name)
    assert card.endswith(f"\n\n# {ORIGINAL}\n\n{body}\n")
    assert "model-index" not in card


def test_a_source_without_a_card_has_no_section(made):
    for source_card in (None, "", "\n\n", "---\nlicense: mit\n---\n"):
        assert ORIGINAL not in card_of(made, "rotated", source_card=source_card)


@pytest.mark.parametrize("name", ASKED)
def test_the_same_request_gives_the_same_card(name, made):
    result, format, source, _ = made(name)
    command = f"spinquant quantize {source} out --scheme W4A4KV4"
    later = replace(result, seconds={"total": 3.0})
    cards = {
        model_card(one, format=format, source=str(source), source_card=SOURCE_CARD, command=asked)
        for one in (result, later)
        for asked in (command, f"{command} --force", f"{command} --json --push-to-hub me/model")
    }
    assert len(cards) == 1
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d", ours(cards.pop()))


@pytest.mark.parametrize("name", ASKED)
def test_a_card_holds_no_path_of_the_machine(name, made, learned):
    result, format, source, out = made(name)
    command = f"/opt/bin/spinquant quantize {source} {out} --text={source}/t.txt --also {source}/a,{source}/b"
    noted = {"kind": "lora", "source": str(source / "lora"), "rotated": 1, "tensors": 2}
    result = replace(result, notes={**result.notes, "adapters": {"lora": noted}, "learned": learned.note()})
    card = model_card(result, format=format, source=str(source), source_card=None, command=command)
    assert "spinquant quantize model" in card
    assert "judge.txt" in card
    for path in (str(source.parent), source.parent.name, "/home/me", "/opt", str(Path.home())):
        assert path not in card, path


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("spinquant rotate /a/b/model /a/b/out", "spinquant rotate model out"),
        ("spinquant rotate '/a b/my model' ~/out --seed 3", "spinquant rotate 'my model' out --seed 3"),
        ("/usr/bin/spinquant rotate org/model ./out --force", "spinquant rotate org/model ./out"),
        ("spinquant quantize m o --block-size R1=64,R4=128", "spinquant quantize m o --block-size R1=64,R4=128"),
        (r"spinquant rotate 'C:\Users\me\model' 'D:/out'", "spinquant rotate model out"),
        ("spinquant learn m o --text dataset:a/b:c:test --held-out https://x.y/z", None),
        ("spinquant learn m o --push-to-hub me/repo --json", "spinquant learn m o"),
        ("spinquant learn m o --push-to-hub=me/repo --learned=/x/y", "spinquant learn m o --learned=y"),
        ("spinquant learn 'm /x/o", "spinquant learn ''\"'\"'m' o"),
    ],
)
def test_commands_keep_names_and_lose_paths(command, public):
    assert public_command(command) == (public or command)


@pytest.mark.parametrize(
    ("source", "card", "base"),
    [
        ("org/Model-1B", SOURCE_CARD, "org/Model-1B"),
        ("~/.cache/huggingface/hub/models--org--Model-1B/snapshots/0123abcd", SOURCE_CARD, "org/Model-1B"),
        ("/data/Model-1B", SOURCE_CARD, "acme/Base-1B"),
        ("/data/Model-1B", None, "Model-1B"),
        ("/data/Model-1B", "---\nbase_model: /data/private/base\n---\n", "Model-1B"),
        ("/data/Model-1B", "---\nbase_model:\n- a/b\n- c/d\n---\n", ["a/b", "c/d"]),
        ("/data/my model", None, None),
    ],
)
def test_the_base_model_is_one_of_the_hub_where_that_is_known(source, card, base, made):
    text = card_of(made, "native", source=source, source_card=card)
    assert ModelCard(text).data.base_model == base
    assert "/data" not in text and "cache" not in text.split("\n## ")[0]
    for one in [base] if isinstance(base, str) else base or []:
        validate_repo_id(one)


BROKEN = {
    "yaml": "---\nlicense: [mit\n  x: : y\n---\n# Theirs\n",
    "no mapping": "---\n- a\n- b\n---\n# Theirs\n",
    "keys": "---\n1: 2\n? [a, b]\n: c\n---\n# Theirs\n",
    "deep": "---\na: " + "[" * 5000 + "\n---\n# Theirs\n",
    "types": "---\nlicense: {a: b}\nlanguage: 3\nbase_model: [1]\n---\n# Theirs\n",
    "tags": "---\ntags: 3\n---\n# Theirs\n",
    "no end": "---\nlicense: mit\n# Theirs\n",
    "dates": "---\nlicense: 2024-01-01\ntags: [1, x]\n---\n# Theirs\n",
    "bom": "\ufeff---\r\nlicense: mit\r\n---\r\n# Theirs\r\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_card_is_kept_as_far_as_it_can_be_read(kind, made, tmp_path):
    (tmp_path / CARD).write_bytes(BROKEN[kind].encode())
    card = card_of(made, "rotated", source="org/model", source_card=read_card(tmp_path))
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "org/model"
    assert data["tags"] == ["spinquant", "rotation"]
    assert data.get("license") == ("mit" if kind == "bom" else None)
    assert "# Theirs" in card.split(ORIGINAL)[1]
    assert ("were ignored" in card) == (kind in ("yaml", "no mapping", "keys", "deep", "tags"))
    card.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        (b"caf\xe9", "not UTF-8"),
        (b"# a\0b", "zero bytes"),
        (b"x" * (LARGEST_CARD + 1), "bytes, more than"),
    ],
)
def test_a_card_that_is_no_text_is_noted(content, says, made, tmp_path):
    (tmp_path / CARD).write_bytes(content)
    card = card_of(made, "rotated", source_card=read_card(tmp_path))
    assert says in card.split(ORIGINAL)[1]
    assert len(card) < LARGEST_CARD


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_card_that_cannot_be_read_is_noted(tmp_path):
    (tmp_path / CARD).write_text("x")
    (tmp_path / CARD).chmod(0)
    assert "could not be read" in str(read_card(tmp_path))


def test_a_folder_without_a_card_has_none(tmp_path):
    assert read_card(tmp_path) is None
    (tmp_path / CARD).mkdir()
    assert read_card(tmp_path) is None


def test_a_card_of_ours_can_be_the_source_s(made):
    first = card_of(made, "rotated")
    second = card_of(made, "native", source_card=first)
    assert ModelCard(second).data.base_model == "acme/Base-1B"
    assert second.count(f"\n# {ORIGINAL}\n") == 2
    assert split_card(second)[1].strip().endswith(first.split("---\n", 2)[2].strip())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"real": None}, "not compared, as asked"),
        ({"real": None, "notes": {"real_tokens": "not compared: blocks are too large"}}, "blocks are too large"),
        ({"twin": None}, "architecture: not measured"),
        ({"notes": {"rounding_alone": 0.25}}, "relative error of logits 2.5e-01"),
        ({"notes": {"calibration_text": {"text": "manual", "samples": 7, "length": 99}}}, "7 samples of 99 tokens"),
    ],
)
def test_what_was_not_measured_is_said(changes, says, made):
    result, format, source, _ = made("native")
    card = model_card(replace(result, **changes), format=format, source=str(source), source_card=None)
    assert says in card
    assert "were not measured" in card


def test_a_folder_loaded_as_a_whole_has_no_checksums(made):
    result, format, source, _ = made("rotated")
    held: Any = SimpleNamespace()
    assert "checksums" in model_card(result, format=format, source=str(source), source_card=None)
    assert "checksums" not in model_card(replace(result, model=held), format=format, source="a/b", source_card=None)


def test_learned_rotations_have_a_card(learned):
    command = "spinquant learn /home/me/model /home/me/learned --scheme W4A4KV4"
    options: dict[str, Any] = {"source": "/home/me/model", "command": command, "source_card": SOURCE_CARD}
    card = learned_card(learned, **options, pictures=["curve.png"])
    data = ModelCard(card).data.to_dict()
    assert set(data) <= KEYS
    assert data["license"] == "apache-2.0" and data["library_name"] == "spinquant"
    assert "pipeline_tag" not in data and "base_model_relation" not in data
    for name, score in learned.record["scores"].items():
        assert re.search(rf"^\| {name} \| {score['kl']:#.4g} \| {score['perplexity']:.2f} \|", card, re.MULTILINE), name
    assert f"`{learned.kept}` was kept" in card
    assert "![curve](curve.png)" in card
    for rotation in learned.spec.rotations:
        assert f"\n| {rotation} |" in card
    assert "spinquant learn model learned --scheme W4A4KV4" in card
    assert "/home/me" not in card and ORIGINAL not in card
    slower = replace(learned, record={**learned.record, "seconds": {"baselines": 9.9}})
    assert learned_card(slower, **options, pictures=["curve.png"]) == card


def test_a_quantized_model_shows_the_scores_of_its_learned_rotations(made, learned):
    result, format, source, _ = made("native")
    noted = replace(result, notes={**result.notes, "learned": learned.note()})
    for one, given in ((noted, None), (result, learned.record)):
        card = model_card(one, format=format, source=str(source), source_card=None, learned=given)
        assert f"`{learned.kept}` was kept" in card
        assert f"{learned.record['scores']['16-bit']['perplexity']:.2f}" in card
        assert "weights at 16 bits" in card
