"""Limit regular expressions from outside, such as those of a family in a config, so that none runs for hours.

The time that Python's `re` takes is exponential in the length of the text for a repetition inside a repetition, (a+)+,
or of alternatives, (a|a)*, and a polynomial of degree d + 1 for d repetitions one after the other; every choice, a? or
(a|b), multiplies it. So a pattern may have at most `MOST_REPEATS` repetitions, none of which has a repetition or a
choice inside it, and `MOST_CHOICES` ways through its choices, and is matched with names of at most `LONGEST_NAME`
characters.
"""

import math
import re
import warnings
from collections.abc import Iterator
from re import _constants as codes  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from spinquant.errors import SpinquantError

LONGEST_PATTERN, MOST_REPEATS, MOST_CHOICES, LONGEST_NAME = 500, 3, 200, 256
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_OPEN = (*_REPEATS, codes.BRANCH, codes.GROUPREF, codes.GROUPREF_EXISTS)


def check_pattern(pattern: str, origin: str, error: type[SpinquantError]) -> None:
    """Raise `error`, naming the origin, for a text that is not a regular expression, or one that may run for hours."""
    if len(pattern) > LONGEST_PATTERN:
        raise error(f"{origin} has a pattern of {len(pattern)} characters: expected at most {LONGEST_PATTERN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            tree = parser.parse(pattern)
        repeats = [inside[0] for code, argument, inside in _parts(tree) if code in _REPEATS and argument[1] > 1]
        choices = math.prod(_ways(code, argument) for code, argument, _ in _parts(tree))
    except (re.error, RecursionError, OverflowError) as wrong:
        raise error(f"{origin} has a pattern that is not a regular expression, {pattern!r}: {wrong}") from None
    inside = [code for tree in repeats for code, *_ in _parts(tree)]
    if len(repeats) > MOST_REPEATS or choices > MOST_CHOICES or any(code in _OPEN for code in inside):
        raise error(
            f"{origin} has the pattern {pattern!r}, which may take hours to match: expected at most {MOST_REPEATS} "
            "repetitions, with no repetition or choice inside them, and few choices"
        )


def check_name(name: str, origin: str, error: type[SpinquantError]) -> None:
    """Raise `error` for a name that is too long to be matched with a pattern."""
    if len(name) > LONGEST_NAME:
        raise error(f"{origin} has a name of {len(name)} characters, {name[:60]!r}...: expected at most {LONGEST_NAME}")


def _parts(tree: Any) -> Iterator[tuple[Any, Any, list[Any]]]:
    """(code, argument, subtrees) of every node of a parsed pattern, at any depth."""
    for code, argument in tree:
        inside = [one for one in _flat(argument) if isinstance(one, parser.SubPattern)]
        yield code, argument, inside
        for one in inside:
            yield from _parts(one)


def _flat(argument: Any) -> Iterator[Any]:
    if isinstance(argument, list | tuple):
        for one in argument:
            yield from _flat(one)
    else:
        yield argument


def _ways(code: Any, argument: Any) -> int:
    """Ways through one node: the alternatives of a branch, two for `x?`, and one for everything else."""
    if code == codes.BRANCH:
        return len(argument[1])
    return 2 if code in _REPEATS and tuple(argument[:2]) == (0, 1) else 1
