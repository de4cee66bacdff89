"""The command `quantize`."""

from typing import Annotated, Any

import typer

from spinquant.calibration.blockwise import Calibration
from spinquant.calibration.data import CalibrationText
from spinquant.cli import tables as report
from spinquant.cli.options import (
    ALL_ROTATIONS,
    AllowInexact,
    AllowPickle,
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
    Runtime,
    Seed,
    Text,
    Type,
    parse_dtype,
    parse_ratio,
    parse_size,
    parse_spec,
    taken_from,
)
from spinquant.cli.output import print_result, stages, step_report
from spinquant.entrypoints.folders import quantize_folder
from spinquant.entrypoints.request import LearnText
from spinquant.entrypoints.result import Options
from spinquant.entrypoints.validation import settle_format
from spinquant.errors import LearningError
from spinquant.formats.compressed_config import as_stored
from spinquant.learning.options import LearnOptions, Watch
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import parse_scheme, static_parts

EXAMPLES = (
    "Examples: `spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --rotations R1,R2,R3,R4`, "
    "`spinquant quantize ./llama ./llama-w4 --scheme W4g128A16 --rotations R1,R2 --method gptq`, "
    "`spinquant quantize ./llama ./llama-w4a8 --scheme W4A8KV8 --method gptq --clips --calibration ./text.txt`"
)


def quantize(
    context: typer.Context,
    model: Model,
    out: Out,
    scheme: Annotated[str, typer.Option(help="W4A4KV4, W4g128A16, W8A8, KV4, ... or none for rotations alone.")],
    rotations: Rotations = ALL_ROTATIONS,
    learned: Learned = None,
    learn_first: Annotated[
        str | None,
        typer.Option(
            "--learn", help="Learn rotations first: auto, local, end-to-end, local+end-to-end; on --calibration's text."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="How weights are rounded: rtn, gptq, or gptaq (asymmetric).")] = "rtn",
    clips: Annotated[bool, typer.Option("--clips", help="Search clip ratios of activations and KV per layer.")] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on: as --text, or generated (by the model itself).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples; 128 by default.")] = None,
    sample_length: Annotated[int | None, typer.Option(help="Tokens per calibration sample; 512 by default.")] = None,
    damping: Annotated[float, typer.Option(help="GPTQ: share of the mean diagonal added to it.")] = 0.01,
    act_order: Annotated[bool, typer.Option(help="GPTQ: columns of large inputs first.")] = False,
    asymmetry: Annotated[
        float | None, typer.Option(help="GPTAQ: share of the way to the unquantized model's outputs; 0.25 by default.")
    ] = None,
    sequential: Annotated[bool, typer.Option(help="GPTQ: one linear after the other inside a block.")] = False,
    exact_inputs: Annotated[bool, typer.Option(help="Calibrate on activations and KV that are not rounded.")] = False,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    seed: Seed = 0,
    group_size: Annotated[int | None, typer.Option(help="Weights per scale; by default a whole channel.")] = None,
    weight_clip: Annotated[str, typer.Option(help="Clip ratio of weights, or mse to search it.")] = "mse",
    activation_clip: Annotated[float, typer.Option(help="Clip ratio of activations.")] = 1.0,
    symmetric_activations: Annotated[
        bool | None,
        typer.Option(
            "--symmetric-activations/--asymmetric-activations",
            help="Grid of activations: by default asymmetric, and symmetric for compressed-tensors.",
            show_default=False,
        ),
    ] = None,
    kv_clip: Annotated[float, typer.Option(help="Clip ratio of keys and values.")] = 1.0,
    lm_head: Annotated[bool, typer.Option(help="Quantize the output head too.")] = False,
    format: Annotated[
        str | None,
        typer.Option(help="Of the folder: native, compressed-tensors (an extra; vLLM), or hf (16 bits, plain)."),
    ] = None,
    runtime: Runtime = None,
    dtype: Dtype = None,
    text: Text = "auto",
    device: Device = "cpu",
    max_shard_size: MaxShardSize = None,
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
    """Rotate and quantize into a folder that `spinquant.load`, or transformers after `import spinquant`, loads.

    With `--format compressed-tensors`, into one that vLLM serves. The model is never loaded: what needs no calibration
    is streamed, and what does goes decoder block by decoder block.
    """
    spec = parse_spec(rotations, type, block_size, randomize, seed)
    settled = settle_format(format, runtime, parse_scheme(scheme), spec)  # pyright: ignore[reportArgumentType]
    parsed = parse_scheme(
        scheme,
        group_size=group_size,
        weight_clip=parse_ratio(weight_clip),
        activation_clip=activation_clip,
        activation_symmetric=settled == "compressed-tensors"
        if symmetric_activations is None
        else symmetric_activations,
        kv_clip=kv_clip,
        lm_head=lm_head,
    )
    about = {"text": calibration, "samples": samples, "length": sample_length}
    chosen: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    source = CalibrationText(**chosen, seed=seed)
    if learn_first and learned:
        raise LearningError("--learn learns rotations and --learned takes them from a folder: give one of them")
    static = settled == "compressed-tensors" and static_parts(as_stored(parsed))
    calibrated = bool(method != "rtn" or clips or static_parts(parsed) or static)
    taken = None if learned is None else taken_from(learned, model, context, scheme=parsed, drawing=calibrated)
    # The text of --learn alone is not one for calibration.
    read = source if (chosen and (calibrated or not learn_first)) or (taken and calibrated) else None
    with stages() as progress:
        result = quantize_folder(
            model,
            out,
            parsed,
            spec,
            learned=taken,
            learn=LearnOptions(method=learn_first, seed=seed) if learn_first else None,  # pyright: ignore[reportArgumentType]
            learn_text=LearnText(source),
            watch=Watch(progress, step_report(progress)),
            method=method,  # pyright: ignore[reportArgumentType] - checked by the function
            calibration=Calibration(
                GPTQOptions(damping, act_order, asymmetry),
                clips=clips,
                round_inputs=not exact_inputs,
                sequential=sequential,
            ),
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
            format=settled,  # pyright: ignore[reportArgumentType]
            runtime=runtime,
            family=family,
            force=force,
            allow_pickle=allow_pickle,
        )
    if result.learned is not None and learn_first and not json_:
        print_result(False, {}, report.learning_table(result.learned, f"rotations of {out}"))
    print_result(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))
