"""The command `quantize`."""

from typing import Annotated, Any

import typer

from spinquant.cli.options import (
    ACTIVATIONS,
    ADVANCED,
    ALL_ROTATIONS,
    LEARNING,
    OUTPUT,
    SAMPLE_LENGTH,
    SAMPLES,
    WEIGHTS,
    AllowInexact,
    AllowPickle,
    BlockSize,
    Calibration,
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
    Runtime,
    SchemeName,
    Seed,
    Text,
    Type,
    parse_dtype,
    parse_ratio,
    parse_size,
    parse_spec,
    taken_from,
)
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages, step_report

EXAMPLES = (
    "spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4",
    "spinquant quantize ./llama ./llama-w4 --scheme W4g128A16 --rotations R1,R2 --method gptq --device cuda",
    "spinquant quantize ./llama ./llama-w4a8 --scheme W4A8KV8 --method gptq --clips --calibration ./text.txt",
    "spinquant quantize ./llama ./llama-w8a8 --scheme W8A8 --rotations R1,R2 --runtime vllm",
)


def quantize(
    context: typer.Context,
    model: Model,
    out: Out,
    scheme: SchemeName,
    rotations: Rotations = ALL_ROTATIONS,
    learned: Learned = None,
    method: Annotated[
        str,
        typer.Option(
            help="How weights are rounded: rtn (round-to-nearest), gptq, or gptaq (asymmetric GPTQ).",
            rich_help_panel=WEIGHTS,
        ),
    ] = "rtn",
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights per scale; by default one scale per output channel.",
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    clips: Annotated[
        bool,
        typer.Option(
            "--clips",
            help="Search clip ratios of activations and KV cache per layer, by calibration.",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = False,
    symmetric_activations: Annotated[
        bool | None,
        typer.Option(
            "--symmetric-activations/--asymmetric-activations",
            help="Quantize activations symmetrically or asymmetrically; by default asymmetrically, and symmetrically "
            "for compressed-tensors.",
            show_default=False,
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    calibration: Calibration = None,
    samples: Annotated[int | None, SAMPLES] = None,
    sample_length: Annotated[int | None, SAMPLE_LENGTH] = None,
    learn_first: Annotated[
        str | None,
        typer.Option(
            "--learn",
            help="Learn rotations first, on the calibration text, by this method: auto, local, end-to-end or "
            "local+end-to-end.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format of OUT: native (the default; loads with spinquant), compressed-tensors (an extra; loads in "
            "vLLM), or hf (a plain 16-bit folder).",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    runtime: Runtime = None,
    force: Force = False,
    push: PushToHub = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_: Json = False,
    lm_head: Annotated[
        bool,
        typer.Option("--lm-head", help="Quantize the output head too.", show_default=False, rich_help_panel=ADVANCED),
    ] = False,
    weight_clip: Annotated[
        str,
        typer.Option(help="Clip ratio of weights: a number, or mse to search it per scale.", rich_help_panel=ADVANCED),
    ] = "mse",
    activation_clip: Annotated[float, typer.Option(help="Clip ratio of activations.", rich_help_panel=ADVANCED)] = 1.0,
    kv_clip: Annotated[float, typer.Option(help="Clip ratio of keys and values.", rich_help_panel=ADVANCED)] = 1.0,
    damping: Annotated[
        float,
        typer.Option(
            help="GPTQ: share of the mean of the Hessian's diagonal that is added to the diagonal.",
            rich_help_panel=ADVANCED,
        ),
    ] = 0.01,
    act_order: Annotated[
        bool,
        typer.Option(
            "--act-order",
            help="GPTQ: quantize the columns with the largest inputs first.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    asymmetry: Annotated[
        float | None,
        typer.Option(
            help="GPTAQ: how far to aim at the unquantized model's outputs, from 0 (GPTQ) to 1; 0.25 by default.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="GPTQ: quantize the linears of a decoder block one after the other, each on the inputs that the "
            "quantized ones before it give.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    exact_inputs: Annotated[
        bool,
        typer.Option(
            "--exact-inputs",
            help="Calibrate on unquantized activations and KV cache.",
            show_default=False,
            rich_help_panel=ADVANCED,
        ),
    ] = False,
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
    """Rotate and quantize a model into a folder that `spinquant.load`, or transformers after `import spinquant`, loads.

    With `--format compressed-tensors` the folder is one that vLLM serves. The model is never loaded as a whole: weights
    are streamed, and calibration works decoder block by decoder block. If the command is stopped, rerun it to resume.
    """
    from spinquant.calibration.blockwise import Calibration
    from spinquant.calibration.data import CalibrationText
    from spinquant.cli import tables as report
    from spinquant.entrypoints.folders import quantize_folder
    from spinquant.entrypoints.request import LearnText
    from spinquant.entrypoints.result import Options
    from spinquant.entrypoints.validation import settle_format
    from spinquant.errors import LearningError
    from spinquant.formats.compressed_config import as_stored
    from spinquant.learning.options import LearnOptions, Watch
    from spinquant.quantization.gptq import GPTQOptions
    from spinquant.quantization.scheme import parse_scheme, static_parts

    spec = parse_spec(rotations, type, block_size, randomize, seed)
    settled = settle_format(format, runtime, parse_scheme(scheme), spec)
    compressed = settled == "compressed-tensors"
    parsed = parse_scheme(
        scheme,
        group_size=group_size,
        weight_clip=parse_ratio(weight_clip),
        activation_clip=activation_clip,
        activation_symmetric=compressed if symmetric_activations is None else symmetric_activations,
        kv_clip=kv_clip,
        lm_head=lm_head,
    )
    about = {"text": calibration, "samples": samples, "length": sample_length}
    chosen: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    source = CalibrationText(**chosen, seed=seed)
    if learn_first and learned:
        raise LearningError("--learn learns rotations and --learned takes them from a folder: give one of them")
    calibrated = method != "rtn" or clips or bool(static_parts(as_stored(parsed) if compressed else parsed))
    taken = None if learned is None else taken_from(learned, model, context, scheme=parsed, drawing=calibrated)
    # The text of --learn alone is not one for calibration.
    read = source if (chosen and (calibrated or not learn_first)) or (taken and calibrated) else None
    how = Calibration(
        GPTQOptions(damping, act_order, asymmetry), clips=clips, round_inputs=not exact_inputs, sequential=sequential
    )
    with stages(quiet=quiet, out=out) as progress:
        result = quantize_folder(
            model,
            out,
            parsed,
            spec,
            learned=taken,
            learn=LearnOptions(method=learn_first, seed=seed) if learn_first else None,  # pyright: ignore[reportArgumentType] - checked by it
            learn_text=LearnText(source),
            watch=Watch(progress, step_report(progress)),
            method=method,  # pyright: ignore[reportArgumentType] - checked by the function
            calibration=how,
            calibration_text=read,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            checksums=checksums,
            options=Options(
                prove=proof,
                allow_inexact=allow_inexact,
                drop_mtp=drop_mtp,
                memory=None if memory is None else parse_size(memory),
                progress=progress,
            ),
            format=settled,
            runtime=runtime,
            family=family,
            force=force,
            allow_pickle=allow_pickle,
            command=command_line(),
        )
    push_to_hub(out, push, quiet=quiet)
    if result.learned is not None and learn_first and not json_:
        print_result(False, {}, report.learning_table(result.learned, f"rotations of {out}"))
    print_result(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))
