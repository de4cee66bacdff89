"""A folder that is written file by file, survives a kill, and appears complete or not at all.

While it grows it lies beside its final name:

    .OUT.partial/settings.json     what the run was asked to do: another run with the same settings goes on
    .OUT.partial/finished/F.json   checksum and size of file F, written after F is on the disk under its name, and what
                                   was read of the source until then
    .OUT.partial/data/             becomes OUT, by one rename
    .OUT.partial/old/              what OUT was before, until OUT is replaced

Every file is written under another name, brought to the disk, renamed, and only then entered as finished. So whatever
is entered is whole; whatever is not entered is written again. In the finished folder `spinquant/checksums.sha256` keeps
the checksums, in the form that `sha256sum -c` reads.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spinquant.checkpoint.atomic import check_replaceable
from spinquant.checkpoint.checksums import Prefix
from spinquant.checkpoint.folder import BESIDE
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.errors import CheckpointError

CHECKSUMS = "checksums.sha256"
SETTINGS = "settings.json"
UNFINISHED = ".spinquant-writing"
_COPIED_AT_ONCE = 1 << 23


class Growing:
    """The files of the folder `out` in the making, for everybody who writes some of them."""

    def __init__(self, out: str | Path):
        self.home = Path(out).parent / f".{Path(out).name}.partial"
        self.data, self.finished = self.home / "data", self.home / "finished"
        self._sources = self.home / "source" / "files.json"

    def is_finished(self, name: str) -> bool:
        """Whether a file was finished by a run before, and still is what it was."""
        entry, path = self.entry(name), self.data / name
        return entry is not None and path.is_file() and path.stat().st_size == entry[1] and file_hash(path) == entry[0]

    def entry(self, name: str) -> tuple[str, int] | None:
        """Checksum and size of a finished file."""
        try:
            about = json.loads((self.finished / f"{name}.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        return about["sha256"], about["bytes"]

    def unfinished(self, name: str) -> Path:
        """Where a file is written until `finish`."""
        return self.data / f"{name}{UNFINISHED}"

    def finish(self, name: str, sha256: str, source: Mapping[str, Prefix] | None = None) -> None:
        """Give a file, which is on the disk as a whole, its name, and enter it as finished.

        source: what was read of the source so far, by its files.
        """
        path = self.unfinished(name)
        size = path.stat().st_size
        path.replace(self.data / name)
        sync_folder(self.data)
        write_file(self.finished / f"{name}.json", _json({"sha256": sha256, "bytes": size, "source": source or {}}))

    def journal(self) -> list[dict[str, Prefix]]:
        """What was read of the source for all that is finished."""
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.finished.glob("*.json"))]
        found = [about.get("source", {}) for about in entries]
        if self._sources.is_file():
            found.append(json.loads(self._sources.read_text(encoding="utf-8")))
        return [{name: (length, sha256) for name, (length, sha256) in one.items()} for one in found]

    def enter_source(self, files: Mapping[str, Prefix]) -> None:
        """Enter what the whole source is, where that was looked at first."""
        write_file(self._sources, _json(files))


class Hold:
    """A folder `home`, made where it is not there, in which one run at a time makes `out`.

    The lock goes with the process that holds it, however it ends. Raises CheckpointError when another run has it, and
    where no folder can be made.
    """

    def __init__(self, home: Path, out: Path):
        self.home, self.out, self._lock = home, out, -1
        try:
            while not self._is_held():  # the run before may have deleted the folder in the meantime
                self.close()
                home.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(home, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(
                f"another run is writing {out} just now: wait for it, or choose another name"
            ) from None
        except OSError as error:
            self.close()
            raise CheckpointError(f"cannot write {out}: {error.strerror}") from None

    def _is_held(self) -> bool:
        try:
            return self._lock >= 0 and os.path.samestat(os.fstat(self._lock), self.home.stat())
        except FileNotFoundError:
            return False

    def settings(self) -> Any:
        """What the run that was stopped here was asked to do; None where there was none."""
        return read_settings(self.home)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise CheckpointError where a run that was stopped here was asked to do something else."""
        before = self.settings()
        if before is not None and before != settings:
            raise CheckpointError(
                f"{self.home} holds a run into {self.out.name} that was stopped, with other settings: "
                f"{_differences(before, settings)}. Repeat it with the same settings to go on, or start anew "
                f"with --force, or delete {self.home}"
            )

    def enter_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep what this run is asked to do."""
        write_file(self.home / SETTINGS, _json(settings))

    def remove_settings(self) -> None:
        """Forget what a run was asked to do."""
        (self.home / SETTINGS).unlink(missing_ok=True)
        (self.home / f"{SETTINGS}{UNFINISHED}").unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def read_settings(home: Path) -> Any:
    """What the run that was stopped in a folder was asked to do; None where there was none."""
    try:
        return json.loads((home / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Resumable:
    """The folder `out` in the making, for the one process that owns it.

    Raises CheckpointError when `out` exists and `force` is off, when another run is writing it, and when a run with
    other settings was stopped half-way and `force` is off.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], *, force: bool = False):
        self.out = Path(out)
        self.files = Growing(self.out)
        self.home, self.data, self._old = self.files.home, self.files.data, self.files.home / "old"
        self.settings = json.loads(json.dumps(settings))
        self.force = force
        if read_settings(self.home) is None:
            check_replaceable(self.out, force=force)
        self._hold = Hold(self.home, self.out)
        try:
            self._start()
        except BaseException:
            self._hold.close()
            raise

    def _start(self) -> None:
        before = self._hold.settings()
        if self._old.exists() and any(self._old.iterdir()) and not self.out.exists():
            (self._old / self.out.name).replace(self.out)  # a kill between the two renames of a replacement
        if before is not None and before != self.settings:
            if not self.force:
                self._hold.check_settings(self.settings)
            before = None
        self.published = before is not None and not self.data.exists() and self.out.exists()
        if self.published:
            return
        if self.force or before is None or self.out.exists():
            check_replaceable(self.out, force=self.force)
        if before is None or not self.data.exists():
            self._hold.remove_settings()
            for path in self.home.iterdir():
                shutil.rmtree(path)
            self.data.mkdir()
            self.files.finished.mkdir()
            # Last, so that settings without data mean data that has become OUT.
            self._hold.enter_settings(self.settings)

    def publish(self) -> None:
        """Checksums into the folder, and the folder to its final name. Whatever is in it must be on the disk."""
        if not self.published:
            lines = []
            for path in sorted(path for path in self.data.rglob("*") if path.is_file()):
                name = path.relative_to(self.data).as_posix()
                if name == f"{BESIDE}/{CHECKSUMS}":
                    continue
                if name.endswith(UNFINISHED):  # left by a run before that was killed
                    path.unlink()
                    continue
                entry = self.files.entry(name)
                lines.append(f"{entry[0] if entry else file_hash(path)}  {name}\n")
            write_file(self.data / BESIDE / CHECKSUMS, "".join(lines).encode())
            for folder in {path.parent for path in self.data.rglob("*")}:
                sync_folder(folder)
            if self.out.exists():
                check_replaceable(self.out, force=self.force)  # it may have appeared during a long run
                self._old.mkdir(exist_ok=True)
                self.out.replace(self._old / self.out.name)
            self.data.replace(self.out)
            sync_folder(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Forget the run: what it has written so far goes."""
        if self._old.exists() and not self.out.exists():
            for path in self._old.iterdir():
                path.replace(self.out)
        if self.data.exists():
            self._hold.remove_settings()  # first, since settings without data mean that data has become OUT
        for folder in (self.data, self.files.finished, self._old, self.home):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self, *, keep: bool = True) -> None:
        """Let other runs go on with the folder; without `keep`, or where nothing is finished, it goes."""
        try:
            if self.data.exists() and not (keep and any(self.files.finished.glob("*.json"))):
                self.discard()
        finally:
            self._hold.close()


def write_file(path: Path, content: bytes | Path) -> None:
    """Write a file, or copy one, so that it is there as a whole or not at all, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{UNFINISHED}")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
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


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_checksums(folder: str | Path) -> list[str]:
    """Names of the files of a folder that are not what they were when it was written; empty when all are.

    Raises CheckpointError for a folder without checksums.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"folder {str(folder)!r} does not exist (or is not a folder)")
    listed = Path(folder) / BESIDE / CHECKSUMS
    if not listed.is_file():
        raise CheckpointError(
            f"{folder} has no {BESIDE}/{CHECKSUMS}: only folders that spinquant wrote as a stream have their checksums"
        )
    bad = []
    for line in listed.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = Path(folder) / name
        if not path.is_file() or file_hash(path) != expected:
            bad.append(name)
    return bad


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    found = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}.{one}" for one in _differences(old, new).split("; ") if one]
        elif old != new:
            found.append(f"{name} was {old!r} and is {new!r}")
    return "; ".join(found)
