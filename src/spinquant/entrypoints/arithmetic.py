"""The dtype that models of folders compute in (`compute/dtypes.py`), chosen before they are loaded.

It follows from the config and the headers of the weights.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spinquant.checkpoint.folder import PICKLES, TensorInfo, folder_of, has_pickles_only, load_config, read_headers
from spinquant.checkpoint.reader import Source
from spinquant.checkpoint.safetensors_io import DTYPES
from spinquant.compute.distributed import Processes
from spinquant.compute.dtypes import Arithmetic, arithmetic
from spinquant.entrypoints.local_paths import source_name
from spinquant.entrypoints.output_folder import dtype_of, widest
from spinquant.formats.load import load_model
from spinquant.formats.register import METHOD
from spinquant.plan import Plan

_WORD = 32  # bits of the words that quantized weights are packed in


def arithmetic_of(
    *models: str | Path,
    device: torch.device | str,
    wanted: torch.dtype | str | None = None,
    allow_pickle: bool = False,
    processes: Processes | None = None,
) -> list[Arithmetic]:
    """Choose the dtypes that models compute in that are loaded as a whole, side by side.

    Args:
        models: Folders or hub ids.
        device: Device to compute on.
        wanted: The dtype that the user asks for; None or "auto" for the choice of `compute/dtypes.py`.
        allow_pickle: Accept pickled weights.
        processes: Processes of which each loads the models; all follow the choice of the first.
    """
    asked = wanted if isinstance(wanted, torch.dtype) else None
    about = [stored_in(model, allow_pickle) for model in models]
    numbers = sum(count for _, count, _ in about)
    found = []
    for model, (stored, _, fixed) in zip(models, about, strict=True):
        if fixed and asked is None:
            found.append(Arithmetic(stored, "the dtype that the model was quantized in"))
        else:
            found.append(arithmetic(source_name(str(model)), stored, numbers, device, wanted=asked))
    if processes is None:
        return found
    return [Arithmetic.from_dict(one) for one in processes.agree([one.to_dict() for one in found])]


def arithmetic_by_block(
    what: str, source: Source, plan: Plan, stored: torch.dtype, device: torch.device | str, wanted: torch.dtype | None
) -> Arithmetic:
    """Choose the dtype that decoder blocks compute in, of which one is in memory at a time.

    Args:
        what: the work, for the log.
        source: the checkpoint.
        plan: its plan.
        stored: dtype of the checkpoint.
        device: device to compute on.
        wanted: the dtype that the user asks for.
    """
    sizes = {name: torch.Size(tensor.entry.shape).numel() for name, tensor in source.tensors.items()}
    blocks = (sum(n for name, n in sizes.items() if name.startswith(f"{block}.")) for block in plan.blocks)
    numbers = max(blocks, default=0) + max(sizes.values())
    return arithmetic(what, stored, numbers, device, wanted=wanted)


def load_to_compute(
    *models: str | Path, device: str, wanted: torch.dtype | str | None = None, allow_pickle: bool = False
) -> tuple[list[Any], list[Arithmetic]]:
    """Load models that are computed with and not written, side by side, each in the dtype that is chosen for it."""
    found = arithmetic_of(*models, device=device, wanted=wanted, allow_pickle=allow_pickle)
    loaded = [
        load_model(model, dtype=computed.dtype, device=device, allow_pickle=allow_pickle)
        for model, computed in zip(models, found, strict=True)
    ]
    return loaded, found


def stored_in(model: str | Path, allow_pickle: bool) -> tuple[torch.dtype, int, bool]:
    """The dtype that a model is loaded in by default, its number of weights, and whether it loads in no other dtype."""
    folder, config = folder_of(model, allow_pickle=allow_pickle), load_config(model)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if allow_pickle and has_pickles_only(folder):
        stored = dtype or torch.float32
        size = sum((folder / name).stat().st_size for name in _pickles(folder))
        return stored, size // stored.itemsize, False
    headers, quantized = read_headers(folder), getattr(config, "quantization_config", None)
    about = quantized if isinstance(quantized, dict) else vars(quantized) if quantized is not None else {}
    if not isinstance(dtype, torch.dtype):
        dtype = dtype_of(config) if about else widest(DTYPES[info.dtype] for info in headers.values())
    return dtype, _numbers(about, headers.values()), about.get("quant_method", METHOD) != METHOD


def _pickles(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.bin")] or [name for name in PICKLES if (folder / name).is_file()]


def _numbers(about: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> int:
    """How many weights a checkpoint holds; of a native folder's words, each holds several."""
    weights = (about.get("scheme") or {}).get("weights") or {}
    per_word = _WORD // weights.get("bits", _WORD)
    return sum(torch.Size(info.shape).numel() * (per_word if info.dtype == "I32" else 1) for info in tensors)
