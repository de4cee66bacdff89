"""The command line: one function per command, each of which calls one documented function of the library.

Tables go to standard output, progress and notes to standard error, so that `--json` can be piped. A mistake of the
user's gives one line and exit code 1; `--debug` shows the traceback.
"""

import sys

import transformers
import typer

from spinquant.cli.learn import EXAMPLES as LEARN_EXAMPLES
from spinquant.cli.learn import learn
from spinquant.cli.output import err_console
from spinquant.cli.quantize import EXAMPLES as QUANTIZE_EXAMPLES
from spinquant.cli.quantize import quantize
from spinquant.cli.rotate_adapter import EXAMPLES as ADAPTER_EXAMPLES
from spinquant.cli.rotate_adapter import rotate_adapter
from spinquant.compute.distributed import is_first
from spinquant.errors import ProcessError, SpinquantError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Rotate language models so that they survive 4-bit weights, activations and KV cache.\n\n"
    "Add `--debug` anywhere for tracebacks.",
)
INTERRUPTED = 130  # the exit code that typer gives Ctrl-C


app.command("rotate-adapter", epilog=ADAPTER_EXAMPLES)(rotate_adapter)
app.command(epilog=QUANTIZE_EXAMPLES)(quantize)
app.command(epilog=LEARN_EXAMPLES)(learn)


def main() -> None:
    """Entry point: turns mistakes of the user's into one line, and keeps everything else."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    transformers.utils.logging.disable_progress_bar()
    if not debug:
        transformers.utils.logging.set_verbosity_error()
    try:
        app()
    except SpinquantError as error:
        if debug:
            raise
        if not is_first() and not isinstance(error, ProcessError):
            raise SystemExit(1) from None  # the first process hears of it, and says so
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            err_console.print(
                "interrupted: no folder was written; the same command goes on behind what was finished", style="red"
            )
        raise


if __name__ == "__main__":
    main()
