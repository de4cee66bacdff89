"""Finished pieces of a run (calibrated blocks, states of learning): safetensors files that a rerun resumes from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinquant.checkpoint.atomic import UNFINISHED, is_full, sync_file, why_full, write_file
from spinquant.checkpoint.untrusted import json_object
from spinquant.errors import CheckpointError


class Pieces:
    """Finished pieces of a stage of a run: safetensors files with tensors and JSON metadata.

    The settings that determine the pieces are stored with them; pieces of other settings are deleted when the stage is
    opened.

    Args:
        folder: created when the first piece is saved.
        settings: everything that determines the pieces, compared by the `repr` of each item.
        writes: whether this process saves pieces; among several processes only one does.
    """

    def __init__(self, folder: Path, settings: Sequence[Any] = (), *, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.fingerprint = json.dumps([repr(one) for one in settings])
        marker = folder / "fingerprint"
        if writes and folder.exists() and (not marker.exists() or marker.read_text("utf-8") != self.fingerprint):
            marker.unlink(missing_ok=True)
            for path in (*folder.glob("*.safetensors"), *folder.glob(f"*{UNFINISHED}")):
                path.unlink()
            with suppress(OSError):  # not empty
                folder.rmdir()

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Save a piece atomically. Raises CheckpointError when the disk is full."""
        if not self.writes:
            return
        marker = self.folder / "fingerprint"
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        partial = self.folder / f"{name}{UNFINISHED}"
        try:
            if not marker.exists():
                write_file(marker, self.fingerprint.encode())
            save_file(stored, partial, metadata={"about": json.dumps(about)})
            sync_file(partial)
            partial.replace(self.path(name))
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            raise CheckpointError(
                f"{why_full(error)}, while saving {self.path(name)}. Free space or raise the limit, and rerun to resume"
            ) from error

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON metadata of a piece; None if it is not finished, or has other settings."""
        if not self.has(name):
            return None
        with self._opened(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, self._about(file)

    def has(self, name: str) -> bool:
        """Whether a piece is finished."""
        return self.path(name).exists() and self._is_ours()

    def about(self, name: str) -> dict[str, Any]:
        """The JSON metadata of a finished piece."""
        with self._opened(name) as file:
            return self._about(file)

    def remove(self, name: str) -> None:
        """Delete a piece."""
        self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of a piece, which exists once the piece is finished."""
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """An open piece. Raises CheckpointError, with the way out, for one that is damaged."""
        try:
            with safe_open(self.path(name), framework="pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path(name)}, which a previous run has left, cannot be read ({error}): delete {self.folder} to "
                "start anew"
            ) from None

    def _about(self, file: Any) -> dict[str, Any]:
        return json_object(file.metadata()["about"].encode(), str(self.folder))

    def _is_ours(self) -> bool:
        marker = self.folder / "fingerprint"
        return marker.exists() and marker.read_text("utf-8") == self.fingerprint
