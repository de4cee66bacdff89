"""Write files atomically, and check before a run that its output folder can be written."""

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
)  # a folder with one of these may be replaced by --force
UNFINISHED = ".spinquant-writing"  # suffix of a file that is being written
_CHUNK = 1 << 23
_QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)  # Windows lacks this error number


def write_file(path: Path, content: bytes | Path) -> None:
    """Write bytes, or copy a file, atomically: under a temporary name, synced to disk, then renamed."""
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
        while chunk := file.read(_CHUNK):
            yield chunk


def sync_file(path: Path) -> None:
    """Sync a file's contents to disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if the system can open folders (Windows cannot)."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(folder: Path) -> None:
    """Sync all files of a folder to disk, and give them the permissions of the user's umask."""
    # safetensors creates files that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            sync_file(path)


def check_free(out: str | Path, *, force: bool = False, source: str | Path | None = None) -> None:
    """Check before a long run that `out` can be written, and create its parent folder.

    Raises:
        CheckpointError: `out` cannot be written, or `check_replaceable` refuses it.
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
    """Check that `out` does not exist, or may be replaced.

    An existing folder is replaced only with `force`, and only if it is empty or holds a model or a demo. The `source`
    of the run, and folders that contain it, are never replaced.

    Raises:
        CheckpointError: `out` exists and may not be replaced.
    """
    out = Path(out)
    if source is not None and Path(source).exists():
        place = Path(source).resolve()
        if out.resolve() == place or out.resolve() in place.parents:
            raise CheckpointError(f"{out} holds the model {source} that this run reads: choose another folder")
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists: choose another name, or pass --force to replace it")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or any((out / f).exists() for f in OURS))):
        raise CheckpointError(
            f"{out} has no {' or '.join(OURS)}, so --force does not replace it: remove it, or choose another name"
        )


def is_full(error: BaseException) -> bool:
    """Whether an error means a full disk, an exceeded quota or a file size limit."""
    # safetensors reports errors of the operating system as text.
    full = (errno.ENOSPC, _QUOTA, errno.EFBIG)
    numbers = tuple(f"os error {number}" for number in full)
    return getattr(error, "errno", None) in full or any(number in str(error) for number in numbers)


def why_full(error: BaseException) -> str:
    """What limit an `is_full` error has hit, as the start of an error message."""
    if getattr(error, "errno", None) == errno.EFBIG or f"os error {errno.EFBIG}" in str(error):
        return "a file exceeds the file size limit (`ulimit -f`, or the file system's)"
    if getattr(error, "errno", None) == _QUOTA or f"os error {_QUOTA}" in str(error):
        return "the disk quota is exceeded"
    return "there is no space left on the disk"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
