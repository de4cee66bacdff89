"""The releases of transformers that spinquant was tested with (`make test-versions`), and a warning outside of them.

What another release changed is caught where it matters: rotations are proved on a tiny model, and an online rotation or
quantizer that does not run is an error (`online/firing.py`).
"""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from spinquant.compute.releases import numbers

TESTED = ("5.17", "5.24")  # the bounds in pyproject.toml, both included


@cache
def warn_untested() -> None:
    """Warn once if the installed transformers is older or newer than what was tested; without importing it."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return
    oldest, newest = (numbers(release) for release in TESTED)
    if not oldest <= numbers(found) <= newest:
        warnings.warn(
            f"transformers {found} is not among the releases that spinquant was tested with ({' to '.join(TESTED)})."
            " Results are still checked, and what does not work is an error; install a tested release if you meet one",
            stacklevel=3,
        )
