"""LoRA adapters: rotated with their base model or later, they give the same logits as before (through peft)."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from families import FAMILIES
from models import logits, random_weights, tiny_model, tokens
from spinquant import LearnedRotations, RotationSpec, load, make_rotations, plan_of, rotate_adapter, rotate_folder
from spinquant.adapters import lora as lora_module
from spinquant.adapters.plan import adapter_plan
from spinquant.cli.main import app
from spinquant.entrypoints.folders import quantize_folder
from spinquant.entrypoints.result import Options
from spinquant.errors import CheckpointError, RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.learning.free_transforms import composed
from spinquant.models.modules import model_class
from spinquant.quantization.scheme import parse_scheme
from spinquant.rotations.random_transforms import random_transforms

peft = pytest.importorskip("peft")

# Warnings of peft that do not concern us: deprecated names of transformers, saved embeddings, tied weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning:peft")

QUICK = Options(prove=False)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# The adapter's options, by family.
ADAPTED = {
    "llama": {"target_modules": [*LINEARS, "lm_head"], "rank_pattern": {"o_proj": 3}},
    "llama-tied": {"target_modules": [*LINEARS, "lm_head", "embed_tokens"]},
    "qwen2": {"target_modules": LINEARS, "bias": "all", "use_rslora": True},
    "gemma": {"target_modules": [*LINEARS, "embed_tokens"]},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "opt": {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"], "bias": "all"},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "gemma2": {"target_modules": LINEARS},
    "deepseek_v3": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "qwen3_moe": {"target_modules": ["q_proj", "gate"], "target_parameters": EXPERTS},
    "gpt_oss": {"target_modules": ["v_proj"], "target_parameters": EXPERTS},
    "mamba2": {"target_modules": ["in_proj", "embeddings"]},
}


def source(name, folder):
    """A tiny model in float64, saved."""
    if name in FAMILIES:
        config = FAMILIES[name].config()
        model = random_weights(model_class(config).from_config(config, dtype=torch.float64)).double()
    else:
        model = tiny_model(name)
    model.save_pretrained(folder)
    return folder


def opened(folder):
    model = prepared(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():  # some routers are loaded in float32, whatever is asked for
        if name in stored and stored[name].dtype == torch.float64:
            parameter.data = stored[name]
    return model


def prepared(model):
    """In float64 throughout, unlike some model classes and grouped products of experts."""
    exact_experts(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def adapter(model_folder, out, **options):
    """An adapter of random weights, saved by peft."""
    settings = {"r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(opened(model_folder), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "lora_" in name
                or "modules_to_save" in name
                or "token" in name.rsplit(".", 1)[-1]
                or (parameter.requires_grad and name.endswith("bias"))
            ):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * 0.3 / max(1, parameter.shape[-1]) ** 0.5)
    model.save_pretrained(out)
    return out


def adapted(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


def answer(folder, adapter_folder=None):
    model = opened(folder)
    with Float64Arithmetic():  # some classes compute in float32, whatever their dtype
        return logits(model if adapter_folder is None else adapted(model, adapter_folder), tokens())


def mergeable(name):
    instance = FAMILIES.get(name)
    return [r for r in ("R1", "R2") if instance is None or r in instance.allowed]


@pytest.mark.parametrize("name", ADAPTED)
def test_a_rotated_adapter_gives_the_same_logits(name, tmp_path):
    model = source(name, tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", **ADAPTED[name])
    expected = answer(model, lora)
    assert not torch.allclose(expected, answer(model), atol=1e-2)  # the adapter matters
    spec = RotationSpec(mergeable(name), "auto", randomize=True)
    result = rotate_folder(model, tmp_path / "out", spec, also=[lora], text=None, options=QUICK)
    made = tmp_path / "out" / "adapters" / "lora"
    assert torch.allclose(answer(tmp_path / "out", made), expected, atol=1e-9)
    assert not torch.allclose(answer(tmp_path / "out", lora), expected, atol=1e-3)  # unrotated, it adds something else
    assert result.notes["adapters"]["lora"]["rotated"] > 0
    # Rotated later, from the folder and its record, it is identical.
    rotate_adapter(tmp_path / "out", lora, tmp_path / "later")
    late, along = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "later", made))
    assert late.keys() == along.keys() and all(torch.equal(late[n], along[n]) for n in late)
    config, before = (json.loads((folder / "adapter_config.json").read_text()) for folder in (made, lora))
    assert config.pop("base_model_name_or_path") == "out"  # it may be published, so no path
    assert config == {k: v for k, v in before.items() if k != "base_model_name_or_path"}


def test_a_rotated_adapter_is_wrong_without_the_gains_of_norms(tmp_path, monkeypatch):
    """So the test above does not pass merely because gains are near one."""
    model = source("llama", tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", target_modules=LINEARS)
    expected = answer(model, lora)
    monkeypatch.setattr(lora_module, "adapter_plan", lambda *a: replace(adapter_plan(*a), gains=()))
    rotate_folder(model, tmp_path / "out", RotationSpec("R1,R2", "auto"), also=[lora], text=None, options=QUICK)
    assert not torch.allclose(answer(tmp_path / "out", tmp_path / "out/adapters/lora"), expected, atol=1e-3)


@pytest.mark.parametrize("rotations", ["R1,R2,R3,R4", "online-R1,R2,R4", "R1,online-R1"])
@pytest.mark.parametrize("scheme", ["none", "W8"])
def test_a_rotated_adapter_works_with_online_rotations(scheme, rotations, tmp_path):
    """peft's layer passes its input to the linear, which rotates it (R4), and to A, whose input axis is not rotated."""
    model = source("llama", tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", target_modules=LINEARS)
    expected = answer(model, lora)
    spec = RotationSpec(rotations, "auto")
    quantize_folder(model, tmp_path / "out", parse_scheme(scheme), spec, text=None, options=QUICK)
    rotate_adapter(tmp_path / "out", lora, tmp_path / "rotated")
    plain, found = load(tmp_path / "out"), load(tmp_path / "out")
    before, after = logits(plain, tokens()), logits(adapted(found, tmp_path / "rotated"), tokens())
    base = answer(model)
    if scheme == "none":
        assert torch.allclose(after, expected, atol=1e-9)
    else:  # the quantization error is about the same with the adapter
        assert (after - expected).norm() < 3 * (before - base).norm() < 0.5 * (expected - base).norm()


@pytest.mark.parametrize(("dora", "rotations"), [(False, "R1"), (True, "R1"), (False, "online-R1")])
def test_transforms_are_applied_to_the_adapter(dora, rotations, tmp_path):
    """Rows of B of up_proj, and columns of A of down_proj, which reads the scaled and not yet rotated input.

    B of v_proj and A of o_proj have the transform of values and its dual, and A of what reads a norm the norm's scales.
    """
    model = source("llama", tmp_path / "model")
    targets = ["q_proj", "up_proj"] if dora else LINEARS
    lora = adapter(model, tmp_path / "lora", target_modules=targets, use_dora=dora)
    expected = answer(model, lora)
    spec = RotationSpec(f"{rotations},R2,R4", "auto")
    plan = plan_of(load(model))
    free = random_transforms(plan, ("R2", "scales of R1", "scales of R4"))
    learned = LearnedRotations(composed(make_rotations(plan, spec), free), spec, {"kept": "closed-form"})
    quantize_folder(model, tmp_path / "out", parse_scheme("none"), spec, learned=learned, text=None, options=QUICK)
    rotate_adapter(tmp_path / "out", lora, tmp_path / "rotated")
    after = logits(adapted(load(tmp_path / "out"), tmp_path / "rotated"), tokens())
    assert torch.allclose(after, expected, atol=1e-9)


def test_updates_of_stacked_experts_are_rotated(tmp_path):
    """They are added to the parameter, which reads the input after R4, and after online R1."""
    model = source("qwen3_moe", tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", target_parameters=EXPERTS, target_modules=["q_proj"])
    expected = answer(model, lora)
    spec = RotationSpec("R1,online-R1,R2,R4", "auto")
    quantize_folder(model, tmp_path / "out", parse_scheme("none"), spec, text=None, options=QUICK)
    rotate_adapter(tmp_path / "out", lora, tmp_path / "rotated")
    found = prepared(load(tmp_path / "out"))
    assert torch.allclose(logits(adapted(found, tmp_path / "rotated"), tokens()), expected, atol=1e-9)
    weights = load_file(lora / "adapter_model.safetensors")
    broken = {n: t[:-1] if "experts.lora_B" in n else t for n, t in weights.items()}
    save_file(broken, lora / "adapter_model.safetensors")
    with pytest.raises(RotationError, match=r"updates experts by .* 0 parameters"):
        rotate_adapter(tmp_path / "out", lora, tmp_path / "no")


def test_dora_magnitudes_follow_the_gain_or_are_refused(tmp_path):
    """They follow the gain where outputs are not rotated, and are refused where they are."""
    model = source("llama", tmp_path / "model")
    reading = ["q_proj", "k_proj", "gate_proj", "up_proj", "lm_head"]
    options = {"use_dora": True, "alpha_pattern": {"q_proj": 9}, "rank_pattern": {"k_proj": 2}}
    lora = adapter(model, tmp_path / "lora", target_modules=reading, **options)
    rotate_folder(model, tmp_path / "out", RotationSpec("R1,R2", "auto"), also=[lora], text=None, options=QUICK)
    made = tmp_path / "out/adapters/lora"
    assert torch.allclose(answer(tmp_path / "out", made), answer(model, lora), atol=1e-9)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (lora, made))
    magnitudes = [name for name in old if "magnitude" in name]
    assert len(magnitudes) == 13 and all(not torch.allclose(old[n], new[n], atol=1e-3) for n in magnitudes)
    for linear, rotations in (("o_proj", "R1"), ("v_proj", "R2"), ("down_proj", "R1")):
        other = adapter(model, tmp_path / linear, target_modules=[linear], use_dora=True)
        with pytest.raises(RotationError, match=rf"DoRA.*{linear}.*diag\(m\) R is not R diag\(m\)"):
            rotate_folder(model, tmp_path / "no", RotationSpec(rotations), also=[other], text=None, options=QUICK)
    assert not (tmp_path / "no").exists()


def test_trained_token_embeddings_are_rotated(tmp_path):
    model = source("llama", tmp_path / "model")
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": tokens()[0, :5].tolist()}}
    lora = adapter(model, tmp_path / "lora", **options)
    rotate_folder(model, tmp_path / "out", RotationSpec("R1,R2", "auto"), also=[lora], text=None, options=QUICK)
    expected = answer(model, lora)
    assert torch.allclose(answer(tmp_path / "out", tmp_path / "out/adapters/lora"), expected, atol=1e-9)
    tied = source("llama-tied", tmp_path / "tied")
    with pytest.raises(RotationError, match=r"trainable_token_indices.*unties"):
        rotate_folder(tied, tmp_path / "no", RotationSpec("R1"), also=[lora], text=None, options=QUICK)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*recomputes"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"use_qalora": True}, "groups of channels"),
        ({"use_something_new": True}, "does not know"),
    ],
)
def test_adapters_without_an_equivalent_are_refused_with_the_reason(change, match, tmp_path):
    model = source("llama", tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RotationError, match=match):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), also=[lora], text=None, options=QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "lora"}


