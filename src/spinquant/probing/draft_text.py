"""Write a probe's findings as a draft of a family file: TOML, with every experiment as a comment."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spinquant.errors import ArchitectureError
from spinquant.probing.probe import Probe
from spinquant.probing.verify_draft import TOLERANCE, Finding

WIDTH = 100


def draft_text(probe: Probe) -> str:
    """Format a probe's findings as the draft of a family file, with every experiment as a comment.

    Args:
        probe: The result of `probe`.

    Returns:
        TOML that `read_family` reads. Comments alone if too little was found for a draft.

    Example:
        >>> import spinquant
        >>> from transformers import LlamaConfig
        >>> text = spinquant.draft_text(spinquant.probe(LlamaConfig()))
        >>> print(text.splitlines()[0])
        # Draft of a family file for model_type 'llama', found by probing.
    """
    lines = [
        f"# Draft of a family file for model_type {probe.model_type!r}, found by probing.",
        "# Each statement was tested by itself on a tiny random model of the class, in float64. Review the draft,",
        "# correct it, and pass it with --family; the rotations are then proved on such a model once more.",
        "#",
        *_tried(f"Proved: logits moved by less than {TOLERANCE:g} (relative)", [f for f in probe.findings if f.holds]),
        *_tried("Failed: refused below, with the reason", [f for f in probe.findings if not f.holds]),
    ]
    if probe.left:
        lines += ["# Not covered:", *(line for text in probe.left for line in _comment(f"- {text}")), "#"]
    if probe.family is None:
        return "\n".join([*lines, "# There is no draft, for the reasons above.", ""])
    return "\n".join([*lines[:-1], "", *_toml(probe.family.recorded()), ""])


def write_draft(probe: Probe, path: str | Path) -> None:
    """Write the draft to a new file. Raises ArchitectureError if it exists, since it may contain corrections."""
    path = Path(path)
    if path.exists():
        raise ArchitectureError(f"{path} exists and may contain your corrections: choose another name for the draft")
    try:
        path.write_text(draft_text(probe), encoding="utf-8")
    except OSError as error:
        raise ArchitectureError(f"cannot write the draft {path}: {error.strerror}") from None


def _tried(title: str, findings: list[Finding]) -> Iterator[str]:
    if not findings:
        return
    yield f"# {title}"
    for finding in findings:
        moved = "untested" if finding.moved is None else f"{finding.moved:.1e}"
        yield from _comment(f"{moved:>9}  {finding.statement}{f': {finding.reason}' if finding.reason else ''}", 13)
    yield "#"


def _comment(text: str, indent: int = 4) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, drop_whitespace=True, break_long_words=False, break_on_hyphens=False)
    return [f"#   {lines[0] if not text.startswith(' ') else text[:1] + lines[0].lstrip()}"] + [
        f"#{' ' * indent}{line}" for line in lines[1:]
    ]


def _toml(data: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a family file in TOML: plain keys, then tables, then arrays of tables."""
    tables = {key: value for key, value in data.items() if isinstance(value, dict)}
    lists = {key: value for key, value in data.items() if _is_list_of_tables(value)}
    for key, value in data.items():
        if key not in tables and key not in lists and value != []:
            yield f"{key} = {_value(value, wide=True)}"
    for key, table in tables.items():
        if not table:
            continue
        yield f"\n[{key}]"
        for name, value in table.items():
            yield f"{name if name.isidentifier() else json.dumps(name)} = {_value(value, wide=True)}"
    for key, entries in lists.items():
        for entry in entries:
            yield f"\n[[{key}]]"
            for name, value in entry.items():
                yield f"{name} = {_value(value)}"


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _value(value: Any, *, wide: bool = False) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        line = "[" + ", ".join(_value(item) for item in value) + "]"
        return "[\n" + "".join(f"    {_value(item)},\n" for item in value) + "]" if wide and len(line) > WIDTH else line
    return json.dumps(value, ensure_ascii=False)
