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
from spinquant.architectures import recorded_family
from spinquant.calibration.data import load_text, token_windows
from spinquant.checkpoint.folder import (
    check_unquantized,
    is_local,
    load_config,
    load_model,
    load_tokenizer,
    read_headers,
)
from spinquant.checkpoint.resumable import check_checksums
from spinquant.cli_along import EXAMPLES as ALONG_EXAMPLES
from spinquant.cli_along import rotate_adapter
from spinquant.cli_learn import EXAMPLES as LEARN_EXAMPLES
from spinquant.cli_learn import learn
from spinquant.cli_options import (
    ALL_ROTATIONS,
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
    parse_spec,
    taken_from,
)
from spinquant.cli_output import err_console, out_console, print_json, print_result, stages
from spinquant.cli_probe import probe_command
from spinquant.cli_quantize import EXAMPLES as QUANTIZE_EXAMPLES
from spinquant.cli_quantize import quantize
from spinquant.errors import ArchitectureError, CheckpointError, ProcessError, SchemeError, SpinquantError
from spinquant.evaluation import compare_models
from spinquant.evaluation import evaluate as evaluate_model
from spinquant.folders import rotate_folder
from spinquant.formats.runtimes import runtime_rows
from spinquant.pipeline import Options
from spinquant.processes import is_first
from spinquant.quantization.scheme import parse_scheme
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
    family: Family = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Of a model that no table knows: try out what can be rotated; print a draft."),
    ] = False,
    draft: Annotated[Path | None, typer.Option(help="With --probe: file for the draft of a family file.")] = None,
    json_: Json = False,
) -> None:
    """Show which tensors each rotation touches, from the config and the safetensors headers alone.

    With --runtime, also what that runtime runs, why, and what would work instead. With --probe, try small random
    models of the class, and draft a family file, which --family takes.
    """
    if draft is not None and not probe:
        raise ArchitectureError("--draft is the file that --probe writes: give --probe too")
    if scheme is not None and runtime is None:
        raise SchemeError("--scheme says what a runtime is to run: give --runtime too")
    wanted = parse_scheme(scheme) if scheme is not None else None
    spec = parse_spec(rotations, type, block_size, randomize, 0)
    config = load_config(model, family=family)
    check_unquantized(config, model)
    shapes = {name: info.shape for name, info in read_headers(model).items()}
    if probe:
        return probe_command(config, shapes, draft, json_)
    made = spinquant.make_plan(config, shapes)
    rows = report.plan_rows(made, spec)
    notes = report.plan_notes(made, spec)
    if recorded_family(config) is not None:
        notes.append(f"the family {made.family} is a family file's, not one of the tables of this library")
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


app.command("rotate-adapter", epilog=ALONG_EXAMPLES)(rotate_adapter)
app.command(epilog=QUANTIZE_EXAMPLES)(quantize)
app.command(epilog=LEARN_EXAMPLES)(learn)


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
        missing = [name for name in bad if not (Path(reference) / name).exists()]
        found = {"folder": reference, "damaged": bad, "missing": missing}
        print_result(json_, found, report.checksum_table(reference, bad, missing))
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
