"""The packed KV cache: equal to fake quantization, and operated like the layers of transformers."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from families import FAMILIES
from models import logits, random_weights, tiny_model, tokens
from spinquant import QuantizedCache, SchemeError, attach, parse_scheme, plan_of
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.modules import model_class
from spinquant.online.kv_cache import PackedLayer, PackedSlidingLayer, pack_layer
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer

QUANTIZER = Quantizer(4)


def states(length: int, *, seed: int = 0, dtype=torch.float32, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, length, 16, generator=g).to(dtype)
    return keys, values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_layer_returns_the_fake_quantized_keys_and_values(bits):
    layer, quantizer = PackedLayer(Quantizer(bits)), Quantizer(bits)
    pairs = [states(length, seed=length) for length in (5, 1, 3)]
    for keys, values in pairs:
        found = layer.update(keys, values)
    for i in range(2):
        expected = fake_quantize(torch.cat([pair[i] for pair in pairs], dim=2), quantizer)
        assert torch.equal(found[i], expected)
    assert layer.get_seq_length() == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_layer_equals_fake_quantization_in_half_precision(dtype):
    keys, values = states(7, dtype=dtype)
    found = PackedLayer(QUANTIZER).update(keys, values)
    assert torch.equal(found[0], fake_quantize(keys, QUANTIZER))
    assert found[1].dtype == dtype


def test_a_4_bit_cache_takes_about_a_quarter_of_16_bits():
    keys, values = (torch.randn(1, 3, 100, 64).bfloat16() for _ in range(2))
    layer = PackedLayer(QUANTIZER)
    layer.update(keys, values)
    assert layer.nbytes / (keys.nbytes + values.nbytes) < 0.28
    # `nbytes` counts everything: the layer has no other tensors.
    held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert sum(t.nbytes for t in held) == 0


@pytest.mark.parametrize("window", [3, 6, 50])
@pytest.mark.parametrize("lengths", [(4, 1, 1, 1), (9, 2), (1, 1, 1)])
def test_packed_sliding_layers_return_the_same_window_as_plain_ones(window, lengths):
    packed, plain = PackedSlidingLayer(window, QUANTIZER), DynamicSlidingWindowLayer(window)
    for i, length in enumerate(lengths):
        assert packed.get_mask_sizes(length) == plain.get_mask_sizes(length)
        keys, values = states(length, seed=i)
        found = packed.update(keys, values)
        expected = plain.update(fake_quantize(keys, QUANTIZER), fake_quantize(values, QUANTIZER))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert packed.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: (layer.offload(), layer.prefetch()),
    ],
)
def test_cache_operations_act_as_on_a_plain_layer(change):
    packed, plain = PackedLayer(QUANTIZER), DynamicLayer()
    keys, values = states(6)
    packed.update(keys, values)
    plain.update(fake_quantize(keys, QUANTIZER), fake_quantize(values, QUANTIZER))
    change(packed)
    change(plain)
    assert packed.get_seq_length() == plain.get_seq_length()
    batch = plain.keys.shape[0] if plain.keys is not None else 2
    more = states(1, seed=9, batch=batch)
    found = packed.update(*more)
    expected = plain.update(fake_quantize(more[0], QUANTIZER), fake_quantize(more[1], QUANTIZER))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_layer_that_was_reset_is_as_new():
    used, new = PackedLayer(QUANTIZER), PackedLayer(QUANTIZER)
    used.update(*states(6))
    used.reset()
    assert used.get_seq_length() == 0
    for found, expected in zip(used.update(*states(2)), new.update(*states(2)), strict=True):
        assert torch.equal(found, expected)


def test_a_sliding_layer_that_records_the_past_can_be_cropped():
    packed, plain = PackedSlidingLayer(4, QUANTIZER), DynamicSlidingWindowLayer(4)
    for layer in (packed, plain):
        layer.activate_past_recording()
    for step, length in enumerate((6, 3)):
        keys, values = states(length, seed=step)
        packed.update(keys, values)
        plain.update(fake_quantize(keys, QUANTIZER), fake_quantize(values, QUANTIZER))
        packed.crop(-2)
        plain.crop(-2)
        assert packed.get_seq_length() == plain.get_seq_length()
    more = states(2, seed=7)
    expected = plain.update(fake_quantize(more[0], QUANTIZER), fake_quantize(more[1], QUANTIZER))
    assert torch.equal(packed.update(*more)[0], expected[0])


def test_layers_that_hold_tokens_are_not_replaced():
    cache = DynamicCache()
    cache.update(*states(3), 0)
    assert pack_layer(cache, 0, QUANTIZER) is False
    assert type(cache.layers[0]) is DynamicLayer
    assert pack_layer(cache, 1, QUANTIZER) is True
    assert isinstance(cache.layers[1], PackedLayer)


def test_a_cache_for_another_scheme_is_refused():
    cache = QuantizedCache(tiny_model("llama").config, Quantizer(8))
    with pytest.raises(SchemeError, match="bits=8"):
        pack_layer(cache, 0, QUANTIZER)


def test_keys_and_values_of_a_layer_are_dequantized():
    layer = PackedLayer(QUANTIZER)
    assert layer.keys is None
    keys, values = layer.update(*states(5))
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)


def test_cropping_more_tokens_than_there_are_empties_the_layer():
    layer = PackedSlidingLayer(8, QUANTIZER)
    layer.update(*states(3))
    layer.crop(-5)
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(1) == (1, 0)


def test_a_quantized_cache_reports_its_size():
    model = tiny_model("qwen2")
    cache = QuantizedCache(model.config, QUANTIZER)
    assert [type(layer) for layer in cache.layers] == [PackedLayer, PackedSlidingLayer, PackedLayer]
    assert cache.nbytes == 0
    cache.update(*states(10), 0)
    assert cache.nbytes > 0


@pytest.mark.parametrize("name", ["mpt", "deepseek_v32", "deepseek_v4"])
def test_keys_and_values_are_quantized_the_same_without_a_cache(name):
    """Whatever the modules read from a cache: its length, its layers, the keys of an indexer."""
    config = FAMILIES[name].config()
    model = random_weights(model_class(config).from_config(config, dtype=torch.float64))
    exact_experts(model)
    model, ids = model.double(), tokens()
    before = logits(model, ids)
    with attach(model, plan_of(model), {}, parse_scheme("KV4")):
        cached = logits(model, ids, use_cache=True)
        torch.testing.assert_close(logits(model, ids, use_cache=False), cached, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(cached, before, atol=1e-3)
