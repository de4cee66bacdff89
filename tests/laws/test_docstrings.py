"""Docstrings of public names: every example runs, and the sections list the parameters of the signature."""

import dataclasses
import doctest
import inspect
import io
import re

import pytest
from pydantic import BaseModel

import spinquant

PUBLIC = {name: getattr(spinquant, name) for name in spinquant.__all__ if name != "__version__"}
NEEDS_NO_EXAMPLE = {name for name, thing in PUBLIC.items() if isinstance(thing, type) and issubclass(thing, Exception)}
CHECKED = sorted(set(PUBLIC) - NEEDS_NO_EXAMPLE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECTION = r"^{name}:\n((?:(?: .*)?\n)+)"
ENTRY = re.compile(r"^    (\w+): ", re.MULTILINE)


def parameters_of(thing):
    """What the Args (or, of a dataclass, Attributes) section has to list: parameters, or fields."""
    if getattr(thing, "_is_protocol", False):
        return []
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        return list(thing.model_fields)
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")]
    return [name for name in inspect.signature(thing).parameters if not name.startswith("_")]


def section(thing, *names):
    """The text of the first of these sections that a docstring has; empty if it has none."""
    text = inspect.cleandoc(thing.__doc__) + "\n"
    found = (re.search(SECTION.format(name=name), text, re.MULTILINE) for name in names)
    return next((match[1] for match in found if match), "")


def test_every_exception_has_a_docstring():
    for name in NEEDS_NO_EXAMPLE:
        assert PUBLIC[name].__doc__


@pytest.mark.parametrize("name", CHECKED)
def test_sections_list_the_parameters_and_the_return_value(name):
    thing = PUBLIC[name]
    summary = inspect.cleandoc(thing.__doc__).splitlines()
    assert summary[0].endswith(".") and not "".join(summary[1:2]).strip(), "one sentence comes first"
    sections = ("Args", "Attributes") if parameters_of(thing) else ("Args",)
    assert ENTRY.findall(section(thing, *sections)) == parameters_of(thing)
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation is not None:
        assert section(thing, "Returns")
    assert ">>> " in section(thing, "Example")


@pytest.mark.parametrize("name", CHECKED)
def test_examples_run(name):
    report, runner = io.StringIO(), doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    examples = [test for test in doctest.DocTestFinder().find(PUBLIC[name], name, globs={}) if test.examples]
    assert examples
    for test in examples:
        runner.run(test, out=report.write)
    assert not runner.summarize(verbose=False).failed, report.getvalue()
