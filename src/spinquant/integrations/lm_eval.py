"""Zero-shot tasks through lm-eval (an extra) and its own Hugging Face model class."""

from pathlib import Path
from typing import Any

from spinquant.errors import TextError


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: list[str], *, task_path: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Results of lm-eval's tasks by task and metric, on a model in memory with its online parts.

    task_path: a folder with task files of the user's own. limit: examples per task. Raises TextError when lm-eval is
    not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TextError(f"tasks need the lm-eval extra ({error}): pip install 'spinquant[lm-eval]'") from None
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise TextError(f"lm-eval knows no task {unknown[0]!r}; add --task-path for tasks of your own")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer)
    results = simple_evaluate(model=language_model, tasks=tasks, task_manager=manager, limit=limit)
    if results is None:  # lm-eval returns nothing on ranks other than the first
        return {}
    return {task: dict(metrics) for task, metrics in results["results"].items()}
