import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from models import CONFIGS, logits, random_weights, tiny_model, tokens
from spinquant import (
    ArchitectureError,
    Calibration,
    CheckpointError,
    Options,
    ProofError,
    RotationError,
    RotationSpec,
    SchemeError,
    parse_scheme,
    quantize,
    rotate,
    rotate_folder,
)
from spinquant.architectures import llama
from spinquant.formats.native import detach


@pytest.mark.parametrize("name", CONFIGS)
def test_rotate_keeps_the_function_and_says_so(name):
    model, ids = tiny_model(name, dtype=torch.float32), tokens()
    before = logits(model, ids)
    result = rotate(model, RotationSpec("R1,R2,R3,R4"), sample=ids)
    assert torch.allclose(logits(model, ids), before, atol=1e-3)
    assert result.twin is not None and result.twin.relative < 1e-9
    assert result.real is not None and result.real.relative < 1e-4


def test_quantize_with_enough_bits_is_close_and_with_few_is_not():
    ids = tokens()
    reference = logits(tiny_model("llama", dtype=torch.float32), ids)
    errors = []
    for scheme in ("W8A8KV8", "W4A4KV4", "W2A2KV2"):
        model = tiny_model("llama", dtype=torch.float32)
        quantize(model, scheme, RotationSpec("R1,R2,R3,R4"))
        errors.append(((logits(model, ids) - reference).norm() / reference.norm()).item())
    assert errors[0] < 0.1 < errors[1] < errors[2]


def test_rotating_helps_where_channels_are_huge():
    """What the method is for: outlier channels in the residual stream and the MLP."""
    ids, errors = tokens(), []
    for rotations in ("none", "R1,R2,R3,R4"):
        model = tiny_model("mistral", dtype=torch.float32)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[5] *= 30
                layer.mlp.up_proj.weight[7] *= 30
        reference = logits(model, ids)
        quantize(model, "A6KV6", RotationSpec(rotations))
        errors.append(((logits(model, ids) - reference).norm() / reference.norm()).item())
    assert errors[1] < 0.7 * errors[0]


def test_saving_is_refused_when_the_function_changed(folder, tmp_path, monkeypatch):
    """A wrong table must be stopped by the tiny, and by real tokens where the tiny is skipped."""
    gains = {k: () if "post_attention" in k else v for k, v in llama.LLAMA.gains.items()}
    monkeypatch.setattr("spinquant.architectures.FAMILIES", (replace(llama.LLAMA, gains=gains),))
    out = tmp_path / "out"
    with pytest.raises(ProofError, match="tiny model"):
        rotate_folder(folder, out, RotationSpec("R1"), text="manual")
    with pytest.raises(ProofError, match=r"this model.*gate_proj"):
        rotate_folder(folder, out, RotationSpec("R1"), text="manual", options=Options(prove=False))
    assert not out.exists()
    options = Options(prove=False, allow_inexact=True)
    rotate_folder(folder, out, RotationSpec("R1"), text="manual", options=options)
    assert out.exists()


