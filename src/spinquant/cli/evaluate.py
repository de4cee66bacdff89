"""The commands `evaluate` and `verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spinquant.cli import options as opt
from spinquant.cli.output import err_console, print_result
from spinquant.cli.progress import stages
from spinquant.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

EVALUATE_EXAMPLES = (
    "spinquant evaluate ./llama-w4a4 --reference ./llama",
    "spinquant evaluate ./llama-w4a4 --text manual --windows 16 --json",
    "spinquant evaluate ./llama-w4a4 --tasks hellaswag,arc_easy --limit 200 --device cuda",
)
VERIFY_EXAMPLES = (
    "spinquant verify ./llama ./llama-rotated",
    "spinquant verify ./llama ./llama-rotated --tolerance 1e-3",
    "spinquant verify --checksums ./llama-rotated",
)


def evaluate(
    model: opt.Model,
    reference: Annotated[
        str | None,
        opt.option(None, "Reference model: adds KL divergence and top-1 agreement with it."),
    ] = None,
    tasks: Annotated[
        str | None,
        opt.option(None, "Run these lm-eval tasks (extra lm-eval), comma-separated, instead of perplexity."),
    ] = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
    text: opt.Text = "auto",
    length: opt.Length = None,
    windows: opt.Windows = 32,
    dtype: opt.Dtype = None,
    task_path: Annotated[
        Path | None,
        opt.option(opt.ADVANCED, "Folder with your own lm-eval tasks."),
    ] = None,
    limit: Annotated[int | None, opt.option(opt.ADVANCED, "Examples per lm-eval task.")] = None,
    allow_pickle: opt.AllowPickle = False,
) -> None:
    """Measure perplexity on text and, with --reference, KL divergence to another model; or run lm-eval tasks."""
    from spinquant.checkpoint.folder import load_tokenizer
    from spinquant.cli.tables import evaluation_table, tasks_table
    from spinquant.entrypoints.arithmetic import load_to_compute
    from spinquant.evaluation.metrics import evaluate as evaluate_model

    loading: dict[str, Any] = {"wanted": opt.parse_dtype(dtype), "device": device, "allow_pickle": allow_pickle}
    if tasks:
        from spinquant.integrations.lm_eval import evaluate_tasks

        with stages(quiet=quiet):
            (loaded,), (computed,) = load_to_compute(model, **loading)
        results = evaluate_tasks(loaded, load_tokenizer(model), tasks.split(","), task_path=task_path, limit=limit)
        found = {"model": model, "arithmetic": computed.to_dict(), "results": results}
        print_result(json_, found, tasks_table(results, computed))
        return
    tokens, name = _windows(model, text, length, windows, allow_pickle, default=1024)
    with stages(quiet=quiet) as progress:
        (loaded, *other), (computed, *_) = load_to_compute(*filter(None, (model, reference)), **loading)
        compared = other[0] if other else None
        result = evaluate_model(loaded, tokens, reference=compared, progress=lambda *n: progress("evaluate", *n))
    setup = {"model": model, "reference": reference, "text": name, "length": tokens.shape[1], "windows": len(tokens)}
    setup["arithmetic"] = computed.to_dict()
    print_result(json_, {**setup, **result.to_dict()}, evaluation_table(model, name, result, computed))


def verify(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="Model folder in Hugging Face format, or a model id on the hub.")
    ],
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="Model to compare with it: a folder or hub id.", show_default=False),
    ] = None,
    checksums: Annotated[
        bool, opt.option(None, "Check the files of one folder against the checksums in its record.", "--checksums")
    ] = False,
    tolerance: Annotated[
        float | None,
        opt.option(None, "Fail if any logit differs by more than this."),
    ] = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
    text: opt.Text = "auto",
    length: opt.Length = None,
    windows: opt.Windows = 4,
    dtype: opt.Dtype = None,
    allow_pickle: opt.AllowPickle = False,
) -> None:
    """Compare the logits of two models on real tokens: largest difference, KL divergence, top-1 agreement.

    With --checksums, check instead that the files of one folder are unchanged since it was written.
    """
    from spinquant.checkpoint.checksums import check_checksums
    from spinquant.cli.tables import checksum_table, comparison_table
    from spinquant.entrypoints.arithmetic import load_to_compute
    from spinquant.evaluation.metrics import compare_models

    if checksums == (other is not None):
        raise CheckpointError("verify takes two models to compare, or one folder with --checksums")
    if other is None:
        bad = check_checksums(reference)
        missing = [name for name in bad if not (Path(reference) / name).exists()]
        found = {"folder": reference, "damaged": bad, "missing": missing}
        print_result(json_, found, checksum_table(reference, bad, missing))
        if bad:
            raise typer.Exit(1)
        return
    tokens, name = _windows(reference, text, length, windows, allow_pickle, default=256)
    loading: dict[str, Any] = {"wanted": opt.parse_dtype(dtype), "device": device, "allow_pickle": allow_pickle}
    with stages(quiet=quiet) as progress:
        (first, second), (computed, _) = load_to_compute(reference, other, **loading)
        result = compare_models(first, second, tokens, progress=lambda *n: progress("compare", *n))
    setup = {"reference": reference, "other": other, "text": name, "arithmetic": computed.to_dict()}
    print_result(json_, {**setup, **result.to_dict()}, comparison_table(reference, other, result, computed))
    if tolerance is not None and not result.max_abs <= tolerance:
        err_console().print(f"logits differ by {result.max_abs:.3g}, more than {tolerance:.3g}", style="red")
        raise typer.Exit(1)


def _windows(
    model: str, text: str, length: int | None, windows: int, allow_pickle: bool, *, default: int
) -> "tuple[Tensor, str]":
    from spinquant.calibration.data import load_text, token_windows
    from spinquant.checkpoint.folder import is_local, load_config, load_tokenizer, read_headers
    from spinquant.models.context import fitting_length

    if is_local(model) and not allow_pickle:
        read_headers(model)  # a broken folder is an error before the text is read
    length = fitting_length(load_config(model), length, default, "give a shorter --length")
    tokenizer = load_tokenizer(model)
    name, content = load_text(text, tokenizer)
    return token_windows(tokenizer, content, length=length, count=windows or None), name
