"""Resumable state of a run that writes a folder OUT: `.OUT.run` beside it, until OUT is written.

Streams, calibrations and learning keep what they have finished in the same place, under one lock and one set of
settings, so there is one way to survive a kill:

    .OUT.run/lock                  held while a run is at work; the operating system takes it back however the run ends
    .OUT.run/settings.json         what the run was asked for; the same settings resume it, others are refused
    .OUT.run/STAGE/N.safetensors   a finished piece of a stage (a calibrated block, a state of learning)
    .OUT.run/finished/F.json       journal: checksum and size of file F of OUT, entered after F is on the disk
    .OUT.run/data/                 becomes OUT by one rename
    .OUT.run/complete              data/ is complete: only renames are left
    .OUT.run/old/                  what OUT was before, until OUT is replaced
    .OUT.run/processes/            locks by which the processes of a job see that the others live

Every file is written under another name, synced to the disk, renamed, and only then entered in the journal. What is
entered is therefore complete; what is not is written again. The finished folder holds `spinquant/checksums.sha256` in
the form that `sha256sum -c` reads.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spinquant.checkpoint.atomic import (
    UNFINISHED,
    check_free,
    check_replaceable,
    first_line,
    is_full,
    sync_all,
    sync_folder,
    why_full,
    write_file,
)
from spinquant.checkpoint.checksums import CHECKSUMS, Prefix
from spinquant.checkpoint.folder import BESIDE
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.compute.distributed import Processes
from spinquant.errors import (
    CalibrationError,
    CheckpointError,
    ProcessError,
    SourceChangedError,
    SpinquantError,
)

SETTINGS = "settings.json"
COMPLETE = "complete"
CALIBRATION, LEARNING = "calibration", "learning"  # stages
_PATIENCE = 0.2  # seconds in which a run before that is just ending gives its lock back


class RunDirectory:
    """Where a run into `out` keeps its state. All processes of a job have one; the first of them owns the folder.

    Args:
        out: the folder that the run writes.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.home = self.out.parent / f".{self.out.name}.run"
        self.data, self._finished, self._old = (self.home / name for name in ("data", "finished", "old"))
        self._sources = self.home / "source" / "files.json"
        self._lock: FileLock | None = None
        self.force = False
        self.published = False  # a run before was killed between its last rename and tidying up

    def pieces(self, stage: str, settings: Sequence[Any] = (), *, writes: bool = True) -> Pieces:
        """The finished pieces of a stage, such as `calibration`."""
        return Pieces(self.home / stage, settings, writes=writes)

    def is_finished(self, name: str) -> bool:
        """Whether a file of `out` was finished by a run before, and is unchanged since."""
        entry, path = self.entry(name), self.data / name
        return entry is not None and path.is_file() and path.stat().st_size == entry[1] and file_hash(path) == entry[0]

    def entry(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size in bytes of a finished file."""
        try:
            about = json.loads((self._finished / f"{name}.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        return about["sha256"], about["bytes"]

    def unfinished(self, name: str) -> Path:
        """Where a file is written until `finish`."""
        return self.data / f"{name}{UNFINISHED}"

    def finish(self, name: str, sha256: str, source: Mapping[str, Prefix] | None = None) -> None:
        """Give a file, which is on the disk as a whole, its name, and enter it in the journal.

        source: what was read of the source so far, by its files.
        """
        path = self.unfinished(name)
        size = path.stat().st_size
        path.replace(self.data / name)
        sync_folder(self.data)
        write_file(self._finished / f"{name}.json", _json({"sha256": sha256, "bytes": size, "source": source or {}}))

    def journal(self) -> list[dict[str, Prefix]]:
        """What was read of the source for all that is finished."""
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._finished.glob("*.json"))]
        found = [about.get("source", {}) for about in entries]
        if self._sources.is_file():
            found.append(json.loads(self._sources.read_text(encoding="utf-8")))
        return [{name: (length, sha256) for name, (length, sha256) in one.items()} for one in found]

    def enter_source(self, files: Mapping[str, Prefix]) -> None:
        """Enter what the whole source is, where that was looked at first."""
        write_file(self._sources, _json(files))

    def settings(self) -> Any:
        """What the run that was stopped here was asked for; None where there was none."""
        try:
            return json.loads((self.home / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def publish(self, *, checksums: bool = True) -> None:
        """Give the finished folder its final name, and delete the state of the run.

        checksums: write those of all files into it first; every file must be on the disk. Without, files that others
        have written are brought there.
        """
        if self.published:
            self.remove()
            return
        if checksums:
            lines = []
            for path in sorted(path for path in self.data.rglob("*") if path.is_file()):
                name = path.relative_to(self.data).as_posix()
                if name == f"{BESIDE}/{CHECKSUMS}":
                    continue
                if name.endswith(UNFINISHED):  # left by a run before that was killed
                    path.unlink()
                    continue
                entry = self.entry(name)
                lines.append(f"{entry[0] if entry else file_hash(path)}  {name}\n")
            write_file(self.data / BESIDE / CHECKSUMS, "".join(lines).encode())
        else:
            sync_all(self.data)
        self._replace_out()
        self.remove()

    def _replace_out(self) -> None:
        for folder in {self.data, *(path.parent for path in self.data.rglob("*"))}:
            sync_folder(folder)
        if self.out.exists():
            check_replaceable(self.out, force=self.force)  # it may have appeared during a long run
        write_file(self.home / COMPLETE, b"")
        if self.out.exists():
            self._old.mkdir(exist_ok=True)
            self.out.replace(self._old / self.out.name)
        self.data.replace(self.out)
        sync_folder(self.out.parent)

    def acquire(
        self, settings: Mapping[str, Any] | None, *, force: bool = False, source: str | Path | None = None
    ) -> None:
        """Take the folder for this process, and find out what a run before has left in it.

        Args:
            settings: what the run is asked for, as JSON; None for a run that is not to be resumed.
            force: replace an `out` that exists, and start anew where a stopped run was asked for something else.
            source: the model that the run reads, which `out` must not replace.

        Raises:
            CheckpointError: `out` is not free, another run is at work, or one with other settings was stopped.
        """
        self.force = force
        settings = None if settings is None else json.loads(json.dumps(settings, default=str))
        begun = self.settings() is not None
        check_replaceable(self.out, force=force or begun, source=source)
        self._take_lock()
        try:
            self._start(settings)
        except BaseException:
            self.release()
            raise

    def _take_lock(self) -> None:
        lock = FileLock(self.home / "lock")
        while self._lock is None:
            try:
                self.home.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=_PATIENCE, poll_interval=0.02)
                self._lock = lock
            except Timeout:
                if not (self.home / "lock").exists():  # the run before has just deleted the folder
                    continue
                raise CheckpointError(
                    f"another run is writing {self.out} just now: wait for it, or choose another name"
                ) from None
            except OSError as error:
                raise CheckpointError(f"cannot write {self.out}: {error.strerror}") from None

    def _start(self, settings: Mapping[str, Any] | None) -> None:
        before = self.settings()
        if self._old.exists() and any(self._old.iterdir()) and not self.out.exists():
            (self._old / self.out.name).replace(self.out)  # a kill between the two renames of a replacement
        if before is not None and before != settings:
            if not self.force:
                raise CheckpointError(
                    f"{self.home} holds a run into {self.out.name} that was stopped, with other settings: "
                    f"{_differences(before, settings or {})}. Rerun with the same settings to resume, start anew with "
                    f"--force, or delete {self.home}"
                )
            before = None
        complete = self.home / COMPLETE
        self.published = before is not None and complete.exists() and not self.data.exists() and self.out.exists()
        if self.published:
            return
        check_replaceable(self.out, force=self.force)
        complete.unlink(missing_ok=True)
        if before is None:
            self._clear()
            if settings is not None:
                write_file(self.home / SETTINGS, _json(settings))
        self.data.mkdir(exist_ok=True)
        self._finished.mkdir(exist_ok=True)

    def _clear(self) -> None:
        """Delete all but the lock. The settings go first: without them nothing else counts."""
        (self.home / SETTINGS).unlink(missing_ok=True)
        for path in self.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _put_back(self) -> None:
        """Put back what `out` was, where a replacement was begun and not ended."""
        if self._old.exists() and not self.out.exists():
            for path in self._old.iterdir():
                path.replace(self.out)

    def discard_output(self) -> None:
        """Delete what was written for `out`; pieces of stages stay."""
        self._put_back()
        for folder in (self._finished, self.data):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the state: the run is complete, or nothing of it is of use."""
        self._put_back()
        with suppress(OSError):
            self._clear()

    def has_progress(self) -> bool:
        """Whether there is anything to resume from."""
        stages = self.home.glob("*/*.safetensors")
        finished = any(self._finished.glob("*.json"))
        return finished or any(path.parent not in (self.data, self._old) for path in stages)

    def release(self) -> None:
        """Give the lock back. The folder goes where there is nothing to resume from."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            if not self.published and self.home.exists() and not self.has_progress():
                self.remove()
        finally:
            if not any(path.name != "lock" for path in self.home.iterdir()):
                (self.home / "lock").unlink(missing_ok=True)  # whoever opened it meanwhile tries again
            lock.release()
            with suppress(OSError):  # not empty
                self.home.rmdir()


@contextmanager
def opened_run(
    out: str | Path,
    settings: Mapping[str, Any],
    processes: Processes | None = None,
    *,
    force: bool = False,
    source: str | Path | None = None,
) -> Iterator[RunDirectory]:
    """The state of a run into `out`, taken for the processes of this job until the block ends.

    A block that ends well has called `publish` in the first process. An error that would come again deletes what was
    written for `out`, and keeps finished pieces of calibration and learning; a kill, the loss of a process, a full disk
    and a source that changed keep all.

    Raises:
        CheckpointError: what `RunDirectory.acquire` refuses; a full disk.
        ProcessError: another process of the job has ended.
    """
    run, processes = RunDirectory(out), processes or Processes(0, 1)
    if processes.first:
        run.acquire(settings, force=force, source=source)
    try:
        run.published = processes.agree(run.published)
        with processes.locked(run.home / "processes"):
            try:
                yield run
            except RuntimeError:  # a collective operation whose other side is gone
                processes.find_loss()
                raise
            processes.meet()
    except (ProcessError, SourceChangedError):
        raise
    except SpinquantError as error:
        if processes.first:
            run.discard_output()
            if isinstance(error, CalibrationError):  # the same blocks would come to the same end
                shutil.rmtree(run.home / CALIBRATION, ignore_errors=True)
        raise
    except OSError as error:
        if not is_full(error):
            raise
        raise CheckpointError(
            f"{why_full(error)} while writing {out}. Then rerun the command to resume: finished files are kept in "
            f"{run.home}"
        ) from error
    finally:
        if processes.first:
            run.release()


@contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and is deleted when it does not; nothing is resumed.

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
                    f"{why_full(error)} while writing {out} ({first_line(error)}): nothing was written"
                ) from error
            raise
    finally:
        run.release()


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
