"""GPTQ: round a weight column by column, each time moving the remaining columns to make up for the error.

With x the inputs of a linear on calibration text, the rounded Q should keep the outputs: least ||(Q - W) X||^2. The
columns are taken in order; the error of column j, divided by U[j, j], is taken out of the later columns along row j of
U, the upper Cholesky factor of (X X^T)^-1 (Frantar et al., arXiv 2210.17323).

The asymmetric target (GPTAQ, arXiv 2504.02692) asks for the outputs W X~ of the unquantized model on its own inputs
X~, where the quantized model only has X. Since

    ||Q X - W X~||^2 = ||(Q - W*) X||^2 + const,     W* = W + W (X~ - X) X^T (X X^T)^-1

it is the same problem around the moved weight W*. Going the whole way is worse than not going at all, in part because
the step follows the noise of the text too: SmolLM2 at W4A4KV4 with 16 samples of 512 tokens has perplexity 20.6
without the step, 18.2 with a quarter of it, 461 with all of it, and 97 when its length is cross-validated for every
linear (0.1 to 0.5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spinquant.errors import CalibrationError
from spinquant.quantization.floating import within_reach
from spinquant.quantization.integer import Packed, decode, encode, grid, group_of, quantize_on_grid
from spinquant.quantization.rtn import search_clip
from spinquant.quantization.scheme import Quantizer

# Columns whose errors are taken out of the rest of the weight at once, by one product.
BLOCK_COLUMNS = 128
# Rows of a large matrix that are worked on at once, so that what lies between is small.
PANEL = 512


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ goes about it.

    damping: share of the mean of the diagonal that is added to it. act_order: columns of large inputs first, with the
    grids of the groups fixed beforehand. asymmetry: how much of the way from W to the asymmetric target W* is gone;
    None is 0 for gptq, and what the pipeline's method says.
    """

    damping: float = 0.01
    act_order: bool = False
    asymmetry: float | None = None

    def __post_init__(self):
        if not self.damping >= 0:
            raise CalibrationError(f"damping {self.damping} is negative: expected a small number such as 0.01")
        if self.asymmetry is not None and not 0 <= self.asymmetry <= 1:
            raise CalibrationError(f"asymmetry {self.asymmetry} is outside [0, 1]")


class Moments:
    """Second moments of the inputs of a linear, summed over tokens, on the inputs' device.

    square: sum of x x^T, (in, in). cross: sum of (x~ - x) x^T, or None where no x~ was given. Both in float32, or in
    float64 for such inputs.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.square: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count inputs x of shape (.., in), and the same inputs in the unquantized model."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        if self.square is None:
            self.square = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.square.addmm_(rows.T, rows)
        self.tokens += len(rows)
        if exact is None:
            return
        if self.cross is None:
            self.cross = torch.zeros_like(self.square)
        self.cross.addmm_((exact.reshape(rows.shape).to(rows.dtype) - rows).T, rows)


@torch.no_grad()
def gptq(weight: Tensor, moments: Moments, quantizer: Quantizer, options: GPTQOptions | None = None) -> Packed:
    """A weight (out, in) as packed integers that keep the linear's outputs on the calibration inputs.

    The moments are used up: beside what is rounded there is then one (in, in) matrix in float64, and one in float32 for
    an asymmetric target. Inputs that were always zero are rounded to nearest. Raises CalibrationError when the second
    moment is not positive definite even with the damping, or is not finite.
    """
    options = options or GPTQOptions()
    wide = torch.promote_types(weight.dtype, torch.float32)
    cross, moments.cross = moments.cross, None
    diagonal = _damped_diagonal(moments, weight.device, options.damping)
    importance = diagonal.to(wide)
    if options.act_order:
        order = importance.argsort(descending=True, stable=True)
    else:
        order = torch.arange(weight.shape[1], device=weight.device)
    lower = _factor(moments, diagonal, order.flip(0), options.damping)
    work = weight.to(wide)
    if cross is not None and options.asymmetry:
        work = _moved(work, cross.div_(moments.tokens), lower, order.flip(0), options.asymmetry)
    del cross
    upper = _inverse_factor(lower, wide)
    del lower
    fixed = options.act_order or quantizer.kind == "nvfp4"
    rounded, scale, zero = _round_columns(work, upper, order, importance, quantizer, weight.dtype, fixed)
    del work, upper
    return quantize_on_grid(rounded, scale.to(weight.dtype), zero, quantizer)


def _damped_diagonal(moments: Moments, device: torch.device, damping: float) -> Tensor:
    """That of the damped second moment, float64. Raises CalibrationError where there is none, or it is not finite."""
    if moments.square is None or moments.tokens == 0:
        raise CalibrationError(
            "no calibration token reached it: give more text, or round to nearest (method rtn) if the model's class "
            "multiplies by its weight without calling it, as Bloom's slow_but_exact does"
        )
    diagonal = moments.square.diagonal().to(device, torch.float64) / moments.tokens
    if not diagonal.isfinite().all():  # no other element of x x^T is larger
        raise CalibrationError("its inputs are not finite on the calibration text")
    mean = diagonal.mean()
    # Alone and of average size, a dead input is rounded to nearest and takes no part in the rest.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    return diagonal + damping * diagonal.mean()


def _factor(moments: Moments, diagonal: Tensor, backwards: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of the damped second moment with its columns backwards; of the moments it is forgotten.

    Float64: half the digits are lost in the inverse. The factor takes the place of the matrix.
    """
    square = moments.square
    assert square is not None
    damped = torch.empty(square.shape, dtype=torch.float64, device=diagonal.device)
    chosen = backwards.to(square.device)
    for rows, target in zip(chosen.split(PANEL), damped.split(PANEL), strict=True):
        target.copy_(square[rows][:, chosen]).div_(moments.tokens)
    moments.square, square = None, None
    damped.diagonal().copy_(diagonal[backwards])
    failed = torch.empty((), dtype=torch.int32, device=damped.device)
    # Column by column, as LAPACK has it: laid out otherwise there would be a copy.
    torch.linalg.cholesky_ex(damped.mT, out=(damped.mT, failed))
    if failed:
        raise CalibrationError(
            f"the second moment of its inputs is singular ({moments.tokens} tokens for {len(damped)} inputs, damping "
            f"{damping}): give more calibration tokens, or more damping"
        )
    return damped.mT


