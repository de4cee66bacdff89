"""The command line: one function per command, each of which calls one documented function of the library.

Tables go to standard output, progress and notes to standard error, so that `--json` can be piped. A mistake of the
user's gives one line and exit code 1; `--debug` shows the traceback.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import spinquant
from spinquant import report
from spinquant.calibrate import CalibrationText, load_text, token_windows
from spinquant.checkpoint import check_unquantized, is_local, load_config, load_model, load_tokenizer, read_headers
from spinquant.cli_options import (
    ALL_ROTATIONS,
    AllowInexact,
    AllowPickle,
    BlockSize,
    Compare,
    Device,
    Dtype,
    Force,
    Json,
    Length,
    MaxShardSize,
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
from spinquant.errors import CheckpointError, SchemeError, SpinquantError
from spinquant.evaluation import compare_models
from spinquant.evaluation import evaluate as evaluate_model
from spinquant.folders import quantize_folder, rotate_folder
from spinquant.formats.runtimes import format_for, runtime_rows
from spinquant.pipeline import Options, Stage
from spinquant.quantization.blockwise import Calibration
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import parse_scheme
from spinquant.resumable import check_checksums
from spinquant.streamed_folders import STREAMED, parse_size

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Rotate language models so that they survive 4-bit weights, activations and KV cache.\n\n"
    "Add `--debug` anywhere for tracebacks.",
)
out_console, err_console = Console(), Console(stderr=True)

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
        _print_json({**data, "runtime": claims or None, "plan": made.to_dict()})
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
    dtype: Dtype = None,
    text: Text = "auto",
    device: Device = "cpu",
    max_shard_size: MaxShardSize = None,
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
    with _stages() as progress:
        result = rotate_folder(
            model,
            out,
            spec,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            options=Options(prove=proof, allow_inexact=allow_inexact, progress=progress),
        )
    _print(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))


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
    force: Force = False,
    allow_pickle: AllowPickle = False,
    allow_inexact: AllowInexact = False,
    proof: Proof = True,
    compare: Compare = True,
    json_: Json = False,
) -> None:
    """Rotate and quantize into a folder that `spinquant.load`, or transformers after `import spinquant`, loads.

    With `--format compressed-tensors`, into one that vLLM serves. What needs no calibration text is streamed: the model
    is never loaded.
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
    about = {"text": calibration, "samples": samples, "length": sample_length}
    chosen: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    with _stages() as progress:
        result = quantize_folder(
            model,
            out,
            parsed,
            spec,
            method=method,  # pyright: ignore[reportArgumentType] - checked by the function
            calibration=Calibration(
                GPTQOptions(damping, act_order, asymmetry),
                clips=clips,
                round_inputs=not exact_inputs,
                sequential=sequential,
            ),
            calibration_text=CalibrationText(**chosen, seed=seed) if chosen else None,
            dtype=parse_dtype(dtype),
            text=text if compare else None,
            force=force,
            allow_pickle=allow_pickle,
            device=device,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            options=Options(prove=proof, allow_inexact=allow_inexact, progress=progress),
            runtime=runtime,
            format=format,  # pyright: ignore[reportArgumentType] - checked by the function
        )
    _print(json_, {**result.record(), "seconds": result.seconds}, report.result_table(result, str(out)))


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
        _print(json_, {"model": model, "results": results}, report.tasks_table(results))
        return
    tokens, name = _windows(model, text, length, windows, allow_pickle)
    loaded = load_model(model, dtype=wanted, device=device, allow_pickle=allow_pickle)
    other = load_model(reference, dtype=wanted, device=device, allow_pickle=allow_pickle) if reference else None
    with _stages() as progress:
        result = evaluate_model(loaded, tokens, reference=other, progress=lambda *n: progress("evaluate", *n))
    setup = {"model": model, "reference": reference, "text": name, "length": length, "windows": len(tokens)}
    _print(json_, {**setup, **result.to_dict()}, report.evaluation_table(model, name, result))


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
        _print(json_, {"folder": reference, "damaged": bad}, report.checksum_table(reference, bad))
        if bad:
            raise typer.Exit(1)
        return
    wanted = parse_dtype(dtype) or "auto"
    tokens, name = _windows(reference, text, length, windows, allow_pickle)
    first = load_model(reference, dtype=wanted, device=device, allow_pickle=allow_pickle)
    second = load_model(other, dtype=wanted, device=device, allow_pickle=allow_pickle)
    with _stages() as progress:
        result = compare_models(first, second, tokens, progress=lambda *n: progress("compare", *n))
    setup = {"reference": reference, "other": other, "text": name}
    _print(json_, {**setup, **result.to_dict()}, report.comparison_table(reference, other, result))
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

    with _stages() as progress:
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
    _print(json_, result.to_dict(), report.rows_table(f"perplexity, {scheme}", result.rows))
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


@contextmanager
def _stages() -> Iterator[Stage]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, transient=True) as bars:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def report_stage(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, amount="")
                begun[stage] = time.monotonic(), done
            start, first = begun[stage]
            amount = _amount(stage, done, total, (done - first) / max(time.monotonic() - start, 1e-3))
            bars.update(tasks[stage], completed=done, total=total, amount=amount)

        yield report_stage


def _amount(stage: str, done: int, total: int, speed: float) -> str:
    """How much of a stage is done: a count, or bytes and how many of them in a second."""
    if stage != STREAMED:
        return f"{done}/{total}"
    return f"{done / 1e9:.2f}/{total / 1e9:.2f} GB, {speed / 1e6:.0f} MB/s"


def _print(as_json: bool, data: dict[str, Any], table: Any) -> None:
    if as_json:
        _print_json(data)
    else:
        out_console.print(table)


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(_finite(data), indent=1, default=dict))


def _finite(data: Any) -> Any:
    """The same data with null where a number is not finite, which JSON cannot say."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


if __name__ == "__main__":
    main()
