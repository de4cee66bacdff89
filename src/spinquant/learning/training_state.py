"""A run of learning on disk, so that one that was killed goes on to the same result, bit for bit.

What was judged is one JSON file, a descent one safetensors file: matrices, what the optimizer remembers, the steps so
far. Both are written under another name first, and name the settings they belong to; other settings start anew.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What a run had reached."""

    tensors: dict[str, Tensor]
    step: int
    history: list[dict[str, Any]]


JUDGED = "judged.json"


def _fingerprint(settings: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([repr(s) for s in settings]).encode()).hexdigest()


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class JudgedFile:
    """What judging has found so far, JSON by name, for one set of settings."""

    def __init__(self, path: Path, settings: Sequence[Any]):
        self.path, self.fingerprint = path, _fingerprint(settings)
        self.found: dict[str, Any] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["fingerprint"] == self.fingerprint:
                self.found = kept["found"]

    def keep(self, name: str, found: Any) -> None:
        """Keep what was found under a name; the first process does, for all of them."""
        self.found[name] = found
        if _is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"fingerprint": self.fingerprint, "found": self.found}), encoding="utf-8")
            partial.replace(self.path)


class StateFile:
    """Where a run is kept, for one set of settings."""

    def __init__(self, path: Path, settings: Sequence[Any]):
        self.path, self.fingerprint = path, _fingerprint(settings)

    def save(self, tensors: Mapping[str, Tensor], step: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Keep the run as it is now; the first process does, for all of them."""
        if not _is_first():
            return
        about = {"fingerprint": self.fingerprint, "step": step, "history": list(history)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata={"about": json.dumps(about)})
        partial.replace(self.path)

    def load(self) -> Kept | None:
        """What was kept; None where there is nothing, or a run of other settings."""
        if not self.path.exists():
            return None
        with safe_open(self.path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if about["fingerprint"] != self.fingerprint:
                return None
            return Kept({name: file.get_tensor(name) for name in file.keys()}, about["step"], about["history"])

    def remove(self) -> None:
        """Delete it: the run is complete."""
        self.path.unlink(missing_ok=True)
