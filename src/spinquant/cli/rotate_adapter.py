"""The command `rotate-adapter`."""

from pathlib import Path
from typing import Annotated

import typer

from spinquant.cli import options as opt
from spinquant.cli.output import print_result

EXAMPLES = (
    "spinquant rotate-adapter ./llama-rotated ./my-lora ./my-lora-rotated",
    "spinquant rotate-adapter ./llama-w4a4 ./eagle3-head ./eagle3-rotated --model ./llama",
)


def rotate_adapter(
    rotated: Annotated[Path, typer.Argument(metavar="ROTATED", help="Folder of the rotated model, quantized or not.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="LoRA adapter (peft) or EAGLE-3 draft head: a folder or hub id.")
    ],
    out: opt.Out,
    model: Annotated[
        str | None,
        opt.option(opt.ADVANCED, "The original model, before it was rotated; by default the one recorded in ROTATED."),
    ] = None,
    force: opt.Force = False,
    json_: opt.Json = False,
) -> None:
    """Rotate a LoRA adapter or an EAGLE-3 draft head to match a model that is already rotated.

    `spinquant rotate --also ADAPTER` rotates model and adapter together. Of the original model, only the norms and the
    tensors that the adapter needs are read.
    """
    from spinquant.adapters.folder import rotate_adapter as rotate_adapter_folder
    from spinquant.cli.tables import adapters_table

    done = rotate_adapter_folder(rotated, adapter, out, model=model, force=force)
    print_result(json_, done, adapters_table({str(out): done}))
