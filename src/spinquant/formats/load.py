"""Load a model from a local folder or the Hugging Face hub, with its online rotations and quantizers attached."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spinquant.architectures import FamilyLike, family_of, module_names, prediction_tensors, use_family
from spinquant.architectures.foreign import layers_beyond, missing_head
from spinquant.checkpoint.atomic import first_line
from spinquant.checkpoint.folder import check_device, check_finite, folder_of, load_config, read_headers
from spinquant.errors import CheckpointError, SpinquantError
from spinquant.formats.register import METHOD
from spinquant.models.modules import config_errors, model_class


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
        _check_layers(config, read_headers(folder), str(model))
    if is_compressed(config):
        with config_errors(config):
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
    except SpinquantError:
        raise
    except Exception as error:  # the code of some hundred classes, which raise what a wrong value leads to
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
        table = family_of(config)
        if table is not None and missing == [table.head]:
            raise CheckpointError(f"{str(model)!r}: {missing_head(table.head)}")
        raise CheckpointError(f"{str(model)!r} lacks tensor {missing[0]!r} (and {len(missing) - 1} others)")
    about = getattr(config, "quantization_config", None) or {}
    if isinstance(about, dict) and about.get("quant_method") == METHOD:
        _check_expected(info.get("unexpected_keys", ()), config, str(model))
    use_family(loaded.config, family)
    if check_values:
        check_finite(loaded, str(model))
    return loaded.eval().to(device)


def _check_layers(config: Any, names: Iterable[str], origin: str) -> None:
    """Raise CheckpointError for layers that the config leaves out: transformers would drop them in silence."""
    family = family_of(config)
    if family is not None:
        names = list(names)
        apart = set(prediction_tensors(config, names))
        reason = layers_beyond(family, config, module_names(family, (name for name in names if name not in apart)))
        if reason is not None:
            raise CheckpointError(f"{origin!r}: {reason}")


def _check_expected(unexpected: Iterable[str], config: Any, model: str) -> None:
    """Raise CheckpointError for a tensor of a native folder that the model has no place for: layers would be lost."""
    unexpected = sorted(unexpected)
    lost = sorted(set(unexpected) - set(prediction_tensors(config, unexpected)))
    if lost:
        raise CheckpointError(
            f"{model!r} has the tensor {lost[0]!r} (and {len(lost) - 1} others), for which a model of its config "
            "(config.json) has no place: the config is not the one that the folder was written with"
        )
