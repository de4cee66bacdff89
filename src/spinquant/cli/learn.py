"""The command `learn`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spinquant.cli.options import (
    ADVANCED,
    ALL_ROTATIONS,
    CALIBRATION,
    LEARNING,
    SAMPLE_LENGTH,
    SAMPLES,
    AllowPickle,
    BlockSize,
    Device,
    Dtype,
    Family,
    Force,
    Json,
    LearningText,
    Model,
    Out,
    PushToHub,
    Quiet,
    Rotations,
    SchemeName,
    Seed,
    Type,
    Windows,
    note_another_model,
    parse_dtype,
    parse_spec,
)
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages, step_report
from spinquant.errors import LearningError
from spinquant.plan import parse_rotation_names
from spinquant.quantization.scheme import parse_scheme

EXAMPLES = (
    "spinquant learn ./llama ./learned --scheme W4A4KV4",
    "spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --learned ./learned --method gptq --clips",
    "spinquant learn ./llama ./learned --scheme W4A4KV4 --method local --device cuda",
    "torchrun --nproc-per-node 4 -m spinquant learn ./llama ./learned --scheme W4A4KV4 --method end-to-end "
    "--device cuda",
)


def learn(
    model: Model,
    out: Out,
    scheme: SchemeName,
    rotations: Rotations = ALL_ROTATIONS,
    method: Annotated[
        str,
        typer.Option(
            help="local: on captured activations; end-to-end: through the quantized model; local+end-to-end: one after "
            "the other; auto: local, and end-to-end only if local does not beat the random rotations; random: learn "
            "nothing, take the best random rotation.",
            rich_help_panel=LEARNING,
        ),
    ] = "auto",
    which: Annotated[
        str | None,
        typer.Option(
            "--learn",
            help="Rotations to learn; by default those of R1,R2,R3 that are applied. R4 needs blocks of at most 512, "
            "as in --block-size R4=64.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps; by default 200 for local, 100 for end-to-end.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate (length of a step); by default 0.5, and 0.15 for end-to-end that starts from learned "
            "rotations.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    text: LearningText = "auto",
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Held-out text that candidates are scored on; by default the end of the calibration text, whose last "
            "sample is then left out as a gap.",
            show_default=False,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    samples: Annotated[int, SAMPLES] = 128,
    sample_length: Annotated[int, SAMPLE_LENGTH] = 512,
    force: Force = False,
    push: PushToHub = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_: Json = False,
    baselines: Annotated[
        int,
        typer.Option(help="Random rotations that learned ones are compared with.", rich_help_panel=ADVANCED),
    ] = 5,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Folder of rotations learned before: start from them if they beat the random ones.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    windows: Windows = 8,
    objective: Annotated[
        str | None,
        typer.Option(
            help="local: error (of rounding; the default), whip or kurtosis.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="local: cayley (the default), qr or procrustes.", show_default=False, rich_help_panel=ADVANCED
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="local: activation vectors sampled at each quantizer; 1024 by default.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            help="local, how vectors are sampled: fisher (by what they cost in KL, which takes a forward and backward "
            "pass through the model; the default), uniform (one decoder block at a time), or massive.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    massive: Annotated[
        float | None,
        typer.Option(
            help="local, --weighting massive: weight of a vector with a massive activation.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="end-to-end: fisher (expected KL; the default), kl or cross-entropy.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="end-to-end: samples per step; 4 by default.", show_default=False, rich_help_panel=ADVANCED),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="end-to-end: samples per pass; gradients accumulate over the passes of a step.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="end-to-end: cosine (the default), linear or constant.", show_default=False, rich_help_panel=ADVANCED
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adam (the default) or sgd.", show_default=False, rich_help_panel=ADVANCED),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option("--weights", help="end-to-end: quantize weights too while learning.", rich_help_panel=ADVANCED),
    ] = False,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="end-to-end under torchrun: shard the weights (FSDP2).", rich_help_panel=ADVANCED),
    ] = False,
    signs: Annotated[
        int,
        typer.Option(
            help="Random sign vectors to try per layer for R3 and R4, of which the best is taken.",
            rich_help_panel=ADVANCED,
        ),
    ] = 0,
    scales: Annotated[
        bool | None,
        typer.Option(
            "--scales/--no-scales",
            help="Scale channels before R4, fused into up_proj and down_proj; by default where gradients are computed "
            "anyway.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    family: Family = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Learn rotations for a model and a scheme; they are kept only if they beat the best of several random ones.

    If the command is stopped, rerun it to resume. A rerun with other options is refused; --force starts anew.
    """
    from spinquant.calibration.data import CalibrationText
    from spinquant.cli import tables as report
    from spinquant.entrypoints.learn import LearnText, learn_folder, read_learned
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions
    from spinquant.learning.options import LearnOptions, Watch

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
        note_another_model(start, read_learned(start), model, quiet=quiet)
    with stages(quiet=quiet, out=out) as progress:
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
            command=command_line(),
            family=family,
            watch=Watch(progress, step_report(progress)),
        )
    push_to_hub(out, push, quiet=quiet)
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