def _moved(work: Tensor, cross: Tensor, lower: Tensor, backwards: Tensor, share: float) -> Tensor:
    """W and a share of the way to W*: of W C H^-1, by the triangular factor of H with its columns backwards."""
    moved = torch.empty_like(work)
    for rows, target in zip(work.split(PANEL), moved.split(PANEL), strict=True):
        exact = rows.to(lower)
        product = torch.cat([exact @ part.to(lower) for part in cross.split(PANEL, dim=1)], dim=1)
        # Not cholesky_solve, which copies the factor.
        half = torch.linalg.solve_triangular(lower, product[:, backwards].T, upper=False)
        step = torch.linalg.solve_triangular(lower.mT, half, upper=True).T
        target[:, backwards] = rows[:, backwards] + (share * step).to(work.dtype)
    return moved


def _inverse_factor(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper Cholesky factor U of H^-1, from the lower one, L, of H with its columns backwards. L is used up.

    With P the reversal, P H P = L L^T, so H^-1 = (P L^-1 P)^T (P L^-1 P). L is inverted in place, panel by panel:
    rows of L^-1 are -D^-1 (L_rows X) and D^-1, where X is what is inverted already and D their corner.
    """
    for start in range(0, len(lower), PANEL):
        end = min(start + PANEL, len(lower))
        unit = torch.eye(end - start, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[start:end, start:end], unit, upper=False)
        lower[start:end, :start] = -corner @ (lower[start:end, :start] @ lower[:start, :start])
        lower[start:end, start:end] = corner
    upper = torch.empty(lower.shape, dtype=dtype, device=lower.device)
    for start in range(0, len(lower), PANEL):
        end = min(start + PANEL, len(lower))
        upper[len(lower) - end : len(lower) - start] = lower[start:end].flip(0, 1)
    return upper


def _round_columns(
    work: Tensor,
    upper: Tensor,
    order: Tensor,
    importance: Tensor,
    quantizer: Quantizer,
    stored: torch.dtype,
    fixed_grids: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded weight, as stored; scales and zero points, (out, groups). `upper` is in the order of columns."""
    columns = work.shape[1]
    group = group_of(columns, quantizer)
    scales, zeros = (work.new_empty(work.shape[0], columns // group) for _ in range(2))
    for g in range(columns // group if fixed_grids or group == columns else 0):
        part = slice(g * group, (g + 1) * group)
        scales[:, g : g + 1], zeros[:, g : g + 1] = _grid(work[:, part], quantizer, stored, importance[part])
    if quantizer.kind == "nvfp4":  # the scales of one tensor depend on each other
        scales = within_reach(scales, work.unflatten(-1, (-1, group)).abs().amax(dim=-1))
    moving = work[:, order].contiguous()
    rounded = torch.empty_like(moving, dtype=stored)
    places = order.tolist()
    groups = [place // group for place in places]
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        # Columns are rows here: one column of the weight is then one run of memory.
        block, corner = moving[:, start:end].T.contiguous(), upper[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            g = groups[start + j]
            if not fixed_grids and group < columns and (start + j) % group == 0:
                rest = torch.cat([block[j:].T, _pending(moving, errors[:j], upper, start, end, start + j + group)], 1)
                part = rest[:, :group]
                scales[:, g : g + 1], zeros[:, g : g + 1] = _grid(
                    part, quantizer, stored, importance[start + j : start + j + group]
                )
            column, scale, zero = block[j], scales[:, g], zeros[:, g]
            nearest = decode(encode(column, scale, zero, quantizer), scale, zero)
            rounded[:, places[start + j]] = nearest
            torch.sub(column, nearest, out=errors[j]).div_(corner[j, j])
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        moving[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return rounded, scales, zeros


def _pending(moving: Tensor, errors: Tensor, upper: Tensor, start: int, end: int, until: int) -> Tensor:
    """Columns behind the block that belong to a group beginning inside it, with the block's errors so far taken out."""
    if until <= end:
        return moving[:, :0]
    return moving[:, end:until] - errors.T @ upper[start : start + len(errors), end:until]


def _grid(part: Tensor, quantizer: Quantizer, stored: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    clip = None
    if quantizer.clip == "mse":
        clip = search_clip(part, quantizer, stored=stored, importance=importance).view(-1, 1)
    return grid(part, quantizer, stored, clip=clip)
