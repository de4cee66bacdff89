"""The command `learn`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spinquant.calibration.data import CalibrationText
from spinquant.cli import tables as report
from spinquant.cli.options import (
    ALL_ROTATIONS,
    AllowPickle,
    BlockSize,
    Device,
    Dtype,
    Family,
    Force,
    Json,
    Model,
    Rotations,
    Seed,
    Type,
    note_another_model,
    parse_dtype,
    parse_spec,
)
from spinquant.cli.output import print_result, stages, step_report
from spinquant.entrypoints.learn import LearnText, learn_folder, read_learned
from spinquant.errors import LearningError
from spinquant.learning.end_to_end import EndToEndOptions
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.options import LearnOptions, Watch
from spinquant.plan import parse_rotation_names
from spinquant.quantization.scheme import parse_scheme

EXAMPLES = (
    "Examples: `spinquant learn ./llama ./learned --scheme W4A4KV4 --method local`, then "
    "`spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --learned ./learned --method gptq --clips`; "
    "`torchrun --nproc-per-node 4 -m spinquant learn ./llama ./learned --scheme W4A4KV4 --method end-to-end`"
)


def learn(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the rotations; it appears complete or not at all.")],
    scheme: Annotated[str, typer.Option(help="What the rotations are for: W4A4KV4, A8KV4, ...")],
    rotations: Rotations = ALL_ROTATIONS,
    method: Annotated[
        str,
        typer.Option(
            help="local: on captured activations; end-to-end: through the quantized network; local+end-to-end; auto: "
            "local, and end-to-end only where that loses to the random rotations; random: the best of those."
        ),
    ] = "auto",
    which: Annotated[
        str | None,
        typer.Option(
            "--learn",
            help="Rotations to learn: R1,R2,R3 by default, where rotated; R4 needs blocks of at most 512, as in "
            "--block-size R4=64.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; 200 for local, 100 for end-to-end.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Length of a step; 0.5, and 0.15 end to end from what was learned.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="local: error (default), whip or kurtosis.")] = None,
    solver: Annotated[str | None, typer.Option(help="local: cayley (default), qr or procrustes.")] = None,
    rows: Annotated[int | None, typer.Option(help="local: activations sampled at each quantizer; 1024.")] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            help="local: fisher (rows by what they cost in KL: a pass forward and back through the model; default), "
            "uniform (one decoder block at a time), or massive."
        ),
    ] = None,
    massive: Annotated[
        float | None, typer.Option(help="local, --weighting massive: how often a row with a massive activation counts.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="end-to-end: fisher (expected KL; default), kl or cross-entropy.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="end-to-end: samples of a step; 4.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="end-to-end: samples of one pass; the rest accumulate.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="end-to-end: cosine (default), linear or constant.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adam; adam by default.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="end-to-end: round weights too while learning.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradients with less memory and more time.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", help="end-to-end, torchrun: spread the weights (FSDP2).")] = False,
    signs: Annotated[int, typer.Option(help="Draws of signs per layer for R3 and R4; the best are taken.")] = 0,
    scales: Annotated[
        bool | None,
        typer.Option(
            "--scales/--no-scales",
            help="Scale channels before R4, fused into up_proj and down_proj; where gradients are taken, by default.",
        ),
    ] = None,
    baselines: Annotated[int, typer.Option(help="Random rotations to beat.")] = 5,
    start: Annotated[
        Path | None,
        typer.Option(help="Folder of rotations learned before, to go on from where they beat the random ones."),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to learn from: a file, manual, dataset:NAME, generated.")] = "auto",
    held_out: Annotated[str | None, typer.Option(help="Text to judge on; by default the end of --text.")] = None,
    windows: Annotated[int, typer.Option(help="Windows to judge on.")] = 8,
    samples: Annotated[
        int, typer.Option(help="Samples of the text; without --held-out the last is a distance to what is judged on.")
    ] = 128,
    sample_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 512,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    force: Force = False,
    allow_pickle: AllowPickle = False,
    family: Family = None,
    json_: Json = False,
) -> None:
    """Learn rotations for a model and a scheme; they are kept only where they beat the best of several random ones.

    A run that is stopped goes on where it was when the command is repeated; with other options it is refused, or starts
    anew with --force.
    """
    spec = parse_spec(rotations, type, block_size, False, seed)
    both: dict[str, Any] = {"steps": steps, "lr": lr, "optimizer": optimizer}
    local = {"objective": objective, "solver": solver, "rows": rows, "weighting": weighting, "massive": massive}
    through = {"loss": loss, "batch": batch, "micro_batch": micro_batch, "schedule": schedule}
    through |= {"weights": weights or None}
    # Local learning takes gradients where rows are drawn by what they cost.
    differentiates = both if weighting in (None, "fisher") and massive is None else through
    differentiates["checkpointing"] = checkpointing or None
    _check_used(method, both, local, through, which)
    if (factor := local.pop("massive")) is not None:
        local |= {"factor": factor, "weighting": weighting or "massive"}
    only = {"local": (local,), "end-to-end": (through,)}.get(method, (local, through))
    for chosen in only:
        chosen.update(both)
    options = LearnOptions(
        method=method,  # pyright: ignore[reportArgumentType] - checked by the class
        rotations=None if which is None else parse_rotation_names(which),
        baselines=baselines,
        signs=signs,
        scales=scales,
        shard=shard,
        local=LocalOptions(**_given(local)),
        end_to_end=EndToEndOptions(**_given(through)),
        seed=seed,
    )
    if start is not None:
        note_another_model(start, read_learned(start), model)
    with stages() as progress:
        learned = learn_folder(
            model,
            out,
            parse_scheme(scheme),
            spec,
            options,
            text=LearnText(CalibrationText(text, samples, sample_length, seed), held_out, windows),
            start=start,
            device=device,
            dtype=parse_dtype(dtype) or "auto",
            force=force,
            allow_pickle=allow_pickle,
            family=family,
            watch=Watch(progress, step_report(progress)),
        )
    print_result(json_, learned.record, report.learning_table(learned, str(out)))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_used(
    method: str, both: dict[str, Any], local: dict[str, Any], through: dict[str, Any], which: str | None
) -> None:
    """Raise LearningError for options of a method that is not used: they would do nothing."""
    if method == "local" and through.get("checkpointing"):
        raise LearningError(
            "--checkpointing would do nothing: it saves memory where gradients go through the model, which local "
            "learning takes with --weighting fisher alone. Leave it out"
        )
    if method == "random" and which is not None:
        raise LearningError("--learn would do nothing: --method random learns no rotation. Leave it out")
    unused = {"local": through, "end-to-end": local, "random": {**both, **local, **through}}.get(method, {})
    if _given(unused):
        names = ", ".join("--" + name.replace("_", "-") for name in _given(unused))
        raise LearningError(f"{names} would do nothing: --method {method} does not use them. Leave them out")
