"""Load calibration and evaluation text and cut it into windows of tokens.

A text is named by a string: a file, `manual` (the Python manual that comes with every Python, for work without a
network), `wikitext`, or `dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]]` from the Hugging Face hub. The default, `auto`,
takes wikitext when the `datasets` extra is installed and the hub answers, else the manual. Files of JSON Lines and
datasets may hold chats (`chats.py`).
"""

import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.calibration.chats import CHATS, EXPECTED, SUFFIXES, read_rows, taken, text_of
from spinquant.checkpoint.untrusted import check_regular
from spinquant.compute.values import check_integer, check_seed
from spinquant.errors import TextError
from spinquant.models.capture import device_of
from spinquant.models.context import fitting_length
from spinquant.models.modules import check_causal, in_eval_mode

WIKITEXT = "dataset:Salesforce/wikitext:wikitext-2-raw-v1:test:text"
LENGTH = 512  # tokens of a window of calibration text
HUB_TIMEOUT = 3.0  # seconds
GENERATED_AT_ONCE = 16  # samples
MOST_TOKENS = 1 << 28  # of a calibration; published ones take some 10^6
LONGEST_TEXT = 1 << 31  # bytes of a text file


def load_text(source: str = "auto", tokenizer: Any = None) -> tuple[str, str]:
    """Load a text from a file, from a dataset on the Hugging Face hub, or from the Python manual.

    Args:
        source: A path to a UTF-8 file, whose suffix .jsonl, .ndjson or .json says that it holds rows; `manual`, the
            Python manual, which needs no network; `wikitext`, the test split of wikitext-2-raw-v1;
            `dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, with split `test` by default, and without a column the one that
            holds texts or chats; or `auto` (the default), wikitext if `datasets` is installed and the hub answers, else
            the manual. Rows are texts ({"text": ...}) or chats (`messages`, `conversations`, or `prompt` and
            `completion`).
        tokenizer: The model's tokenizer of transformers, whose chat template writes out chats. Default: none, chats are
            refused.

    Returns:
        (name, text); the name records which source was read.

    Raises:
        TextError: The file or dataset cannot be read, holds no text, or holds something else; what was found is named.

    Example:
        >>> import spinquant
        >>> name, text = spinquant.load_text("manual")
        >>> name, len(text) > 1000
        ('manual', True)
    """
    if source == "auto":
        source = "wikitext" if find_spec("datasets") and hub_reachable() else "manual"
    if source == "manual":
        from pydoc_data.topics import topics

        return "manual", "\n\n".join(topics[name] for name in sorted(topics))
    if source == "wikitext" or source.startswith("dataset:"):
        return _load_dataset(WIKITEXT if source == "wikitext" else source, tokenizer)
    path = Path(source)
    if path.suffix.lower() in SUFFIXES:
        return path.name, text_of(read_rows(path), tokenizer, f"text file {source!r}")
    try:
        check_regular(path, LONGEST_TEXT, TextError)
        text = path.read_text(encoding="utf-8")
    except (TextError, OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"cannot read text {source!r}: {error}. Expected a UTF-8 file, manual, wikitext, or dataset:NAME"
        ) from None
    if not text.strip():
        raise TextError(f"text file {source!r} is empty")
    return path.name, text


def _load_dataset(source: str, tokenizer: Any) -> tuple[str, str]:
    name, config, split, column = [*source.split(":")[1:], "", "", "", ""][:4]
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            f"text {source!r} needs the datasets extra (pip install 'spinquant[datasets]'), or use --text manual"
        ) from None
    try:
        rows: Any = load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # the library raises many kinds, from network to parsing
        reason = f"{type(error).__name__}: {error}"
        raise TextError(f"cannot load {source!r}: {reason}. Offline, use --text manual") from error
    wanted = _columns(source, rows.column_names, column)
    if len(rows) == 0:
        raise TextError(f"text {source!r} holds no rows")

    def row_of(i: int) -> Any:
        found = rows[i]
        return found[wanted[0]] if len(wanted) == 1 else {key: found[key] for key in wanted}

    if len(wanted) == 1 and isinstance(row_of(0), str):
        values: Any = enumerate(rows[wanted[0]])  # far faster than row by row
    else:
        values = ((i, row_of(i)) for i in taken(len(rows), row_of(0)))
    return source, text_of([(f"row {i + 1} of {source!r}", v) for i, v in values], tokenizer, f"text {source!r}")


def _columns(source: str, names: Sequence[str], column: str) -> tuple[str, ...]:
    """The columns of a dataset that hold its texts or chats."""
    if column and column not in names:
        raise TextError(f"{source!r} names column {column!r}, and the dataset has {', '.join(names)}")
    if column:
        return (column,)
    for choice in (("text",), *((key,) for key in CHATS), ("prompt", "completion")):
        if set(choice) <= set(names):
            return choice
    raise TextError(
        f"the dataset of {source!r} has the columns {', '.join(names)}: {EXPECTED}. Name the column of a text or chat, "
        "as in dataset:NAME:CONFIG:SPLIT:COLUMN"
    )


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers; False at once when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except OSError:
        return False


