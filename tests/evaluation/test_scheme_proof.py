"""Quantizers of activations and KV cache equal a computation without hooks on a tiny model, or are refused."""

import pytest
import torch

from families import FAMILIES, config_of
from models import CONFIGS, fuse_duals, online_transforms, tiny_model, tokens
from spinquant import ProofError, Quantizer, RotationSpec, parse_scheme, plan_of, quantize
from spinquant.entrypoints.result import Options
from spinquant.evaluation import scheme_proof
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.scheme_proof import coarse, compare_schemes, plainly_rounded, prove_scheme
from spinquant.evaluation.tiny_model import make_tiny_model
from spinquant.online import hooks, sites
from spinquant.online.firing import AttentionCheck, FiringCheck
from spinquant.online.kv_cache import PackedLayer
from spinquant.quantization import integer
from spinquant.quantization.integer import fake_quantize
from spinquant.rotations.fuse_module import untie

ALL = RotationSpec("R1,R2,R3,R4", "auto")


def proof_of(name, scheme="W4A8KV8", **options):
    config = config_of(name)
    allowed = FAMILIES[name].allowed if name in FAMILIES else ALL.rotations
    if plan_of(make_tiny_model(config)).uncalled:
        scheme = "KV8"
    return prove_scheme(config, parse_scheme(scheme, **options), RotationSpec(allowed, "auto", randomize=True))


@pytest.mark.parametrize("name", [*CONFIGS, *FAMILIES])
def test_quantizers_of_every_family_equal_a_computation_without_hooks(name):
    proof = proof_of(name)
    assert proof.relative < 1e-11
    assert proof.moved > 0.01


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scheme", ["A8g32", "W8A8KVFP8"])
@pytest.mark.parametrize("name", [*CONFIGS, *FAMILIES])
def test_no_scheme_is_refused_by_mistake(name, scheme, seed):
    """Numbers of which the last bit decides, between two codes, would be found with one seed and not with another."""
    config = config_of(name)
    allowed = FAMILIES[name].allowed if name in FAMILIES else ALL.rotations
    if "A" in scheme and plan_of(make_tiny_model(config)).uncalled:
        pytest.skip("linears of this class are called by their weights")
    for rotations in ((), allowed):
        proof = prove_scheme(config, parse_scheme(scheme), RotationSpec(rotations, "auto", randomize=True), seed=seed)
        assert proof is None or proof.relative < 1e-11


@pytest.mark.parametrize("rotations", ["none", "R2,R4", "R1", "online-R1,R4"])
@pytest.mark.parametrize("name", ["zamba2", "qwen2", "phi", "gpt2", "mixtral"])
def test_quantizers_are_proved_with_any_rotations(name, rotations):
    """Blocks that share weights are untied by R1 alone."""
    config = config_of(name)
    assert prove_scheme(config, parse_scheme("A8KV8"), RotationSpec(rotations, "auto")).relative < 1e-11


@pytest.mark.parametrize("options", [{"activation_symmetric": True}, {"lm_head": True}, {}])
@pytest.mark.parametrize("scheme", ["A4g16", "KV4", "A4", "AFP8KVFP8"])
def test_parts_groups_and_the_head_are_proved(scheme, options):
    options = {} if scheme == "AFP8KVFP8" and "activation_symmetric" in options else options
    assert proof_of("llama", scheme, **options).unseen == ()


def test_nothing_is_proved_where_no_tensor_is_rounded_online():
    assert prove_scheme(CONFIGS["llama"](), parse_scheme("W4"), ALL) is None
    assert prove_scheme(config_of("mamba2"), parse_scheme("KV4"), RotationSpec("R1")) is None


@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_quantizers_are_proved_with_transforms_that_are_no_rotations(name, heads):
    model = tiny_model(name)
    plan = plan_of(model)
    untie(model, plan)
    made = online_transforms(plan, heads=heads)
    fuse_duals(model, plan, made)
    with Float64Arithmetic():
        proof = compare_schemes(model, plan, made, coarse(parse_scheme("A8KV8"), model, plan), tokens())
    assert proof.relative < 1e-11 and proof.moved > 0.01 and proof.unseen == ()


