"""Read texts and chats from rows: the lines of a JSON Lines file, a JSON array, or the rows of a dataset.

A row is a text, {"text": ...}, or a chat, which becomes the text that the model was trained on: its tokenizer's chat
template writes it.

    {"messages": [{"role": "user", "content": ...}, ...]}           OpenAI's form; `conversations` may hold it too
    {"conversations": [{"from": "human", "value": ...}, ...]}       ShareGPT's form
    {"prompt": ..., "completion": ...}                              text, or messages, each

Anything else is an error that says what was found, since text that the model never sees at inference would calibrate it
for something else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spinquant.errors import TextError

SUFFIXES = (".jsonl", ".ndjson", ".json")
CHATS = ("messages", "conversations")
# Names of ShareGPT's speakers.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    **{role: role for role in ("system", "user", "assistant", "tool")},
}
EXPECTED = "expected text, messages, conversations, or prompt and completion"
MOST = 4096  # chats that are read, spread evenly over all of them: some millions of tokens

Message = dict[str, Any]


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """(where, row) of every row of a JSON Lines file, or of a JSON array or object; `where` is for error messages.

    Raises TextError for a line that is not JSON, and for a file that cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read text {str(path)!r}: {error}. Expected JSON in UTF-8") from None
    if path.suffix.lower() == ".json":
        whole = _parsed(content, str(path))
        rows = whole if isinstance(whole, list) else [whole]
        return [(f"row {i + 1} of {str(path)!r}", row) for i, row in enumerate(rows)]
    # Not splitlines: a text may hold line separators other than the newline, which JSON does not escape.
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [(where := f"line {i} of {str(path)!r}", _parsed(line, where)) for i, line in lines]


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where} is not JSON: {error}. Expected one object per line (.jsonl), or an array") from None


def text_of(rows: Sequence[tuple[str, Any]], tokenizer: Any, origin: str) -> str:
    """The text of rows, one after the other; origin: what they are from, for error messages.

    Of more than `MOST` rows with chats as many are taken, spread evenly. Raises TextError for a row that is neither a
    text nor a chat, and for chats without a tokenizer that has a chat template.
    """
    if not rows:
        raise TextError(f"{origin} holds no rows: {EXPECTED}")
    parts = []
    for where, row in (rows[i] for i in taken(len(rows), rows[0][1])):
        found = chat_or_text(row, where)
        parts.append(f"{found}\n\n" if isinstance(found, str) else _written(found, tokenizer, where))
    text = "".join(parts).removesuffix("\n\n")
    if not text.strip():
        raise TextError(f"{origin} holds no text: its {len(rows)} rows are empty")
    return text


def taken(count: int, first: Any) -> list[int]:
    """The numbers of the rows to read, of `count`: all texts, and at most `MOST` chats; first: the first row."""
    is_text = isinstance(first, str) or (isinstance(first, Mapping) and "text" in first)
    most = count if is_text else min(count, MOST)
    return [i * count // most for i in range(most)]


def chat_or_text(row: Any, where: str) -> str | list[Message]:
    """The text or the messages of a row. Raises TextError for anything else, naming what was found."""
    if isinstance(row, str):
        return row
    if isinstance(row, list):
        return _messages(row, where)
    if not isinstance(row, Mapping):
        raise TextError(f"{where} is {_described(row)}: expected an object or a text")
    if "text" in row:
        if isinstance(row["text"], str):
            return row["text"]
        raise TextError(f"text of {where} is {_described(row['text'])}: expected a text")
    for key in CHATS:
        if key in row:
            return _messages(row[key], where)
    if "prompt" in row and "completion" in row:
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return [m for role, turn in turns for m in _turn(role, turn, where)]
    raise TextError(f"{where} has {', '.join(map(repr, sorted(map(str, row)))) or 'nothing'}: {EXPECTED}")


def _turn(role: str, turn: Any, where: str) -> list[Message]:
    return [{"role": role, "content": turn}] if isinstance(turn, str) else _messages(turn, where)


def _messages(found: Any, where: str) -> list[Message]:
    if isinstance(found, Mapping) and found and all(isinstance(column, list) for column in found.values()):
        found = [dict(zip(found, values, strict=False)) for values in zip(*found.values(), strict=False)]  # by columns
    if not isinstance(found, list) or not found:
        raise TextError(f"{where} holds {_described(found)} as its messages: expected a list of messages")
    return [_message(message, where) for message in found]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise TextError(f"a message of {where} is {_described(message)}: expected an object with role and content")
    speaker, said = ("role", "content") if "role" in message else ("from", "value")
    role, content = message.get(speaker), message.get(said)
    role = ROLES.get(role) if speaker == "from" and isinstance(role, str) else role
    if not isinstance(role, str):
        raise TextError(
            f"a message of {where} has {speaker} {message.get(speaker)!r}: expected a role, or from with one of "
            f"{', '.join(ROLES)}"
        )
    if content is None and message.get("tool_calls"):
        content = ""
    # A dataset has every key in every message.
    others = {key: value for key, value in message.items() if key not in (speaker, said) and value is not None}
    return {**others, "role": role, "content": _plain(content, where)}


def _plain(content: Any, where: str) -> str:
    """The text of a message, which may be in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = [part.get("type", "text") for part in content]
        if set(kinds) <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise TextError(f"a message of {where} has parts of types {', '.join(map(repr, kinds))}: expected text alone")
    raise TextError(f"a message of {where} has {_described(content)} as its content: expected a text")


def _written(messages: Iterable[Message], tokenizer: Any, where: str) -> str:
    if tokenizer is None:
        raise TextError(f"{where} is a chat, which the chat template of a tokenizer writes out: the model has none")
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{where} is a chat, and the model's tokenizer has no chat template (chat_template.jinja): add the "
            'template, or give a file of texts: lines of {"text": ...}'
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:  # templates are programs; they raise what they like
        raise TextError(f"the model's chat template cannot write {where}: {type(error).__name__}: {error}") from error


def _described(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    return "nothing" if value is None else f"a JSON {type(value).__name__}"