def token_windows(tokenizer: Any, text: str, *, length: int, count: int | None = None) -> Tensor:
    """Tokenize a text and cut it into windows that do not overlap.

    The windows are spread evenly over the text, so that a few of them still cover all of it. Every window starts with
    the beginning-of-sequence token if the tokenizer starts every text with it; where the text itself has it, as chats
    do, it is not doubled.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The text.
        length: Tokens of a window, the beginning-of-sequence token included.
        count: Largest number of windows; None for all of them.

    Returns:
        Tokens, int64, (windows, length).

    Raises:
        TextError: The text is too short for one window, or `count` or `length` leaves no room for one.

    Example:
        >>> import spinquant
        >>> from transformers import ByT5Tokenizer  # its tokens are bytes, so it needs no vocabulary
        >>> spinquant.token_windows(ByT5Tokenizer(), "to be or not to be", length=4, count=2)
        tensor([[119, 114,  35, 101],
                [ 35, 119, 114,  35]])
    """
    first = tokenizer("x")["input_ids"][0]
    bos = first if first == tokenizer.bos_token_id else None
    room = length if bos is None else length - 1
    if count is not None:
        check_integer(count, "windows", TextError)
    check_integer(length, "the length of a window", TextError)
    if room < 1:
        raise TextError(f"a window of {length} tokens has no room for text")
    # verbose=False: no warning about a text that is longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = _starts(ids, length, bos)
    if not starts:
        raise TextError(f"the text has {len(ids)} tokens: too short for one window of {length}. Give a longer text.")
    if count is not None and count < len(starts):
        starts = [starts[i] for i in torch.linspace(0, len(starts) - 1, count).round().long()]
    rows = [ids[at : at + length] if bos in (None, ids[at]) else [bos, *ids[at : at + room]] for at in starts]
    return torch.tensor(rows, dtype=torch.int64)


def _starts(ids: Sequence[int], length: int, bos: int | None) -> list[int]:
    """Where the windows of a text begin: each has `length` tokens, with `bos` put before those that lack it.

    A chat template writes the token itself, and a model has never seen two of them.
    """
    found, at = [], 0
    while at < len(ids):
        end = at + (length if bos in (None, ids[at]) else length - 1)
        if end > len(ids):
            break
        found.append(at)
        at = end
    return found


@dataclass(frozen=True)
class CalibrationText:
    """Which text a model is calibrated on, and how much of it.

    Attributes:
        text: A source of text as in `load_text`, or `generated`: sampled from the model itself. `auto` (the default)
            is `generated` if there is no tokenizer.
        samples: Largest number of windows. Default: 128.
        length: Tokens of a window. Default: 512, or the model's context if that is shorter.
        seed: Of generated text.

    Raises:
        TextError: Fewer than one sample, or than two tokens; more than `MOST_TOKENS` tokens; or a seed that is no
            integer from 0 to 2^63 - 1.

    Example:
        >>> import spinquant
        >>> spinquant.CalibrationText("manual", samples=16)
        CalibrationText(text='manual', samples=16, length=None, seed=0)
    """

    text: str = "auto"
    samples: int = 128
    length: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_integer(self.samples, "samples", TextError)
        if self.length is not None:
            check_integer(self.length, "length", TextError, least=2)
        check_seed(self.seed, TextError)
        if self.samples * (self.length or LENGTH) > MOST_TOKENS:
            raise TextError(
                f"{self.samples} samples of {self.length or LENGTH} tokens: expected at most {MOST_TOKENS} tokens, "
                "which are in memory at once"
            )


def fitted(source: CalibrationText, config: Any) -> CalibrationText:
    """The text with the length of its windows settled; config: of the model, None if it is unknown.

    Raises TextError for windows that are longer than the model's context.
    """
    if config is None:
        return replace(source, length=source.length or LENGTH)
    return replace(source, length=fitting_length(config, source.length, LENGTH, "give a shorter --sample-length"))


def calibration_tokens(
    model: Any, tokenizer: Any, source: CalibrationText, *, progress: Callable[[int, int], None] | None = None
) -> tuple[str, Tensor]:
    """Read or generate calibration text and tokenize it.

    Args:
        model: The model, which generates text if the source asks for it; may be None if no text is generated.
        tokenizer: The model's tokenizer of transformers, or None.
        source: Which text, and how much of it.
        progress: Called with (samples done, samples in all) while text is generated.

    Returns:
        (name, tokens): the source that was read, and the tokens, int64, (samples, length).

    Raises:
        TextError: The text cannot be read, is shorter than one sample, or needs a tokenizer that is missing, or a
            sample is longer than the model's context.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> source = spinquant.CalibrationText("generated", samples=2, length=8)
        >>> name, tokens = spinquant.calibration_tokens(model, None, source)
        >>> name, tuple(tokens.shape)
        ('generated', (2, 8))
    """
    source = fitted(source, None if model is None else model.config)
    assert source.length is not None
    if source.text == "generated" or (tokenizer is None and source.text == "auto"):
        return "generated", generate_tokens(model, source, progress=progress)
    if tokenizer is None:
        raise TextError(
            f"the model has no tokenizer, so text {source.text!r} cannot be tokenized: use generated text, which the "
            "model samples itself"
        )
    name, text = load_text(source.text, tokenizer)
    return name, token_windows(tokenizer, text, length=source.length, count=source.samples)


@torch.no_grad()
def generate_tokens(
    model: Any, source: CalibrationText, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Sample text from a model at temperature one; int64, (samples, length).

    Every sample starts with a random token, behind the beginning-of-sequence token if the config has one. The same seed
    gives the same text.
    """
    check_causal(model, "generated text")
    source = fitted(source, model.config)
    config = model.config.get_text_config()
    device = device_of(model)
    with torch.random.fork_rng(), in_eval_mode(model):
        torch.manual_seed(source.seed)
        first = torch.randint(0, config.vocab_size, (source.samples, 1))
        if isinstance(config.bos_token_id, int) and config.bos_token_id < config.vocab_size:
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
