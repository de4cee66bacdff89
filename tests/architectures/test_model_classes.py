"""Classes with another head than the causal LM's, or with none: rotated exactly, or refused with the reason."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from families import FAMILIES
from models import CONFIGS, aligned, byte_tokenizer, close, random_weights, tiny_model, tokens
from spinquant import (
    LearnOptions,
    Options,
    RotationSpec,
    calibration_tokens,
    evaluate,
    learn,
    load,
    parse_scheme,
    plan_of,
    prove,
    quantize,
    quantize_folder,
    rotate,
    rotate_folder,
    save,
)
from spinquant.architectures import make_plan
from spinquant.architectures.model_classes import HEADS, is_body
from spinquant.calibration.data import CalibrationText
from spinquant.errors import ArchitectureError, CheckpointError, ProofError, RotationError, SchemeError
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.modules import output_of, tensor_shapes
from spinquant.rotations.factory import make_rotations
from spinquant.rotations.fuse_module import fuse_module

CLASSES = {
    "body": AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
}
# RMSNorm and LayerNorm, tied, with a fused qkv, Conv1D, experts, an embedding of another width (OPT's projections).
TRIED = ("llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "bloom", "gemma2")
CASES = [(name, kind) for name in TRIED for kind in CLASSES]
ALL = ("R1", "R2", "R3", "R4")
WITHOUT_R1 = ("gemma2", "bloom")  # in every class


def config(name, **changes):
    found = CONFIGS[name]() if name in CONFIGS else FAMILIES[name].config()
    found.pad_token_id = 0  # a classifier needs one for several texts
    found.num_labels = 3
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def of_class(name, kind, dtype=torch.float64):
    """A random model of a class; skips if the family has none."""
    made = config(name)
    if CLASSES[kind]._model_mapping.get(type(made), None) is None:
        pytest.skip(f"transformers has no such class of {name}")
    model = random_weights(CLASSES[kind].from_config(made, dtype=dtype))
    exact_experts(model)
    return model


@torch.no_grad()
def outputs(model, ids):
    with Float64Arithmetic() if model.dtype == torch.float64 else nullcontext():
        return output_of(aligned(model)(input_ids=ids, use_cache=False))


def possible(plan):
    refused = {rotation for rotation, _ in plan.refused}
    return tuple(name for name in ALL if plan.spaces_of(name) and name not in refused)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rotating_leaves_the_outputs_unchanged(name, kind):
    """The proof on the tiny model, which includes a KV cache, and the model itself."""
    model, ids = of_class(name, kind), tokens()
    plan, before = plan_of(model), outputs(model, ids)
    names = possible(plan)
    assert ("R1" in names) == (kind != "body" and name not in WITHOUT_R1)
    result = rotate(model, RotationSpec(names, "auto", randomize=True, seed=2), sample=ids)
    assert result.twin.relative < 1e-9 and result.real.relative < 1e-9
    assert close(outputs(model, ids), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_r1_would_change_what_a_body_returns(name):
    model, ids = of_class(name, "body"), tokens()
    plan, before = plan_of(model), outputs(model, ids)
    with pytest.raises(RotationError, match=f"{type(model).__name__} has no output head.*Leave R1 out"):
        rotate(model, RotationSpec("R1,R2"))
    assert torch.equal(outputs(model, ids), before)
    fuse_module(model, plan, make_rotations(replace(plan, refused=()), RotationSpec("R1")))
    assert not torch.allclose(outputs(model, ids), before, atol=0.1)


def test_a_head_that_the_table_misses_is_found_by_the_proof(monkeypatch):
    """The law can fail: without the gain of the last norm in the head, the outputs move."""
    from spinquant.architectures import model_classes

    usual = model_classes._with_heads
    monkeypatch.setattr(model_classes, "_with_heads", lambda family, heads: _without_readers(usual(family, heads)))
    with pytest.raises(ProofError):
        prove(config("llama", architectures=["LlamaForSequenceClassification"]), RotationSpec("R1"))


def _without_readers(family):
    return replace(family, gains={**family.gains, "model.norm.weight": ()})


@pytest.mark.parametrize("kind", CLASSES)
def test_every_family_has_a_plan_for_its_classes(kind):
    """On the meta device: every tensor is described, and every module of the plan is there."""
    tried = 0
    for name in FAMILIES:
        made = FAMILIES[name].config()
        if made.get_text_config() is not made or CLASSES[kind]._model_mapping.get(type(made), None) is None:
            continue
        with torch.device("meta"):
            model = CLASSES[kind].from_config(made)
        plan = plan_of(model)
        assert plan.linears and len(plan.blocks) == made.num_hidden_layers, name
        assert plan.heads == () if kind == "body" else plan.heads[0] in ("score", "classifier", "qa_outputs"), name
        for module in (*plan.blocks, *plan.attentions, *plan.heads, *(n for group in plan.linears for n in group)):
            model.get_submodule(module)
        assert set(plan.axes_of) <= set(tensor_shapes(model)), name
        tried += 1
    assert tried > 4


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_folders_are_streamed_and_load_with_transformers(name, kind, tmp_path):
    model, ids = of_class(name, kind, torch.float32), tokens()
    before = outputs(model, ids)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    spec = RotationSpec("R2" if kind == "body" else "R1,R2", seed=3)
    result = rotate_folder(tmp_path / "model", tmp_path / "out", spec)
    assert result.real is not None and result.real.relative < 1e-4, result.notes
    loaded = CLASSES[kind].from_pretrained(tmp_path / "out")
    assert torch.allclose(outputs(loaded, ids), before, atol=1e-3)
    assert type(load(tmp_path / "out")) is type(model)


def test_stacked_experts_under_another_prefix_are_streamed(tmp_path):
    """Qwen3-MoE for question answering: the body is `transformer`, and the checkpoint has the experts one by one."""
    model, ids = of_class("qwen3_moe", "question", torch.float32), tokens()
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "transformer.layers.1.mlp.experts.0.down_proj.weight" in names
    rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1,R2", seed=3))
    loaded = CLASSES["question"].from_pretrained(tmp_path / "out")
    assert torch.allclose(outputs(loaded, ids), outputs(model, ids), atol=1e-3)
    quantize_folder(tmp_path / "model", tmp_path / "four", "W4A8", RotationSpec("R1,R2", seed=3))
    found, again = quantize(model, "W4A8", RotationSpec("R1,R2", seed=3)).model, load(tmp_path / "four")
    exact_experts(again)  # as in the model
    assert torch.equal(outputs(again, ids), outputs(found, ids))


@pytest.mark.parametrize("kind", CLASSES)
def test_quantized_folders_equal_quantizing_in_memory(kind, tmp_path):
    model, ids = of_class("qwen3", kind, torch.float32), tokens()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    spec = RotationSpec("R2,R3,R4" if kind == "body" else "R1,R2,R3,R4", seed=3)
    scheme, quick = parse_scheme("W4A4KV4", lm_head=kind == "sequence"), Options(prove=False)
    quantize_folder(tmp_path / "model", tmp_path / "out", scheme, spec, options=quick)
    result = quantize(model, scheme, spec, options=quick)
    expected = outputs(result.model, ids)
    assert torch.equal(outputs(load(tmp_path / "out"), ids), expected)
    assert torch.equal(outputs(CLASSES[kind].from_pretrained(tmp_path / "out"), ids), expected)
    save(result, tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again"), ids), expected)


def test_gptq_on_a_body_from_disk_and_in_memory(tmp_path):
    model, ids = of_class("qwen3", "body", torch.float32), tokens()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = CalibrationText("manual", samples=4, length=16)
    spec, quick = RotationSpec("R2,R4"), Options(prove=False)
    options = {"method": "gptq", "calibration_text": text, "text": None, "options": quick}
    quantize_folder(tmp_path / "model", tmp_path / "out", parse_scheme("W4A8"), spec, **options)
    _, rows = calibration_tokens(None, byte_tokenizer(), text)
    found = quantize(model, "W4A8", spec, method="gptq", tokens=rows, options=quick).model
    assert torch.equal(outputs(load(tmp_path / "out"), ids), outputs(found, ids))


def bare(folder, model):
    """A body saved as sentence-transformers does: names without the prefix, and a config that names the causal LM."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Qwen3ForCausalLM"]}))
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    return folder


