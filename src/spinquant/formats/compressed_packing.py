"""Pack single tensors in the compressed-tensors format, for streaming.

Linears are quantized, and packed as wholes by the library's own compressors (zero points are packed across rows).
`compressed_tensors.py` packs models in memory with the same code.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spinquant.formats.compressed_config import stored_ranges
from spinquant.formats.compressed_tensors import compress, stored_transforms, transform_matrix
from spinquant.formats.native_packing import Finished, round_rows
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed, dequantize, quantize
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.quantization.targets import linears_of
from spinquant.rotations.rotation import Transform


def _stored_name(plan: Plan, name: str, modules: Collection[str]) -> str:
    """The name in the checkpoint of a tensor that is added beside those of a module."""
    module = max((m for m in modules if name.startswith(f"{m}.")), key=len, default="")
    return plan.stored_as(module) + name.removeprefix(module) if module else name


class CompressedPacking:
    """Packs the linears of a scheme; `extras` are the matrices of online rotations and the static ranges.

    dtype: of the model. finished: weights that calibration has quantized; they are not quantized here. clips: peaks of
    static quantizers.
    """

    def __init__(
        self,
        plan: Plan,
        scheme: Scheme,
        online: Mapping[str, Transform],
        dtype: torch.dtype,
        finished: Finished | None = None,
        clips: Clips | None = None,
    ):
        self.scheme, self.finished = scheme, finished
        names = linears_of(plan, scheme) if scheme.weights is not None else []
        self.covered = {plan.weight_of(name): plan.stored_as(name) for name in names}
        matrices = {name: transform_matrix(made, dtype) for name, made in stored_transforms(plan, online)}
        extras = matrices | (stored_ranges(plan, scheme, clips) if clips else {})
        modules = {*names, *plan.attentions, *(name for group in plan.linears for name in group)}
        self.extras: Mapping[str, Tensor] = {_stored_name(plan, name, modules): t for name, t in extras.items()}
        self._layouts: dict[tuple[torch.dtype, tuple[int, ...]], dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}

    def is_whole(self, name: str) -> bool:
        """Whether a tensor has to be packed as a whole."""
        return name in self.covered

    def layout(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if name not in self.covered:
            return {name: (dtype, shape)}
        dtype = dtype if self.finished is None else self.finished.dtype
        if (dtype, shape) not in self._layouts:
            # The library decides the layout: compress a weight of zeros, without clip search, and look.
            zeros = quantize(torch.zeros(shape, dtype=dtype), replace(self._quantizer, clip=1.0))
            tried = self._stored("", zeros)
            self._layouts[dtype, shape] = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tried.items()}
        return {f"{self.covered[name]}{key}": found for key, found in self._layouts[dtype, shape].items()}

    def is_made(self, name: str) -> bool:
        return self.finished is not None and name in self.covered

    def made(self, name: str) -> dict[str, Tensor]:
        assert self.finished is not None
        return self._stored(self.covered[name], self.finished.of(name))

    def pack(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        if name not in self.covered:
            return {name: rows}
        return self._stored(self.covered[name], round_rows(rows, self._quantizer))

    @property
    def _quantizer(self):
        assert self.scheme.weights is not None
        return self.scheme.weights

    def _stored(self, linear: str, packed: Packed) -> dict[str, Tensor]:
        found = compress(linear, dequantize(packed), packed.scale, packed.zero, self.scheme)
        return {f"{linear}.{key}": tensor for key, tensor in found.items()}
