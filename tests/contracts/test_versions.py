"""Untested releases of transformers are warned of, once, and pyproject.toml allows the tested ones."""

import tomllib
import warnings
from pathlib import Path

import pytest

from spinquant.models import tested_versions
from spinquant.models.tested_versions import TESTED, warn_untested


@pytest.mark.parametrize(
    ("release", "warned"),
    [("5.16.9", True), ("5.17.0", False), ("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0", True)],
)
def test_releases_outside_of_the_tested_ones_are_warned_of_once(monkeypatch, release, warned):
    monkeypatch.setattr(tested_versions, "version", lambda name: release)
    warn_untested.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_untested()
        warn_untested()
    warn_untested.cache_clear()
    assert [release in str(warning.message) for warning in found] == [True] * warned


def test_the_command_line_warns_too(monkeypatch, run):
    monkeypatch.setattr(tested_versions, "version", lambda name: "5.25.0")
    warn_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 5\.25\.0 is not among"):
        assert run("--help")[0] == 0
    warn_untested.cache_clear()


def test_the_bounds_of_the_package_are_the_tested_releases():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    bound = next(line for line in project["dependencies"] if line.startswith("transformers"))
    oldest, newest = TESTED
    major, minor = newest.split(".")
    assert bound == f"transformers>={oldest},<{major}.{int(minor) + 1}"
