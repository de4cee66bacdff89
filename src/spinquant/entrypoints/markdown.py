"""Pieces of Markdown."""

import re
from collections.abc import Iterable


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def fence(language: str, lines: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def code(text: str) -> str:
    """Code of one line."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def plain(text: str) -> str:
    """A name as plain text of one line."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def listed(names: Iterable[object]) -> str:
    """Names as a list in a sentence."""
    *first, last = [str(name) for name in names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
