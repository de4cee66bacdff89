"""SpinQuantModifier in llm-compressor: its tests of its own modifier with tighter bounds, and whole `oneshot` runs.

Needs llm-compressor 0.14, which pins other versions than ours: `make test-llmcompressor` makes an environment for it.
"""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from models import byte_tokenizer

pytest.importorskip("llmcompressor", reason="needs llm-compressor: make test-llmcompressor")
pytestmark = [
    pytest.mark.filterwarnings("default"),  # llm-compressor warns of other libraries' deprecations
]

from compressed_tensors.offload import set_onload_device  # noqa: E402
from compressed_tensors.transform import TransformConfig  # noqa: E402
from compressed_tensors.utils import match_named_modules  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.core import Event, EventType, State  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # noqa: E402
from llmcompressor.pipelines import CalibrationPipeline, DataFreePipeline  # noqa: E402
from llmcompressor.recipe import Recipe  # noqa: E402

from spinquant import RotationError, SpinQuantModifier  # noqa: E402

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXACT = 1e-10  # mean squared error of float32 logits; llm-compressor's own test allows 8e-3


def make_model(dtype=torch.float32, *, tied=False):
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, shift = (parameter.shape[-1] ** -0.5, 0.0) if parameter.ndim > 1 else (0.3, float("norm" in name))
            parameter.copy_(noise * scale + shift)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A saved model and tokenizer: `oneshot` reads the config again from the model's folder."""
    make_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    ids = torch.arange(40).reshape(2, 20) * 7 % 256
    return model(input_ids=ids, use_cache=False).logits.double()


def mse(a, b):
    return (a - b).square().mean().item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rotations": ["R1"]},
        {"rotations": ["R1", "R2"]},
        {"rotations": ["R2"]},
        {"rotations": ["R4"]},
        {"rotations": ["R1", "R2", "R3", "R4"]},
        {"rotations": ["R1", "R2", "R3", "R4"], "transform_type": "random-hadamard"},
        {"rotations": ["R1", "R2", "R3", "R4"], "transform_type": "random-matrix"},
        {"rotations": ["R1", "R2", "R3", "R4"], "transform_type": "random-hadamard", "randomize": True},
        {"rotations": ["R1", "R2", "R3", "R4"], "transform_type": "random-hadamard", "learnable": True},
        {"transform_type": "random-hadamard", "precision": torch.float32, "transform_block_size": 32},
        {"transform_type": "random-hadamard", "precision": torch.float64, "transform_block_size": 64},
        {"rotations": ["R3", "R4"], "transform_block_size": 16},
    ],
)
def test_the_function_is_unchanged_before_and_after_finalize(options, tied):
    model = make_model(tied=tied)
    before = logits(model)
    state, modifier = State(model=model), SpinQuantModifier(**options)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    assert mse(logits(model), before) <= EXACT
    modifier.on_finalize(state)
    assert mse(logits(model), before) <= EXACT
    weights = [p for n, p in model.named_parameters() if n in dict(make_model(tied=tied).named_parameters())]
    assert any(not torch.equal(a, b) for a, b in zip(weights, make_model(tied=tied).parameters(), strict=False))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 5e-3), (torch.float32, EXACT)])
@pytest.mark.parametrize("block", [None, 16])
def test_the_function_is_unchanged_within_the_precision(dtype, expected, block):
    model = make_model(dtype)
    before, state = logits(model), State(model=model)
    modifier = SpinQuantModifier(transform_type="random-hadamard", precision=dtype, transform_block_size=block)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    assert mse(logits(model), before) <= expected


@pytest.mark.parametrize("transform_block_size", [16, 32])
def test_a_modifier_round_trips_and_is_one_of_llm_compressors(transform_block_size):
    instance = SpinQuantModifier(transform_type="hadamard", transform_block_size=transform_block_size)
    assert SpinQuantModifier.model_validate(instance.model_dump()) == instance
    assert isinstance(instance, Modifier)


def test_the_pipeline_is_data_free():
    assert isinstance(CalibrationPipeline.from_modifiers([SpinQuantModifier()]), DataFreePipeline)


def test_the_generated_config_is_valid_for_compressed_tensors():
    state = State(model=make_model())
    modifier = SpinQuantModifier(rotations=["R1", "R2", "R3", "R4"], transform_type="random-hadamard")
    modifier.initialize(state)
    theirs = TransformConfig.model_validate(modifier.transform_config.model_dump())
    again = SpinQuantModifier(transform_config=theirs)
    assert again.transform_config == modifier.transform_config


def test_yaml_recipes_round_trip():
    recipe = """
        test_stage:
          transform_modifiers:
            SpinQuantModifier: {rotations: [r1, r2], transform_type: random-hadamard, seed: 5}
    """
    (modifier,) = Recipe.create_instance(recipe).modifiers
    assert isinstance(modifier, SpinQuantModifier) and modifier.seed == 5
    (again,) = Recipe.create_instance(Recipe.create_instance([modifier]).yaml()).modifiers
    assert again.model_dump(exclude={"group"}) == modifier.model_dump(exclude={"group"})


