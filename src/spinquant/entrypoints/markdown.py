"""Markdown building blocks: table rows, code, escaped names, lists in a sentence."""

import re
from collections.abc import Iterable


def row(*cells: object) -> str:
    """A table row."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def fence(language: str, lines: str) -> str:
    """A fenced code block, with enough backticks for its content."""
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def code(text: str) -> str:
    """Inline code on one line."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def plain(text: str) -> str:
    """A name on one line, with Markdown characters escaped."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def listed(names: Iterable[object]) -> str:
    """Names joined for a sentence: "a, b and c"."""
    *first, last = [str(name) for name in names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
