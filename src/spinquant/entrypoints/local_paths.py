"""Remove paths of this machine from what may be published: model cards, records, and commands.

A local folder is recorded by its name, or by its Hub id if it is a snapshot in the Hub's cache.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from spinquant.checkpoint.folder import is_local

# Options of the command line that do not affect what is written.
FLAGS, WITH_VALUE = {"--force", "--debug", "--json", "--quiet", "--private", "--public"}, {"--push-to-hub"}


def hub_id(source: str) -> str | None:
    """The Hub id of a source: itself, or that of the snapshot in the Hub's cache that it is."""
    if not is_local(source):
        return source
    for place, below in zip(*(Path(source).expanduser().absolute().parts[i:] for i in (0, 1)), strict=False):
        if place.startswith("models--") and below == "snapshots":
            return "/".join(place.split("--")[1:])
    return None


def source_name(source: str) -> str:
    """The last component of a source's Hub id or path."""
    found = hub_id(source)
    return found.split("/")[-1] if found else Path(source).expanduser().resolve().name or "model"


def public_source(source: str) -> str:
    """A source as it is recorded: its Hub id, or the name of its folder."""
    return hub_id(source) or public(source_name(source))


def public_command(command: str) -> str:
    """A command line with absolute paths reduced to names, without options that do not affect what is written."""
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
    """A word with absolute paths, alone or after one of = , :, reduced to their last component."""

    def name(match: re.Match[str]) -> str:
        path = match.group(2)
        last = PureWindowsPath(path).name if "\\" in path or path[1:2] == ":" else PurePosixPath(path).name
        return match.group(1) + (last or ".")

    return re.sub(r"(^|[=,:])(?!//)((?:~|/|[A-Za-z]:[\\/])[^=,]*)", name, word)


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with absolute paths reduced to names, except in the plan, which has names of tensors only."""
    return {key: value if key == "plan" else _public_value(value, key) for key, value in record.items()}


def _public_value(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _public_value(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_public_value(one) for one in value]
    if not isinstance(value, str):
        return value
    return public_source(value) if key in ("source", "model", "given") else public(value)
