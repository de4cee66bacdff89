"""Clip ratios of activations, keys and values, searched where they act.

A ratio below one clips the few largest numbers and gives all others a finer grid. For the input x of linears with the
weights W (stacked) the ratio of least ||(Q_c(x) - x) W^T||^2 is taken; for keys and values, one after the other, the
ratio that changes the output of the attention module least.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer

# From no clipping to 0.6 of the range, first in wide steps, then half a step to both sides of the best.
RATIOS = tuple(1 - i / 20 for i in range(9))
HALF_STEP = 1 / 40


@torch.no_grad()
def search_input_clip(x: Tensor, weight: Tensor, quantizer: Quantizer) -> float:
    """The best clip ratio for activations x (tokens, in) that are multiplied by weight (out, in)."""
    # The smaller of the two products: outputs themselves, or the quadratic form of W^T W.
    tall = weight.shape[0] > weight.shape[1]
    form = weight.T @ weight if tall else weight

    def error(ratio: float) -> float:
        change = fake_quantize(x, replace(quantizer, clip=ratio)) - x
        moved = change @ (form if tall else form.T)
        return float((moved * change).sum() if tall else moved.square().sum())

    return best_ratio(error)


def best_ratio(error: Callable[[float], float]) -> float:
    """The ratio of least error, in (0, 1]; the larger of two that are equal."""
    errors = {ratio: error(ratio) for ratio in RATIOS}
    best = min(RATIOS, key=lambda ratio: (errors[ratio], -ratio))
    errors |= {ratio: error(ratio) for ratio in (best - HALF_STEP, best + HALF_STEP) if ratio <= 1}
    return min(errors, key=lambda ratio: (errors[ratio], -ratio))
