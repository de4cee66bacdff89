"""The command `rotate`."""

import typer

from spinquant.cli import options as opt
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages

EXAMPLES = (
    "spinquant rotate ./llama ./llama-rotated",
    "spinquant rotate ./llama ./llama-rotated --seed 1 --also ./my-lora --device cuda",
    "spinquant rotate ./llama ./llama-rotated --learned ./learned --rotations R1,R2 --push-to-hub me/llama-rotated",
)


def rotate(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    rotations: opt.Rotations = "R1,R2",
    learned: opt.Learned = None,
    also: opt.Also = None,
    force: opt.Force = False,
    push: opt.PushToHub = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
    type: opt.Type = "auto",
    block_size: opt.BlockSize = None,
    randomize: opt.Randomize = False,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    text: opt.Text = "auto",
    compare: opt.Compare = True,
    proof: opt.Proof = True,
    max_shard_size: opt.MaxShardSize = None,
    checksums: opt.Checksums = None,
    memory: opt.Memory = None,
    family: opt.Family = None,
    drop_mtp: opt.DropMtp = False,
    allow_inexact: opt.AllowInexact = False,
    allow_pickle: opt.AllowPickle = False,
) -> None:
    """Fuse R1 and R2 into a plain folder that transformers, vLLM and others load without spinquant.

    The model is never loaded as a whole: its tensors are rotated one by one. Rerun a stopped command to resume.
    """
    from spinquant.cli.tables import result_table
    from spinquant.entrypoints.folders import rotate_folder
    from spinquant.entrypoints.result import Options

    spec = opt.parse_spec(rotations, type, block_size, randomize, seed)
    with stages(quiet=quiet, out=out) as progress:
        result = rotate_folder(
            model,
            out,
            spec,
            learned=opt.taken_from(learned, model, context) if learned else None,
            dtype=opt.parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            command=command_line(),
            device=device,
            max_shard_size=opt.parse_size(max_shard_size),
            checksums=checksums,
            also=also or (),
            options=Options(
                prove=proof,
                allow_inexact=allow_inexact,
                drop_mtp=drop_mtp,
                progress=progress,
                memory=opt.parse_size(memory),
            ),
            family=family,
        )
    push_to_hub(out, push, quiet=quiet)
    print_result(json_, {**result.record(), "seconds": result.seconds}, result_table(result, str(out)))
