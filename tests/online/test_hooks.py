"""Attaching online rotations and quantizers to a model, and removing them."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from models import CACHE, CONFIGS, logits, tiny_model, tokens
from spinquant import RotationError, RotationSpec, attach, fuse_module, make_rotations, parse_scheme, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.models.capture import captured
from spinquant.online.attachment import attachment_of
from spinquant.online.hooks import CONTINUOUS
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer, Scheme

SCHEME = parse_scheme("A4KV4")


def fused(name="llama", rotations="R1,R2,R3,R4", **options):
    model = tiny_model(name, **options)
    plan = plan_of(model)
    made = make_rotations(plan, RotationSpec(rotations))
    fuse_module(model, plan, made)
    return model, plan, made


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_remove_restores_the_model_exactly(name):
    model, ids = tiny_model(name), tokens()
    plan, before, implementation = plan_of(model), logits(model, ids), model.config._attn_implementation
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    attachment = attach(model, plan, make_rotations(plan, RotationSpec("R3,R4")), SCHEME)
    assert not torch.equal(logits(model, ids), before)
    attachment.remove()
    attachment.remove()  # a second call does nothing
    assert torch.equal(logits(model, ids), before)
    assert hooks_of(model) == 0
    assert model.config._attn_implementation == implementation
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_leaving_the_with_block_removes_the_hooks():
    model, plan, made = fused()
    with attach(model, plan, made, SCHEME):
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0


def test_attaching_twice_is_refused():
    model, plan, made = fused()
    attach(model, plan, made)
    with pytest.raises(RotationError, match="remove"):
        attach(model, plan, made)


def test_attaching_r4_changes_the_logits_of_a_fused_model():
    """If the fused model had the same logits without its online rotation, the rotation would do nothing."""
    model, plan, made = fused(rotations="R4")
    ids = tokens()
    alone = logits(model, ids)
    attach(model, plan, made)
    assert not torch.allclose(logits(model, ids), alone, atol=1e-2)


def test_linears_with_a_shared_input_read_the_same_quantized_tensor():
    model, ids = tiny_model("llama"), tokens()
    seen = {}
    layer = model.model.layers[0].self_attn
    attach(model, plan_of(model), {}, SCHEME)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    with captured(model, ["model.layers.0.input_layernorm"]) as outputs:
        logits(model, ids)
    expected = fake_quantize(outputs["model.layers.0.input_layernorm"], SCHEME.activations)
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]
    assert torch.equal(seen["q_proj"], expected)


def test_an_activation_changed_in_place_is_quantized_again():
    """An activation changed in place, or a new one at a reused address, must be quantized again."""
    model = tiny_model("llama", dtype=torch.float32)
    attach(model, plan_of(model), {}, SCHEME)
    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 4, 48)
    with torch.no_grad():
        first = linear(x)
        x.mul_(-3)
        assert torch.equal(linear(x), linear(x.clone()))
        assert not torch.equal(linear(x), first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_activation_changed_in_place_is_quantized_again_without_gradients(mode):
    model = tiny_model("llama", dtype=torch.float32)
    attach(model, plan_of(model), {}, SCHEME)
    linear = model.model.layers[0].self_attn.q_proj
    with mode():
        x = torch.randn(1, 4, 48)
        linear(x)
        x.mul_(-3)
        assert torch.equal(linear(x), linear(x.clone()))


def test_a_pass_without_gradients_does_not_remove_those_of_the_next():
    model = tiny_model("llama", dtype=torch.float32)
    attach(model, plan_of(model), {}, SCHEME)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 4, 48, requires_grad=True)
    with torch.no_grad():
        attention.q_proj(x)
    attention.k_proj(x).sum().backward()
    assert x.grad is not None


def test_a_copy_has_an_attachment_of_its_own():
    model, plan, made = fused()
    attach(model, plan, made, SCHEME)
    ids = tokens()
    before = logits(model, ids)
    tiny = copy.deepcopy(model)
    attachment_of(tiny).remove()
    assert hooks_of(tiny) == 0
    assert torch.equal(logits(model, ids), before)


def test_r3_under_flash_attention_is_refused():
    model, plan, made = fused()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RotationError, match="flash_attention_2"):
        attach(model, plan, made)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("spec", "scheme"), [("R3", "none"), ("", "KV4")])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_batching_is_refused_with_the_way_out(spec, scheme, name):
    """Its paged cache is written inside the attention function: keys would be neither rotated nor quantized."""
    model = tiny_model("llama")
    plan = plan_of(model)
    with attach(model, plan, make_rotations(plan, RotationSpec(spec)), parse_scheme(scheme)):
        with pytest.raises(RotationError, match=r"generate_batch.*Call generate with a padded batch"):
            getattr(model, name)([[1, 2, 3]])
    assert name not in vars(model)


def test_generating_with_a_paged_cache_is_refused():
    model = tiny_model("llama")
    plan = plan_of(model)
    with attach(model, plan, make_rotations(plan, RotationSpec("R3"))):
        with pytest.raises(RotationError, match="continuous batching"):
            model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="paged")


def test_the_input_of_down_proj_is_rotated_then_quantized():
    model, ids = tiny_model("llama"), tokens()
    plan = plan_of(model)
    made = make_rotations(plan, RotationSpec("R4"))
    name = "model.layers.2.mlp.down_proj"
    with captured(model, [name], inputs=True) as before:
        logits(model, ids)
    fuse_module(model, plan, made)
    rotated = made["layers.2.hidden"].apply(before[name])
    with attach(model, plan, made), captured(model, [name], inputs=True) as after:
        logits(model, ids)
    assert torch.allclose(after[name], rotated, atol=1e-9)
    x = torch.randn(3, 80, dtype=torch.float64)
    with attach(model, plan, made, Scheme(activations=Quantizer(4))), torch.no_grad():
        linear = model.get_submodule(name)
        rounded = fake_quantize(made["layers.2.hidden"].apply(x), Quantizer(4))
        assert torch.equal(linear(x), nn.functional.linear(rounded, linear.weight, linear.bias))


def test_the_input_of_the_head_is_quantized_only_if_asked_for():
    model = tiny_model("llama")
    plan = plan_of(model)
    with attach(model, plan, {}, parse_scheme("A4")):
        assert not model.lm_head._forward_pre_hooks
    with attach(model, plan, {}, parse_scheme("A4", lm_head=True)):
        assert model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "smollm3"])
def test_all_kinds_of_kv_cache_give_the_same_logits(name):
    """No cache, a dynamic one, a static one, a reused one: the same quantized keys and values."""
    model, plan, made = fused(name)
    attach(model, plan, made, SCHEME)
    ids = tokens(length=12)
    whole = logits(model, ids, use_cache=False)
    assert torch.allclose(logits(model, ids, use_cache=True), whole, atol=1e-9)
    cache = DynamicCache(config=model.config)
    with Float64Arithmetic(), torch.no_grad():
        parts = [model(input_ids=part, **{CACHE: cache}).logits for part in ids.split([7, 1, 1, 3], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)
    static = StaticCache(config=model.config, max_cache_len=16)
    assert torch.allclose(logits(model, ids, **{CACHE: static}), whole, atol=1e-9)


def test_generation_with_a_quantized_cache_equals_decoding_without_one():
    model, plan, made = fused()
    attach(model, plan, made, SCHEME)
    ids = tokens(batch=1)
    with Float64Arithmetic():
        steps = greedy_logits(model, ids)
        for step in steps:
            expected = logits(model, ids, use_cache=False)[:, -1]
            assert torch.allclose(step, expected, atol=1e-9)
            ids = torch.cat([ids, expected.argmax(-1, keepdim=True)], dim=1)


def test_changing_the_attention_implementation_under_r3_is_refused():
    """Otherwise keys would still be rotated, and queries would not."""
    model, plan, made = fused()
    attach(model, plan, made)
    model.set_attn_implementation("eager")
    with pytest.raises(RotationError, match="eager"):
        model(input_ids=tokens())


def test_a_decoder_layer_run_alone_is_rotated_too():
    """Calibration runs decoder layers one by one, without a cache: keys must be rotated there too."""
    model, plan, made = fused(rotations="R3")
    layer, x = model.model.layers[0], torch.randn(1, 6, 48, dtype=torch.float64)
    positions = model.model.rotary_emb(x, torch.arange(6).unsqueeze(0))
    with torch.no_grad():
        expected = layer(x, position_embeddings=positions)
        with attach(model, plan, made):
            assert torch.allclose(layer(x, position_embeddings=positions), expected, atol=1e-6)


def test_gradients_reach_the_weights_through_quantizers():
    model, plan, made = fused(dtype=torch.float32)
    attach(model, plan, made, SCHEME)
    model(input_ids=tokens()).logits.square().mean().backward()
    for name in ("q_proj", "o_proj"):
        grad = getattr(model.model.layers[0].self_attn, name).weight.grad
        assert grad is not None
        assert grad.abs().max() > 0
