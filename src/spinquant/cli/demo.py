"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from spinquant.cli.options import ADVANCED, Force, Json, Length, Quiet, SchemeName, Seed, Text, Windows
from spinquant.cli.output import out_console, print_result
from spinquant.cli.progress import stages

EXAMPLES = (
    "spinquant demo ./demo",
    "spinquant demo ./demo-llama --model ./llama --scheme W4A8KV8",
)


def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the page and its pictures.")] = Path("demo"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub id; by default a 135M model from PyPI.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    scheme: SchemeName = "W4A4KV4",
    text: Text = "manual",
    length: Length = 512,
    windows: Windows = 8,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Measure a small real model plain and rotated, and write a page with a table and pictures that explain it."""
    from spinquant.cli.tables import rows_table
    from spinquant.demo.run import run_demo

    with stages(quiet=quiet) as progress:
        result = run_demo(
            out,
            model=model,
            text=text,
            windows=windows,
            length=length,
            seed=seed,
            scheme=scheme,
            force=force,
            progress=progress,
        )
    print_result(json_, result.to_dict(), rows_table(f"perplexity, {scheme}", result.rows))
    if not json_:
        out_console().print(f"page: {out / 'index.html'}", highlight=False)
