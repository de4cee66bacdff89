"""The command line: one module per command, each of which calls one documented function of the library.

Tables go to standard output, progress and notes to standard error, so that `--json` can be piped. A mistake of the
user's gives one line and exit code 1; `--debug` shows the traceback. The modules of the commands import what they run
inside the command, so that help, completion and `--version` start without torch and transformers.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.core

from spinquant.cli import demo, evaluate, learn, plan, quantize, rotate, rotate_adapter
from spinquant.cli.output import print_error
from spinquant.compute.torchrun import is_first
from spinquant.errors import ProcessError, SpinquantError


class _Group(typer.core.TyperGroup):
    """Flags that were not given are False, not None, which typer would import pydantic for: half the time of help."""

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
# What transformers and the hub's client print by themselves; what the user has set stays.
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
    """Options before the command."""


def main() -> None:
    """Entry point: turns mistakes of the user's into one line, and keeps everything else."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        with _silent(debug=debug):
            app(prog_name="spinquant")
    except SpinquantError as error:
        if debug:
            raise
        if not is_first() and not isinstance(error, ProcessError):
            raise SystemExit(1) from None  # the first process hears of it, and says so
        print_error(str(error))
        raise SystemExit(1) from None


@contextmanager
def _silent(*, debug: bool) -> Iterator[None]:
    """Without progress bars of other libraries and, but for --debug, their warnings; before they are imported."""
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
