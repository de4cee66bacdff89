"""Zero-shot evaluation: run tasks of lm-eval (lm-evaluation-harness, an optional extra) on a model in memory."""

from pathlib import Path
from typing import Any

from spinquant.errors import TextError


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: list[str], *, task_path: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model in memory, with its online rotations, on tasks of lm-eval.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: Names of tasks.
        task_path: Folder with custom task files. Default: none.
        limit: Examples per task. Default: all.

    Returns:
        The results by task and metric; empty on all processes but the first.

    Raises:
        TextError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TextError(f"tasks need lm-eval ({error}): pip install 'spinquant[lm-eval]'") from None
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise TextError(f"lm-eval has no task {unknown[0]!r}; use --task-path for custom tasks")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer)
    results = simple_evaluate(model=language_model, tasks=tasks, task_manager=manager, limit=limit)
    if results is None:  # lm-eval returns nothing on ranks other than the first
        return {}
    return {task: dict(metrics) for task, metrics in results["results"].items()}
