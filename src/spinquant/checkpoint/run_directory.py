"""Resumable state of a run that writes a folder OUT: lock, settings, journal and finished files, in `.OUT.run`.

Streaming, calibration and learning all keep their state here, so there is one way to resume a run that was killed:

    .OUT.run/lock                  held while a run is active; the operating system releases it however the run ends
    .OUT.run/settings.json         settings of the run; a rerun with the same ones resumes it, others are refused
    .OUT.run/STAGE/N.safetensors   a finished piece of a stage (a calibrated block, a state of learning)
    .OUT.run/finished/F.json       journal: checksum and size of file F of OUT, entered after F is on disk
    .OUT.run/data/                 becomes OUT by one rename
    .OUT.run/complete              data/ is complete: only renames are left
    .OUT.run/old/                  the previous OUT, until it is replaced
    .OUT.run/processes/            locks by which the processes of a job see that the others are alive

Every file is written under a temporary name, synced to disk, renamed, and only then entered in the journal. So entries
are complete, and files without an entry are written again. The finished folder holds `spinquant/checksums.sha256` in
the form that `sha256sum -c` reads.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spinquant.checkpoint.atomic import (
    UNFINISHED,
    check_replaceable,
    first_line,
    is_full,
    sync_all,
    sync_folder,
    why_full,
    write_file,
)
from spinquant.checkpoint.checksums import CHECKSUMS, Prefix
from spinquant.checkpoint.folder import BESIDE, ORIGIN
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.checkpoint.untrusted import read_json
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
_LOCK_TIMEOUT = 0.2  # seconds, for a previous run that is just ending to release its lock


class RunDirectory:
    """State of a run that writes the folder `out`. Every process of a job has one; rank 0 owns the folder on disk."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.home = self.out.parent / f".{self.out.name}.run"
        self.data, self._finished, self._old = (self.home / name for name in ("data", "finished", "old"))
        self._sources = self.home / "source" / "files.json"
        self._lock: FileLock | None = None
        self.force = False
        self.published = False  # a previous run was killed between its last rename and the cleanup

    def pieces(self, stage: str, settings: Sequence[Any] = (), *, writes: bool = True) -> Pieces:
        """The finished pieces of a stage, such as `calibration`."""
        return Pieces(self.home / stage, settings, writes=writes)

    def is_finished(self, name: str) -> bool:
        """Whether a previous run finished a file of `out`, and the file is unchanged since."""
        entry, path = self.entry(name), self.data / name
        return entry is not None and path.is_file() and path.stat().st_size == entry[1] and file_hash(path) == entry[0]

    def entry(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size in bytes of a finished file."""
        try:
            about = read_json(self._finished / f"{name}.json")
            return str(about["sha256"]), int(about["bytes"])
        except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
            return None

    def unfinished(self, name: str) -> Path:
        """The temporary path of a file until `finish`."""
        return self.data / f"{name}{UNFINISHED}"

    def finish(self, name: str, sha256: str, source: Mapping[str, Prefix] | None = None) -> None:
        """Rename a complete, synced file to its final name, and enter it in the journal.

        source: prefix that was read so far, by source file.
        """
        path = self.unfinished(name)
        size = path.stat().st_size
        path.replace(self.data / name)
        sync_folder(self.data)
        write_file(self._finished / f"{name}.json", _json({"sha256": sha256, "bytes": size, "source": source or {}}))

    def journal(self) -> list[dict[str, Prefix]]:
        """Prefixes of the source files that the finished files were computed from."""
        found = [read_json(path).get("source", {}) for path in sorted(self._finished.glob("*.json"))]
        if self._sources.is_file():
            found.append(read_json(self._sources))
        try:
            return [{name: (int(length), str(sha256)) for name, (length, sha256) in one.items()} for one in found]
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise CheckpointError(
                f"the journal in {self.home} is corrupted: delete {self.home} to start anew"
            ) from None

    def enter_source(self, files: Mapping[str, Prefix]) -> None:
        """Journal the hashes of the whole source, if they were taken before the run."""
        write_file(self._sources, _json(files))

    def settings(self) -> Any:
        """Settings of the interrupted run in this folder; None if there is none."""
        try:
            return read_json(self.home / SETTINGS)
        except CheckpointError:
            return None

    def publish(self, *, checksums: bool = True) -> None:
        """Give the finished folder its final name, and delete the state of the run.

        checksums: write the checksums of all files into the folder first; every file must be synced to disk already.
        Without checksums, the files are synced here.
        """
        if self.published:
            self.remove()
            return
        if checksums:
            lines = []
            for path in sorted(path for path in self.data.rglob("*") if path.is_file()):
                name = path.relative_to(self.data).as_posix()
                if name in (f"{BESIDE}/{CHECKSUMS}", f"{BESIDE}/{ORIGIN}"):  # the latter stays on this machine
                    continue
                if name.endswith(UNFINISHED):  # left by a previous run that was killed
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
            check_replaceable(self.out, force=self.force)  # it may have been created during a long run
        write_file(self.home / COMPLETE, b"")
        if self.out.exists():
            self._old.mkdir(exist_ok=True)
            self.out.replace(self._old / self.out.name)
        self.data.replace(self.out)
        sync_folder(self.out.parent)

    def acquire(
        self, settings: Mapping[str, Any] | None, *, force: bool = False, source: str | Path | None = None
    ) -> None:
        """Lock the folder for this process, and find the state that a previous run has left.

        Args:
            settings: settings of the run, as JSON; None for a run that cannot be resumed.
            force: replace an existing `out`, and start anew if an interrupted run had other settings.
            source: the model that the run reads, which `out` must not replace.

        Raises:
            CheckpointError: `out` may not be replaced, another run is active, or an interrupted run had other settings.
        """
        self.force = force
        self._check_links()
        settings = None if settings is None else json.loads(json.dumps(settings, default=str))
        begun = self.settings() is not None
        check_replaceable(self.out, force=force or begun, source=source)
        self._take_lock()
        try:
            self._start(settings)
        except OSError as error:
            self.release()
            if (reason := self.explained(error)) is None:
                raise
            raise reason from error
        except BaseException:
            self.release()
            raise

    def explained(self, error: Exception) -> CheckpointError | None:
        """What a full disk, or an error about a file of this run, means to the user; None for any other error."""
        if is_full(error):
            kept = f" to resume: finished files are kept in {self.home}" if self.has_progress() else ""
            return CheckpointError(
                f"{why_full(error)}, while writing {self.out}. Free space or raise the limit, and rerun{kept}"
            )
        name = os.fsdecode(error.filename) if isinstance(error, OSError) and error.filename is not None else None
        if name is None or not Path(name).is_relative_to(self.home):
            return None
        return CheckpointError(
            f"{name}, a file of the run that writes {self.out}, cannot be used: {first_line(error)}. Delete "
            f"{self.home} to start anew"
        )

    def _check_links(self) -> None:
        """Refuse state that is no file or folder: what a link leads to would be written, or deleted."""
        inside = (Path(folder) / name for folder, *names in os.walk(self.home) for name in chain(*names))
        for path in (self.home, *inside):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another run is active, or there is no state
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no file"
                raise CheckpointError(
                    f"{path} is {kind}, and the state of a run is never kept behind one: delete it, or choose another "
                    "output folder"
                )

    def _take_lock(self) -> None:
        lock = FileLock(self.home / "lock")
        while self._lock is None:
            try:
                self.home.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=_LOCK_TIMEOUT, poll_interval=0.02)
                self._lock = lock
            except Timeout:
                if not (self.home / "lock").exists():  # the previous run has just deleted the folder
                    continue
                raise CheckpointError(
                    f"another run is writing {self.out}: wait for it to end, or choose another output folder"
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
                    f"{self.home} holds an interrupted run of {self.out.name} with other settings: "
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
        """Delete everything but the lock. The settings go first: without them the rest is not resumed."""
        (self.home / SETTINGS).unlink(missing_ok=True)
        for path in self.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _put_back(self) -> None:
        """Restore the previous `out` after a replacement that was begun but not finished."""
        if self._old.exists() and not self.out.exists():
            for path in self._old.iterdir():
                path.replace(self.out)

    def discard_output(self) -> None:
        """Delete the files written for `out`; finished pieces of stages stay."""
        self._put_back()
        for folder in (self._finished, self.data):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the state of the run."""
        self._put_back()
        with suppress(OSError):
            self._clear()

    def has_progress(self) -> bool:
        """Whether there is anything to resume from."""
        stages = self.home.glob("*/*.safetensors")
        finished = any(self._finished.glob("*.json"))
        return finished or any(path.parent not in (self.data, self._old) for path in stages)

    def release(self) -> None:
        """Release the lock, and delete the folder if there is nothing to resume from."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            if not self.published and self.home.exists() and not self.has_progress():
                self.remove()
        finally:
            if not any(path.name != "lock" for path in self.home.iterdir()):
                (self.home / "lock").unlink(missing_ok=True)  # a process that has opened it meanwhile tries again
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
    """Within the block, hold the state of a run that writes `out`, in all processes of the job.

    The block has to call `publish` in the first process. After an error that a rerun would meet again, the files
    written for `out` are deleted and finished pieces of calibration and learning are kept. After a kill, the loss of a
    process, a full disk or a change of the source everything is kept.

    Args:
        out: the folder that the run writes.
        settings: settings of the run, as JSON; a rerun resumes only with the same ones.
        processes: processes of the job; by default this one alone.
        force: replace an existing `out`, and discard an interrupted run with other settings.
        source: the model that the run reads, which `out` must not replace.

    Yields:
        The state of the run.

    Raises:
        CheckpointError: `RunDirectory.acquire` refuses `out`, or the disk is full.
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
            except RuntimeError:  # a collective operation with a process that has ended
                processes.find_loss()
                raise
            processes.meet()
    except (ProcessError, SourceChangedError):
        raise
    except SpinquantError as error:
        if processes.first:
            run.discard_output()
            if isinstance(error, CalibrationError):  # a rerun from these blocks would fail in the same way
                shutil.rmtree(run.home / CALIBRATION, ignore_errors=True)
        raise
    except Exception as error:  # a full disk is an OSError, a SafetensorError, or the tokenizer's plain Exception
        if (reason := run.explained(error)) is None:
            raise
        raise reason from error
    finally:
        if processes.first:
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
