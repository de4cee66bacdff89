"""Finished pieces of a run (calibrated blocks, states of learning): safetensors files that a rerun resumes from."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinquant.checkpoint.atomic import UNFINISHED, is_full, sync_file, why_full, write_file
from spinquant.errors import CheckpointError


class Pieces:
    """Finished pieces of a stage: safetensors files with JSON beside the tensors, all of the same settings.

    Pieces of other settings are deleted when the stage is opened.

    Args:
        folder: made when the first piece is saved.
        settings: whatever decides the pieces, each item by its `repr`.
        writes: whether this process saves. Of several processes one does, for all of them.
    """

    def __init__(self, folder: Path, settings: Sequence[Any] = (), *, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.fingerprint = json.dumps([repr(one) for one in settings])
        marker = folder / "fingerprint"
        if writes and folder.exists() and (not marker.exists() or marker.read_text("utf-8") != self.fingerprint):
            marker.unlink(missing_ok=True)
            for path in (*folder.glob("*.safetensors"), *folder.glob(f"*{UNFINISHED}")):
                path.unlink()
            with suppress(OSError):  # there is more in it
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
                f"{why_full(error)} while saving {self.path(name)}. Then rerun the command to resume"
            ) from error

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON of a piece; None for one that is not finished, or belongs to other settings."""
        if not self.path(name).exists() or not self._is_ours():
            return None
        with safe_open(self.path(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])

    def about(self, name: str) -> dict[str, Any]:
        """The JSON of a finished piece."""
        with safe_open(self.path(name), framework="pt") as file:
            return json.loads(file.metadata()["about"])

    def remove(self, name: str) -> None:
        """Delete a piece."""
        self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of a piece, finished or not."""
        return self.folder / f"{name}.safetensors"

    def _is_ours(self) -> bool:
        marker = self.folder / "fingerprint"
        return marker.exists() and marker.read_text("utf-8") == self.fingerprint
