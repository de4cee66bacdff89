"""vLLM plugin for online rotations that vLLM alone does not run: an entry point of `vllm.general_plugins`.

vLLM reads `transform_config`, but its transform module needs a CUDA kernel or a weight layout that a CPU does not get;
it refuses a linear with a bias under a transform; and it ignores transforms of queries and keys (R3). The plugin
replaces only:

    HadamardTransform.forward, .process_weights_after_loading    on a CPU: the fast transform of this library
    CompressedTensorsLinearTransformMethod.apply                 passes the bias on
    CompressedTensorsConfig.get_quant_method                     rotates queries and keys of an attention with R3

Only models with a `transform_config` are affected. `register` returns a function that undoes it.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import HadamardOrderError, RotationError
from spinquant.rotations.hadamard import hadamard_matrix
from spinquant.rotations.rotation import Hadamard, Orthogonal, Rotation, Transform, dual, undo

ROTATION = "_spinquant_rotation"
ATTENTION = ".attn"  # vLLM's attention layer inside the module that transform_config names
SITES = ("q_attn", "k_cache")
# vLLM casts matrices to bfloat16, which changes inner products of their rows by less than this.
TOLERANCE = 2.0**-6


def register() -> Callable[[], None]:
    """Patch vLLM to run online rotations; returns a function that undoes the patch. A second call has no effect."""
    # Imported by name: vLLM is not a dependency, and is not installed where this file is type-checked.
    base = "vllm.model_executor.layers.quantization.compressed_tensors"
    config = import_module(f"{base}.compressed_tensors").CompressedTensorsConfig
    method = import_module(f"{base}.transform.linear").CompressedTensorsLinearTransformMethod
    transform = import_module(f"{base}.transform.module").HadamardTransform
    platform = import_module("vllm.platforms").current_platform

    saved: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        if getattr(original, ROTATION, False):
            return
        replacement = make(original)
        setattr(replacement, ROTATION, True)
        saved.append((owner, name, original))
        setattr(owner, name, replacement)

    if platform.is_cpu():
        replace(transform, "process_weights_after_loading", _process_weights)
        replace(transform, "forward", _forward)
    replace(method, "apply", _apply)
    replace(config, "get_quant_method", _get_quant_method)

    def undo() -> None:
        while saved:
            owner, name, original = saved.pop()
            setattr(owner, name, original)

    return undo


def rotation_of(stored: Tensor) -> Rotation:
    """The rotation x W / sqrt(n) of a stored, unnormalized matrix W (n, n); a fast transform if W is D H with signs D.

    Raises RotationError for a matrix that is not sqrt(n) times an orthogonal one.
    """
    n = stored.shape[0]
    wide = stored.detach().to(torch.float32)
    try:
        hadamard = hadamard_matrix(n).to(torch.float32)
        signs = (wide * hadamard).sum(dim=1) / n
        if (signs.abs() == 1).all() and torch.equal(signs.unsqueeze(1) * hadamard, wide):
            return Hadamard(n, signs.to(torch.int8))
    except HadamardOrderError:
        pass  # no Hadamard matrix of this order is known: the rotation is dense
    orthogonal = wide / math.sqrt(n)
    error = float((orthogonal @ orthogonal.T - torch.eye(n)).abs().max())
    if not error < TOLERANCE:
        raise RotationError(
            f"a transform of order {n} is not sqrt(n) times an orthogonal matrix (error {error:.1e}): either it was "
            "not loaded, or it is not a rotation"
        )
    return Orthogonal(orthogonal)


def _process_weights(original: Callable[..., Any]) -> Callable[..., None]:
    def process_weights_after_loading(self: Any) -> None:
        self.weight.process_weights_after_loading()
        rotations = {}
        for part, partition in self.weight.partitions.items():
            scheme, order = self.transforms[part].scheme, partition.data.shape[0]
            # All layers of a group share one tensor; the rotation is computed once and stored on it.
            shared = self.weight.tensors_registry[self._get_data_key(scheme, order)]
            if not hasattr(shared, ROTATION):
                if scheme.type == "hadamard":
                    shared.copy_(hadamard_matrix(order))
                setattr(shared, ROTATION, rotation_of(shared))
            rotations[part] = getattr(shared, ROTATION)
        setattr(self, ROTATION, rotations)

    return process_weights_after_loading


def _forward(original: Callable[..., Any]) -> Callable[..., Tensor]:
    def forward(self: Any, value: Tensor, part_id: int = 0) -> Tensor:
        if part_id not in self.weight.partitions:
            return value
        inverse = self.transforms[part_id].args.inverse
        if not torch.compiler.is_compiling():
            rotation = getattr(self, ROTATION)[part_id]
            return undo(rotation, value) if inverse else rotation.apply(value)
        # The fast transform uses cached buffers, which torch.compile cannot trace.
        weight = self.weight.partitions[part_id]  # of a rotation, so that its transpose is its inverse
        weight, order = weight.T if inverse else weight, weight.shape[0]
        blocks = value.unflatten(-1, (-1, order)).to(weight.dtype)
        return (blocks @ weight / math.sqrt(order)).flatten(-2).to(value.dtype)

    return forward


def _apply(original: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(self: Any, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return original(self, layer, x)
        if self.output_transform is not None:
            raise RotationError(
                "an output transform of a linear with a bias is not supported: fuse the rotation instead"
            )
        if self.input_transform is not None:
            x = self.input_transform(x)
        return self.quant_method.apply(layer, x, bias)

    return apply


def _get_quant_method(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_quant_method(self: Any, layer: torch.nn.Module, prefix: str) -> Any:
        method = original(self, layer, prefix)
        if self.transform_config is not None and prefix.endswith(ATTENTION):
            order = query_key_order(self.transform_config, prefix.removesuffix(ATTENTION), layer)
            if order is not None:
                layer.register_forward_pre_hook(_QueryKeyRotation(Hadamard(order)))
        return method

    return get_quant_method


def query_key_order(config: Any, name: str, layer: torch.nn.Module) -> int | None:
    """Order of the Hadamard transform of an attention's queries and keys (R3) in a transform_config, None without one.

    Raises RotationError for a transform of another type, and if queries and keys are not rotated the same way.
    """
    from compressed_tensors.utils import is_match

    orders: dict[str, int] = {}
    for scheme in config.config_groups.values():
        for args in scheme.apply:
            if args.location in SITES and is_match(name, layer, args.targets, args.ignore):
                if scheme.type != "hadamard" or scheme.head_dim is None:
                    raise RotationError(
                        f"{name}: transforms of queries and keys need type hadamard and a head_dim, not {scheme.type!r}"
                    )
                orders[args.location] = scheme.head_dim
    if not orders:
        return None
    if set(orders) != set(SITES) or len(set(orders.values())) != 1:
        raise RotationError(f"{name}: queries and keys must have the same rotation, but transform_config has {orders}")
    return orders[SITES[0]]


class _QueryKeyRotation:
    """Forward pre-hook of vLLM's attention: queries get the dual of what keys get, before keys are cached."""

    def __init__(self, rotation: Transform):
        self.rotation = rotation
        self.queries = dual(rotation)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *others = args
        return (self.queries.apply(query), self.rotation.apply(key), *others)
