"""rotate"""

import typer

from spinquant.cli import tables as report
from spinquant.cli.main import app
from spinquant.cli.options import (
    AllowInexact,
    AllowPickle,
    Also,
    BlockSize,
    Checksums,
    Compare,
    Device,
    DropMtp,
    Dtype,
    Family,
    Force,
    Json,
    Learned,
    MaxShardSize,
    Memory,
    Model,
    Out,
    Proof,
    Randomize,
    Rotations,
    Seed,
    Text,
    Type,
    parse_dtype,
    parse_size,
    parse_spec,
    taken_from,
)
from spinquant.cli.output import print_result, stages
from spinquant.entrypoints.folders import rotate_folder
from spinquant.entrypoints.result import Options


@app.command(epilog="Example: `spinquant rotate ./llama ./llama-rotated --rotations R1,R2 --seed 1`")
def rotate(
    context: typer.Context,
    model: Model,
    out: Out,
    rotations: Rotations = "R1,R2",
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    seed: Seed = 0,
    learned: Learned = None,
    dtype: Dtype = None,
    text: Text = "auto",
    device: Device = "cpu",
    max_shard_size: MaxShardSize = None,
    also: Also = None,
    checksums: Checksums = None,
    memory: Memory = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    allow_inexact: AllowInexact = False,
    drop_mtp: DropMtp = False,
    proof: Proof = True,
    compare: Compare = True,
    family: Family = None,
    json_: Json = False,
) -> None:
    """Fuse R1 and R2 into a plain folder that transformers, vLLM and others load with nothing of ours installed.

    The model is never loaded: its tensors are rotated one by one, and a command that was stopped goes on where it was
    when it is repeated.
    """
    spec = parse_spec(rotations, type, block_size, randomize, seed)
    with stages() as progress:
        result = rotate_folder(
            model,
            out,
            spec,
            learned=taken_from(learned, model, context) if learned else None,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            checksums=checksums,
            also=also or (),
            options=Options(
                prove=proof,
                allow_inexact=allow_inexact,
                drop_mtp=drop_mtp,
                progress=progress,
                memory=None if memory is None else parse_size(memory),
            ),
            family=family,
        )
    print_result(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))
