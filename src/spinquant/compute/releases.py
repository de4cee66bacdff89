"""Releases of libraries as numbers that compare, read from their metadata: nothing is imported for it."""

from importlib.metadata import PackageNotFoundError, version


def release_of(package: str) -> tuple[int, int] | None:
    """Major and minor number of an installed package; None if it is not installed."""
    try:
        return numbers(version(package))
    except PackageNotFoundError:
        return None


def numbers(release: str) -> tuple[int, int]:
    """Major and minor number: "5.24.0.dev0" -> (5, 24)."""
    major, minor, *_ = [*release.split("."), "0", "0"]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
