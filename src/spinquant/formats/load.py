"""Load a model from a local folder or the Hugging Face hub, with its online rotations and quantizers attached."""

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
    """Load a language model; one that spinquant wrote comes with its online rotations and quantizers attached.

    Public as `spinquant.load`. Reads plain, native and compressed-tensors checkpoints. Unlike `from_pretrained` it
    raises for tensors that are missing, of the wrong shape or not finite, and never runs code of the checkpoint.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub.
        dtype: Dtype to load in. Default: "auto", that of the checkpoint.
        device: Device to load to. Default: "cpu".
        allow_pickle: Accept pickled weights (`.bin`), which can run code when they are loaded. Default: False.
        check_values: Check that every weight is finite. Default: True.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.
            Folders that spinquant wrote contain it.

    Returns:
        The model of transformers, in evaluation mode.

    Raises:
        CheckpointError: Something is missing, corrupted, of the wrong shape or not finite; the tensor or file is named.

    Example:
        >>> import spinquant, tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = spinquant.load(folder)
        >>> type(loaded).__name__, loaded.training
        ('LlamaForCausalLM', False)
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
        if isinstance(about, dict) and about.get("quant_method") == "fp8":  # e.g. blocks that do not divide a weight
            raise CheckpointError(
                f"transformers cannot load the FP8 checkpoint {str(model)!r} ({first_line(error)}). Dequantize it "
                "first (spinquant rotate MODEL OUT --rotations none) and load OUT"
            ) from error
        raise CheckpointError(f"cannot load {str(model)!r}: {first_line(error)}") from error
    for name, found, expected in sorted(info.get("mismatched_keys", ())):
        raise CheckpointError(
            f"tensor {name!r} of {str(model)!r} has shape {tuple(found)}, and the config requires {tuple(expected)}"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise CheckpointError(f"{str(model)!r} lacks tensor {missing[0]!r} (and {len(missing) - 1} others)")
    use_family(loaded.config, family)
    if check_values:
        check_finite(loaded, str(model))
    return loaded.eval().to(device)
