"""Folders that appear complete or not at all, and what is refused before one is written."""

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spinquant.errors import CheckpointError

OURS = (
    "config.json",
    "adapter_config.json",
    "demo.json",
    "learned.json",
)  # what marks a folder that --force may replace


@contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    It stands beside `out`, so that the last step is one rename. What a run before left there that was killed goes.
    Raises CheckpointError when `out` exists and `force` is off, and when the disk is full.
    """
    out = Path(out)
    check_free(out, force=force)
    _remove_left(out)
    partial = Path(tempfile.mkdtemp(prefix=f"{_partial(out)}", dir=out.parent))
    lock = os.open(partial, os.O_RDONLY)  # says that this process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield partial
            _sync(partial)
        except Exception as error:  # a full disk is an OSError, a SafetensorError, or the tokenizer's plain Exception
            if is_full(error):
                raise CheckpointError(
                    f"{why_full(error)} while writing {out} ({first_line(error)}): nothing was written"
                ) from error
            raise
        check_free(out, force=force)  # it may have appeared during a long run
        _replace(partial, out)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_left(out: Path) -> None:
    """Delete what runs that were killed have left of `out`."""
    for path in out.parent.glob(f"{glob.escape(_partial(out))}*"):
        with suppress(OSError):  # another run is at work there, or removes it too
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def check_free(out: str | Path, *, force: bool = False, source: str | Path | None = None) -> None:
    """Raise CheckpointError when `out` cannot be written: a long run should not end with this news.

    Refuses what `check_replaceable` refuses. Makes the parent folder of `out`.
    """
    out = Path(out)
    check_replaceable(out, force=force, source=source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {first_line(error)}") from None


def check_replaceable(out: str | Path, *, force: bool = False, source: str | Path | None = None) -> None:
    """Raise CheckpointError when `out` exists, and is not to be replaced.

    An existing folder is replaced with `force` alone, only when it is empty or holds a model or a demo, and never when
    it is, or contains, the `source` of the run.
    """
    out = Path(out)
    if source is not None and Path(source).exists():
        place = Path(source).resolve()
        if out.resolve() == place or out.resolve() in place.parents:
            raise CheckpointError(f"{out} holds the model {source} that this run reads: choose another folder")
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists: choose another name, or pass --force to replace it")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or any((out / f).exists() for f in OURS))):
        raise CheckpointError(f"{out} is no model folder of ours to replace (it has no {' or '.join(OURS)}): remove it")


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.replace(out)
        return
    # A folder cannot be renamed onto another: the old one steps aside first, and comes back if anything fails.
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.replace(old / out.name)
        partial.replace(out)
    except BaseException:
        if not out.exists() and (old / out.name).exists():
            (old / out.name).replace(out)
        raise
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    # mkdtemp makes folders private, and safetensors files too: give them what the user's umask allows.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    # safetensors reports the operating system's error as text.
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    numbers = tuple(f"os error {number}" for number in full)
    return getattr(error, "errno", None) in full or any(number in str(error) for number in numbers)


def why_full(error: BaseException) -> str:
    """What is full, and what to do about it."""
    if getattr(error, "errno", None) == errno.EFBIG or f"os error {errno.EFBIG}" in str(error):
        return "a file grew beyond what may be written (`ulimit -f`, or the file system's limit)"
    if getattr(error, "errno", None) == errno.EDQUOT or f"os error {errno.EDQUOT}" in str(error):
        return "your share of the disk is full (quota): free some of it"
    return "no space left: free some"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