def test_a_bare_body_that_names_its_causal_lm_is_a_body(tmp_path):
    model, ids = of_class("qwen3", "body", torch.float32), tokens()
    before, folder = outputs(model, ids), bare(tmp_path / "model", model)
    with pytest.raises(RotationError, match="Qwen3Model has no output head"):
        rotate_folder(folder, tmp_path / "out", RotationSpec("R1,R2"))
    rotate_folder(folder, tmp_path / "out", RotationSpec("R2"))
    assert torch.allclose(outputs(AutoModel.from_pretrained(tmp_path / "out"), ids), before, atol=1e-4)
    assert type(load(tmp_path / "out")) is Qwen3Model
    quantize_folder(folder, tmp_path / "four", parse_scheme("W4A4"), RotationSpec("R2,R4"))
    assert AutoConfig.from_pretrained(tmp_path / "four").architectures == ["Qwen3Model"]
    assert type(load(tmp_path / "four")) is Qwen3Model


def test_a_causal_lm_of_sentence_transformers_is_used_by_its_states(tmp_path):
    model = random_weights(Qwen3ForCausalLM._from_config(config("qwen3"), dtype=torch.float32))
    model.save_pretrained(tmp_path / "model")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RotationError, match=r"modules\.json"):
        rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1,R2"))
    ids = tokens()
    rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R2"))
    before, after = (outputs(AutoModel.from_pretrained(tmp_path / name), ids) for name in ("model", "out"))
    assert torch.allclose(after, before, atol=1e-4)


