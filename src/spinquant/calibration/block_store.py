"""Finished blocks on disk, so that a calibration that was killed goes on where it was.

One file per block, written under another name first. The folder belongs to one set of settings, named by a
fingerprint: other settings start anew.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from spinquant.quantization.integer import Packed
from spinquant.quantization.scheme import Clips, Quantizer


class BlockStore:
    """A folder of finished blocks, made when the first is finished. Blocks of another fingerprint are removed.

    What else is in the folder stays until `remove`.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder
        marker = folder / "fingerprint"
        self.fingerprint = fingerprint
        if folder.exists() and (not marker.exists() or marker.read_text(encoding="utf-8") != fingerprint):
            marker.unlink(missing_ok=True)
            for path in (*folder.glob("*.safetensors"), *folder.glob("*.partial")):
                path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()

    def save(self, block: str, packed: Mapping[str, Packed], clips: Clips) -> None:
        """Keep a block's packed weights by linear, and all clip ratios found so far."""
        tensors = {
            f"{linear}/{i}": tensor.contiguous().cpu()
            for linear, weight in packed.items()
            for i, tensor in enumerate(weight.tensors())
        }
        about = {
            "clips": clips.to_dict(),
            "linears": {
                linear: {"length": weight.length, "quantizer": vars(weight.quantizer)}
                for linear, weight in packed.items()
            },
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "fingerprint").write_text(self.fingerprint, encoding="utf-8")
        partial = self.folder / f"{block}.partial"
        save_file(tensors, partial, metadata={"about": json.dumps(about)})
        partial.replace(self._file(block))

    def load(self, block: str) -> tuple[dict[str, Packed], Clips] | None:
        """What `save` kept; None for a block that is not finished."""
        path = self._file(block)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        packed = {}
        for linear, meta in about["linears"].items():
            count = sum(name.startswith(f"{linear}/") for name in tensors)
            words, scale, *zero = (tensors[f"{linear}/{i}"] for i in range(count))
            packed[linear] = Packed(
                words, scale, zero[0] if zero else None, meta["length"], Quantizer(**meta["quantizer"])
            )
        return packed, Clips.from_dict(about["clips"])

    def packed(self, block: str, linear: str, part: tuple[int | slice, ...] | None = None) -> Packed:
        """One weight of a finished block; part: some of its rows alone, of one matrix where it is a stack."""
        with safe_open(self._file(block), framework="pt") as file:
            meta = json.loads(file.metadata()["about"])["linears"][linear]
            names = sorted(name for name in file.keys() if name.startswith(f"{linear}/"))
            whole = (file.get_slice(name) for name in names)
            words, scale, *zero = (found[:] if part is None else found[part] for found in whole)
        return Packed(words, scale, zero[0] if zero else None, meta["length"], Quantizer(**meta["quantizer"]))

    def remove(self) -> None:
        """Delete the folder: the run it served is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"
