import pytest
import torch

from models import CONFIGS, logits, tiny_model, tokens
from spinquant import CheckpointError, RotationSpec, attach, fuse_module, make_rotations, plan_of
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.models.capture import captured
from spinquant.plan import Span
from spinquant.rotations.factory import random_orthogonal
from spinquant.rotations.fuse import rotate_axis, transform
from spinquant.rotations.rotation import Orthogonal, matrix

TYPES = ["hadamard", "random-hadamard", "random-matrix"]


def rotated(model, spec):
    plan = plan_of(model)
    rotations = make_rotations(plan, spec)
    fuse_module(model, plan, rotations)
    return plan, rotations, attach(model, plan, rotations)


@pytest.mark.parametrize("rotations", ["R1", "R2", "R3", "R4", "R1,R2", "R1,R2,R3,R4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rotating_does_not_change_the_function(name, rotations):
    """Whole sequences, and token by token through the KV cache."""
    model, ids = tiny_model(name), tokens()
    before = logits(model, ids)
    with Float64Arithmetic():
        generated = greedy_logits(model, ids)
        rotated(model, RotationSpec(rotations, randomize=True))
        assert torch.allclose(greedy_logits(model, ids), generated, atol=1e-9)
    assert torch.allclose(logits(model, ids, use_cache=False), before, atol=1e-9)
    assert torch.allclose(logits(model, ids, use_cache=True), before, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block_size", [None, 4, {"R1": 12, "R4": 20}])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_block_size_and_attention_implementation_keeps_the_function(kind, block_size, attention):
    model, ids = tiny_model("qwen2", attention=attention), tokens()
    before = logits(model, ids)
    rotated(model, RotationSpec("R1,R2,R3,R4", kind, block_size, seed=2))
    assert torch.allclose(logits(model, ids), before, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_rotated(name):
    """A plan without axes would keep the function too; this test would fail for it."""
    model, ids = tiny_model(name), tokens()
    plan = plan_of(model)
    modules = ["model.embed_tokens", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    spaces = ["residual", "layers.1.value", "residual"]
    with captured(model, modules) as before:
        logits(model, ids)
    rotations = make_rotations(plan, RotationSpec("R1,R2"))
    fuse_module(model, plan, rotations)
    with captured(model, modules) as after:
        logits(model, ids)
    for module, space in zip(modules, spaces, strict=True):
        expected = rotations[space].apply(before[module])
        assert torch.allclose(after[module], expected, atol=1e-9), module
        assert not torch.allclose(after[module], before[module], atol=1e-2), module


def test_fused_norms_are_identity_and_tied_weights_untied():
    model = tiny_model("qwen3")
    rotated(model, RotationSpec("R1"))
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name == "model.norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter))
        if "q_norm" in name or "k_norm" in name:
            assert not torch.equal(parameter, torch.ones_like(parameter))
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_weights_stay_tied_if_no_rotation_parts_them():
    model = tiny_model("qwen3")
    rotated(model, RotationSpec("R2,R3,R4"))
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transform_does_not_change_its_input():
    model = tiny_model("llama")
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2,R4"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    copies = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        transform(name, weight, plan, weights, rotations)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


def test_transform_is_the_formula():
    """T' = R2^T (T diag(g)) R1 for a value projection, head by head."""
    model = tiny_model("llama")
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2", "random-matrix"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = "model.layers.1.self_attn.v_proj"
    r1, r2 = matrix(rotations["residual"]), torch.block_diag(*[matrix(rotations["layers.1.value"])] * 2)
    gain = weights["model.layers.1.input_layernorm.weight"]
    expected = r2.T @ (weights[f"{name}.weight"] * gain) @ r1
    assert torch.allclose(transform(f"{name}.weight", weights[f"{name}.weight"], plan, weights, rotations), expected)
    bias = transform(f"{name}.bias", weights[f"{name}.bias"], plan, weights, rotations)
    assert torch.allclose(bias, weights[f"{name}.bias"] @ r2)


def test_only_the_span_is_rotated():
    q = random_orthogonal(2, torch.Generator().manual_seed(0))
    x = torch.arange(12.0, dtype=torch.float64).view(1, 12)
    found = rotate_axis(x, 1, Orthogonal(q), Span(start=1, length=2, period=4)).view(3, 4)
    expected = x.view(3, 4).clone()
    expected[:, 1:3] = expected[:, 1:3] @ q
    assert torch.allclose(found, expected)
    column = x.T.contiguous()
    rotation, span = Orthogonal(q), Span(start=1, length=2, period=4)
    assert torch.equal(rotate_axis(column, 0, rotation, span, out=column).view(3, 4), found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precisions_stay_close(dtype, tolerance):
    model, ids = tiny_model("llama", dtype=dtype), tokens()
    before = logits(model, ids).float()
    rotated(model, RotationSpec("R1,R2,R3,R4"))
    after = logits(model, ids).float()
    assert (after - before).norm() / before.norm() < tolerance


def test_half_precision_is_rounded_once():
    model = tiny_model("llama", dtype=torch.bfloat16)
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exact = {name: weight.double() for name, weight in weights.items()}
    for name, weight in weights.items():
        fused = transform(name, weight, plan, weights, rotations)
        expected = transform(name, exact[name], plan, exact, rotations).bfloat16()
        # float32 arithmetic may land on the other side of a rounding boundary, by one unit at most
        assert ((fused - expected).abs() <= expected.abs() * 2**-7 + 1e-6).all(), name
        assert fused.dtype == torch.bfloat16


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model("llama-tied")
    plan, before = plan_of(model), logits(model, tokens())
    linear = model.model.layers[2].mlp.up_proj
    weight, bias = linear.weight, linear.bias
    linear.to("meta")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight.*meta"):
        fuse_module(model, plan, make_rotations(plan, RotationSpec("R1")))
    linear.weight, linear.bias = weight, bias
    assert torch.equal(logits(model, tokens()), before)  # nothing was changed before the refusal
    assert model.config.tie_word_embeddings is True


def test_fusing_slices_equals_fusing_the_whole(monkeypatch):
    whole, sliced = tiny_model("qwen2"), tiny_model("qwen2")
    for model, size in ((whole, 1 << 30), (sliced, 100)):
        monkeypatch.setattr("spinquant.rotations.fuse.SLICE", size)
        plan = plan_of(model)
        fuse_module(model, plan, make_rotations(plan, RotationSpec("R1,R2,R4")))
    for (name, a), b in zip(whole.named_parameters(), sliced.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-13), name


def test_progress_counts_to_the_end():
    model, seen = tiny_model("llama"), []
    plan = plan_of(model)
    fuse_module(model, plan, make_rotations(plan, RotationSpec("R1")), progress=lambda *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_precision_is_the_dtype_of_the_arithmetic():
    """float32 weights fused in float64 are the exact result, rounded once."""
    model = tiny_model("llama", dtype=torch.float32)
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2,R4"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exact = {name: weight.double() for name, weight in weights.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    expected = transform(name, exact[name], plan, exact, rotations).float()
    assert torch.equal(transform(name, weights[name], plan, weights, rotations, precision=torch.float64), expected)
    assert not torch.equal(transform(name, weights[name], plan, weights, rotations), expected)
