"""evaluate"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from spinquant.calibration.data import load_text, token_windows
from spinquant.checkpoint.folder import is_local, load_tokenizer, read_headers
from spinquant.checkpoint.run_directory import check_checksums
from spinquant.cli import tables as report
from spinquant.cli.main import app
from spinquant.cli.options import (
    AllowPickle,
    Device,
    Dtype,
    Json,
    Length,
    Model,
    Text,
    Windows,
    parse_dtype,
)
from spinquant.cli.output import err_console, print_result, stages
from spinquant.errors import CheckpointError
from spinquant.evaluation.metrics import compare_models
from spinquant.evaluation.metrics import evaluate as evaluate_model
from spinquant.formats.load import load_model


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
        from spinquant.integrations.lm_eval import evaluate_tasks

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


def _windows(model: str, text: str, length: int, windows: int, allow_pickle: bool) -> tuple[torch.Tensor, str]:
    if is_local(model) and not allow_pickle:
        read_headers(model)  # a broken folder should say so before a text is read
    tokenizer = load_tokenizer(model)
    name, content = load_text(text)
    return token_windows(tokenizer, content, length=length, count=windows or None), name
