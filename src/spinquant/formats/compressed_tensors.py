"""Write compressed-tensors checkpoints, for vLLM, and for transformers if nothing is rotated online.

Weights are packed by the library's own compressors with the scales and zero points that quantization left in each
linear; every tensor is unpacked again and compared before it is written, so the checkpoint has exactly the values of
the model in memory. Matrices of online rotations are stored once per transform group, under the name of its first
module, where runtimes look for them: `model.layers.0.mlp.down_proj.R4_input.weight`, unnormalized.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.errors import CheckpointError
from spinquant.formats.compressed_config import (
    format_of,
    quantization_config,
    quantization_scheme,
    stored_ranges,
    transform_groups,
)
from spinquant.plan import Plan
from spinquant.quantization.floating import tensor_factor
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.quantization.targets import linears_of
from spinquant.rotations.rotation import Transform, matrix


def write_compressed(
    model: Any, plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme, clips: Clips, folder: Path
) -> None:
    """Write the weights and config of a rotated and quantized model to a folder; the model is not changed.

    clips: peaks of static quantizers. Raises CheckpointError for a weight that is not on its quantization grid, and
    SchemeError if the library is not installed.
    """
    state = compressed_state(model, plan, rotations, scheme) | stored_ranges(plan, scheme, clips)
    covered = set(linears_of(plan, scheme)) if scheme.weights else set()
    ignore = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in covered]
    described = quantization_config(plan, rotations, scheme, ignore=ignore)
    quantizer, ours = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    try:
        # Otherwise the native format's quantizer would pack the weights.
        model.hf_quantizer = None
        model.config.quantization_config = described
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, ours
        if ours is None:
            del model.config.quantization_config


def compressed_state(model: Any, plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme) -> dict[str, Tensor]:
    """All tensors of the checkpoint by name."""
    state = dict(model.state_dict())
    if scheme.weights is not None:
        for name in linears_of(plan, scheme):
            linear = model.get_submodule(name)
            packed = compress(name, linear.weight.detach(), *_grid_of(linear, name), scheme)
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    for name, rotation in stored_transforms(plan, rotations):
        state[name] = transform_matrix(rotation, model.dtype)
    return state


def unnormalised(rotation: Transform) -> Tensor:
    """W of a rotation x W / sqrt(n), as the library and vLLM store it: (n, n), float64."""
    return matrix(rotation) * math.sqrt(rotation.order)


def transform_matrix(rotation: Transform, dtype: torch.dtype) -> Tensor:
    """The unnormalized matrix of a rotation, (n, n): in `dtype` if that is exact, else in float32."""
    whole = unnormalised(rotation)
    # Entries of +-1 are exact in any dtype; a runtime casts others to the model's dtype when it loads them.
    signs = whole.round()
    exact = bool((signs.abs() == 1).all()) and torch.allclose(whole, signs)
    return signs.to(dtype) if exact else whole.to(torch.float32)


def stored_transforms(plan: Plan, rotations: Mapping[str, Transform]) -> Iterator[tuple[str, Transform]]:
    """Names of the matrices of online rotations in a checkpoint, each with its rotation."""
    spaces = {online.module: online.space for online in plan.onlines}
    sites = {online.module: online.site for online in plan.onlines}
    for group, modules in transform_groups(plan, rotations).items():
        if sites[modules[0]] == "input":  # R3 is a plain Hadamard transform, which needs no matrix
            yield f"{modules[0]}.{group}_input.weight", rotations[spaces[modules[0]]]


def compress(name: str, weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> dict[str, Tensor]:
    """Pack a linear's weight (out, in), which is on the grid of `scale` and `zero`; tensors by suffix of their name.

    Raises CheckpointError if unpacking would give another weight.
    """
    from compressed_tensors.compressors import BaseCompressor

    quantizer = scheme.weights
    assert quantizer is not None
    state = _on_grid(weight, scale, zero, quantizer)
    compressor: Any = BaseCompressor.get_value_from_registry(format_of(scheme))
    described = quantization_scheme(scheme)
    # In float32, where dividing a weight by its scale recovers its code exactly.
    wide = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in state.items()}
    packed = {**compressor.compress(wide, described)}
    if quantizer.kind in ("int", "fp8"):
        packed["weight_scale"] = state["weight_scale"]
    again = compressor.decompress(dict(packed), described)["weight"].to(weight.dtype)
    if not torch.equal(again, weight):
        worst = float((again - weight).abs().max())
        raise CheckpointError(
            f"{name}.weight would change by up to {worst:.2e} in compressed-tensors: it was changed after "
            "quantization, or its scales do not fit the format"
        )
    return {key: tensor.contiguous() for key, tensor in packed.items()}


def _grid_of(linear: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point that quantization left in a linear."""
    scale = linear._buffers.get("weight_scale")
    if scale is None:
        raise CheckpointError(f"{name} was not quantized: its scale (weight_scale) is missing")
    return scale, linear._buffers.get("weight_zero")


def _on_grid(weight: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> dict[str, Tensor]:
    """Weight, scale and zero point of a linear in the form that the library's compressors take."""
    state = {"weight": weight, "weight_scale": scale}
    if zero is not None:  # the library's zero points are signed
        state["weight_zero_point"] = (zero.to(torch.int16) - 2 ** (quantizer.bits - 1)).to(torch.int8)
    if quantizer.kind == "nvfp4":
        factor = tensor_factor(scale.to(torch.float32))
        state["weight_scale"] = scale.to(torch.float32) / factor
        state["weight_global_scale"] = (1 / factor).reshape(1)
    return state
