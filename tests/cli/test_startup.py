"""Help, version and completion start without torch and transformers; options have one name and help everywhere."""

import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
import typer

from spinquant.calibration.data import LENGTH, CalibrationText
from spinquant.cli.main import app
from spinquant.cli.options import (
    ACTIVATIONS,
    ADVANCED,
    CALIBRATION,
    DTYPES,
    LEARNING,
    OUTPUT,
    ROTATIONS,
    WEIGHTS,
    parse_dtype,
)
from spinquant.learning.options import Method

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
PANELS = {ROTATIONS, WEIGHTS, ACTIVATIONS, CALIBRATION, LEARNING, OUTPUT, ADVANCED, None}
# Options whose meaning depends on the command.
DIFFERENT = {"--method", "--learn", "--model", "--text", "--checksums"}

LIGHT = """
import sys
from spinquant.cli.main import main
for arguments in {commands!r}:
    sys.argv = ["spinquant", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
    heavy = {{"torch", "transformers", "numpy", "pydantic", "safetensors"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def test_help_and_version_import_neither_torch_nor_transformers():
    assert len(COMMANDS) == 8
    commands = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    done = subprocess.run([sys.executable, "-c", LIGHT.format(commands=commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("spinquant ")


def test_version(run):
    import spinquant

    assert run("--version") == (0, f"spinquant {spinquant.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_can_be_read(run, command):
    """Every example names options that its command has."""
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples:" in out
    examples = COMMANDS[command].epilog.split("\n\n")[1:]
    assert any(example.strip().startswith(f"spinquant {command} ") for example in examples)
    for example in examples:
        words = example.split("spinquant ", 1)[1].split()
        known = {name for option in COMMANDS[words[0]].params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_an_option_has_the_same_help_in_every_command():
    helps, panels = {}, {}
    for name, command in COMMANDS.items():
        for option in command.params:
            if not isinstance(option, typer.core.TyperOption):
                continue
            assert option.help, (name, option.name)
            assert option.rich_help_panel in PANELS
            for spelling in {*option.opts} - DIFFERENT:
                assert helps.setdefault(spelling, option.help) == option.help, (name, spelling)
                assert panels.setdefault(spelling, option.rich_help_panel) == option.rich_help_panel, (name, spelling)
    assert {panel for panel in panels.values()} | {None} == PANELS


def test_commands_that_work_long_can_be_quiet_and_those_that_write_a_model_can_push():
    def spellings(command: str) -> set[str]:
        return {spelling for option in COMMANDS[command].params for spelling in option.opts}

    for command in ("rotate", "quantize", "learn", "evaluate", "verify", "demo"):
        assert {"--quiet", "--json"} <= spellings(command)
    assert {name for name in COMMANDS if "--push-to-hub" in spellings(name)} == {"rotate", "quantize", "learn"}


def test_names_in_the_help_are_those_of_the_library(run):
    assert [parse_dtype(name) for name in DTYPES] == [getattr(torch, name) for name in DTYPES]
    (method,) = [option for option in COMMANDS["learn"].params if option.name == "method"]
    assert all(f"{name}:" in method.help for name in get_args(Method))
    options = {command: {o.name: o for o in COMMANDS[command].params} for command in ("learn", "quantize")}
    assert options["learn"]["samples"].default == CalibrationText("auto").samples
    for found in options.values():
        assert f"; {CalibrationText('auto').samples} by default" in found["samples"].help
        assert f"; {LENGTH} by default" in found["sample_length"].help


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("spinquant qua", "quantize"),
        ("spinquant learn --held", "--held-out"),
        ("spinquant rotate --push", "--push-to-hub"),
    ],
)
def test_bash_completes(words, expected):
    environment = {**os.environ, "_SPINQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run([sys.executable, "-m", "spinquant"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done


def test_the_script_of_bash_completion_is_shown(run):
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "spinquant", "--show-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "_SPINQUANT_COMPLETE=complete_bash" in done.stdout and done.returncode == 0, done


def test_a_repository_that_the_hub_refuses_is_refused_before_any_work(run, tmp_path):
    code, _, errors = run("rotate", tmp_path / "nowhere", tmp_path / "out", "--push-to-hub", "a/b/c")
    assert code == 1 and "'a/b/c' is not a valid repository id" in errors


def test_what_silences_other_libraries_is_gone_afterwards(run):
    before = dict(os.environ)
    assert run("--version")[0] == 0
    assert {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} == {
        k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"
    }
