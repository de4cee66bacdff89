"""Our own folder format, tensor by tensor: what a stream writes for each tensor of the rotated model.

See `native.py` for the format. Rows of a weight do not influence each other, so a weight is rounded rows at a time;
NVFP4 alone has a scale for the whole tensor, which is therefore kept together.
"""

import torch
from torch import Tensor

from spinquant.formats.native import BANK, distinct_rotations, packed_layout
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Scheme
from spinquant.quantization.weights import PARTS, linear_weights, weights_of
from spinquant.rotation import Rotation

# Elements rounded at once: a few copies of them in float32 are in memory.
PIECE = 1 << 20


class NativePacking:
    """Linears that a scheme covers as packed integers (flat at 16 bits), online rotations beside them."""

    def __init__(self, plan: Plan, scheme: Scheme, online: dict[str, Rotation]):
        self.quantizer = scheme.weights
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
        return packed_layout(name, dtype, self.covered[name].turned(torch.empty(shape, device="meta")), self.quantizer)

    def pack(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        if name not in self.covered:
            return {name: rows}
        if self.quantizer is None:
            return {name: rows.flatten()}
        matrices = self.covered[name].turned(rows)
        step = len(matrices) if self.is_whole(name) else max(1, PIECE * len(matrices) // max(1, matrices.numel()))
        packed: list[Packed] = [quantize_weight(part, self.quantizer) for part in matrices.split(step)]
        parts = [torch.cat(tensors) for tensors in zip(*(piece.tensors() for piece in packed), strict=True)]
        return dict(zip((name, *(f"{name}_{part}" for part in PARTS)), parts, strict=False))