def test_a_scheme_that_does_not_fit_is_refused_before_anything_is_touched():
    model = tiny_model("llama", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for scheme in ("W4g32A16", "A4g32"):
        with pytest.raises(SchemeError, match="q_proj"):
            quantize(model, scheme, RotationSpec("R1"))
    with pytest.raises(SchemeError, match="magic"):
        quantize(model, "W4A4", method="magic")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_detach_and_quantize_again():
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    quantize(model, "A4KV4", RotationSpec("R1,R2"))
    first = logits(model, ids)
    detach(model)
    quantize(model, "A4KV4", RotationSpec(()))
    assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize("again", ["rotate", "quantize"])
@pytest.mark.parametrize("rotations", ["R3", "R4"])
def test_a_second_time_is_refused_before_anything_changes(rotations, again):
    """The first run's online rotations would be lost, and the model talk nonsense."""
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    rotate(model, RotationSpec(rotations))
    before = logits(model, ids)
    with pytest.raises(RotationError, match="already"):
        rotate(model, RotationSpec("R1,R4")) if again == "rotate" else quantize(model, "A8")
    assert torch.equal(logits(model, ids), before)


def test_training_mode_is_no_departure():
    model = tiny_model("llama", dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    rotate(model, RotationSpec("R1,R2"), sample=tokens())
    assert model.training


def test_the_global_random_state_is_left_alone():
    model = tiny_model("llama", dtype=torch.float32)
    before = torch.get_rng_state()
    rotate(model, RotationSpec("R1,R2,R3,R4", seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_names_its_stages():
    seen = []
    options = Options(progress=lambda stage, done, total: seen.append((stage, done, total)))
    quantize(tiny_model("llama", dtype=torch.float32), parse_scheme("W4A4"), RotationSpec("R1"), options=options)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["rotate", "quantize"]
    assert all(any(s == stage and done == total for s, done, total in seen) for stage in stages)


def test_dropout_is_off_in_calibration_and_every_mode_is_restored():
    """`from_config` gives a model in training mode, and GPT-2 has dropout by default."""
    config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=6, n_positions=64, attn_pdrop=0.5, embd_pdrop=0.5)
    model = random_weights(AutoModelForCausalLM.from_config(config))
    trained = copy.deepcopy(model).train()
    trained.transformer.h[1].eval()
    modes = [module.training for module in trained.modules()]
    options = {"method": "gptq", "tokens": tokens(), "calibration": Calibration(clips=True), "sample": tokens()}
    found, expected = (quantize(m, "W4A4", RotationSpec("R1"), **options) for m in (trained, model))
    assert found.clips == expected.clips
    assert [module.training for module in trained.modules()] == modes
    assert torch.equal(logits(trained.eval(), tokens()), logits(model, tokens()))


def share_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def share_memory(model):
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


def share_mlp(model):
    model.model.layers[2].mlp = model.model.layers[1].mlp


@pytest.mark.parametrize("share", [share_head, share_memory, share_mlp])
def test_a_weight_of_two_names_is_refused_unless_the_config_ties_it(share):
    """Its rotation would be fused into it twice, or the embedding quantized with the head."""
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    share(model)
    before = logits(model, ids)
    for change in (
        lambda: rotate(model, RotationSpec("R1,R2"), options=Options(prove=False)),
        lambda: quantize(model, parse_scheme("W4A16", lm_head=True)),
    ):
        with pytest.raises(ArchitectureError, match=r"'model.*' and '.*' are one weight"):
            change()
    assert torch.equal(logits(model, ids), before)


def test_a_head_that_is_tied_by_hand_is_rotated_once_the_config_says_so(tmp_path):
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    share_head(model)
    before = logits(model, ids)
    model.config.tie_word_embeddings = True
    rotate(model, RotationSpec("R1,R2"), options=Options(prove=False))
    assert torch.allclose(logits(model, ids), before, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), before, atol=1e-3)


def test_weights_that_are_not_in_memory_are_refused_before_anything_is_changed(tmp_path):
    """Rounding a weight on the meta device does nothing, and a model that looks quantized would not be."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    places = {"model.layers.2": "disk", **dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    before = logits(model, tokens())
    for scheme in ("W4A16", "A8", "KV4"):
        with pytest.raises(CheckpointError, match=r"layers\.2.* is not in memory .* offloading"):
            quantize(model, scheme)
    assert torch.equal(logits(model, tokens()), before)


class Wrapper(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_model_inside_another_module_is_named(wrap):
    wrapped = wrap(tiny_model("llama", dtype=torch.float32))
    with pytest.raises(ArchitectureError, match=r"is a .* around a LlamaForCausalLM: give the model inside, its attr"):
        rotate(wrapped)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
@pytest.mark.parametrize("own", [True, False])
def test_a_model_with_an_adapter_is_refused_with_the_way_out(own):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    if own:
        peft.inject_adapter_in_model(config, model)  # as `add_adapter` of transformers does
    else:
        model = peft.get_peft_model(model, config)
    with pytest.raises(ArchitectureError, match=r"has an adapter on .*q_proj: merge it first \(merge_and_unload"):
        quantize(model, "W4A16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_it_spreads(value):
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    for change in (lambda: rotate(model), lambda: quantize(model, "W4A16")):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight' .* holds 1 values"):
            change()
    assert sum(int((~parameter.isfinite()).sum()) for parameter in model.parameters()) == 1
