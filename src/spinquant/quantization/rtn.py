"""Round-to-nearest (RTN) quantization of weights, with the clip ratio searched per channel or group.

The ratio c in (0, 1] minimizes the squared error sum (w - Q_c(w))^2: the largest weights are clipped, and the many
small ones get a finer grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spinquant.errors import SchemeError
from spinquant.plan import Plan
from spinquant.quantization.integer import (
    Packed,
    block_for,
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

# From no clipping down to 0.425 of the range, which an outlier in a row of weights can make best.
CLIP_RATIOS = tuple(1 - i / 40 for i in range(24))


def quantize_weight(weight: Tensor, quantizer: Quantizer) -> Packed:
    """Quantize a weight (.., out, in) by RTN, per output channel or group of inputs; stacked matrices one by one.

    Raises:
        SchemeError: the group size does not divide the inputs.
    """
    if weight.ndim > 2:
        return stacked([quantize_weight(matrix, quantizer) for matrix in weight])
    clip = search_clip(weight, quantizer) if quantizer.clip == "mse" else None
    return quantize(weight, quantizer, clip=clip)


def search_clip(
    weight: Tensor, quantizer: Quantizer, *, stored: torch.dtype | None = None, importance: Tensor | None = None
) -> Tensor:
    """The clip ratio of least squared error for each group.

    Args:
        weight: shape (.., in).
        quantizer: how it is quantized.
        stored: dtype of the scales; by default the weight's.
        importance: weight of the error at each input, shape (in,); by default all are equal.

    Returns:
        Ratios in (0, 1], shape (.., groups, 1), float32 or wider.

    Raises:
        SchemeError: the weight has no inputs, or the group size does not divide them.
    """
    if weight.shape[-1] == 0:
        raise SchemeError(f"a weight of shape {tuple(weight.shape)} has no input side to quantize")
    group = group_of(weight.shape[-1], quantizer)
    rows = weight.reshape(-1, group)
    best = torch.empty(rows.shape[0], 1, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    step = max(1, block_for(weight) // group)
    for start in range(0, len(rows), step):
        block, target = rows[start : start + step].to(best.dtype), best[start : start + step]
        share = None
        if importance is not None:  # row r is group r modulo the number of groups
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
    """Quantize the weights of a model by round-to-nearest (RTN), in place.

    Scales and zero points are kept with each weight (see `targets.py`), so that saving packs the very same numbers. A
    tied head that is quantized is untied first.

    Args:
        model: the model.
        plan: its plan.
        scheme: what to quantize; without weights nothing is done.
        progress: called as `progress(done, total)` after each weight.

    Raises:
        SchemeError: the group size does not divide the inputs of a weight, which the message names.
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
