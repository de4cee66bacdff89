"""Load compressed-tensors checkpoints that spinquant wrote, with online rotations attached.

The outputs of a runtime can then be compared with those of this library. Rotations come from the record beside the
weights, which stores them in a form with a fast transform; the stored matrices that runtimes multiply with must agree
with them. A folder without such a record, or with a config other than this library would write, is refused: it may need
something at inference that is not known here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.architectures import family_of, module_names
from spinquant.checkpoint.folder import BESIDE, RECORD, ROTATIONS, load_config, weight_files
from spinquant.checkpoint.safetensors_io import read_tensors
from spinquant.checkpoint.untrusted import beside, read_json
from spinquant.errors import CheckpointError, SpinquantError
from spinquant.formats.compressed_config import format_of, quantization_config, quantization_scheme, stored_ranges
from spinquant.formats.compressed_tensors import stored_transforms, transform_matrix
from spinquant.formats.native import mark
from spinquant.models.modules import new_model
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.quantization.targets import linears_of
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved
from spinquant.rotations.wrappers import online_part

METHOD = "compressed-tensors"


def is_compressed(config: Any) -> bool:
    """Whether a config is that of a compressed-tensors folder."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def load_compressed(folder: Path, *, dtype: torch.dtype | str = "auto") -> Any:
    """Load a compressed-tensors folder that spinquant wrote, with online rotations and quantizers attached.

    Raises CheckpointError for a folder of another origin, for a config or tensors that contradict its record, and for a
    dtype other than the one it was quantized in.
    """
    config = load_config(folder)
    described = config.quantization_config
    del config.quantization_config
    if dtype not in ("auto", config.dtype):
        raise CheckpointError(f"{folder} was quantized in {config.dtype}: load it in that dtype, not in {dtype}")
    record = _read_record(folder)
    scheme, clips = record.scheme, record.clips
    with torch.device("meta"):
        skeleton = new_model(config)
    plan = plan_of(skeleton)
    online = online_part(plan, record.rotations)
    _check_config(described, quantization_config(plan, online, scheme, ignore=described.get("ignore", ())), folder)
    stored = _read_tensors(folder, skeleton, [name for name, _ in stored_transforms(plan, online)])
    _take_transforms(plan, online, stored, config.dtype, folder)
    _take_ranges(stored_ranges(plan, scheme, clips), stored, folder)
    grids = _decompress(plan, scheme, stored, config.dtype) if scheme.weights else {}
    model, info = type(skeleton).from_pretrained(
        None, config=config, state_dict=stored, dtype=config.dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(
                f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]} and maybe more"
            )
    for name, buffers in grids.items():
        for key, tensor in buffers.items():
            model.get_submodule(name).register_buffer(key, tensor, persistent=False)
    attach(model, plan, online, scheme, clips)
    mark(model, plan, online, record.spec, scheme, clips)
    return model.eval()


@dataclass(frozen=True)
class _Record:
    """What is used of the record of a folder."""

    scheme: Scheme
    spec: RotationSpec
    clips: Clips
    rotations: Mapping[str, Transform]


def _read_record(folder: Path) -> _Record:
    try:
        record = read_json(beside(folder, RECORD))
        tensors, _ = read_tensors(beside(folder, ROTATIONS))
    except SpinquantError as error:
        raise CheckpointError(
            f"{folder} is a compressed-tensors folder without spinquant's record ({BESIDE}/{RECORD}: {error}), so its "
            "online rotations and quantizers are unknown: load it with vLLM or transformers"
        ) from None
    try:
        return _Record(
            Scheme.from_dict(record.get("scheme")),
            RotationSpec.from_dict(record.get("spec")),
            Clips.from_dict(record.get("clips") or {}),
            saved(record, tensors),
        )
    except SpinquantError as error:
        raise CheckpointError(f"{folder / BESIDE / RECORD}: {error}") from None


def _read_tensors(folder: Path, model: Any, transforms: Collection[str]) -> dict[str, Tensor]:
    """All tensors of a folder, by the names of the model where a module holds them.

    Others (experts that a checkpoint stores one by one) keep their names, by which transformers converts them.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        found |= read_tensors(folder / file)[0]
    family = family_of(model.config)
    assert family is not None  # or there would be no plan
    modules = {name for name, _ in model.named_modules()}
    names = module_names(family, found).items()
    kept = {inside for inside, _ in names if inside in transforms or inside.rpartition(".")[0] in modules}
    return {inside if inside in kept else name: found[name] for inside, name in names}


def _check_config(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    # Later versions of the library write more keys; those that determine the numbers must agree.
    for key in ("config_groups", "format", "kv_cache_scheme", "transform_config"):
        if found.get(key) != expected.get(key):
            raise CheckpointError(
                f"{folder}: {key} of its quantization_config contradicts its record: {found.get(key)!r}, expected "
                f"{expected.get(key)!r}. The folder was changed, or written with another compressed-tensors version"
            )


def _take_transforms(
    plan: Plan, online: Mapping[str, Transform], stored: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> None:
    """Pop the matrices of online rotations from the tensors, and check them against the record."""
    for name, rotation in stored_transforms(plan, online):
        found = stored.pop(name, None)
        if found is None:
            raise CheckpointError(f"{folder} lacks the online rotation {name!r}: incomplete checkpoint")
        if not torch.equal(found, transform_matrix(rotation, dtype)):
            raise CheckpointError(f"{folder}: tensor {name!r} is not the rotation that its record describes")


def _take_ranges(ranges: Mapping[str, Tensor], stored: dict[str, Tensor], folder: Path) -> None:
    """Pop the tensors of static ranges, and check them against the record."""
    for name, expected in ranges.items():
        found = stored.pop(name, None)
        if found is None or not torch.equal(found, expected):
            raise CheckpointError(
                f"{folder}: tensor {name!r} is {'missing' if found is None else found.tolist()}, and its record has "
                f"{expected.tolist()}"
            )


def _decompress(
    plan: Plan, scheme: Scheme, stored: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """Replace packed tensors by weights, in place, and return the scale and zero point of each linear."""
    from compressed_tensors.compressors import BaseCompressor

    assert scheme.weights is not None
    compressor: Any = BaseCompressor.get_value_from_registry(format_of(scheme))
    described = quantization_scheme(scheme)
    keys = [key for key in compressor.compression_param_names(described) if not key.startswith("input_")]
    grids = {}
    for name in linears_of(plan, scheme):
        missing = [key for key in keys if f"{name}.{key}" not in stored]
        if missing:
            raise CheckpointError(f"the folder lacks tensor '{name}.{missing[0]}'")
        packed = {key: stored.pop(f"{name}.{key}") for key in keys}
        plain = compressor.decompress(dict(packed), described)
        stored[f"{name}.weight"] = plain["weight"].to(dtype)
        grids[name] = _grid(plain, scheme.weights, dtype)
    return grids


def _grid(plain: Mapping[str, Tensor], quantizer: Quantizer, dtype: torch.dtype) -> dict[str, Tensor]:
    scale = plain["weight_scale"].detach().to(torch.float32 if quantizer.kind == "nvfp4" else dtype)
    if quantizer.kind == "nvfp4":
        scale = (scale / plain["weight_global_scale"]).to(dtype)
    grid = {"weight_scale": scale}
    if not quantizer.symmetric:
        zero = plain["weight_zero_point"].to(torch.int16) + 2 ** (quantizer.bits - 1)
        grid["weight_zero"] = zero.to(torch.uint8)
    return grid
