"""What spinquant asks of transformers, one test for each thing: `make test-versions` runs them under several releases.

A test that fails here says which promise of the library is gone; the laws then say what it broke.
"""

import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    MixtralConfig,
    Qwen2VLConfig,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from models import CONFIGS, tiny_model, tokens
from spinquant.models.cache_names import CACHE_NAMES, cache_of, cache_parameter
from spinquant.online.hooks import CONTINUOUS
from spinquant.online.sites import EXPERTS, GATE


def mixtral():
    config = MixtralConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    return AutoModelForCausalLM.from_config(config).eval()


def attention_of(model):
    return model.model.layers[0].self_attn


# Attention


@pytest.mark.parametrize("name", CONFIGS)
def test_an_attention_module_takes_its_cache_by_a_known_name(name):
    model = tiny_model(name)
    assert cache_parameter(type(attention_of(model)).forward) is not None
    assert cache_parameter(type(model).forward) is not None


def test_an_attention_module_updates_the_cache_that_it_is_given():
    model, calls = tiny_model("llama"), []

    class Cache(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            calls.append((layer_idx, keys.shape, values.shape))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    name, _ = cache_parameter(type(model).forward)
    output = model(tokens(2, 5), **{name: Cache(config=model.config)})
    assert calls == [(i, (2, 2, 5, 16), (2, 2, 5, 16)) for i in range(3)]
    assert cache_of(output).get_seq_length() == 5


def test_the_layers_of_a_dynamic_cache_can_be_replaced():
    cache = DynamicCache(config=CONFIGS["mistral"]())
    assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    assert not cache.offloading and not cache.layers[0].is_initialized
    assert DynamicCache().layer_class_to_replicate is DynamicLayer
    for name in ("lazy_initialization", "update", "get_seq_length", "get_mask_sizes", "crop", "reset", "offload"):
        assert callable(getattr(DynamicLayer, name)), name
    for name in ("prefetch", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        assert callable(getattr(DynamicLayer, name)), name
    layer = DynamicSlidingWindowLayer(5)
    assert layer.sliding_window == 5 and layer.record_past is False and layer.cumulative_length == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_pass_a_registered_attention_function(name):
    model, seen = tiny_model(name), []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append(query.shape)
        return AttentionInterface().get_interface("sdpa", None)(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("contract", attention)
    AttentionMaskInterface.register("contract", AttentionMaskInterface()["sdpa"])
    expected = model(tokens(1, 4)).logits
    model.config._attn_implementation = "contract"
    assert torch.equal(model(tokens(1, 4)).logits, expected)
    assert len(seen) == model.config.num_hidden_layers


def test_the_file_of_a_model_has_its_eager_attention():
    module = inspect.getmodule(type(attention_of(tiny_model("llama"))))
    assert callable(module.eager_attention_forward)


def test_the_text_config_is_found():
    config = Qwen2VLConfig()
    assert config.get_text_config() is config.text_config
    assert CONFIGS["llama"]().get_text_config().hidden_size == 48


# Linears and experts


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_are_called_as_modules(name):
    model, called = tiny_model(name), set()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for module_name, module in linears.items():
        module.register_forward_hook(lambda *_, n=module_name: called.add(n))
    model(tokens(1, 4))
    assert called == set(linears)


@pytest.mark.parametrize("implementation", EXPERTS)
def test_stacked_experts_call_their_gate_between_the_products(implementation):
    model, shapes = mixtral(), []
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    assert experts.config._experts_implementation == implementation
    expected = model(torch.tensor([[1, 2, 3]])).logits
    gate = getattr(experts, GATE)

    def changed(gate_up):
        shapes.append(gate_up.shape[-1])
        return gate(gate_up) * 0

    setattr(experts, GATE, changed)
    assert not torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected)
    assert shapes == [48]


# Loading and saving


def test_configs_state_their_class():
    causal, seeing = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping
    assert causal.get(type(CONFIGS["llama"]()), None) is not None
    assert seeing.get(type(CONFIGS["llama"]()), None) is None
    assert seeing.get(Qwen2VLConfig, None) is not None


def test_the_registry_of_quantizers():
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    assert isinstance(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, dict) and isinstance(auto.AUTO_QUANTIZER_MAPPING, dict)
    for name in ("register_quantization_config", "register_quantizer", "QuantizationConfigMixin", "HfQuantizer"):
        assert hasattr(auto, name), name
    for name in (
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
        "get_state_dict_and_metadata",
        "update_weight_conversions",
        "is_serializable",
        "is_trainable",
        "remove_quantization_config",
    ):
        assert hasattr(HfQuantizer, name), name


def test_the_methods_of_a_quantizer_take_what_they_are_called_with():
    """transformers calls those of `formats.native.SpinQuantizer` as it calls those of its own base class."""
    from transformers.quantizers.base import HfQuantizer

    from spinquant.formats.native import SpinQuantizer

    overridden = [name for name, value in vars(SpinQuantizer).items() if callable(value) and hasattr(HfQuantizer, name)]
    assert "update_weight_conversions" in overridden
    for name in set(overridden) - {"__init__"}:
        positional, keywords = [], {}
        for parameter in inspect.signature(getattr(HfQuantizer, name)).parameters.values():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                positional.append(None)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = None
        inspect.signature(getattr(SpinQuantizer, name)).bind(*positional, **keywords)


def test_weight_conversions_have_patterns_and_operations():
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(mixtral(), add_legacy=False)
    assert all(isinstance(c, WeightConverter | WeightRenaming | PrefixChange) for c in found)
    stacked = [c for c in found if isinstance(c, WeightConverter)]
    assert stacked and all(c.source_patterns and c.target_patterns and c.operations for c in stacked)


def test_what_is_missing_or_has_another_shape_is_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == {"model.norm.weight"}
    assert [name for name, *_ in info["mismatched_keys"]] == ["lm_head.weight"]
    assert "unexpected_keys" in info


def test_a_state_dict_is_loaded_without_a_folder():
    model = tiny_model("llama", dtype=torch.float32)
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=torch.float32)
    assert torch.equal(loaded(tokens(1, 4)).logits, model(tokens(1, 4)).logits)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)


def test_modules_are_made_without_weights():
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    assert all(parameter.is_meta for parameter in model.parameters())


# Generation


def test_generation_returns_its_logits():
    model = tiny_model("llama")
    found = model.generate(
        tokens(1, 4),
        attention_mask=torch.ones(1, 4, dtype=torch.long),
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(found.logits) == 3 and found.logits[0].shape == (1, 256)


def test_continuous_batching_starts_from_known_methods():
    model = tiny_model("llama")
    assert all(callable(getattr(model, name)) for name in CONTINUOUS)
    assert any(method in inspect.getsource(type(model).generate_batch) for method in CONTINUOUS[1:])


# Classes and training


def test_classes_are_found_by_their_config():
    config = CONFIGS["llama"]()
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        assert auto._model_mapping.get(type(config), None) is not None
    model = AutoModelForSequenceClassification.from_config(config)
    assert "score.weight" in dict(model.named_parameters()) and not model.can_generate()
    assert "embed_tokens.weight" in dict(AutoModel.from_config(config).named_parameters())


def test_a_trainer_asks_the_quantizer_whether_it_trains():
    from transformers import trainer, trainer_utils

    source = inspect.getsource(trainer) + inspect.getsource(trainer_utils)
    assert "hf_quantizer.is_trainable" in source and "is_qat_trainable" in source


def test_the_version_is_a_version():
    assert transformers.__version__.startswith("5.")
    assert set(CACHE_NAMES) >= {"cache", "past_key_values"}