@pytest.mark.parametrize("spoilt", ["queries", "keys"])
def test_queries_that_get_the_transform_of_the_keys_are_found(spoilt, monkeypatch):
    """Either way of using one matrix for both, which is right for rotations alone."""
    made = sites.KeyValueSite.__init__

    def same(self, rotation, *rest, **options):
        made(self, rotation, *rest, **options)
        if rotation is not None:
            self._queries, self.rotation = (rotation, rotation) if spoilt == "queries" else (self._queries,) * 2

    monkeypatch.setattr(sites.KeyValueSite, "__init__", same)
    with pytest.raises(ProofError, match="self_attn"):
        test_quantizers_are_proved_with_transforms_that_are_no_rotations("llama", 2)


@pytest.mark.parametrize(
    "quantizer",
    [Quantizer(3), Quantizer(4, symmetric=True), Quantizer(2, group_size=8), Quantizer(5, clip=0.8)],
)
def test_the_plain_formula_rounds_as_the_quantizers_do(quantizer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    x[0], x[1], x[2] = 0.0, x[1].abs(), -x[2].abs()
    assert torch.allclose(plainly_rounded(x, quantizer), fake_quantize(x, quantizer), atol=1e-14)


def changed(monkeypatch, change):
    """Change an attachment in the proof, after it was made."""

    def attach(*arguments):
        attachment = hooks.attach(*arguments)
        change(attachment)
        return attachment

    monkeypatch.setattr(scheme_proof, "attach", attach)


def without(part, name):
    return lambda attachment: setattr(attachment.inputs[name], part, None)


def drop_the_cache(monkeypatch):
    monkeypatch.setattr(hooks, "cache_argument", lambda module, name: ("key_value_store", 99))


def change_scales(monkeypatch):
    original = integer.grid_of_range

    def grid(*arguments):
        scale, zero = original(*arguments)
        return scale * (1 + 1e-6), zero

    monkeypatch.setattr(integer, "grid_of_range", grid)


def forget_packed(monkeypatch):
    monkeypatch.setattr(PackedLayer, "_quantize", lambda self, keys, values: exact(self, keys, values))


def exact(layer, keys, values):
    return tuple(integer.quantize(tensor, Quantizer(8)) for tensor in (keys, values))


MLP = "model.layers.1.mlp.down_proj"
BREAKS = {
    "cache": (drop_the_cache, "keys and values move the logits by 0"),
    "scale": (change_scales, r"'model\.layers\.0\.self_attn\.q_proj' reads"),
    "quantizer": (lambda patch: changed(patch, without("quantizer", MLP)), rf"'{MLP}' reads"),
    "rotation": (lambda patch: changed(patch, without("rotation", MLP)), rf"'{MLP}' reads"),
    "queries": (
        lambda patch: patch.setattr(sites.KeyValueSite, "rotate_queries", lambda self, queries: queries),
        r"'model\.layers\.0\.self_attn\.o_proj' reads",
    ),
    "packed": (forget_packed, "generation through a KV cache"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_and_its_place_named(name, monkeypatch):
    """Even where the checks of `online/firing.py` do not notice."""
    for check in (AttentionCheck, FiringCheck):
        monkeypatch.setattr(check, "finish", lambda *arguments: None)
    prove_scheme(CONFIGS["mistral"](), parse_scheme("A8KV8"), ALL)
    change, message = BREAKS[name]
    change(monkeypatch)
    with pytest.raises(ProofError, match=message):
        prove_scheme(CONFIGS["mistral"](), parse_scheme("A8KV8"), ALL)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen3_moe", "nemotron_h", "deepseek_v3", "gemma3", "falcon_h1"])
def test_a_changed_scale_is_found_in_other_families(name, monkeypatch):
    change_scales(monkeypatch)
    with pytest.raises(ProofError, match="reads differs"):
        proof_of(name)


def test_quantizers_are_proved_before_a_model_is_changed(monkeypatch):
    change_scales(monkeypatch)
    model = tiny_model("mistral", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(ProofError, match="yours was not touched"):
        quantize(model, "W4A8", RotationSpec("R1"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert quantize(model, "W4A8", RotationSpec("R1"), options=Options(prove=False)).quantizers is None


def test_the_result_says_how_the_quantizers_compare():
    result = quantize(tiny_model("mistral", dtype=torch.float32), "W4A8KV4", RotationSpec("R1,R4"))
    assert result.record()["proof"]["quantizers"]["relative"] < 1e-11
