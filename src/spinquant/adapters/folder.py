"""Folders of adapters and draft heads, rotated into new folders of the same layout."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor

from spinquant.adapters.base_model import Target, target_of
from spinquant.adapters.draft_heads import head_kind, rotate_head
from spinquant.adapters.lora import rotate_lora
from spinquant.checkpoint.atomic import check_replaceable, write_file
from spinquant.checkpoint.folder import SINGLE, copied_files, folder_of, weights_digest
from spinquant.checkpoint.run_directory import atomic_folder
from spinquant.errors import CheckpointError

ADAPTERS = "adapters"  # beside the weights of a rotated model
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def rotate_adapter(
    rotated: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Rotate an adapter or a draft head for a model that was rotated before; what was done, as JSON.

    rotated: a folder that spinquant wrote, quantized or not. adapter: a folder, of peft (LoRA) or of an EAGLE-3 head,
    that was trained for the original of that model. model: the original, by default the one that the record of
    `rotated` names. The result appears complete or not at all. Raises CheckpointError for folders that cannot be read,
    and RotationError, with the reason, for what has no exact counterpart in the rotated model.
    """
    folder = folder_of(adapter)
    check_replaceable(out, force=force, source=folder)
    check_replaceable(out, force=True, source=rotated)
    with target_of(rotated, model) as target, atomic_folder(out, force=force) as made:
        return write_adapter(folder, target, made)


def write_adapter(folder: Path, target: Target, out: Path) -> dict[str, Any]:
    """Write what rides along with a target into `out`, an empty folder; what was done, as JSON."""
    if (folder / ADAPTER_CONFIG).is_file():
        kind, about, tensors, metadata = "lora", *_read(folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        rotated = rotate_lora(about, tensors, target)
        # A revision is one of the model's that the name stood for.
        stale = {"base_model_name_or_path": target.name, "revision": None}
        changed = {key: stale.get(key, value) for key, value in about.items()}
        config, weights = ADAPTER_CONFIG, ADAPTER_WEIGHTS
    elif (folder / "config.json").is_file():
        about, tensors, metadata = _read(folder, "config.json", SINGLE)
        kind, changed, config, weights = head_kind(about, tensors), about, "config.json", SINGLE
        rotated = rotate_head(kind, about, tensors, target)
    else:
        raise CheckpointError(
            f"{folder} is neither an adapter of peft ({ADAPTER_CONFIG}) nor a draft head (config.json)"
        )
    moved = [name for name, tensor in tensors.items() if rotated[name] is not tensor]
    write_file(out / weights, save_bytes({n: t.contiguous() for n, t in rotated.items()}, metadata or None))
    write_file(out / config, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())
    for path in copied_files(folder):
        write_file(out / path, folder / path)
    return {"kind": kind, "source": str(folder), "tensors": len(tensors), "rotated": len(moved)}


def read_adapters(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Folders of adapters by the name that each gets beside the model, before any work.

    Raises CheckpointError for one that does not exist, and for two of one name.
    """
    found: dict[str, Path] = {}
    for given in folders:
        folder = folder_of(given)
        name = folder.resolve().name
        if name in found:
            raise CheckpointError(f"two adapters are called {name!r}: {found[name]} and {folder}. Rename one of them")
        found[name] = folder
    return found


def adapter_digests(folders: Mapping[str, Path]) -> dict[str, str]:
    """What tells the adapters of one run from those of another."""
    return {name: weights_digest(folder) for name, folder in folders.items()}


def _read(folder: Path, config: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What a folder's config says, its tensors, and what their file says beside them."""
    try:
        about = json.loads((folder / config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / config} is not valid JSON: {error}") from None
    if not (folder / weights).is_file():
        raise CheckpointError(
            f"{folder} has no {weights}. Pickled weights can run code when they are loaded, and are not read: convert "
            "them with safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)"
        )
    try:
        with safe_open(folder / weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / weights} is corrupted or unreadable: {error}. Download it again.") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name!r} of {folder / weights} holds values that are NaN or infinite")
    return about, tensors, metadata
