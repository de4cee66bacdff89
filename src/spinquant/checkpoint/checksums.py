"""Verify SHA-256 checksums: of a source's files while they are read, and of the folders that spinquant writes.

A source file is read piece by piece, nearly always from beginning to end, and hashed on the way; small gaps, and what
is missing at the end, are read for the hash alone. The hash of the bytes read so far (a prefix of the file) is entered
in the run's journal with every file of the result, so that a resumed run can tell whether the source has changed. This
saves no hashing: a resumed run hashes the prefix again, which it needs for the hash of the whole file, and compares.

Hashing pieces while they are in memory takes 0.55 s of CPU for 0.77 GB, reading included, and 1.91 s where
`hashlib.file_digest` reads the files again (`python benchmarks/checkpoint_io.py --layers 2 --only hash`).

The expected hash of a source file is taken from a list in the form of `sha256sum`, from the metadata that
huggingface_hub writes beside a download (`.cache/huggingface/download/F.metadata`, whose second line is the SHA-256 of
files in large file storage), or from the name of the blob that a link in the hub's cache points to.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from spinquant.checkpoint.folder import BESIDE, WEIGHTS
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.checkpoint.untrusted import file_in, read_file
from spinquant.errors import CheckpointError, SourceChangedError

CHECKSUMS = "checksums.sha256"

# Length of a prefix of a file in bytes, and its SHA-256.
Prefix = tuple[int, str]

_GAP = 1 << 22  # largest gap in bytes between two pieces that is read for the hash alone
_CHUNK = 1 << 23
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileHash:
    """SHA-256 of a prefix of a file, extended as the file is read."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0
        self._hash = hashlib.sha256()

    def add(self, start: int, piece: Tensor) -> None:
        """Hash a piece of the file, uint8, that starts at a byte; one far ahead of the prefix is read again later."""
        end = start + len(piece)
        if self.length < start <= self.length + _GAP:
            self.read_to(start)
        if start <= self.length < end:
            self._hash.update(piece[self.length - start :].numpy().data)
            self.length = end

    def read_to(self, end: int) -> None:
        """Extend the prefix to a byte by reading what is missing."""
        if self.length >= end:
            return
        buffer = bytearray(min(_CHUNK, end - self.length))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.length)
                while self.length < end:
                    count = file.readinto(memoryview(buffer)[: end - self.length])
                    if not count:
                        raise OSError(f"the file ends at byte {self.length}")
                    self._hash.update(memoryview(buffer)[:count])
                    self.length += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}. Download it again.") from None

    def prefix(self) -> Prefix:
        """Length and SHA-256 of the prefix so far."""
        return self.length, self._hash.copy().hexdigest()


class SourceHash:
    """SHA-256 of all files of a source, taken while they are read."""

    def __init__(self, folder: Path, files: Iterable[str]):
        self.files = {name: FileHash(folder / name) for name in files}
        self._read = dict.fromkeys(self.files, 0)

    def add(self, file: str, start: int, piece: Tensor) -> None:
        """Hash a piece of a file; its buffer may be overwritten afterwards."""
        self.files[file].add(start, piece)
        self._read[file] = max(self._read[file], start + len(piece))

    def prefixes(self) -> dict[str, Prefix]:
        """The prefix of every file of which anything was read, up to the end of what was read."""
        for name, end in self._read.items():
            self.files[name].read_to(end)
        return {name: self.files[name].prefix() for name, end in self._read.items() if end}

    def check(self, journal: Iterable[Mapping[str, Prefix]]) -> None:
        """Hash the journalled prefixes again. Raises SourceChangedError, naming the file, if one has changed."""
        found: dict[str, dict[int, str]] = {}
        for prefixes in journal:
            for name, (length, sha256) in prefixes.items():
                found.setdefault(name, {})[length] = sha256
        for name, prefixes in found.items():
            for length, sha256 in sorted(prefixes.items()):
                self.files[name].read_to(length)
                if self.files[name].prefix() != (length, sha256):
                    raise SourceChangedError(
                        f"{self.files[name].path} has changed since this run began: the SHA-256 of its first {length} "
                        "bytes differs. Restore the file, or delete the unfinished result (.OUT.run) to start anew"
                    )

    def finish(self, files: Iterable[str], known: Mapping[str, "Known"]) -> dict[str, str]:
        """SHA-256 of whole files. Raises CheckpointError if one differs from the expected hash."""
        for name in files:
            self.files[name].read_to(self.files[name].path.stat().st_size)
            if name in known and self.files[name].prefix()[1] != known[name].sha256:
                raise CheckpointError(
                    f"{self.files[name].path} is damaged or was changed: its SHA-256 is "
                    f"{self.files[name].prefix()[1]}, but {known[name].origin} records {known[name].sha256}. Download "
                    "it again, or remove that record"
                )
        return {name: self.files[name].prefix()[1] for name in files}


class Known:
    """The SHA-256 that a file should have, and where it is recorded."""

    def __init__(self, sha256: str, origin: str):
        self.sha256, self.origin = sha256, origin


def known_hashes(folder: Path, files: Iterable[str], listed: Path | None = None) -> dict[str, Known]:
    """Expected hashes of the files of a folder; listed: a file of `sha256sum`.

    Raises CheckpointError if the list cannot be read, or lists none of the files.
    """
    files = list(files)
    found = {name: known for name in files if (known := _noted(folder, name)) is not None}
    if listed is None:
        return found
    given = _read_list(listed)
    if not any(name in given for name in files):
        raise CheckpointError(f"{listed} lists none of the weight files of {folder} ({', '.join(files[:3])}, ...)")
    return found | {name: Known(given[name], str(listed)) for name in files if name in given}


def _noted(folder: Path, name: str) -> Known | None:
    path = folder / name
    noted = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if noted.is_file():
        lines = noted.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return Known(lines[1], str(noted))
    if path.is_symlink():
        blob = Path(os.path.realpath(path))
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
            return Known(blob.name, f"the hub's cache ({blob.parent})")
    return None


def _read_list(listed: Path) -> dict[str, str]:
    try:
        lines = read_file(listed).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read checksums {str(listed)!r}: {error}") from None
    found = {}
    for line in lines:
        match = re.fullmatch(r"\\?([0-9a-fA-F]{64}) [ *](.+)", line.strip())
        if match:
            found[match.group(2).removeprefix("./")] = match.group(1).lower()
    if not found:
        raise CheckpointError(f"{str(listed)!r} holds no SHA-256 checksums: expected lines as sha256sum writes them")
    return found


def check_checksums(folder: str | Path) -> list[str]:
    """Verify a folder that spinquant wrote: names of the files that differ from its checksums, empty if none does.

    Raises:
        CheckpointError: the folder has no checksums, or its list names files outside of it, or lacks a file of weights.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"folder {str(folder)!r} does not exist (or is not a folder)")
    listed = Path(folder) / BESIDE / CHECKSUMS
    if not listed.is_file():
        raise CheckpointError(
            f"{folder} has no {BESIDE}/{CHECKSUMS}: only folders that spinquant wrote by streaming have checksums"
        )
    known = _read_list(listed)
    for path in (path for path in Path(folder).iterdir() if path.suffix in WEIGHTS or path.name == "config.json"):
        if path.name not in known:
            raise CheckpointError(f"{listed} has no checksum of {path.name}: it is not the list of this folder")
    bad = []
    for name, expected in known.items():
        path = Path(folder)
        for part in name.split("/"):
            path = file_in(path, part)
        if not path.is_file() or file_hash(path) != expected:
            bad.append(name)
    return bad