def test_a_body_is_told_by_its_class_and_not_by_the_config_that_it_keeps(tmp_path):
    causal = random_weights(Qwen3ForCausalLM._from_config(config("qwen3"), dtype=torch.float32))
    causal.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert plan_of(model).heads == () and plan_of(AutoModelForCausalLM.from_pretrained(tmp_path)).heads == ("lm_head",)


def test_a_native_causal_lm_with_r1_is_not_loaded_as_a_body(tmp_path):
    for rotations in ("R1,R4", "R2,R4"):
        model = random_weights(Qwen3ForCausalLM._from_config(config("qwen3"), dtype=torch.float32))
        save(quantize(model, "W4A8", RotationSpec(rotations), options=Options(prove=False)), tmp_path / rotations)
        with torch.no_grad():
            expected = model.model(input_ids=tokens()).last_hidden_state
    with pytest.raises(CheckpointError, match="cannot be loaded as Qwen3Model: it was rotated by R1"):
        AutoModel.from_pretrained(tmp_path / "R1,R4")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "R2,R4"), tokens()), expected)


def test_a_missing_head_and_a_class_without_a_table_are_named(tmp_path):
    model = of_class("qwen3", "sequence", torch.float32)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["score.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureError, match=r"head of Qwen3ForSequenceClassification is missing \(expected 'score"):
        rotate_folder(tmp_path, tmp_path / "out", RotationSpec("R1"))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for name in ("Qwen3ForMultipleChoice", "Qwen3ForMaskedLM", "Qwen3ForRewardModel", "GPT2DoubleHeadsModel"):
        with pytest.raises(ArchitectureError, match=rf"'{name}' is not supported: expected .*\.\.\.Model"):
            make_plan(config("qwen3", architectures=[name]), shapes)
    model = tiny_model("llama")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"'v_head\.summary\.weight' is a value head of trl.*save_pretrained"):
        make_plan(model.config, {**shapes, "v_head.summary.weight": (1, 48)})


def test_what_needs_predicted_tokens_is_refused():
    model, ids = of_class("llama", "sequence", torch.float32), tokens(8, 16)
    for action in (
        lambda: evaluate(model, ids),
        lambda: learn(model, parse_scheme("A4"), RotationSpec("R1"), ids[:6], ids[6:], LearnOptions("local")),
        lambda: calibration_tokens(model, None, CalibrationText("generated", samples=1, length=4)),
    ):
        with pytest.raises(ArchitectureError, match="LlamaForSequenceClassification has no head over the vocabulary"):
            action()
    with pytest.raises(SchemeError, match="has none"):
        quantize(of_class("llama", "body"), parse_scheme("W4", lm_head=True))


def test_the_ends_of_class_names():
    assert is_body("Qwen3Model") and not is_body("GPT2LMHeadModel") and not is_body("GPT2DoubleHeadsModel")
    assert not any(is_body(end) for end in HEADS)
