"""Inspect a Hugging Face model folder or hub id: config, tokenizer, safetensors headers, files to copy; and check it.

A folder has a config.json, safetensors shards with or without an index, and tokenizer files. A hub id is downloaded
first (only its headers, for a plan). Pickle checkpoints can run code when they are loaded, so they are refused unless
they are asked for, and `trust_remote_code` stays off. Weights are read by `reader.py`.
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from spinquant.architectures import FamilyLike, use_family
from spinquant.architectures.model_classes import is_causal
from spinquant.checkpoint.atomic import first_line
from spinquant.checkpoint.untrusted import BESIDE, check_inside, file_in, read_json
from spinquant.errors import CheckpointError
from spinquant.plan import Plan

MODULES = "modules.json"  # of sentence-transformers
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
RECORD, ROTATIONS = "record.json", "rotations.safetensors"  # in the folder `spinquant` beside the weights
ORIGIN = ".source"  # in that folder, the path of a local source; hidden files are not pushed to the hub
# Suffixes of weight files.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite")
_SAMPLES = 64  # pieces of a weight file that `weights_sample` hashes
MOST_LAYERS = 10_000
# Files beside a config in which ModelOpt, AutoGPTQ and AutoAWQ describe how its weights are quantized.
DESCRIBED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def is_local(model: str | Path) -> bool:
    """Whether a model is a local folder rather than a hub id."""
    path = Path(model)
    return path.exists() or path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1


def folder_of(model: str | Path, *, allow_pickle: bool = False) -> Path:
    """The folder of a model; a hub id is downloaded to the hub's cache first.

    Raises CheckpointError when the folder does not exist or cannot be downloaded.
    """
    if is_local(model):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"model folder {str(model)!r} does not exist (or is not a folder)")
        return folder
    from huggingface_hub import snapshot_download

    skipped = ["*.gguf", "*.onnx", *([] if allow_pickle else ["*.bin", "*.pt", "*.pth"])]
    try:
        return Path(snapshot_download(str(model), ignore_patterns=skipped))
    except Exception as error:  # the hub's client raises many kinds, from its own to those of the network library
        reason = first_line(error)
        raise CheckpointError(f"{str(model)!r} is not a local folder, and downloading it failed: {reason}") from None


def load_config(model: str | Path, *, family: FamilyLike | None = None) -> Any:
    """The transformers config of a folder or hub id; family: a family file to attach to it.

    Raises CheckpointError if config.json is missing, is not JSON, or names no architecture that transformers knows.
    """
    if is_local(model):
        folder = folder_of(model)
        path = file_in(folder, "config.json")
        if not path.exists():
            raise CheckpointError(f"{str(model)!r} has no config.json: expected a Hugging Face model folder")
        about = read_json(path)
        if not isinstance(about.get("model_type"), str):
            raise CheckpointError(
                f"{path} names no architecture (no model_type): expected the config of a transformers causal LM"
            )
        _check_sizes(about, path)
    try:
        place = folder_of(model) if is_local(model) else model
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # config classes raise what a wrong value leads to
        here = "" if is_local(model) else ", which is not a local folder"
        raise CheckpointError(f"cannot read the config of {str(model)!r}{here}: {first_line(error)}") from None
    _check_parts(config, str(model))
    use_family(config, family)
    return config


def _check_parts(config: Any, model: str) -> None:
    """Refuse a part of a config that is no config, and a dtype that is none."""
    parts = {"text_config": config.get_text_config()}
    parts |= {name: getattr(config, name, None) for name in config.sub_configs}
    for name, part in parts.items():
        if part is not None and not isinstance(part, PretrainedConfig):
            raise CheckpointError(f"config.json of {model!r} has {name} = {reprlib.repr(part)}: expected a config")
        for one in (config, part):
            dtype = getattr(one, "dtype", None)
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise CheckpointError(
                    f"config.json of {model!r} has dtype = {reprlib.repr(dtype)}: expected a name such as 'bfloat16'"
                )


def _check_sizes(about: Any, path: Path) -> None:
    """Refuse numbers of layers for which a config class would fill the memory with lists."""
    for key, value in about.items():
        if isinstance(value, dict):
            _check_sizes(value, path)
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise CheckpointError(f"{path} has {key} = {value}: expected at most {MOST_LAYERS}")


def read_headers(model: str | Path) -> dict[str, TensorInfo]:
    """Read names, shapes and dtypes of all tensors from safetensors headers, without reading weights.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub, of which only the headers are downloaded.

    Returns:
        Shape, dtype and file by tensor name.

    Raises:
        CheckpointError: A shard is missing or corrupted, lacks a tensor that the index lists, or there are only pickled
            weights.

    Example:
        >>> import spinquant, tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ...     headers = spinquant.read_headers(folder)
        >>> headers["model.embed_tokens.weight"]
        TensorInfo(shape=(64, 32), dtype='F32', file='model.safetensors')
        >>> plan = spinquant.make_plan(config, {name: info.shape for name, info in headers.items()})
    """
    if not is_local(model):
        return _hub_headers(str(model))
    folder = folder_of(model)
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        path = folder / file
        try:
            with path.open("rb"):  # safetensors has one word for every reason
                pass
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():
                    part = shard.get_slice(name)
                    found[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)
        except PermissionError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}. Change its permissions") from None
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{path} is corrupted or unreadable: {reason}. Download it again.") from None
    index = folder / INDEX
    if index.is_file():
        promised = _weight_map(folder)
        lost = sorted(name for name in promised if name not in found)
        if lost:
            raise CheckpointError(f"{index} lists tensor {lost[0]!r}, which {promised[lost[0]]} does not contain")
    return found


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors shards of a folder. Raises CheckpointError when one is missing."""
    if (folder / INDEX).is_file():
        files = sorted(set(_weight_map(folder).values()))
        missing = [file for file in files if not file_in(folder, file).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(files)} weight shards, the first is {missing[0]}"
            )
        return files
    if file_in(folder, SINGLE).is_file():
        return [SINGLE]
    if has_pickles_only(folder):
        raise CheckpointError(
            f"{folder} holds pickle weights only (pytorch_model.bin), which can run code when loaded. Convert them to "
            "safetensors, or, where a command has the option, pass --allow-pickle if you trust their origin."
        )
    raise CheckpointError(_without_weights(folder))


