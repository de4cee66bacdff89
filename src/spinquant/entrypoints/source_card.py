"""What a model card says of its source: the source's own card, its id on the Hub, and metadata that are inherited.

A card holds no absolute path of the machine that wrote it: of a folder the name is told, or the Hub id of the snapshot
in the Hub's cache that it is. A source's card that is broken never fails a run: what can be read of it is kept, and a
note says what was left out.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from spinquant.checkpoint.folder import is_local
from spinquant.entrypoints.markdown import code, fence

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# Other formats of the weights, which stay behind.
FORMAT_TAGS = {"pytorch", "tf", "jax", "rust", "onnx", "openvino", "gguf", "coreml", "tflite", "mlx", "tensorboard"}
# Options of the command line that do not decide what is written.
FLAGS, WITH_VALUE = {"--force", "--debug", "--json", "--quiet", "--private", "--public"}, {"--push-to-hub"}


def read_card(folder: str | Path) -> str | None:
    """The text of a model folder's README.md; a note in its place where it cannot be kept, None where there is none."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    try:
        size = path.stat().st_size
        if size > LARGEST_CARD:
            return f"*The source's {CARD} has {size} bytes, more than the {LARGEST_CARD} that are repeated here.*\n"
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return f"*The source's {CARD} is not UTF-8 text, so it is not repeated here.*\n"
    except OSError:
        return f"*The source's {CARD} could not be read, so it is not repeated here.*\n"
    if "\0" in text:
        return f"*The source's {CARD} holds zero bytes, so it is not text, and is not repeated here.*\n"
    return text


def split_card(text: str | None) -> tuple[dict[str, Any], str, str | None]:
    """(metadata, text without front matter, a note where the metadata were ignored) of a model card."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = (text or "").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return {}, text, None
    try:
        found = ModelCard(block.group(0), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's own errors, RecursionError, and what the parser raises for unexpected keys and values
        note = "*The metadata of the source's card are not valid, and were ignored:*"
        return {}, text[block.end() :], f"{note}\n\n{fence('yaml', block.group(2))}"
    return found, text[block.end() :], None


def front_matter(
    source: str,
    metadata: Mapping[str, Any],
    *,
    library_name: str,
    tags: Sequence[str],
    base_model_relation: str | None = None,
) -> str:
    """The YAML block at the top of a card: ours, and what is inherited from the source's metadata."""
    from huggingface_hub import ModelCardData

    kept: dict[str, Any] = {
        key: value for key in INHERITED if (value := _words(metadata.get(key), language=key == "language"))
    }
    theirs = _words(metadata.get("tags"))  # huggingface_hub 1 cuts a tag that is in no list into letters
    inherited = [tag for tag in theirs if len(tag) > 1 and tag not in FORMAT_TAGS] if isinstance(theirs, list) else []
    base = _base_model(source, metadata)
    data = ModelCardData(
        base_model=base,
        library_name=library_name,
        tags=[*tags, *inherited],
        base_model_relation=base_model_relation if base else None,
        **kept,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _words(value: Any, *, language: bool = False) -> str | list[str] | None:
    """Metadata that are a word, or a list of words; None for anything else."""
    if language:  # YAML 1.1 reads Norwegian, `no`, as false
        value = "no" if value is False else value
        value = ["no" if one is False else one for one in value] if isinstance(value, list) else value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value or None
    return value if isinstance(value, str) and value else None


def _base_model(source: str, metadata: Mapping[str, Any]) -> str | list[str] | None:
    """Hub id of a source, else the base model that its card names, else the name of its folder."""
    if (found := hub_id(source)) is not None:
        return found
    named = _words(metadata.get("base_model"))
    ids = [one for one in ([named] if isinstance(named, str) else named or []) if _is_id(one)]
    if ids:
        return ids[0] if isinstance(named, str) else ids
    name = source_name(source)
    return name if _is_id(name) else None


def _is_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_id(source: str) -> str | None:
    """The Hub id of a source: itself, or that of the snapshot in the Hub's cache that it is."""
    if not is_local(source):
        return source
    for place, below in zip(*(Path(source).expanduser().absolute().parts[i:] for i in (0, 1)), strict=False):
        if place.startswith("models--") and below == "snapshots":
            return "/".join(place.split("--")[1:])
    return None


def source_name(source: str) -> str:
    """The name of a source, without where it lies."""
    found = hub_id(source)
    return found.split("/")[-1] if found else Path(source).expanduser().resolve().name or "model"


def linked(source: str) -> str:
    """A source in a sentence: a link to the Hub, or the name of a folder."""
    found = hub_id(source)
    return f"[{found}](https://huggingface.co/{found})" if found else f"The model of folder {code(source_name(source))}"


def public_command(command: str) -> str:
    """A command line without absolute paths, of which names stay, and without options that decide nothing written."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed
        words = command.split()
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.split("=", 1)[0]
        if not skip and word not in FLAGS and name not in WITH_VALUE:
            kept.append(public(word))
        skip = word in WITH_VALUE
    return shlex.join(kept)


def public(word: str) -> str:
    """Absolute paths in a word, alone or behind one of = , : become names."""

    def name(match: re.Match[str]) -> str:
        path = match.group(2)
        last = PureWindowsPath(path).name if "\\" in path or path[1:2] == ":" else PurePosixPath(path).name
        return match.group(1) + (last or ".")

    return re.sub(r"(^|[=,:])(?!//)((?:~|/|[A-Za-z]:[\\/])[^=,]*)", name, word)
