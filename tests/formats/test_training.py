"""Training a rotated or quantized model, and adapters on it; adapters that are merged into it are refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from models import logits, tiny_model, tokens
from spinquant import RotationSpec, detach, load, quantize, rotate, save
from spinquant.errors import CheckpointError, RotationError

pytestmark = pytest.mark.filterwarnings("ignore")  # of accelerate and peft

ALL = RotationSpec("R1,R2,R3,R4", seed=1)
ROWS = [{"input_ids": row, "labels": row} for row in tokens(8, 12, seed=3)]
KINDS = {"rotated": "none", "W4A4KV4": "W4A4KV4", "W4A16": "W4A16"}


def made(kind, spec=ALL):
    model = tiny_model("llama", dtype=torch.float32)
    return rotate(model, spec) if KINDS[kind] == "none" else quantize(model, KINDS[kind], spec)


def native(tmp_path, kind, spec=ALL):
    save(made(kind, spec), tmp_path / "native")
    return load(tmp_path / "native")


def trained(model, folder, steps=4, rate=5e-3):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2]), losses
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["memory", "folder"])
def test_a_model_is_trained_saved_and_loaded(kind, source, tmp_path):
    """Online rotations and quantizers stay; what is saved is what was computed, to the last bit."""
    model = native(tmp_path, kind) if source == "folder" else made(kind).model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trained(model, tmp_path / "run", rate=3e-2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(before)
    trainer.save_model(str(tmp_path / "trained"))
    found = load(tmp_path / "trained")
    assert torch.equal(logits(found, tokens()), logits(model.eval(), tokens()))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found.get_parameter(name), before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_rounded_weights(kind):
    """Straight-through: the gradient at the rounded weights, in every linear, keys and values included."""
    model = made(kind).model.train()
    plain = copy.deepcopy(model)
    ids = tokens(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    weight = model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        shifted = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        weight.add_(shifted)  # off its grid, by less than half a step
    before = plain(input_ids=ids, labels=ids).loss
    after = model(input_ids=ids, labels=ids).loss
    assert torch.equal(before, after) == (kind != "rotated")


def test_a_kv_cache_changes_no_gradient():
    """Packed integers have none: in training, keys and values are rounded without being packed."""
    found = []
    for cached in (False, True):
        model = made("W4A4KV4").model.train()
        model(input_ids=tokens(), labels=tokens(), use_cache=cached).loss.backward()
        found.append([layer.self_attn.k_proj.weight.grad for layer in model.model.layers])
    assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(*found, strict=True))


def test_the_gradient_of_a_rotated_model_is_exact():
    """R3 and R4 at run time: loss and gradients of embedding and norms equal those of the original, rotated back."""
    model = tiny_model("llama").train()
    ids = tokens(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = model.model.layers[1].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    rotate(model, RotationSpec("R3,R4", seed=1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(model.model.layers[1].self_attn.q_proj.weight.grad, expected, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    found = []
    for checkpointing in (False, True):
        model = made("W4A4KV4").model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append(model.model.layers[0].mlp.down_proj.weight.grad)
    assert torch.allclose(*found, atol=1e-6)


def test_a_classifier_is_trained(tmp_path):
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    model = LlamaForSequenceClassification._from_config(config, dtype=torch.float32)
    result = rotate(model, ALL)
    assert isinstance(result.model, LlamaForSequenceClassification)
    labels = torch.tensor([0, 1])
    model.train()(input_ids=tokens(2, 6), labels=labels).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_detaching_leaves_a_model_without_a_watch():
    result = made("W4A4KV4")
    detach(result.model)
    assert not result.model._forward_pre_hooks


# Adapters


def adapter(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_saved_and_loaded(kind, tmp_path):
    from peft import PeftModel

    base = native(tmp_path, kind)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = adapter(base)
    trainer = trained(model, tmp_path / "run", steps=6)
    for name, parameter in base.named_parameters():
        origin = name.replace(".base_layer", "")
        assert origin not in before or torch.equal(parameter, before[origin]), name
    trainer.save_model(str(tmp_path / "adapter"))
    found = PeftModel.from_pretrained(load(tmp_path / "native"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, model.eval()(tokens()).logits)
        assert not torch.allclose(found(tokens()).logits, logits(load(tmp_path / "native"), tokens()), atol=1e-3)


def test_transformers_own_adapters_are_saved(tmp_path):
    from peft import LoraConfig
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
    model = native(tmp_path, "W4A4KV4")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "native")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, tokens()), expected)


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_refused_at_the_next_forward_pass_and_on_saving(kind, passes, tmp_path):
    model = adapter(native(tmp_path, kind), init_lora_weights=False)
    if passes:
        model(tokens())
    merged = model.merge_and_unload()
    with pytest.raises(RotationError, match=r"merge_and_unload of peft.*unload\(\).*or merge it into the original"):
        logits(merged, tokens())
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        merged.save_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_unloaded_leaves_the_model(kind, tmp_path):
    base = native(tmp_path, kind)
    expected = logits(base, tokens())
    model = adapter(base, init_lora_weights=False)
    assert not torch.allclose(logits(model, tokens()), expected, atol=1e-3)
    plain = model.unload()
    assert torch.equal(logits(plain, tokens()), expected)
    plain.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), tokens()), expected)


def test_merging_into_a_model_without_r4_and_grids_is_exact(tmp_path):
    model = adapter(made("rotated", RotationSpec("R1,R2,R3")).model, init_lora_weights=False)
    expected = logits(model, tokens())
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, tokens()), expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), tokens()), logits(merged, tokens()))


def stopped(model, folder, steps, resume=None):
    """A training of some steps with a checkpoint after every second; resume: a checkpoint to go on from."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=ROWS).train(resume_from_checkpoint=resume)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_stops_and_resumes_ends_where_one_that_ran_through_ends(kind, tmp_path):
    expected = stopped(native(tmp_path, kind), tmp_path / "run", 4)
    model = load(tmp_path / "native")
    found = stopped(model, tmp_path / "again", 4, str(tmp_path / "run" / "checkpoint-2"))
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
    through = load(tmp_path / "run" / "checkpoint-4")  # with the unrounded numbers, which are not used
    assert torch.equal(logits(through, tokens()), logits(model.eval(), tokens()))
    model.save_pretrained(tmp_path / "end")  # in evaluation mode, without them
    assert torch.equal(logits(load(tmp_path / "end"), tokens()), logits(through, tokens()))
    names = [{*load_file(tmp_path / end / "model.safetensors")} for end in ("run/checkpoint-4", "end")]
    latent = {name for name in names[0] if name.endswith("_latent")}
    assert names[0] - latent == names[1] and bool(latent) == (kind != "rotated")


def test_a_resumed_model_computes_with_rounded_weights_before_it_trains(tmp_path):
    stopped(native(tmp_path, "W4A16"), tmp_path / "run", 2)
    model = load(tmp_path / "native")
    model.load_state_dict(load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors"), strict=False)
    assert torch.equal(logits(model, tokens()), logits(load(tmp_path / "run" / "checkpoint-2"), tokens()))
    model.save_pretrained(tmp_path / "end")


def test_the_checkpoint_of_another_model_is_not_resumed_from(tmp_path):
    stopped(native(tmp_path, "W4A16"), tmp_path / "run", 2)
    state = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    for spec, scheme in ((RotationSpec("R1,R2,R3,R4", seed=2), "W4A16"), (ALL, "W3A16")):
        other = quantize(tiny_model("llama", dtype=torch.float32), scheme, spec).model
        with pytest.raises(CheckpointError, match=r"resumed: the checkpoint has another (online|grid).*started from"):
            other.load_state_dict(state, strict=False)
    plain = tiny_model("llama", dtype=torch.float32).state_dict()
    made("W4A16").model.load_state_dict(plain)  # nothing to unpack
