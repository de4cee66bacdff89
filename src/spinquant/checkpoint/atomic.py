"""Write files atomically, and check that a folder may be written before work begins."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spinquant.checkpoint.positional_io import BINARY
from spinquant.errors import CheckpointError

OURS = (
    "config.json",
    "adapter_config.json",
    "demo.json",
    "learned.json",
)  # what marks a folder that --force may replace
UNFINISHED = ".spinquant-writing"  # the end of a name until the file is complete
_COPIED_AT_ONCE = 1 << 23
_QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)  # Windows has no quotas of this kind


def write_file(path: Path, content: bytes | Path) -> None:
    """Write a file, or copy one, atomically: whatever happens, it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{UNFINISHED}")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
    try:
        for chunk in _chunks(content):
            view = memoryview(chunk)
            while len(view):
                view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)
    partial.replace(path)
    sync_folder(path.parent)


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(_COPIED_AT_ONCE):
            yield chunk


def sync_file(path: Path) -> None:
    """Bring a file's contents to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system lets folders be opened (Windows does not)."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(folder: Path) -> None:
    """Bring all files of a folder to the disk, with the permissions that the user's umask gives new files."""
    # safetensors makes private files.
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            sync_file(path)


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


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    # safetensors reports the operating system's error as text.
    full = (errno.ENOSPC, _QUOTA, errno.EFBIG)
    numbers = tuple(f"os error {number}" for number in full)
    return getattr(error, "errno", None) in full or any(number in str(error) for number in numbers)


def why_full(error: BaseException) -> str:
    """What is full, and what to do about it."""
    if getattr(error, "errno", None) == errno.EFBIG or f"os error {errno.EFBIG}" in str(error):
        return "a file grew beyond what may be written (`ulimit -f`, or the file system's limit)"
    if getattr(error, "errno", None) == _QUOTA or f"os error {_QUOTA}" in str(error):
        return "your share of the disk is full (quota): free some of it"
    return "no space left: free some"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