def test_the_import_path_of_earlier_versions():
    now = importlib.import_module("spinquant.modifiers.llmcompressor")
    assert importlib.import_module("spinquant.llmcompressor").SpinQuantModifier is now.SpinQuantModifier


def test_events_rotate_only_once():
    model = make_model()
    state, modifier = State(model=model), SpinQuantModifier()
    modifier.initialize(state)
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_START))
    weights = [p.clone() for p in model.parameters()]
    modifier.on_start(state, None)
    modifier.update_event(state, Event(type_=EventType.SEQUENTIAL_EPOCH_END), modules=[])
    modifier.update_event(state, Event(type_=EventType.CALIBRATION_END))
    modifier.finalize(state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert modifier.started_ and modifier.ended_ and modifier.finalized


def transforms_by_hand(model, folder):
    """Run a folder's rotations at the input of linears as its format defines: x H / sqrt(n), one H per group."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    tensors = load_file(folder / "model.safetensors")
    for group, scheme in TransformConfig.model_validate(config).config_groups.items():
        for args in scheme.apply:
            if args.location != "input":
                continue
            (stored,) = [tensor for name, tensor in tensors.items() if name.endswith(f".{group}_input.weight")]
            matrix = stored.double() / len(stored) ** 0.5
            assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))

            def rotate(module, inputs, matrix=matrix.T if args.inverse else matrix):
                blocks = inputs[0].double().unflatten(-1, (-1, len(matrix)))
                return ((blocks @ matrix).flatten(-2).to(inputs[0].dtype),)

            for _, module in match_named_modules(model, args.targets, args.ignore):
                module.register_forward_pre_hook(rotate)


@pytest.mark.parametrize("randomize", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("block", [None, 64])
def test_oneshot_saves_the_rotations_that_run(folder, tmp_path, kind, randomize, block):
    if kind == "hadamard" and randomize:
        pytest.skip("refused: nothing to randomize")
    model = load(folder)
    before = logits(model)
    spin = SpinQuantModifier(
        rotations=["R1", "R2", "R4"], transform_type=kind, randomize=randomize, transform_block_size=block, seed=1
    )
    oneshot(model=model, recipe=[spin, QuantizationModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])])
    rounded = logits(model)
    assert mse(rounded, before) < 1e-2  # eight bits
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    groups = TransformConfig.model_validate(config["transform_config"]).config_groups
    online = {name: scheme for name, scheme in groups.items() if name.startswith("R4")}
    assert len(online) == (SIZES["num_hidden_layers"] if randomize else 1)
    natural = kind == "hadamard" and block == 64
    assert {scheme.type for scheme in online.values()} == {"hadamard" if natural else "random-hadamard"}
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = "R4_0_input" if randomize else "R4_input"
    assert tensors[f"model.layers.0.mlp.down_proj.{name}.weight"].shape == (block or 384, block or 384)
    again = load(tmp_path / "out")
    assert mse(logits(again), rounded) > 1e-3  # transformers drops the online rotation ...
    transforms_by_hand(again, tmp_path / "out")
    assert mse(logits(again), rounded) <= EXACT  # ... which the folder has


def test_oneshot_with_gptq_and_all_rotations(folder, tmp_path):
    model = load(folder)
    before = logits(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (8, 64), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 64] * 8})
    recipe = [
        SpinQuantModifier(rotations="R1,R2,R3,R4", transform_type="random-hadamard"),
        GPTQModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"]),
    ]
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=8, max_seq_length=64)
    assert mse(logits(model), before) < 1e-2
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.self_attn.R3_q_attn.weight" in tensors
    saved = Recipe.create_instance(str(tmp_path / "out/recipe.yaml")).modifiers[0]
    assert isinstance(saved, SpinQuantModifier) and saved.rotations == ["R1", "R2", "R3", "R4"]


def test_oneshot_from_yaml(folder):
    recipe = """
        run_stage:
          run_modifiers:
            SpinQuantModifier: {rotations: [R1, R2, R4], transform_type: random-hadamard, learnable: true}
    """
    model = load(folder)
    before = logits(model)
    oneshot(model=model, recipe=recipe)
    assert mse(logits(model), before) <= EXACT
    assert hasattr(model.model.layers[0].mlp.down_proj, "R4_input")


def test_learning_beside_a_quantizer_is_refused(folder):
    recipe = [SpinQuantModifier(learnable=True), QuantizationModifier(targets="Linear", scheme="W8A16")]
    with pytest.raises(RotationError, match="has a quantization scheme"):
        oneshot(model=load(folder), recipe=recipe)


def test_learning_with_offloaded_weights_is_refused():
    model = make_model()
    state, modifier = State(model=model), SpinQuantModifier(learnable=True)
    modifier.on_initialize(state)
    set_onload_device(model, "meta")
    with pytest.raises(RotationError, match="are offloaded to cpu"):
        modifier.on_calibration_start(state, None)


def test_eager_attention_is_refused_before_anything_changes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(RotationError, match="eager"):
        SpinQuantModifier(rotations=["R3"]).on_initialize(State(model=model))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
