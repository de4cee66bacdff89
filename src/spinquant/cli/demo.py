"""demo"""

from pathlib import Path
from typing import Annotated

import typer

from spinquant.cli import tables as report
from spinquant.cli.main import app
from spinquant.cli.options import (
    Force,
    Json,
    Length,
    Seed,
    Text,
)
from spinquant.cli.output import out_console, print_result, stages


@app.command(epilog="Example: `spinquant demo ./demo`")
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the page and its pictures.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Another model; by default a 135M one from PyPI.")] = None,
    text: Text = "manual",
    length: Length = 512,
    windows: Annotated[int, typer.Option(help="Windows per perplexity.")] = 8,
    seed: Seed = 0,
    scheme: Annotated[str, typer.Option(help="What to quantize to.")] = "W4A4KV4",
    force: Force = False,
    json_: Json = False,
) -> None:
    """Tell the whole story on a real model: a table, pictures that show why, and a page with both."""
    from spinquant.demo.run import run_demo

    with stages() as progress:
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
    print_result(json_, result.to_dict(), report.rows_table(f"perplexity, {scheme}", result.rows))
    if not json_:
        out_console.print(f"page: {out / 'index.html'}", highlight=False)
