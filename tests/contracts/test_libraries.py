"""What spinquant asks of torch, safetensors, compressed-tensors, peft, datasets and huggingface_hub."""

import inspect
import json
import warnings
from importlib.util import find_spec

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


# torch


def test_forward_hooks_change_arguments_and_see_keywords():
    linear = nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 0,), kwargs), with_kwargs=True)
    order = []
    linear.register_forward_pre_hook(lambda module, args: order.append("before"))
    linear.register_forward_hook(lambda module, args, output: order.append("after"))
    assert torch.equal(linear(torch.ones(1, 2)), linear.bias.expand(1, 2)) and order == ["before", "after"]


def test_attributes_of_a_module_shadow_those_of_its_class():
    class Module(nn.Module):
        def gate(self, x):
            return x

        def forward(self, x):
            return self.gate(x)

    module = Module()
    module.gate = lambda x: x + 1
    assert module(1) == 2
    del module.gate
    assert module(1) == 1


def test_versions_of_tensors_count_changes_in_place():
    x = torch.ones(2)
    before = x._version
    x.add_(1)
    assert x._version > before
    with torch.inference_mode():
        assert torch.ones(2).is_inference()


def test_an_empty_tensor_can_be_put_on_the_meta_device():
    with torch.device("meta"):
        assert torch.empty(3).is_meta and nn.Linear(2, 2).weight.is_meta


# safetensors


def test_a_header_has_dtype_shape_and_offsets(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and file.get_slice("a").get_shape() == [2, 3]
        assert torch.equal(file.get_slice("a")[:1], torch.zeros(1, 3))


def test_a_truncated_file_is_an_error(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-1])
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x.safetensors")


# compressed-tensors


@needs("compressed_tensors")
def test_schemes_and_transforms_are_described():
    from compressed_tensors import TRANSFORM_CONFIG_NAME
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.transform import TransformConfig

    assert TRANSFORM_CONFIG_NAME == "transform_config"
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    described = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized").model_dump()
    assert described["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert "config_groups" in TransformConfig.model_fields


@needs("compressed_tensors")
def test_weights_are_packed_eight_to_a_word():
    from compressed_tensors.compressors import BaseCompressor

    assert callable(BaseCompressor.get_value_from_registry)
    assert "pack-quantized" in BaseCompressor.registered_names()


# peft


@needs("peft")
def test_an_adapter_says_what_it_is(tmp_path):
    from peft import LoraConfig, get_peft_model

    from models import tiny_model

    with warnings.catch_warnings():  # peft and transformers rename things at different times
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
        warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)  # the model is of no folder
        model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["target_modules"]) == ("LORA", 2, ["q_proj"])
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


# datasets and the hub


@needs("datasets")
def test_a_dataset_is_loaded_by_name_and_split():
    from datasets import load_dataset

    assert {"path", "split", "streaming"} <= set(inspect.signature(load_dataset).parameters)


def test_the_hub_is_asked_by_these_names():
    from huggingface_hub import HfApi, get_safetensors_metadata, snapshot_download

    assert "ignore_patterns" in inspect.signature(snapshot_download).parameters
    assert "repo_id" in inspect.signature(get_safetensors_metadata).parameters
    assert {"folder_path", "repo_id"} <= set(inspect.signature(HfApi.upload_folder).parameters)


@needs("peft")
@pytest.mark.filterwarnings("ignore")
def test_peft_freezes_a_model_and_leaves_its_configs_until_it_is_unloaded():
    """How a merged adapter is noticed (`formats/training.py`); hooks stay on the linear inside the adapter's layer."""
    import peft

    from models import tiny_model, tokens

    model, calls = tiny_model("llama"), []
    linear, embedding = model.model.layers[0].self_attn.q_proj, model.get_input_embeddings().weight
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    before = linear.weight.detach().clone()
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    assert "peft_config" in vars(model) and not embedding.requires_grad and not linear.weight.requires_grad
    wrapped(tokens(1, 3))
    assert calls == [1]
    assert wrapped.merge_and_unload() is model and model.model.layers[0].self_attn.q_proj is linear
    assert "peft_config" not in vars(model) and not torch.equal(linear.weight[0], before[0])
