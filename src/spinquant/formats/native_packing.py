"""Our own folder format, tensor by tensor: what a stream writes for each tensor of the rotated model.

See `native.py` for the format. Rows of a weight do not influence each other, so a weight is rounded rows at a time;
NVFP4 alone has a scale for the whole tensor, which is therefore kept together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spinquant.architectures.checkpoint_mapping import Form
from spinquant.calibration.block_store import BlockStore
from spinquant.formats.native import BANK, distinct_rotations, packed_layout
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import PARTS, linear_weights, weights_of
from spinquant.rotations.rotation import Rotation

# Elements rounded at once: a few copies of them in float32 are in memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class Finished:
    """Weights that a calibration has rounded already, by block of the model, and the dtype of their scales.

    form: where the tensors of the checkpoint are in the model's.
    """

    store: BlockStore
    blocks: tuple[str, ...]
    dtype: torch.dtype
    form: Form

    def of(self, stored: str) -> Packed:
        """A weight by the name of its tensor in the checkpoint."""
        piece = self.form.of_stored[stored]
        block = next(b for b in self.blocks if piece.tensor.startswith(f"{b}."))
        return self.store.packed(block, piece.tensor, None if piece.is_all else piece.place)


def round_rows(rows: Tensor, quantizer: Quantizer) -> Packed:
    """Rows of a weight (out, in), or matrices of a stack, rounded to nearest.

    Pieces at a time, unless their scales depend on each other.
    """
    step = len(rows) if quantizer.kind == "nvfp4" else max(1, PIECE * len(rows) // max(1, rows.numel()))
    packed = [quantize_weight(part, quantizer) for part in rows.split(step)]
    return packed[0].with_tensors(*map(torch.cat, zip(*(piece.tensors() for piece in packed), strict=True)))


class NativePacking:
    """Linears that a scheme covers as packed integers (flat at 16 bits), online rotations beside them.

    finished: weights that are taken from there, and not rounded here.
    """

    def __init__(self, plan: Plan, scheme: Scheme, online: dict[str, Rotation], finished: Finished | None = None):
        self.quantizer, self.finished = scheme.weights, finished
        # At 16 bits a linear alone is flat: that is enough for a plain model to refuse the folder.
        found = (linear_weights if scheme.weights is None else weights_of)(plan, scheme)
        self.covered = {weight.tensor: weight for weight in found}
        self.stacks = {experts.first[0] for experts in plan.experts if len(experts.first) == 1}
        self.stacks |= {experts.second[0] for experts in plan.experts if len(experts.second) == 1}
        self.extras = {
            f"{BANK}.{i}.{name}": tensor
            for i, rotation in enumerate(distinct_rotations(online))
            for name, tensor in rotation.tensors().items()
        }

    def is_whole(self, name: str) -> bool:
        """Whether a tensor cannot be packed in parts."""
        if name not in self.covered or self.quantizer is None:
            return False
        # Rows of (in, out) are not rows of what is stored; the matrices of a stack are packed one by one.
        return self.quantizer.kind == "nvfp4" or (self.covered[name].transposed and name not in self.stacks)

    def layout(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if name not in self.covered:
            return {name: (dtype, shape)}
        if self.quantizer is None:
            return {name: (dtype, (torch.Size(shape).numel(),))}
        dtype = dtype if self.finished is None else self.finished.dtype
        return packed_layout(name, dtype, self.covered[name].turned(torch.empty(shape, device="meta")), self.quantizer)

    def is_made(self, name: str) -> bool:
        return self.finished is not None and self.quantizer is not None and name in self.covered

    def made(self, name: str) -> dict[str, Tensor]:
        assert self.finished is not None
        return _stored(name, self.finished.of(name))

    def pack(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        if name not in self.covered:
            return {name: rows}
        if self.quantizer is None:
            return {name: rows.flatten()}
        return _stored(name, round_rows(self.covered[name].turned(rows), self.quantizer))


def _stored(name: str, packed: Packed) -> dict[str, Tensor]:
    return dict(zip((name, *(f"{name}_{part}" for part in PARTS)), packed.tensors(), strict=False))
