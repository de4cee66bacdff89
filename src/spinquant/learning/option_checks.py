"""Validation of the options of learning: known names, ranges of numbers, and options without effect."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from spinquant.errors import LearningError


def check_choices(options: Any, known: Mapping[str, Collection[str | None]]) -> None:
    """Raise LearningError for an option, by name, whose value is not among the known ones."""
    for name, values in known.items():
        value = getattr(options, name)
        if value not in values:
            raise LearningError(f"unknown {name} {value!r}: expected one of {', '.join(filter(None, values))}")


def check_numbers(options: Any, *, counts: Collection[str], positive: Collection[str]) -> None:
    """Raise LearningError, naming the option, for a count below 1 or a number that is not positive."""
    for name in (*counts, *positive):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= (1 if name in counts else 1e-300)):
            wanted = "at least 1" if name in counts else "a positive number"
            option = {"factor": "massive"}.get(name, name.replace("_", "-"))
            raise LearningError(f"{name} is {value}: expected {wanted} (--{option})")


def check_unused(options: Any, unused: Collection[str], user: str) -> None:
    """Raise LearningError if an option that `user` (a solver or a loss) does not use differs from its default."""
    changed = [f.name for f in fields(options) if f.name in unused and getattr(options, f.name) != f.default]
    if changed:
        raise LearningError(f"{user} does not use {', '.join(changed)}: leave them out")
