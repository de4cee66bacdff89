"""Rotated and quantized models can be compiled and exported, with the numbers of eager execution."""

import shutil

import pytest
import torch
import torch._inductor
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from models import SIZES, random_weights, tokens
from spinquant import (
    OnlineError,
    Quantizer,
    RotationSpec,
    attach,
    fuse_module,
    make_rotations,
    parse_scheme,
    plan_of,
)
from spinquant.quantization.integer import fake_quantize

pytestmark = [
    pytest.mark.long,
    # of torch's tracers
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
SMALL = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def quantized(intermediate=96, scheme="A4KV4", dtype=torch.float64, type="auto"):
    config = LlamaConfig(**{**SMALL, "intermediate_size": intermediate})
    model = random_weights(AutoModelForCausalLM.from_config(config, dtype=dtype))
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1,R2,R3,R4", type))
    fuse_module(model, plan, rotations)
    attach(model, plan, rotations, parse_scheme(scheme))
    return model.requires_grad_(False)


class Logits(nn.Module):
    """What torch.export takes: a module of tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("order", [96, 11008])
def test_every_order_of_r4_is_exported(order, strict):
    model, ids = Logits(quantized(order)), tokens(2, 6)
    exported = torch.export.export(model, (ids,), strict=strict)
    assert relative(exported.module()(ids), model(ids)) < 1e-12


@pytest.mark.parametrize("type", ["hadamard", "random-hadamard", "random-matrix", "auto"])
def test_every_type_of_rotation_is_exported(type):
    model, ids = Logits(quantized(96, type=type)), tokens(2, 6)
    exported = torch.export.export(model, (ids,))
    assert relative(exported.module()(ids), model(ids)) < 1e-12


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("scheme", ["A4KV4", "A8", "none"])
def test_a_compiled_model_is_one_graph(scheme, use_cache):
    """And its numbers are those of eager execution."""
    model, ids = quantized(scheme=scheme), tokens(2, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, expected = (run(ids, use_cache=use_cache).logits for run in (compiled, model))
    assert relative(found, expected) < 1e-12


@needs_compiler
def test_the_kernels_of_inductor_compute_what_eager_execution_computes():
    """In float32: transformers computes norms and the softmax in it, whatever the dtype of the model."""
    model, ids = quantized(scheme="A4KV4"), tokens(2, 6)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found, expected = (run(ids, use_cache=True).logits for run in (compiled, model))
    assert relative(found, expected) < 100 * torch.finfo(torch.float32).eps


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizers_compiled_by_inductor_round_to_the_last_bit_alike(dtype):
    """Also where scales have 16 bits: a compiler may drop a cast to them and back."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizers = Quantizer(4), Quantizer(8, symmetric=True, group_size=16), parse_scheme("AFP8").activations
    compiled = torch.compile(lambda x: [fake_quantize(x, quantizer) for quantizer in quantizers], fullgraph=True)
    for found, quantizer in zip(compiled(x), quantizers, strict=True):
        assert torch.equal(found, fake_quantize(x, quantizer))


@needs_compiler
def test_a_package_of_aotinductor_computes_what_eager_execution_computes(tmp_path):
    model, ids = Logits(quantized(96)), tokens(2, 6)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        found = torch._inductor.aoti_load_package(path)(ids)
    assert relative(found, model(ids)) < 100 * torch.finfo(torch.float32).eps


def test_a_site_that_does_not_fire_is_an_error_while_tracing():
    model, ids = quantized(), tokens(2, 6)

    class ByWeight(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    model.model.layers[1].mlp.down_proj = ByWeight(model.model.layers[1].mlp.down_proj)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"down_proj"):
            torch.export.export(Logits(model), (ids,), strict=strict)
    with pytest.raises(OnlineError, match=r"layers\.1\.mlp\.down_proj"):
        torch.compile(Logits(model), backend="eager")(ids)