def _without_weights(folder: Path) -> str:
    """Why a folder without the usual weight files is refused, and the way out."""
    expected = f"expected {SINGLE}, or {INDEX} and the shards that it names"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        return f"{folder} holds no weights: {expected}"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter, without the weights of its base model ({shards[0]} alone): {expected}"
    if len(shards) == 1:
        return (
            f"{folder} has one weight file, {shards[0]}: {expected}. If it holds the whole model in the format of "
            f"transformers, rename it to {SINGLE}; otherwise download the folder again"
        )
    return (
        f"{folder} has {len(shards)} weight files ({shards[0]}, ...) and no index, which says which tensors belong to "
        f"the model: {expected}. Download {INDEX} from where the shards are from"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of every tensor, by the index of a folder."""
    index = file_in(folder, INDEX)
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} is not a safetensors index: expected an object weight_map")
    checked: set[str] = set()  # an index may list ten thousands of experts in a few files
    for name, file in found.items():
        if isinstance(file, str) and file in checked:
            continue
        file_in(folder, file)
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r} as the shard of {name!r}: expected a .safetensors file")
        checked.add(file)
    return found


def has_pickles_only(folder: Path) -> bool:
    """Whether a folder's weights are pickles, with no safetensors beside them."""
    safe = (folder / INDEX).is_file() or (folder / SINGLE).is_file()
    return not safe and any((folder / file).is_file() for file in PICKLES)


def _hub_headers(repo: str) -> dict[str, TensorInfo]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(repo)
    except Exception as error:  # the hub's client raises many kinds, from its own to those of the network library
        raise CheckpointError(f"cannot read the safetensors headers of {repo!r}: {first_line(error)}") from None
    return {
        name: TensorInfo(tuple(info.shape), info.dtype, file)
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }


def check_device(device: torch.device | str) -> None:
    """Raise CheckpointError when torch cannot use a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CheckpointError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from None


def check_finite(model: nn.Module, origin: str) -> None:
    """Raise CheckpointError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta:
            continue
        # A finite sum proves that all numbers are finite. Otherwise it may have overflowed, so each number is checked.
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise CheckpointError(
                f"tensor {name!r} of {origin!r} holds {bad} values that are NaN or infinite (shape "
                f"{tuple(parameter.shape)}): the checkpoint is broken, download it again"
            )


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of a folder or hub id, without running code of the checkpoint.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub.

    Returns:
        The tokenizer of transformers.

    Raises:
        CheckpointError: There is no tokenizer, or it cannot be loaded. transformers alone would make an empty one for
            some architectures.

    Example:
        >>> import spinquant, tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        ...     spinquant.load_tokenizer(folder)("b")["input_ids"]
        [1]
    """
    folder = folder_of(model)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        # For some architectures transformers would make an empty tokenizer.
        raise CheckpointError(f"{str(model)!r} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    from transformers import AutoTokenizer  # here, because few callers need a tokenizer: 0.16 s of CPU

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise CheckpointError(f"{str(model)!r} has no usable tokenizer: {first_line(error)}") from None


def plan_in(folder: Path, config: Any, plan: Plan) -> Plan:
    """The plan of a folder's model; R1 is refused for a causal LM that sentence-transformers uses without its head."""
    if not (folder / MODULES).is_file() or not is_causal(config):
        return plan
    reason = (
        f"the folder has {MODULES}, so sentence-transformers uses the output of the last norm, which R1 would change, "
        f"instead of the logits. R2, R3, R4 and online R1 leave it as it is; remove {MODULES} if only the logits are "
        "used"
    )
    return replace(plan, refused=(*plan.refused, ("R1", reason)))


def check_unquantized(config: Any, model: str | Path, folder: Path | None = None) -> None:
    """Raise CheckpointError if a model is described as quantized: in its config, at any depth, or in a file beside it.

    folder: where the model's files are, for a hub id.
    """
    found = _quantization_in(config.to_dict())
    if found:
        raise CheckpointError(
            f"{str(model)!r} is quantized already ({found}): rotate and quantize the 16-bit model it came from"
        )
    place = folder or (folder_of(model) if is_local(model) else None)
    beside = next((name for name in DESCRIBED if place is not None and (place / name).is_file()), None)
    if beside:
        raise CheckpointError(
            f"{str(model)!r} is described as quantized by {beside}, which runtimes read: rotate and quantize the "
            f"16-bit model it came from, or remove {beside} if its weights are 16-bit"
        )


def _quantization_in(values: Mapping[str, Any]) -> str | None:
    """The method of the first quantization that a config or a part of it describes; None without one."""
    for key, value in values.items():
        if key in ("quantization_config", "compression_config") and value:
            about = value if isinstance(value, Mapping) else value.to_dict()
            return str(about.get("quant_method", key))
        if isinstance(value, Mapping) and (inside := _quantization_in(value)):
            return inside
    return None


def copied_files(folder: Path) -> list[Path]:
    """The files to copy beside new weights, relative to the folder: no weights, no hidden files, no `spinquant/`.

    Adapters inside the folder are left out, since they fit the original weights only; so are folders inside it that
    spinquant has made from the model.
    """
    adapters = {path.parent for path in folder.rglob("adapter_config.json")} - {folder}
    made = {path.parent.parent for path in folder.rglob(f"{BESIDE}/{RECORD}")}
    made = (made | {path.parent for path in folder.rglob("learned.json")}) - {folder}
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or inside.parts[0] == BESIDE or not path.is_file() or path.parent in adapters:
            continue
        if made.intersection(path.parents):
            continue
        check_inside(folder, path)
        written = inside in (Path("config.json"), Path("adapter_config.json"))
        # The index of a variant has its name inside: model.safetensors.index.fp16.json.
        if not written and path.suffix not in WEIGHTS and not fnmatch(path.name, "*.index*.json"):
            found.append(inside)
    return found


def weights_sample(model: str | Path) -> str:
    """Fingerprint of a model's weights, independent of their location: hash of file sizes and sampled bytes."""
    found = hashlib.sha256()
    folder = folder_of(model)
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(_SAMPLES):
                file.seek(part * size // _SAMPLES)
                found.update(file.read(512))
    return found.hexdigest()[:16]


def weights_digest(model: str | Path) -> str:
    """Fingerprint of the current files of a model folder: hash of names, sizes and modification times."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder_of(model).iterdir() if p.is_file()]
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]
