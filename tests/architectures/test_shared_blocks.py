"""Shared (weight-tied) decoder blocks (Zamba): tied where possible, untied by R1 and by quantization, always exact."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import FAMILIES, tiny
from models import byte_tokenizer, logits, tokens
from spinquant import (
    CalibrationText,
    RotationSpec,
    load,
    parse_scheme,
    plan_of,
    quantize,
    quantize_folder,
    rotate,
    rotate_folder,
    save,
)
from spinquant.architectures.family import Shared
from spinquant.architectures.shared_blocks import owners
from spinquant.calibration.data import calibration_tokens
from spinquant.checkpoint.folder import load_tokenizer
from spinquant.cli.tables import plan_notes
from spinquant.entrypoints.result import Options
from spinquant.evaluation.equivalence import difference

NAMES = ("zamba", "zamba2-adapters")


@pytest.fixture(params=NAMES)
def source(request, tmp_path):
    """A saved model in float32 with shared tensors stored once, and a tokenizer."""
    model = tiny(request.param).float()
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def near(found, expected):
    return difference(expected, found).relative < 1e-3


def shared_in(model):
    """Names of tensors that share the memory of another."""
    first = dict(model.named_parameters())
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first}


def test_layers_reuse_the_shared_blocks_cyclically():
    """As the model class ties them, with other layers in between."""
    config = FAMILIES["zamba2"].config()
    config.num_hidden_layers, config.num_mem_blocks = 8, 2
    names = [f"model.layers.{i}.linear.weight" for i in (0, 2, 3, 5, 7)]
    shared = Shared("model.layers.{i}.shared_transformer", "model.layers.{i}.linear.weight", "num_mem_blocks")
    assert owners(shared, config, names) == {0: 0, 2: 2, 3: 0, 5: 2, 7: 0}


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_lists_every_tied_tensor_of_the_model_class(name):
    model = tiny(name)
    assert shared_in(model) == set(plan_of(model).tied)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameters[tensor] is parameters[origin] for tensor, origin in plan_of(model).tied.items())


@pytest.mark.parametrize("name", NAMES)
def test_r1_unties_shared_blocks_and_r2_does_not(name):
    model = tiny(name)
    before = shared_in(model)
    rotate(model, RotationSpec("R2"), options=Options(prove=False))
    assert shared_in(model) == before and model.config.tie_word_embeddings
    model = tiny(name)
    rotate(model, RotationSpec("R1,R2"), options=Options(prove=False))
    assert not shared_in(model) and not model.config.tie_word_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_plan_notes_mention_that_r1_unties_shared_blocks(name):
    model = tiny(name)
    notes = plan_notes(plan_of(model), RotationSpec("R1"))
    assert any(f"{len(shared_in(model)) - 1} tensors" in note for note in notes)
    assert not any("share" in note for note in plan_notes(plan_of(model), RotationSpec("R2")))


def test_a_folder_without_the_untied_copies_loads_as_another_model(source, tmp_path):
    """With `tie_word_embeddings` off, transformers initializes tensors that the folder lacks at random."""
    rotate_folder(source, tmp_path / "out", RotationSpec("R1"), text=None)
    expected = logits(AutoModelForCausalLM.from_pretrained(source), tokens())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert near(logits(found, tokens()), expected)
    tied = set(plan_of(AutoModelForCausalLM.from_pretrained(source)).tied) - {"lm_head.weight"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tied <= set(tensors)
    save_file(
        {n: t for n, t in tensors.items() if n not in tied}, tmp_path / "out" / "model.safetensors", {"format": "pt"}
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(logits(found, tokens()), expected).relative > 0.1


@pytest.mark.parametrize(
    ("scheme", "rotations"), [("none", "R1,R2"), ("none", "R2,R4"), ("W4A8KV8", "none"), ("W4A8KV8", "R1,R2,R3,R4")]
)
def test_streamed_and_in_memory_results_agree(source, tmp_path, scheme, rotations):
    """Streamed, or in memory and saved: the same logits; without quantization those of the source."""
    spec, options = RotationSpec(rotations), Options(prove=False)
    plain = scheme == "none" and not {"R3", "R4"} & set(spec.rotations)
    if plain:
        rotate_folder(source, tmp_path / "streamed", spec, text=None)
    else:
        quantize_folder(source, tmp_path / "streamed", parse_scheme(scheme), spec, text=None)
    model = AutoModelForCausalLM.from_pretrained(source)
    before = logits(model, tokens())
    result = rotate(model, spec, options=options) if plain else quantize(model, scheme, spec, options=options)
    found = logits(result.model, tokens())
    save(result, tmp_path / "saved")
    for folder in ("streamed", "saved"):
        loaded = load(tmp_path / folder)
        assert near(logits(loaded, tokens()), found), folder
        tie = json.loads((tmp_path / folder / "config.json").read_text())["tie_word_embeddings"]
        assert tie == bool(shared_in(loaded)), folder
    if scheme == "none":
        assert near(found, before)


def test_calibration_quantizes_each_layers_copy_by_its_own_inputs(source, tmp_path):
    """A calibration unties shared blocks, from disk as in memory."""
    text, scheme, spec = CalibrationText("manual", 4, 16), parse_scheme("W4"), RotationSpec("R2")
    quantize_folder(source, tmp_path / "out", scheme, spec, method="gptq", calibration_text=text, text=None)
    loaded = load(tmp_path / "out")
    model = load(source)
    _, ids = calibration_tokens(model, load_tokenizer(source), text)
    tied = plan_of(model).tied
    quantize(model, scheme, spec, method="gptq", tokens=ids, options=Options(prove=False))
    assert near(logits(loaded, tokens()), logits(model, tokens()))
    assert not shared_in(loaded) and not shared_in(model)
    weights = dict(loaded.named_parameters())
    copy = next(name for name in tied if name.endswith("self_attn.o_proj.weight"))
    assert not torch.equal(weights[copy], weights[tied[copy]])
