"""The command line: one function per command, each of which calls one documented function of the library.

Tables go to standard output, progress and notes to standard error, so that `--json` can be piped. A mistake of the
user's gives one line and exit code 1; `--debug` shows the traceback.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import spinquant
from spinquant import report
from spinquant.calibrate import CalibrationText, load_text, token_windows
from spinquant.checkpoint import (
    check_free,
    check_unquantized,
    is_local,
    load_config,
    load_model,
    load_tokenizer,
    read_headers,
)
from spinquant.cli_learn import EXAMPLES, learn
from spinquant.cli_options import (
    ALL_ROTATIONS,
    AllowInexact,
    AllowPickle,
    BlockSize,
    Checksums,
    Compare,
    Device,
    Dtype,
    Force,
    Json,
    Learned,
    Length,
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
    Windows,
    parse_dtype,
    parse_ratio,
    parse_spec,
)
from spinquant.cli_output import err_console, out_console, print_json, print_result, stages, step_report
from spinquant.errors import CheckpointError, LearningError, ProcessError, SchemeError, SpinquantError
from spinquant.evaluation import compare_models
from spinquant.evaluation import evaluate as evaluate_model
from spinquant.folders import check_for, check_format, quantize_folder, rotate_folder
from spinquant.formats.compressed_config import as_stored
from spinquant.formats.runtimes import format_for, runtime_rows
from spinquant.learning.folder import LearnText, learn_from, read_learned, remove_store
from spinquant.learning.learn import LearnOptions, Watch
from spinquant.pipeline import Options
from spinquant.processes import is_first
from spinquant.quantization.blockwise import Calibration
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import parse_scheme, static_parts
from spinquant.resumable import check_checksums
from spinquant.streamed_folders import parse_size

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Rotate language models so that they survive 4-bit weights, activations and KV cache.\n\n"
    "Add `--debug` anywhere for tracebacks.",
)
INTERRUPTED = 130  # the exit code that typer gives Ctrl-C


@app.command(
    epilog="Examples: `spinquant plan ./llama --rotations R1,R2,R4 --block-size R4=128`, "
    "`spinquant plan ./llama --runtime vllm --scheme W8A8`"
)
def plan(
    model: Model,
    rotations: Rotations = ALL_ROTATIONS,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    runtime: Runtime = None,
    scheme: Annotated[str | None, typer.Option(help="What a runtime is to run: W8A8, W4A16, ...")] = None,
    json_: Json = False,
) -> None:
    """Show which tensors each rotation touches, from the config and the safetensors headers alone.

    With --runtime, also what that runtime runs, why, and what would work instead.
    """
    if scheme is not None and runtime is None:
        raise SchemeError("--scheme says what a runtime is to run: give --runtime too")
    wanted = parse_scheme(scheme) if scheme is not None else None
    spec = parse_spec(rotations, type, block_size, randomize, 0)
    config = load_config(model)
    check_unquantized(config, model)
    made = spinquant.make_plan(config, {name: info.shape for name, info in read_headers(model).items()})
    rows = report.plan_rows(made, spec)
    notes = report.plan_notes(made, spec)
    claims = runtime_rows(runtime, spec, wanted, made) if runtime else []
    if json_:
        plain = [{**row, "axes": [asdict(axis) for axis in row["axes"]]} for row in rows]
        data: dict[str, Any] = {"family": made.family, "rotations": plain, "notes": notes}
        print_json({**data, "runtime": claims or None, "plan": made.to_dict()})
    else:
        out_console.print(report.plan_table(made, rows, spec))
        if runtime:
            out_console.print(report.runtime_table(runtime, claims))
        for note in notes:
            out_console.print(f"- {note}", highlight=False)
    if any(row["error"] for row in rows) or not all(claim["runs"] for claim in claims):
        raise typer.Exit(1)


@app.command(epilog="Example: `spinquant rotate ./llama ./llama-rotated --rotations R1,R2 --seed 1`")
def rotate(
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
    checksums: Checksums = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    allow_inexact: AllowInexact = False,
    proof: Proof = True,
    compare: Compare = True,
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
            learned=read_learned(learned) if learned else None,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            checksums=checksums,
            options=Options(prove=proof, allow_inexact=allow_inexact, progress=progress),
        )
    print_result(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))


@app.command(
    epilog="Examples: `spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --rotations R1,R2,R3,R4`, "
    "`spinquant quantize ./llama ./llama-w4 --scheme W4g128A16 --rotations R1,R2 --method gptq`, "
    "`spinquant quantize ./llama ./llama-w4a8 --scheme W4A8KV8 --method gptq --clips --calibration ./text.txt`"
)
def quantize(
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
    proof: Proof = True,
    compare: Compare = True,
    json_: Json = False,
) -> None:
    """Rotate and quantize into a folder that `spinquant.load`, or transformers after `import spinquant`, loads.

    With `--format compressed-tensors`, into one that vLLM serves. The model is never loaded: what needs no calibration
    is streamed, and what does goes decoder block by decoder block.
    """
    spec = parse_spec(rotations, type, block_size, randomize, seed)
    if format is None:
        format = format_for(runtime, parse_scheme(scheme), spec) if runtime else "native"
    parsed = parse_scheme(
        scheme,
        group_size=group_size,
        weight_clip=parse_ratio(weight_clip),
        activation_clip=activation_clip,
        activation_symmetric=format == "compressed-tensors" if symmetric_activations is None else symmetric_activations,
        kv_clip=kv_clip,
        lm_head=lm_head,
    )
    if format == "compressed-tensors":
        parsed = as_stored(parsed)
    about = {"text": calibration, "samples": samples, "length": sample_length}
    chosen: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    source = CalibrationText(**chosen, seed=seed)
    if learn_first and learned:
        raise LearningError("--learn learns rotations and --learned takes them from a folder: give one of them")
    calibrated = method != "rtn" or clips or static_parts(parsed)
    with stages() as progress:
        found, store = read_learned(learned) if learned else None, None
        if learn_first:
            # What would be refused afterwards is refused before.
            check_free(out, force=force, source=model)
            check_format(format, parsed, spec, clips=clips)
            if runtime is not None:
                check_for(runtime, format, parsed, spec, None if allow_pickle else model)
            watch = Watch(progress, step_report(progress))
            options = LearnOptions(method=learn_first, seed=seed)  # pyright: ignore[reportArgumentType] - checked by it
            given = {"text": LearnText(source), "device": device, "allow_pickle": allow_pickle}
            found, store = learn_from(model, out, parsed, spec, options, **given, watch=watch)
        result = quantize_folder(
            model,
            out,
            parsed,
            spec,
            learned=found,
            method=method,  # pyright: ignore[reportArgumentType] - checked by the function
            calibration=Calibration(
                GPTQOptions(damping, act_order, asymmetry),
                clips=clips,
                round_inputs=not exact_inputs,
                sequential=sequential,
            ),
            # The text of --learn alone is not one for calibration.
            calibration_text=source if chosen and (calibrated or not learn_first) else None,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            checksums=checksums,
            options=Options(
                prove=proof,
                allow_inexact=allow_inexact,
                memory=None if memory is None else parse_size(memory),
                progress=progress,
            ),
            runtime=runtime,
            format=format,  # pyright: ignore[reportArgumentType] - checked by the function
        )
        if store is not None:
            remove_store(store)
    print_result(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))


app.command(epilog=EXAMPLES)(learn)


@app.command(epilog="Example: `spinquant evaluate ./llama-w4a4 --reference ./llama --text manual --windows 16`")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Model to agree with: adds KL and top-1 agreement.")] = None,
    text: Text = "auto",
    length: Length = 1024,
    windows: Windows = 32,
    dtype: Dtype = None,
    device: Device = "cpu",
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval (an extra) instead of perplexity.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task.")] = None,
    allow_pickle: AllowPickle = False,
    json_: Json = False,
) -> None:
    """Perplexity over windows of text, and agreement with a reference model; or tasks of lm-eval."""
    wanted = parse_dtype(dtype) or "auto"
    if tasks:
        from spinquant.tasks import evaluate_tasks

        loaded = load_model(model, dtype=wanted, device=device, allow_pickle=allow_pickle)
        results = evaluate_tasks(loaded, load_tokenizer(model), tasks.split(","), task_path=task_path, limit=limit)
        print_result(json_, {"model": model, "results": results}, report.tasks_table(results))
        return
    tokens, name = _windows(model, text, length, windows, allow_pickle)
    loaded = load_model(model, dtype=wanted, device=device, allow_pickle=allow_pickle)
    other = load_model(reference, dtype=wanted, device=device, allow_pickle=allow_pickle) if reference else None
    with stages() as progress:
        result = evaluate_model(loaded, tokens, reference=other, progress=lambda *n: progress("evaluate", *n))
    setup = {"model": model, "reference": reference, "text": name, "length": length, "windows": len(tokens)}
    print_result(json_, {**setup, **result.to_dict()}, report.evaluation_table(model, name, result))


@app.command(
    epilog="Examples: `spinquant verify ./llama ./llama-rotated`, `spinquant verify --checksums ./llama-rotated`"
)
def verify(
    reference: Model,
    other: Annotated[str | None, typer.Argument(help="Model to compare with it.", show_default=False)] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Check that the files of one folder are what was written.")
    ] = False,
    text: Text = "auto",
    length: Length = 256,
    windows: Windows = 4,
    dtype: Dtype = None,
    device: Device = "cpu",
    tolerance: Annotated[float | None, typer.Option(help="Fail when a logit differs by more than this.")] = None,
    allow_pickle: AllowPickle = False,
    json_: Json = False,
) -> None:
    """Compare two saved models on real tokens: logit differences, KL, and how often they agree on the next token.

    With --checksums, check the files of one folder against the checksums that were taken when it was written.
    """
    if checksums == (other is not None):
        raise CheckpointError("verify compares two models, or checks one folder with --checksums")
    if other is None:
        bad = check_checksums(reference)
        print_result(json_, {"folder": reference, "damaged": bad}, report.checksum_table(reference, bad))
        if bad:
            raise typer.Exit(1)
        return
    wanted = parse_dtype(dtype) or "auto"
    tokens, name = _windows(reference, text, length, windows, allow_pickle)
    first = load_model(reference, dtype=wanted, device=device, allow_pickle=allow_pickle)
    second = load_model(other, dtype=wanted, device=device, allow_pickle=allow_pickle)
    with stages() as progress:
        result = compare_models(first, second, tokens, progress=lambda *n: progress("compare", *n))
    setup = {"reference": reference, "other": other, "text": name}
    print_result(json_, {**setup, **result.to_dict()}, report.comparison_table(reference, other, result))
    if tolerance is not None and not result.max_abs <= tolerance:
        err_console.print(f"logits differ by {result.max_abs:.3g}, more than {tolerance:.3g}", style="red")
        raise typer.Exit(1)


@app.command(epilog="Example: `spinquant demo ./demo`")
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the page and its pictures.")] = Path("demo"),
    model: Annotated[str | None, typer.Option(help="Another model; by default a 135M one from PyPI.")] = None,
    text: Text = "manual",
    length: Length = 512,
    windows: Annotated[int, typer.Option(help="Windows per perplexity.")] = 8,
    seed: Seed = 0,
    scheme: Annotated[str, typer.Option(help="What to quantize to.")] = "W4A4KV4",
    force: Force = False,
    json_: Json = False,
) -> None:
    """Tell the whole story on a real model: a table, pictures that show why, and a page with both."""
    from spinquant.demo import run_demo

    with stages() as progress:
        result = run_demo(
            out,
            model=model,
            text=text,
            windows=windows,
            length=length,
            seed=seed,
            scheme=scheme,
            force=force,
            progress=progress,
        )
    print_result(json_, result.to_dict(), report.rows_table(f"perplexity, {scheme}", result.rows))
    if not json_:
        out_console.print(f"page: {out / 'index.html'}", highlight=False)


def main() -> None:
    """Entry point: turns mistakes of the user's into one line, and keeps everything else."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    transformers.utils.logging.disable_progress_bar()
    if not debug:
        transformers.utils.logging.set_verbosity_error()
    try:
        app()
    except SpinquantError as error:
        if debug:
            raise
        if not is_first() and not isinstance(error, ProcessError):
            raise SystemExit(1) from None  # the first process hears of it, and says so
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            err_console.print(
                "interrupted: no folder was written; the same command goes on behind what was finished", style="red"
            )
        raise


def _windows(model: str, text: str, length: int, windows: int, allow_pickle: bool) -> tuple[torch.Tensor, str]:
    if is_local(model) and not allow_pickle:
        read_headers(model)  # a broken folder should say so before a text is read
    tokenizer = load_tokenizer(model)
    name, content = load_text(text)
    return token_windows(tokenizer, content, length=length, count=windows or None), name


if __name__ == "__main__":
    main()
