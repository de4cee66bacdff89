"""The command `rotate`."""

import typer

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
    PushToHub,
    Quiet,
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
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages

EXAMPLES = (
    "spinquant rotate ./llama ./llama-rotated",
    "spinquant rotate ./llama ./llama-rotated --seed 1 --also ./my-lora --device cuda",
    "spinquant rotate ./llama ./llama-rotated --learned ./learned --rotations R1,R2 --push-to-hub me/llama-rotated",
)


def rotate(
    context: typer.Context,
    model: Model,
    out: Out,
    rotations: Rotations = "R1,R2",
    learned: Learned = None,
    also: Also = None,
    force: Force = False,
    push: PushToHub = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_: Json = False,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    text: Text = "auto",
    compare: Compare = True,
    proof: Proof = True,
    max_shard_size: MaxShardSize = None,
    checksums: Checksums = None,
    memory: Memory = None,
    family: Family = None,
    drop_mtp: DropMtp = False,
    allow_inexact: AllowInexact = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Fuse R1 and R2 into a plain folder that transformers, vLLM and others load without spinquant.

    The model is never loaded as a whole: its tensors are rotated one by one. If the command is stopped, rerun it to
    resume.
    """
    from spinquant.cli.tables import result_table
    from spinquant.entrypoints.folders import rotate_folder
    from spinquant.entrypoints.result import Options

    spec = parse_spec(rotations, type, block_size, randomize, seed)
    with stages(quiet=quiet, out=out) as progress:
        result = rotate_folder(
            model,
            out,
            spec,
            learned=taken_from(learned, model, context) if learned else None,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            command=command_line(),
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
    push_to_hub(out, push, quiet=quiet)
    print_result(json_, {**result.record(), "seconds": result.seconds}, result_table(result, str(out)))
