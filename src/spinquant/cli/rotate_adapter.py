"""The command `rotate-adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from spinquant.adapters.folder import rotate_adapter as rotate_adapter_folder
from spinquant.cli import tables as report
from spinquant.cli.options import Force, Json, Out
from spinquant.cli.output import print_result

EXAMPLES = (
    "Examples: `spinquant rotate-adapter ./llama-rotated ./my-lora ./my-lora-rotated`, "
    "`spinquant rotate-adapter ./llama-w4a4 ./eagle3-head ./eagle3-rotated --model ./llama`"
)


def rotate_adapter(
    rotated: Annotated[Path, typer.Argument(help="Folder of the rotated model, quantized or not.")],
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter (peft) or an EAGLE-3 head.")],
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="The model before rotating; by default as the record of ROTATED names it.")
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Rotate an adapter or a draft head for a model that was rotated before.

    With `spinquant rotate --also ADAPTER` they are rotated together. Of the model before rotating, only its norms and
    what the adapter needs are read.
    """
    done = rotate_adapter_folder(rotated, adapter, out, model=model, force=force)
    print_result(json_, done, report.adapters_table({str(out): done}))
