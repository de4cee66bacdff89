"""Entry point of the command line. Each command has a module of its own and calls one public function of the library.

Tables go to standard output, progress and notes to standard error, so that `--json` can be piped. A user error prints
one line and exits with code 1; `--debug` shows the traceback. Command modules import the library inside the command
function, so that help, completion and `--version` start without torch and transformers.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.core

from spinquant.cli import demo, evaluate, learn, plan, quantize, rotate, rotate_adapter
from spinquant.cli.output import checked_output, print_error
from spinquant.compute.torchrun import is_first
from spinquant.errors import ProcessError, SpinquantError
from spinquant.models.tested_versions import warn_untested


class _Group(typer.core.TyperGroup):
    """A group whose flags default to False: for None, typer imports pydantic, which takes half the time of `--help`."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        for option in found:
            if getattr(option, "is_flag", False) and option.default is None:
                option.default = False
        return found


app = typer.Typer(
    name="spinquant",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Rotate language models so that they survive 4-bit weights, activations and KV cache.\n\n"
    "Add --debug anywhere for tracebacks.",
)
# Silences transformers and huggingface_hub; variables that the user has set are kept.
SILENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _examples(examples: Sequence[str]) -> str:
    return "\n\n".join(["Examples:", *(f"  {example}" for example in examples)])


app.command(epilog=_examples(plan.EXAMPLES))(plan.plan)
app.command(epilog=_examples(rotate.EXAMPLES))(rotate.rotate)
app.command(epilog=_examples(quantize.EXAMPLES))(quantize.quantize)
app.command(epilog=_examples(learn.EXAMPLES))(learn.learn)
app.command(epilog=_examples(evaluate.EVALUATE_EXAMPLES))(evaluate.evaluate)
app.command(epilog=_examples(evaluate.VERIFY_EXAMPLES))(evaluate.verify)
app.command("rotate-adapter", epilog=_examples(rotate_adapter.EXAMPLES))(rotate_adapter.rotate_adapter)
app.command(epilog=_examples(demo.EXAMPLES))(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"spinquant {version('spinquant')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that come before the command."""


def main() -> None:
    """Run the command line; a SpinquantError becomes one line and exit code 1, other exceptions pass through."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        with _silent(debug=debug), checked_output():
            warn_untested()
            app(prog_name="spinquant")
    except SpinquantError as error:
        if debug:
            raise
        if not is_first() and not isinstance(error, ProcessError):
            raise SystemExit(1) from None  # the first process receives the error too, and prints it
        print_error(str(error))
        raise SystemExit(1) from None


@contextmanager
def _silent(*, debug: bool) -> Iterator[None]:
    """Suppress progress bars of other libraries and, without --debug, their warnings. Set before they are imported."""
    added = {name: value for name, value in SILENT.items() if name not in os.environ}
    if debug:
        added.pop("TRANSFORMERS_VERBOSITY", None)
    os.environ.update(added)
    if (transformers := sys.modules.get("transformers")) is not None:  # `main` called from Python
        transformers.utils.logging.disable_progress_bar()
        if not debug:
            transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


if __name__ == "__main__":
    main()
