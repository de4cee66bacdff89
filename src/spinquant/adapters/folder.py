"""Rotate folders of LoRA adapters and draft heads into new folders of the same layout."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_bytes
from torch import Tensor

from spinquant.adapters.base_model import BaseModel, open_base_model, rotations_of
from spinquant.adapters.draft_heads import head_kind, rotate_head
from spinquant.adapters.lora import rotate_lora
from spinquant.checkpoint.atomic import check_replaceable, write_file
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.checkpoint.folder import BESIDE, RECORD, SINGLE, copied_files, folder_of, weights_digest
from spinquant.checkpoint.safetensors_io import read_tensors
from spinquant.checkpoint.untrusted import file_in, read_json
from spinquant.compute.hashing import digest
from spinquant.errors import CheckpointError, RotationError
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import to_save

ADAPTERS = "adapters"  # subfolder of a rotated model's folder
ROTATED_FOR = "spinquant_rotated_for"  # in the metadata of the weights, the fingerprint of the rotations
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def rotate_adapter(
    rotated: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Rotate a LoRA adapter or a draft head to match a rotated base model.

    The adapter was trained for the original model; the result gives the same outputs with the rotated one. The output
    folder is written atomically.

    Args:
        rotated: Folder of the rotated model, written by spinquant, quantized or not.
        adapter: Folder of a LoRA adapter (peft) or an EAGLE-3 draft head, with weights in safetensors format.
        out: Folder to write.
        model: The original model, a folder or hub id. Default: the one that the record in `rotated` names.
        force: Replace `out` if it exists. Default: False.

    Returns:
        What was done, ready for JSON: `kind` (lora, eagle3, eagle or medusa), `source`, the number of `tensors`, and
        how many of them were `rotated`.

    Raises:
        CheckpointError: A folder cannot be read, or `out` exists.
        RotationError: The adapter has no exact equivalent in the rotated model, with the reason; or `model` is not
            the original.

    Example:
        >>> import json, pathlib, spinquant, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> temporary = tempfile.TemporaryDirectory()
        >>> folder = pathlib.Path(temporary.name)
        >>> model.save_pretrained(folder / "model")
        >>> result = spinquant.rotate_folder(folder / "model", folder / "rotated", spinquant.RotationSpec())
        >>> (folder / "lora").mkdir()
        >>> about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        >>> written = (folder / "lora/adapter_config.json").write_text(json.dumps(about))
        >>> q = "base_model.model.model.layers.0.self_attn.q_proj"
        >>> update = {f"{q}.lora_A.weight": torch.randn(2, 32), f"{q}.lora_B.weight": torch.randn(32, 2)}
        >>> save_file(update, folder / "lora/adapter_model.safetensors")
        >>> spinquant.rotate_adapter(folder / "rotated", folder / "lora", folder / "rotated-lora")
        {'kind': 'lora', 'source': '...lora', 'tensors': 2, 'rotated': 1}
        >>> temporary.cleanup()
    """
    folder = folder_of(adapter)
    check_replaceable(out, force=force, source=folder)
    check_replaceable(out, force=True, source=rotated)
    with open_base_model(rotated, model) as base, atomic_folder(out, force=force) as made:
        return write_adapter(folder, base, made)


def write_adapter(folder: Path, base: BaseModel, out: Path) -> dict[str, Any]:
    """Rotate an adapter or draft head for its base model into `out`, an empty folder; see `rotate_adapter`."""
    if (folder / ADAPTER_CONFIG).is_file():
        kind, about, tensors, metadata = "lora", *_read(folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        _check_base(about, metadata, base)
        rotated = rotate_lora(about, tensors, base)
        # The revision is one of the original model, which the config no longer names.
        stale = {"base_model_name_or_path": base.name, "revision": None}
        changed = {key: stale.get(key, value) for key, value in about.items()}
        config, weights = ADAPTER_CONFIG, ADAPTER_WEIGHTS
    elif (folder / "config.json").is_file():
        about, tensors, metadata = _read(folder, "config.json", SINGLE)
        _check_base({}, metadata, base)
        kind, changed, config, weights = head_kind(about, tensors), about, "config.json", SINGLE
        rotated = rotate_head(kind, about, tensors, base)
    else:
        raise CheckpointError(
            f"{folder} is neither a LoRA adapter of peft (no {ADAPTER_CONFIG}) nor a draft head (no config.json)"
        )
    moved = [name for name, tensor in tensors.items() if rotated[name] is not tensor]
    marked = {**metadata, ROTATED_FOR: _fingerprint(base.rotations)}
    write_file(out / weights, save_bytes({n: t.contiguous() for n, t in rotated.items()}, marked))
    write_file(out / config, (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())
    for path in copied_files(folder):
        write_file(out / path, folder / path)
    return {"kind": kind, "source": str(folder), "tensors": len(tensors), "rotated": len(moved)}


def _check_base(about: Mapping[str, Any], metadata: Mapping[str, str], base: BaseModel) -> None:
    """Raise RotationError for what was trained on the rotated model, or was rotated before: it would be rotated twice.

    about: the config of a LoRA adapter.
    """
    named = about.get("base_model_name_or_path")
    if isinstance(named, str) and named and _same_model(named, base.name):
        raise RotationError(
            f"the adapter was trained on {named!r}, the rotated model itself, or was rotated for it (as its "
            "base_model_name_or_path says): use it as it is. Only adapters of the original model are rotated"
        )
    mark, folder = metadata.get(ROTATED_FOR), base.source.folder
    if mark is not None and (not (folder / BESIDE / RECORD).is_file() or mark != _fingerprint(rotations_of(folder))):
        raise RotationError(
            "the adapter has been rotated already: use it as it is with the model that it was rotated for, or rotate "
            "the adapter that it was made from"
        )


def _same_model(name: str, other: str) -> bool:
    """Whether two names of models, hub ids or paths, are those of one."""
    return name == other or Path(name).expanduser().resolve() == Path(other).expanduser().resolve()


def _fingerprint(rotations: Mapping[str, Transform]) -> str:
    """A hash of rotations: 16 hexadecimal digits."""
    about, tensors = to_save(rotations)
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(f"{name} {digest(tensors[name])}".encode())
    return found.hexdigest()[:16]


def read_adapters(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Adapter folders by the names of their subfolders in the rotated model's folder.

    Raises CheckpointError for a folder that does not exist, and for two of the same name.
    """
    found: dict[str, Path] = {}
    for given in folders:
        folder = folder_of(given)
        name = folder.resolve().name
        if name in found:
            raise CheckpointError(f"two adapters are named {name!r}: {found[name]} and {folder}. Rename one of them")
        found[name] = folder
    return found


def adapter_digests(folders: Mapping[str, Path]) -> dict[str, str]:
    """Checksums of the adapters' weights by name, for the fingerprint of a run."""
    return {name: weights_digest(folder) for name, folder in folders.items()}


def _read(folder: Path, config: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """A folder's config, its tensors, and the metadata of their safetensors file."""
    about = read_json(file_in(folder, config))
    if not (folder / weights).is_file():
        raise CheckpointError(
            f"{folder} has no {weights}. Pickled weights can run code when they are loaded, and are not read: convert "
            "them with safetensors.torch.save_file(torch.load(FILE, weights_only=True), ...)"
        )
    tensors, metadata = read_tensors(file_in(folder, weights))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"tensor {name!r} of {folder / weights} holds values that are NaN or infinite")
    return about, tensors, metadata
