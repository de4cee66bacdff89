"""What was read of a source: SHA-256 of its files, taken while they are read, and held against what is known of them.

A file is read piece by piece, nearly always from its beginning to its end. Its hash follows, reads small gaps itself,
and what is still missing at the end. A hash of the bytes so far (a prefix of the file) is journalled with every file of
the result, so that a run that goes on can tell whether the source is still what was read. The journal saves no hashing:
a run that goes on hashes the prefix again, as it must for the hash of the whole file, and compares.

Hashing pieces while they are in memory takes 0.55 s of CPU for 0.77 GB, reading included, and 1.91 s where
`hashlib.file_digest` reads the files again (`python benchmarks/checkpoint_io.py --layers 2 --only hash`).

What is known of a file: a list in the form of `sha256sum`; what huggingface_hub noted beside a download
(`.cache/huggingface/download/F.metadata`, whose second line is the SHA-256 of files in large file storage); and the
name of the blob that a link in the hub's cache points to.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from spinquant.checkpoint.folder import BESIDE
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.errors import CheckpointError, SourceChangedError

CHECKSUMS = "checksums.sha256"

# The number of bytes, and the SHA-256 of so many first bytes of a file.
Prefix = tuple[int, str]

_GAP = 1 << 22  # bytes that are read to be hashed alone, between two pieces that are read anyway
_AT_ONCE = 1 << 23
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileHash:
    """The SHA-256 of a file, as far as it was taken."""

    def __init__(self, path: Path):
        self.path, self.length = path, 0
        self._hash = hashlib.sha256()

    def add(self, start: int, piece: Tensor) -> None:
        """Take a piece of the file that was read, uint8; one that does not follow is left for later."""
        end = start + len(piece)
        if self.length < start <= self.length + _GAP:
            self.read_to(start)
        if start <= self.length < end:
            self._hash.update(piece[self.length - start :].numpy().data)
            self.length = end

    def read_to(self, end: int) -> None:
        """Read what is missing up to a byte."""
        if self.length >= end:
            return
        buffer = bytearray(min(_AT_ONCE, end - self.length))
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
        """What was taken so far."""
        return self.length, self._hash.copy().hexdigest()


class SourceHash:
    """The hashes of all files of a source."""

    def __init__(self, folder: Path, files: Iterable[str]):
        self.files = {name: FileHash(folder / name) for name in files}
        self._read = dict.fromkeys(self.files, 0)

    def add(self, file: str, start: int, piece: Tensor) -> None:
        """Take a piece that was read; the buffer may be overwritten afterwards."""
        self.files[file].add(start, piece)
        self._read[file] = max(self._read[file], start + len(piece))

    def prefixes(self) -> dict[str, Prefix]:
        """For every file of which anything was read, all that was read and what lies before it."""
        for name, end in self._read.items():
            self.files[name].read_to(end)
        return {name: self.files[name].prefix() for name, end in self._read.items() if end}

    def check(self, journal: Iterable[Mapping[str, Prefix]]) -> None:
        """Read again what was read before. Raises SourceChangedError, naming the file, when it is not what it was."""
        found: dict[str, dict[int, str]] = {}
        for prefixes in journal:
            for name, (length, sha256) in prefixes.items():
                found.setdefault(name, {})[length] = sha256
        for name, prefixes in found.items():
            for length, sha256 in sorted(prefixes.items()):
                self.files[name].read_to(length)
                if self.files[name].prefix() != (length, sha256):
                    raise SourceChangedError(
                        f"{self.files[name].path} has changed since this run began: its first {length} bytes are not "
                        "what was read then. Give it its old content, or delete the unfinished result (.OUT.run) "
                        "to start anew"
                    )

    def finish(self, files: Iterable[str], known: Mapping[str, "Known"]) -> dict[str, str]:
        """SHA-256 of these files, read to their ends. Raises CheckpointError where another one is known."""
        for name in files:
            self.files[name].read_to(self.files[name].path.stat().st_size)
            if name in known and self.files[name].prefix()[1] != known[name].sha256:
                raise CheckpointError(
                    f"{self.files[name].path} is damaged, or was changed: its SHA-256 is "
                    f"{self.files[name].prefix()[1]}, and {known[name].origin} says {known[name].sha256}. Download it "
                    "again, or remove what says otherwise"
                )
        return {name: self.files[name].prefix()[1] for name in files}


class Known:
    """A SHA-256 that a file should have, and who says so."""

    def __init__(self, sha256: str, origin: str):
        self.sha256, self.origin = sha256, origin


def known_hashes(folder: Path, files: Iterable[str], listed: Path | None = None) -> dict[str, Known]:
    """What is known of the files of a folder. Raises CheckpointError for a list that cannot be read, or lists none."""
    files = list(files)
    found = {name: known for name in files if (known := _noted(folder, name)) is not None}
    if listed is None:
        return found
    given = _read_list(listed)
    if not any(name in given for name in files):
        raise CheckpointError(f"{listed} lists none of the weights of {folder} ({', '.join(files[:3])}, ...)")
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
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
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
    """Names of the files of a folder that differ from what was written; empty when none does.

    Raises:
        CheckpointError: the folder has no checksums.
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
