"""Check values from outside: integers and seeds of options, and JSON against types or pydantic models."""

import reprlib
from typing import Any

from spinquant.errors import SpinquantError

SEEDS = (1 << 63) - 1  # the largest seed; torch takes no more


def check_integer(value: Any, what: str, error: type[SpinquantError], *, least: int = 1, most: int = 1 << 31) -> None:
    """Raise `error` for a value that is not an int (a bool is none) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise error(f"{what} is {reprlib.repr(value)}: expected an integer from {least} to {most}")


def check_seed(value: Any, error: type[SpinquantError]) -> None:
    """Raise `error` for a seed that is not an int from 0 to 2^63 - 1."""
    check_integer(value, "the seed", error, least=0, most=SEEDS)


def validated(kind: Any, data: Any, origin: str, error: type[SpinquantError]) -> Any:
    """Data as an instance of a type or pydantic model; raises `error` that names the origin of the data and the key."""
    from pydantic import TypeAdapter, ValidationError  # here: it takes half the time of `spinquant --help`

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("missing", "value_error") else f", found {reprlib.repr(first['input'])}"
        what = first["msg"].removeprefix("Value error, ")
        raise error(f"{origin}: {f'key {key}: ' if key else ''}{what}{found}") from None
