"""Pack single tensors in the native format, for streaming.

See `native.py` for the format. Rows of a weight are independent, so a weight is quantized a few rows at a time; NVFP4
alone has a scale for the whole tensor, which is therefore quantized as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spinquant.architectures.checkpoint_mapping import Form
from spinquant.calibration.block_store import BlockStore
from spinquant.formats.native import BANK, distinct_rotations
from spinquant.formats.native_weights import packed_layout
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import PARTS, linear_weights, weights_of
from spinquant.rotations.rotation import Transform

# Elements quantized at once; a few float32 copies of them are in memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class Finished:
    """Weights that calibration has quantized already, by block of the model, and the dtype of their scales.

    form: mapping from the checkpoint's tensors to the model's.
    """

    store: BlockStore
    blocks: tuple[str, ...]
    dtype: torch.dtype
    form: Form

    def of(self, stored: str) -> Packed:
        """A packed weight, by the name of its tensor in the checkpoint."""
        piece = self.form.of_stored[stored]
        block = next(b for b in self.blocks if piece.tensor.startswith(f"{b}."))
        return self.store.packed(block, piece.tensor, None if piece.is_all else piece.place)


def round_rows(rows: Tensor, quantizer: Quantizer) -> Packed:
    """Quantize rows of a weight (out, in), or matrices of a stack, by round-to-nearest (RTN).

    A piece at a time, unless the scales depend on each other (NVFP4).
    """
    step = len(rows) if quantizer.kind == "nvfp4" else max(1, PIECE * len(rows) // max(1, rows.numel()))
    packed = [quantize_weight(part, quantizer) for part in rows.split(step)]
    return packed[0].with_tensors(*map(torch.cat, zip(*(piece.tensors() for piece in packed), strict=True)))


class NativePacking:
    """Packs the linears of a scheme (flat at 16 bits); `extras` are the tensors of online rotations.

    finished: weights that calibration has quantized; they are not quantized here.
    """

    def __init__(self, plan: Plan, scheme: Scheme, online: Mapping[str, Transform], finished: Finished | None = None):
        self.quantizer, self.finished = scheme.weights, finished
        # At 16 bits only linears are flattened: enough for a plain model to refuse the folder.
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
        """Whether a tensor has to be packed as a whole."""
        if name not in self.covered or self.quantizer is None:
            return False
        # Rows of (in, out) are not rows of the stored (out, in); the matrices of a stack are packed one by one.
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
