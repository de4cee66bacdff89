"""Search the clip ratios of activations, keys and values that change a layer's output least.

A ratio below one clips the few largest numbers and gives all others a finer grid. For the input x of linears with
(stacked) weights W, the ratio minimizes ||(Q_c(x) - x) W^T||^2. For keys and values, one after the other, it minimizes
the change of the attention module's output.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer

# From no clipping down to 0.6 of the range in coarse steps, then half a step to both sides of the best.
RATIOS = tuple(1 - i / 20 for i in range(9))
HALF_STEP = 1 / 40
DRAWN = 64  # random rows from which the error of a quantizer is estimated


@torch.no_grad()
def search_input_clip(products: Sequence[tuple[Tensor, Tensor]], quantizer: Quantizer) -> float:
    """The best clip ratio for the inputs of linears.

    Args:
        products: pairs of an activation (tokens, in) and the weight (out, in) that it is multiplied by.
        quantizer: how the activations are quantized.
    """
    # The smaller of the two products: outputs themselves, or the quadratic form of W^T W.
    forms = [(x, w.T @ w if w.shape[0] > w.shape[1] else w) for x, w in products]

    def error(ratio: float) -> float:
        total = 0.0
        for (x, weight), (_, form) in zip(products, forms, strict=True):
            change = fake_quantize(x, replace(quantizer, clip=ratio)) - x
            moved = change @ form.T
            total += float((moved * change).sum() if form is not weight else moved.square().sum())
        return total

    return best_ratio(error)


def best_ratio(error: Callable[[float], float]) -> float:
    """The ratio in (0, 1] of least error; of two equally good ones, the larger."""
    errors = {ratio: error(ratio) for ratio in RATIOS}
    best = min(RATIOS, key=lambda ratio: (errors[ratio], -ratio))
    errors |= {ratio: error(ratio) for ratio in (best - HALF_STEP, best + HALF_STEP) if ratio <= 1}
    return min(errors, key=lambda ratio: (errors[ratio], -ratio))


def relative_error(length: int, quantizer: Quantizer) -> float:
    """Expected squared error of rounding a row of Gaussian numbers, relative to its squared length.

    With clip "mse", at the best clip ratio.
    """
    return _gaussian(length, quantizer)[1]


def with_gaussian_clip(quantizer: Quantizer, length: int) -> Quantizer:
    """The quantizer, with clip "mse" replaced by the best ratio for rows of Gaussian numbers."""
    return replace(quantizer, clip=_gaussian(length, quantizer)[0]) if quantizer.clip == "mse" else quantizer


@lru_cache
def _gaussian(length: int, quantizer: Quantizer) -> tuple[float, float]:
    """The clip ratio for rows of Gaussian numbers, and their relative error."""
    length = min(length, 1 << 14)
    rows = torch.randn(DRAWN, length, generator=torch.Generator().manual_seed(0))

    def error(ratio: float) -> float:
        rounded = fake_quantize(rows, replace(quantizer, clip=ratio, static=False, peak=None))
        return float((rounded - rows).square().sum() / rows.square().sum())

    ratio = best_ratio(error) if quantizer.clip == "mse" else float(quantizer.clip)
    return ratio, error(ratio)
