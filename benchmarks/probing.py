"""Probe every model type that has a table, with the tables hidden, and compare: python benchmarks/probing.py

For every tiny instance of the tests: whether the draft's plan equals the table's (without refused rotations), and if
not, what is missing. The lists in docs/how-to/own-model.md come from this script.
"""

import sys
import time
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402
import models  # noqa: E402
import spinquant  # noqa: E402
from families import config_of, shapes_of, usable  # noqa: E402
from spinquant.errors import ArchitectureError  # noqa: E402


def outcome(name: str) -> tuple[bool, str]:
    """Whether the draft equals the table; if not, what is missing."""
    config = config_of(name)
    shapes = shapes_of(config)
    expected = usable(spinquant.make_plan(config, shapes))
    try:
        found = spinquant.probe(config)
    except ArchitectureError as error:
        return False, f"nothing: {error}"
    if found.family is None:
        return False, f"no draft: {found.left[0]}"
    try:
        plan = usable(spinquant.make_plan(config, shapes, family=found.family))
    except ArchitectureError as error:
        return False, f"no plan: {error}"
    differing = [part for part in plan if plan[part] != expected[part]]
    refused = sorted(plan["refused"] - expected["refused"])
    return not differing, f"{', '.join(differing)}; refused beyond the table: {', '.join(refused) or 'nothing'}"


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    same: dict[str, bool] = {}
    for name in [*models.CONFIGS, *families.FAMILIES]:
        start = time.perf_counter()
        found, missing = outcome(name)
        model_type = config_of(name).model_type
        same[model_type] = same.get(model_type, True) and found
        print(f"{name}: {'same' if found else missing} ({time.perf_counter() - start:.1f} s)", flush=True)
    print("\nsame:", ", ".join(f"`{name}`" for name in sorted(same) if same[name]))
    print("\nnot:", ", ".join(f"`{name}`" for name in sorted(same) if not same[name]))


if __name__ == "__main__":
    main()
