"""The part of a model card that describes the source: its own card, its Hub id, and inherited metadata.

A broken card of the source never fails a run: what can be read of it is kept, and a note states what was left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spinquant.checkpoint.untrusted import leads_out
from spinquant.entrypoints.local_paths import hub_id, source_name
from spinquant.entrypoints.markdown import code, fence

CARD = "README.md"
LARGEST_CARD = 1 << 20  # bytes
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# Tags of other formats of the weights, which are not copied.
FORMAT_TAGS = {"pytorch", "tf", "jax", "rust", "onnx", "openvino", "gguf", "coreml", "tflite", "mlx", "tensorboard"}


def read_card(folder: str | Path) -> str | None:
    """The text of a model folder's README.md; a note in its place if it cannot be kept, None if there is none."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    if leads_out(Path(folder), path):
        return f"*The source's {CARD} is a link out of its folder, so it is not repeated here.*\n"
    try:
        size = path.stat().st_size
        if size > LARGEST_CARD:
            return f"*The source's {CARD} has {size} bytes, more than the {LARGEST_CARD} that are copied here.*\n"
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return f"*The source's {CARD} is not UTF-8 text, so it is not repeated here.*\n"
    except OSError:
        return f"*The source's {CARD} could not be read, so it is not repeated here.*\n"
    if "\0" in text:
        return f"*The source's {CARD} contains zero bytes, so it is not text, and is not repeated here.*\n"
    return text


def split_card(text: str | None) -> tuple[dict[str, Any], str, str | None]:
    """(metadata, text without front matter, a note if the metadata were ignored) of a model card."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = (text or "").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return {}, text, None
    try:
        found = ModelCard(block.group(0), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's own errors, RecursionError, and what the parser raises for unexpected keys and values
        note = "*The metadata of the source's card are invalid and were ignored:*"
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
    """The YAML block at the top of a card: our metadata, and what is inherited from the source's."""
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
    """A metadata value if it is a word or a list of words, else None."""
    if language:  # YAML 1.1 reads Norwegian, `no`, as false
        value = "no" if value is False else value
        value = ["no" if one is False else one for one in value] if isinstance(value, list) else value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value or None
    return value if isinstance(value, str) and value else None


def _base_model(source: str, metadata: Mapping[str, Any]) -> str | list[str] | None:
    """The Hub id of a source, else the base model that its card names, else the name of its folder."""
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


def linked(source: str) -> str:
    """A source as the subject of a sentence: a link to the Hub, or the name of its folder."""
    found = hub_id(source)
    return f"[{found}](https://huggingface.co/{found})" if found else f"The model of folder {code(source_name(source))}"
