"""Objectives of local learning (rounding error, whip, kurtosis): a loss for every row of rotated activations z.

    error       sum of s^2 / 12 over numbers, s the quantization step: the expected rounding error of numbers that are
                uniform between two codes; its gradient is that of the range, without clipping
    whip        mean of exp(-|z| / rms): pushes numbers away from zero, so that the largest shrink
                (DartQuant, arXiv 2511.04063)
    kurtosis    sum of z^4 / (sum of z^2)^2 times the length (KurTail, EMNLP Findings 2025)

A rotation preserves the energy of a row; each objective is normalized by it, so that it does not depend on the scale.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from spinquant.quantization.floating import LARGEST
from spinquant.quantization.integer import group_of
from spinquant.quantization.scheme import Quantizer

Objective = Literal["error", "whip", "kurtosis"]
OBJECTIVES = get_args(Objective)


def row_loss(z: Tensor, quantizer: Quantizer, objective: Objective) -> Tensor:
    """The objective of each row of z, (rows, width); returns (rows,)."""
    return _ROW_LOSS[objective](z, quantizer)


def expected_errors(z: Tensor, quantizer: Quantizer) -> Tensor:
    """Expected squared error of every group of z, (.., width), that is rounded with one scale; (.., groups)."""
    groups = z.unflatten(-1, (-1, group_of(z.shape[-1], quantizer)))
    high, low = groups.amax(-1), groups.amin(-1)
    if quantizer.kind != "int":  # a floating-point format has no single step; all are proportional to its scale
        step = torch.maximum(high, -low) / LARGEST[quantizer.kind]
    elif quantizer.symmetric:
        step = torch.maximum(high, -low) / (2 ** (quantizer.bits - 1) - 1)
    else:
        step = (high.clamp(min=0) - low.clamp(max=0)) / quantizer.top
    return step.square() * (groups.shape[-1] / 12)


def _error(z: Tensor, quantizer: Quantizer) -> Tensor:
    return expected_errors(z, quantizer).sum(-1) / _energy(z)


def _whip(z: Tensor, quantizer: Quantizer) -> Tensor:
    rms = (_energy(z) / z.shape[-1]).sqrt().unsqueeze(-1)
    return (-z.abs() / rms).exp().mean(-1)


def _kurtosis(z: Tensor, quantizer: Quantizer) -> Tensor:
    return z.square().square().sum(-1) * z.shape[-1] / _energy(z).square()


def _energy(z: Tensor) -> Tensor:
    return z.square().sum(-1).clamp(min=torch.finfo(z.dtype).tiny ** 0.5)


_ROW_LOSS: dict[str, Callable[[Tensor, Quantizer], Tensor]] = {"error": _error, "whip": _whip, "kurtosis": _kurtosis}
