"""Save and load calibrated decoder blocks, to resume a calibration: packed weights by linear, and clip ratios."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from spinquant.checkpoint.run_pieces import Pieces
from spinquant.quantization.integer import Packed
from spinquant.quantization.scheme import Clips, Quantizer


class BlockStore:
    """Finished blocks of a calibration, after the last of which a rerun resumes.

    Args:
        pieces: files of the blocks, for one set of settings.
    """

    def __init__(self, pieces: Pieces):
        self.pieces = pieces

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.pieces.folder

    def save(self, block: str, packed: Mapping[str, Packed], clips: Clips) -> None:
        """Save a block's packed weights by linear, and all clip ratios found so far."""
        tensors = {
            f"{linear}/{i}": tensor for linear, weight in packed.items() for i, tensor in enumerate(weight.tensors())
        }
        linears = {
            linear: {"length": weight.length, "quantizer": vars(weight.quantizer)} for linear, weight in packed.items()
        }
        self.pieces.save(block, tensors, {"clips": clips.to_dict(), "linears": linears})

    def load(self, block: str) -> tuple[dict[str, Packed], Clips] | None:
        """Packed weights and clip ratios of a finished block; None if it is not finished."""
        found = self.pieces.load(block)
        if found is None:
            return None
        tensors, about = found
        packed = {}
        for linear, meta in about["linears"].items():
            count = sum(name.startswith(f"{linear}/") for name in tensors)
            words, scale, *zero = (tensors[f"{linear}/{i}"] for i in range(count))
            packed[linear] = Packed(
                words, scale, zero[0] if zero else None, meta["length"], Quantizer(**meta["quantizer"])
            )
        return packed, Clips.from_dict(about["clips"])

    def packed(self, block: str, linear: str, part: tuple[int | slice, ...] | None = None) -> Packed:
        """One weight of a finished block; part: an index of rows, preceded by one of the matrix in a stack."""
        meta = self.pieces.about(block)["linears"][linear]
        with safe_open(self.pieces.path(block), framework="pt") as file:
            names = sorted(name for name in file.keys() if name.startswith(f"{linear}/"))
            whole = (file.get_slice(name) for name in names)
            words, scale, *zero = (found[:] if part is None else found[part] for found in whole)
        return Packed(words, scale, zero[0] if zero else None, meta["length"], Quantizer(**meta["quantizer"]))
