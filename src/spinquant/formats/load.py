"""load_model"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from spinquant.architectures import FamilyLike, use_family
from spinquant.checkpoint.atomic import first_line
from spinquant.checkpoint.folder import check_device, check_finite, folder_of, load_config, read_headers
from spinquant.errors import CheckpointError
from spinquant.models.modules import model_class


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
    check_values: bool = True,
    family: FamilyLike | None = None,
) -> Any:
    """A causal LM in evaluation mode, from a folder or hub id; folders that spinquant wrote come with online parts.

    family: a file that explains the model where no table does, see `use_family`; such folders know it already. Raises
    CheckpointError for anything missing, corrupted or not finite, naming it.
    """
    from spinquant.formats.compressed_reader import is_compressed, load_compressed

    check_device(device)
    config = load_config(model)
    folder = folder_of(model, allow_pickle=allow_pickle)
    if not allow_pickle:
        read_headers(folder)
    if is_compressed(config):
        loaded = load_compressed(folder, dtype=dtype)
        if check_values:
            check_finite(loaded, str(model))
        return loaded.to(device)
    try:
        result: Any = model_class(config).from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # so that they can be named below
            output_loading_info=True,
        )
        loaded, info = result
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, ImportError) as error:
        about = getattr(config, "quantization_config", None) or {}
        if isinstance(about, dict) and about.get("quant_method") == "fp8":  # blocks that do not divide a weight, say
            raise CheckpointError(
                f"transformers cannot load the FP8 checkpoint {str(model)!r} ({first_line(error)}). Write it with the "
                "numbers that it stands for: spinquant rotate MODEL OUT --rotations none, and use that"
            ) from error
        raise CheckpointError(f"cannot load {str(model)!r}: {first_line(error)}") from error
    for name, found, expected in sorted(info.get("mismatched_keys", ())):
        raise CheckpointError(
            f"tensor {name!r} of {str(model)!r} has shape {tuple(found)}, and the config promises {tuple(expected)}"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(f"{str(model)!r} lacks tensor {missing[0]!r} (and {len(missing) - 1} others)")
    use_family(loaded.config, family)
    if check_values:
        check_finite(loaded, str(model))
    return loaded.eval().to(device)
