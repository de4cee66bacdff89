"""Write the files beside the weights: config.json, index, model card, record, and copies of the source's other files.

Files that are not weights are copied unchanged (tokenizer, license, chat template, ...), except config.json and
README.md. Other formats of the same weights (pickles, GGUF, consolidated.safetensors, ...) are left out: they would
still contain the unrotated model.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from spinquant.architectures import RECORDED
from spinquant.checkpoint.atomic import write_file
from spinquant.checkpoint.folder import BESIDE, INDEX, ORIGIN, RECORD, ROTATIONS, SINGLE, copied_files, is_local
from spinquant.checkpoint.reader import Source, fp8_block
from spinquant.checkpoint.untrusted import read_json
from spinquant.entrypoints.loading import auto_class
from spinquant.entrypoints.local_paths import public_record
from spinquant.entrypoints.model_card import model_card
from spinquant.entrypoints.result import Result
from spinquant.entrypoints.source_card import CARD, read_card
from spinquant.rotations.serialization import to_save
from spinquant.streaming.shards import Shard


def write_config_and_copies(source: Source, shards: Sequence[Shard], folder: Path, changes: Mapping[str, Any]) -> None:
    """Write the index, the config with its changes, and copies of the source's other files."""
    names = {shard.file: shard.layout for shard in shards}
    if list(names) != [SINGLE]:
        sizes = sum(torch.Size(s).numel() * d.itemsize for layout in names.values() for d, s in layout.values())
        weight_map = {name: file for file, layout in names.items() for name in layout}
        index = {
            "metadata": {**source.index_metadata, "total_size": sizes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    config = read_json(source.folder / "config.json")
    if fp8_block(config) is not None:
        del config["quantization_config"]
        changes = {"dtype": str(dtype_of(config)).removeprefix("torch."), **changes}
    _change(config, changes)
    write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    copy_files(source.folder, folder)


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a source that are neither weights nor written anew."""
    for path in copied_files(source):
        if path != Path(CARD):  # written by `write_record`, which appends the source's card
            write_file(folder / path, source / path)


def write_record(
    result: Result, folder: Path, *, format: str, source: Path | None = None, command: str | None = None
) -> None:
    """Write the rotations, the record of how the folder was made, and its model card.

    Card and record contain no absolute paths, since they may be published. The path of a local source is in a hidden
    file of its own, from which `rotate_adapter` reads it.

    source: folder of the source model, whose card is appended to ours; None for a model in memory of unknown origin,
        which gets no card.
    """
    if source is not None:
        name, original = str(result.notes["source"]), read_card(source)
        loads = auto_class(read_json(folder / "config.json"))
        about = {"source": name, "source_card": original, "command": command, "loads_with": loads}
        card = model_card(result, format=format, **about)
        write_file(folder / CARD, card.encode())
        if is_local(name):
            write_file(folder / BESIDE / ORIGIN, os.fsencode(Path(name).expanduser().absolute()))
    # In a folder of their own: runtimes load every safetensors file beside the weights.
    write_file(folder / BESIDE / ROTATIONS, save_bytes(to_save(result.rotations)[1]))
    record = json.dumps(public_record(result.record()), indent=1, default=dict)
    write_file(folder / BESIDE / RECORD, (record + "\n").encode())


def _change(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if key in ("quantization_config", RECORDED):
            config[key] = value
            continue
        # Configs of old transformers have torch_dtype; those of models with several parts have it in the text part.
        places = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        keys = [(part, name) for part in places for name in (key, f"torch_{key}") if name in part]
        for part, name in keys or [(config, key)]:
            part[name] = value


def dtype_of(config: Any) -> torch.dtype:
    """The dtype in which an FP8 checkpoint computes, by its config."""
    values = config if isinstance(config, dict) else {"dtype": getattr(config, "dtype", None)}
    found = values.get("dtype") or values.get("torch_dtype")
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if found in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def model_dtype(config: Any, source: Source) -> torch.dtype:
    """The dtype in which transformers would load a checkpoint: that of its config, else the widest in it."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(found, torch.dtype):
        return found
    return widest(stored.dtype for stored in source.tensors.values())


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The widest floating dtype; bfloat16 is coarser than float16."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: (dtype.itemsize, dtype != torch.bfloat16))
