"""Text to tokens, and what a model computes on them.

A text is named by a string: a file, `manual` (the Python manual that every Python carries, for work without a
network), `wikitext`, or `dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]]` from the Hugging Face hub. The default, `auto`,
takes wikitext when the `datasets` extra is installed and the hub answers, else the manual.
"""

import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import TextError
from spinquant.models.capture import device_of

WIKITEXT = "dataset:Salesforce/wikitext:wikitext-2-raw-v1:test:text"
HUB_TIMEOUT = 3.0  # seconds
GENERATED_AT_ONCE = 16  # samples


def load_text(source: str = "auto") -> tuple[str, str]:
    """(name, text) of a source; the name says what was really read, for the record.

    Raises TextError when the file or dataset cannot be read, or holds no text.
    """
    if source == "auto":
        source = "wikitext" if find_spec("datasets") and hub_reachable() else "manual"
    if source == "manual":
        from pydoc_data.topics import topics

        return "manual", "\n\n".join(topics[name] for name in sorted(topics))
    if source == "wikitext" or source.startswith("dataset:"):
        return _load_dataset(WIKITEXT if source == "wikitext" else source)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"cannot read text {source!r}: {error}. Expected a UTF-8 file, manual, wikitext, or dataset:NAME"
        ) from None
    if not text.strip():
        raise TextError(f"text file {source!r} is empty")
    return path.name, text


def _load_dataset(source: str) -> tuple[str, str]:
    name, config, split, column = [*source.split(":")[1:], "", "", "", ""][:4]
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            f"text {source!r} needs the datasets extra (pip install 'spinquant[datasets]'), or use --text manual"
        ) from None
    try:
        rows = load_dataset(name, config or None, split=split or "test")
        text = "\n\n".join(rows[column or "text"])  # pyright: ignore
    except Exception as error:  # the library raises many kinds, from network to parsing
        reason = f"{type(error).__name__}: {error}"
        raise TextError(f"cannot load {source!r}: {reason}. Offline, use --text manual") from error
    return source, text


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers; False at once when the environment says offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except OSError:
        return False


def token_windows(tokenizer: Any, text: str, *, length: int, count: int | None = None) -> Tensor:
    """The text cut into windows that do not overlap: int64, shape (windows, length), at most `count` of them.

    Windows are spread evenly over the text, so that a few of them still see all of it. Every window starts with
    the beginning-of-sequence token where the tokenizer begins every text with it. Raises TextError when the text is
    too short for one window.
    """
    first = tokenizer("x")["input_ids"][0]
    bos = first if first == tokenizer.bos_token_id else None
    room = length if bos is None else length - 1
    if count is not None and count < 1:
        raise TextError(f"{count} windows: expected at least one, or none given for all")
    if room < 1:
        raise TextError(f"a window of {length} tokens has no room for text")
    # verbose=False: a text longer than the model's context is what we want here, not a mistake.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    whole = len(ids) // room
    if whole == 0:
        raise TextError(f"the text has {len(ids)} tokens: too short for one window of {length}. Give a longer text.")
    windows = ids[: whole * room].view(whole, room)
    if count is not None and count < whole:
        windows = windows[torch.linspace(0, whole - 1, count).round().long()]
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


@dataclass(frozen=True)
class CalibrationText:
    """Which text a model is calibrated on: at most `samples` windows of `length` tokens, from a text as in `load_text`.

    `generated` text is sampled from the model itself, with `seed`; so is `auto` where there is no tokenizer.
    """

    text: str = "auto"
    samples: int = 128
    length: int = 512
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1 or self.length < 2:
            raise TextError(f"{self.samples} samples of {self.length} tokens: expected at least 1 sample of 2 tokens")


def check_length(config: Any, source: CalibrationText) -> None:
    """Raise TextError for samples that are longer than the context that a model's config names."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and source.length > context > 0:
        raise TextError(
            f"samples of {source.length} tokens are longer than the {context} that this model is made for "
            "(max_position_embeddings): give a shorter --sample-length"
        )


def calibration_tokens(
    model: Any, tokenizer: Any, source: CalibrationText, *, progress: Callable[[int, int], None] | None = None
) -> tuple[str, Tensor]:
    """(name, tokens) of a calibration text; int64 (samples, length).

    model: None where no text is generated. Raises TextError when the text cannot be read, is shorter than one sample,
    or needs a tokenizer that is not there, and what `check_length` raises.
    """
    if model is not None:
        check_length(model.config, source)
    if source.text == "generated" or (tokenizer is None and source.text == "auto"):
        return "generated", generate_tokens(model, source, progress=progress)
    if tokenizer is None:
        raise TextError(f"the model has no tokenizer to read {source.text!r} with: use text the model generates itself")
    name, text = load_text(source.text)
    return name, token_windows(tokenizer, text, length=source.length, count=source.samples)


@torch.no_grad()
def generate_tokens(
    model: Any, source: CalibrationText, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Text sampled from a model at temperature one, int64 (samples, length): every sample starts with another token.

    The beginning-of-sequence token comes first where the config has one. The same seed gives the same text.
    """
    config = model.config.get_text_config()
    device = device_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(source.seed)
        first = torch.randint(0, config.vocab_size, (source.samples, 1))
        if isinstance(config.bos_token_id, int):
            first = torch.cat([torch.full_like(first, config.bos_token_id), first], dim=1)
        found = []
        for start in range(0, source.samples, GENERATED_AT_ONCE):
            begun = first[start : start + GENERATED_AT_ONCE].to(device)
            found.append(
                model.generate(
                    begun,
                    attention_mask=torch.ones_like(begun),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_length=source.length,
                    max_length=source.length,
                    pad_token_id=config.pad_token_id or 0,
                ).cpu()
            )
            if progress:
                progress(min(start + GENERATED_AT_ONCE, source.samples), source.samples)
    return torch.cat(found)[:, : source.length]
