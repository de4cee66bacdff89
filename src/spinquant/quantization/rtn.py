"""Round to nearest: weights to the closest point of a grid whose clip ratio is searched per group.

For every channel (or group) the ratio c in (0, 1] with the least squared error sum (w - Q_c(w))^2 is taken; the
largest weights are then clipped, and the many small ones get a finer grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spinquant.errors import SchemeError
from spinquant.plan import Plan
from spinquant.quantization.integer import (
    BLOCK,
    Packed,
    decode,
    encode,
    extremes,
    grid_of_range,
    group_of,
    quantize,
    stacked,
)
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import parts_tied, weights_of
from spinquant.rotations.fuse_module import untie

# From no clipping down to 0.425 of the range, which an outlier in a row of weights may call for.
CLIP_RATIOS = tuple(1 - i / 40 for i in range(24))


def quantize_weight(weight: Tensor, quantizer: Quantizer) -> Packed:
    """A weight (.., out, in) as packed integers, per output channel or group of inputs.

    Stacked matrices are rounded one by one. Raises SchemeError when the group does not divide the input side.
    """
    if weight.ndim > 2:
        return stacked([quantize_weight(matrix, quantizer) for matrix in weight])
    clip = search_clip(weight, quantizer) if quantizer.clip == "mse" else None
    return quantize(weight, quantizer, clip=clip)


def search_clip(
    weight: Tensor, quantizer: Quantizer, *, stored: torch.dtype | None = None, importance: Tensor | None = None
) -> Tensor:
    """The clip ratio of least squared error for each group, shape (.., groups, 1), float32 or wider.

    stored: dtype of the scales, by default the weight's. importance: of the error at each input, (in,), default equal.
    """
    if weight.shape[-1] == 0:
        raise SchemeError(f"a weight of shape {tuple(weight.shape)} has no input side to quantize")
    group = group_of(weight.shape[-1], quantizer)
    rows = weight.reshape(-1, group)
    best = torch.empty(rows.shape[0], 1, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    step = max(1, BLOCK // group)
    for start in range(0, len(rows), step):
        block, target = rows[start : start + step].to(best.dtype), best[start : start + step]
        share = None
        if importance is not None:  # row r holds group r modulo the number of groups
            groups = importance.to(best).view(-1, group)
            share = groups[torch.arange(start, start + len(block), device=groups.device) % len(groups)]
        target.copy_(_search(block, quantizer, stored or weight.dtype, share))
    return best.view(*weight.shape[:-1], -1, 1)


def _search(block: Tensor, quantizer: Quantizer, stored: torch.dtype, share: Tensor | None) -> Tensor:
    ratios = torch.tensor(CLIP_RATIOS, dtype=block.dtype, device=block.device)
    low, high = extremes(block)
    errors = []
    for ratio in CLIP_RATIOS:
        scale, zero = grid_of_range(low, high, quantizer, stored, ratio)
        error = decode(encode(block, scale, zero, quantizer), scale, zero).sub_(block).square_()
        errors.append((error if share is None else error.mul_(share)).sum(dim=-1))
    return ratios[torch.stack(errors).argmin(dim=0)].unsqueeze(-1)


@torch.no_grad()
def round_weights(
    model: nn.Module, plan: Plan, scheme: Scheme, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Round the weights of a model to the nearest point of their grids, in place.

    The grid stays with each weight (see `weights.py`), so that saving packs the very same numbers. A tied head that is
    quantized is untied first. `progress(done, total)` counts weights.
    """
    if scheme.weights is None:
        return
    if parts_tied(plan, scheme):
        untie(model, plan)
    weights = weights_of(plan, scheme)
    for done, weight in enumerate(weights):
        try:
            weight.put(model, quantize_weight(weight.matrices(model), scheme.weights))
        except SchemeError as error:
            raise SchemeError(f"{weight.tensor}: {error}") from None
        if progress:
            progress(done + 1, len(weights))