def test_a_trained_norm_or_a_tensor_of_another_model_is_refused_by_name(tmp_path):
    model = source("llama", tmp_path / "model")
    normed = adapter(model, tmp_path / "normed", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(RotationError, match=r"input_layernorm.*scale of a norm"):
        rotate_folder(model, tmp_path / "out", RotationSpec("R1"), also=[normed], text=None, options=QUICK)
    rotate_folder(model, tmp_path / "out", RotationSpec("R2", "auto"), also=[normed], text=None, options=QUICK)
    made = tmp_path / "out/adapters/normed"
    assert torch.allclose(answer(tmp_path / "out", made), answer(model, normed), atol=1e-9)
    lora = adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    weights = load_file(lora / "adapter_model.safetensors")
    renamed = {name.replace("layers.2", "layers.7"): tensor for name, tensor in weights.items()}
    save_file(renamed, lora / "adapter_model.safetensors")
    with pytest.raises(RotationError, match=re.escape("layers.7.self_attn.q_proj")):
        rotate_adapter(tmp_path / "out", lora, tmp_path / "no")


def test_another_base_model_is_refused(tmp_path):
    model = source("llama", tmp_path / "model")
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    lora = adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    rotate_folder(model, tmp_path / "out", RotationSpec("R1"), text=None, options=QUICK)
    with pytest.raises(RotationError, match=r"is not the model that .* was made from"):
        rotate_adapter(tmp_path / "out", lora, tmp_path / "no", model=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no spinquant/record\.json"):
        rotate_adapter(model, lora, tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
        rotate_adapter(tmp_path / "out", lora, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_an_adapter_of_the_rotated_model_is_not_rotated(tmp_path):
    """It was trained on that model, or rotated for it: rotated once more it would be another adapter."""
    model = source("llama", tmp_path / "model")
    lora = adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    rotate_folder(model, tmp_path / "out", RotationSpec("R1"), text=None, options=QUICK, also=[lora])
    trained = adapter(tmp_path / "out", tmp_path / "trained", target_modules=["q_proj"])
    rotate_adapter(tmp_path / "out", lora, tmp_path / "rotated")
    with pytest.raises(RotationError, match=r"was trained on '.*out', the rotated model itself, .*: use it as it is"):
        rotate_adapter(tmp_path / "out", trained, tmp_path / "no")
    for rotated in (tmp_path / "rotated", tmp_path / "out/adapters/lora"):
        config = json.loads((rotated / "adapter_config.json").read_text())
        (rotated / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
        with pytest.raises(RotationError, match="has been rotated already"):
            rotate_adapter(tmp_path / "out", rotated, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    rotate_folder(tmp_path / "out", tmp_path / "again", RotationSpec("R1", seed=1), text=None, options=QUICK)
    rotate_adapter(tmp_path / "again", tmp_path / "rotated", tmp_path / "twice")
    assert torch.allclose(answer(tmp_path / "again", tmp_path / "twice"), answer(model, lora), atol=1e-9)


def test_adapters_on_the_command_line(tmp_path):
    model = source("llama", tmp_path / "model")
    loras = [adapter(model, tmp_path / name, target_modules=[name]) for name in ("q_proj", "v_proj")]
    (loras[0] / "README.md").write_text("what it does")
    run = CliRunner()
    also = [word for lora in loras for word in ("--also", str(lora))]
    arguments = ["rotate", str(model), str(tmp_path / "out"), *also, "--no-proof", "--no-compare"]
    done = run.invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "adapters/v_proj" in done.output
    assert (tmp_path / "out/adapters/q_proj/README.md").read_text() == "what it does"
    late = ["rotate-adapter", str(tmp_path / "out"), str(loras[1]), str(tmp_path / "late"), "--json"]
    done = run.invoke(app, late, catch_exceptions=False)
    assert json.loads(done.output)["kind"] == "lora"
    # If a rotated folder is rotated or quantized again, its adapters are not copied.
    rotate_folder(tmp_path / "out", tmp_path / "again", RotationSpec("R1"), text=None, options=QUICK)
    assert not (tmp_path / "again/adapters").exists()
    with pytest.raises(CheckpointError, match="exists"):
        rotate_adapter(tmp_path / "out", loras[1], tmp_path / "late")
    rotate_adapter(tmp_path / "out", loras[1], tmp_path / "late", force=True)
