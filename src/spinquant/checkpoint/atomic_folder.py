"""A folder that appears under its name when it is complete, for what is written in one go and need not resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spinquant.checkpoint.atomic import check_free, first_line, is_full, why_full
from spinquant.checkpoint.run_directory import RunDirectory
from spinquant.errors import CheckpointError


@contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Within the block, a temporary folder that is renamed to `out` at the end, or deleted after an error.

    Raises:
        CheckpointError: `out` exists and `force` is off, another run writes it, or the disk is full.
    """
    run = RunDirectory(out)
    check_free(out, force=force)
    run.acquire(None, force=force)
    try:
        try:
            yield run.data
            run.publish(checksums=False)
        except Exception as error:  # a full disk is an OSError, a SafetensorError, or the tokenizer's plain Exception
            if is_full(error):
                raise CheckpointError(
                    f"{why_full(error)}, while writing {out} ({first_line(error)}): nothing was written"
                ) from error
            raise
    finally:
        run.release()
