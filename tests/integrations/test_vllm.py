"""The vLLM plugin without vLLM: how it reads matrices and configs, what it patches, and that the patch can be undone.

`make test-clients` runs it in vLLM.
"""

import sys
import types

import pytest
import torch
from compressed_tensors.transform import TransformConfig

from spinquant import Hadamard, Kronecker, Orthogonal, RotationError
from spinquant.formats.compressed_tensors import transform_matrix
from spinquant.integrations.vllm import query_key_order, register, rotation_of
from spinquant.rotations.factory import random_orthogonal, random_signs
from spinquant.rotations.rotation import matrix

GENERATOR = torch.Generator().manual_seed(0)
ROTATIONS = {
    "hadamard": lambda: Hadamard(64),
    "random hadamard": lambda: Hadamard(80, random_signs(80, GENERATOR)),
    "paley": lambda: Hadamard(12, random_signs(12, GENERATOR)),
    "dense": lambda: Orthogonal(random_orthogonal(24, GENERATOR)),
    "no hadamard order": lambda: Kronecker(random_orthogonal(7, GENERATOR), 2, random_signs(14, GENERATOR)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotation_of_recovers_the_rotation_from_a_stored_matrix(kind, dtype):
    rotation = ROTATIONS[kind]()
    again = rotation_of(transform_matrix(rotation, dtype).to(dtype))  # vLLM narrows every matrix to the model's dtype
    assert isinstance(again, Hadamard) == isinstance(rotation, Hadamard)  # the fast transform, where there is one
    exact = isinstance(rotation, Hadamard) or dtype == torch.float32
    assert torch.allclose(matrix(again), matrix(rotation), atol=1e-6 if exact else 2**-8)


@pytest.mark.parametrize("stored", [torch.zeros(8, 8), torch.rand(8, 8), torch.eye(8), torch.full((8, 8), torch.nan)])
def test_a_matrix_that_is_not_orthogonal_is_refused(stored):
    with pytest.raises(RotationError, match="order 8"):
        rotation_of(stored)


def transforms(*groups):
    """A transform_config of (type, head_dim, locations) groups on self_attn."""
    return TransformConfig(
        config_groups={
            f"R{i}": {
                "type": kind,
                "head_dim": head_dim,
                "apply": [{"targets": ["re:.*self_attn$"], "location": location} for location in locations],
            }
            for i, (kind, head_dim, locations) in enumerate(groups)
        }
    )


def test_query_key_order_reads_r3_from_a_config():
    layer, name = torch.nn.Identity(), "model.layers.3.self_attn"
    both = transforms(("hadamard", 16, ("q_attn", "k_cache")))
    assert query_key_order(both, name, layer) == 16
    assert query_key_order(both, "model.layers.3.mlp", layer) is None
    assert query_key_order(transforms(("random-hadamard", 16, ("input",))), name, layer) is None
    for wrong, word in (
        (transforms(("hadamard", 16, ("q_attn",))), "the same rotation"),
        (transforms(("hadamard", 16, ("q_attn",)), ("hadamard", 8, ("k_cache",))), "the same rotation"),
        (transforms(("random-hadamard", 16, ("q_attn", "k_cache"))), "type hadamard"),
        (transforms(("hadamard", None, ("q_attn", "k_cache"))), "head_dim"),
    ):
        with pytest.raises(RotationError, match=word):
            query_key_order(wrong, name, layer)


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins for the objects of vLLM that the plugin patches or reads, which act as vLLM without a transform."""

    class HadamardTransform(torch.nn.Module):
        def process_weights_after_loading(self):
            return "theirs"

        def forward(self, value, part_id=0):
            return "theirs"

    class CompressedTensorsLinearTransformMethod:
        input_transform = output_transform = None

        def apply(self, layer, x, bias=None):
            assert bias is None
            return layer(x)

        @property
        def quant_method(self):
            return types.SimpleNamespace(apply=lambda layer, x, bias: layer(x) + bias)

    class CompressedTensorsConfig:
        transform_config = None

        def get_quant_method(self, layer, prefix):
            return prefix

    base = "vllm.model_executor.layers.quantization.compressed_tensors"
    contents = {
        f"{base}.compressed_tensors": {"CompressedTensorsConfig": CompressedTensorsConfig},
        f"{base}.transform.linear": {"CompressedTensorsLinearTransformMethod": CompressedTensorsLinearTransformMethod},
        f"{base}.transform.module": {"HadamardTransform": HadamardTransform},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(is_cpu=lambda: True)},
    }
    for name, attributes in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        for attribute, value in attributes.items():
            setattr(sys.modules[name], attribute, value)
    return types.SimpleNamespace(
        transform=HadamardTransform, method=CompressedTensorsLinearTransformMethod, config=CompressedTensorsConfig
    )


def state(vllm):
    return [dict(vars(c)) for c in (vllm.transform, vllm.method, vllm.config)]


def test_undo_restores_vllm_and_a_second_register_has_no_effect(vllm):
    before = state(vllm)
    undo = register()
    once = state(vllm)
    assert once != before
    again = register()
    assert state(vllm) == once
    again()
    assert state(vllm) == once
    undo()
    assert state(vllm) == before


def test_a_model_without_transforms_gets_no_hooks(vllm):
    undo = register()
    layer = torch.nn.Linear(4, 4)
    assert vllm.config().get_quant_method(layer, "model.layers.0.self_attn.attn") == "model.layers.0.self_attn.attn"
    assert not layer._forward_pre_hooks
    undo()


def test_a_bias_is_added_under_a_transform(vllm):
    undo = register()
    layer, bias = torch.nn.Linear(4, 4, bias=False), torch.randn(4)
    method = vllm.method()
    method.input_transform = lambda x: -x
    x = torch.randn(3, 4)
    assert torch.equal(method.apply(layer, x, bias), layer(-x) + bias)
    method.output_transform = lambda x: x
    with pytest.raises(RotationError, match="bias"):
        method.apply(layer, x, bias)
    undo()


def test_queries_and_keys_are_rotated_and_values_are_not(vllm):
    undo = register()
    config = vllm.config()
    config.transform_config = transforms(("hadamard", 8, ("q_attn", "k_cache")))

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return query, key, value

    layer = Attention()
    config.get_quant_method(layer, "model.layers.0.self_attn.attn")
    given = [torch.randn(5, 32), torch.randn(5, 16), torch.randn(5, 16)]
    query, key, value = layer(*given)
    assert torch.allclose(query, Hadamard(8).apply(given[0])) and torch.allclose(key, Hadamard(8).apply(given[1]))
    assert torch.equal(value, given[2])
    undo()


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard"])
def test_the_transform_module_applies_the_rotation(kind, vllm):
    undo = register()
    rotation = Hadamard(16) if kind == "hadamard" else Hadamard(16, random_signs(16, GENERATOR))
    shared = torch.empty(16, 16) if kind == "hadamard" else transform_matrix(rotation, torch.float32)
    module = vllm.transform()
    scheme = types.SimpleNamespace(type=kind, head_dim=16)
    args = types.SimpleNamespace(inverse=False)
    module.transforms = {0: types.SimpleNamespace(scheme=scheme, args=args)}
    module.weight = types.SimpleNamespace(
        partitions={0: torch.nn.Parameter(shared, requires_grad=False)},
        tensors_registry={16: shared},
        process_weights_after_loading=lambda: None,
    )
    module._get_data_key = lambda scheme, size: size
    module.process_weights_after_loading()
    x = torch.randn(3, 48)
    assert torch.allclose(module(x), rotation.apply(x), atol=1e-6)
    compiled = torch.compile(lambda value: module.forward(value), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), rotation.apply(x), atol=1e-6)
    assert torch.equal(module(x, part_id=1), x)
    args.inverse = True
    assert torch.allclose(module(rotation.apply(x)), x, atol=1e-6)
    undo()
