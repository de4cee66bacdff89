"""GPTQ: quantize a weight column by column, updating the remaining columns to compensate for each error.

With X the inputs of a linear on calibration text, the quantized weight Q minimizes the change of the outputs,
||(Q - W) X||^2. Columns are taken in order; the error of column j, divided by U[j, j], is subtracted from the later
columns along row j of U, the upper Cholesky factor of (X X^T)^-1 (Frantar et al., arXiv 2210.17323).

The asymmetric target (GPTAQ, arXiv 2504.02692) asks for the outputs W X~ of the unquantized model on its own inputs
X~, whereas the quantized model has X. Since

    ||Q X - W X~||^2 = ||(Q - W*) X||^2 + const,     W* = W + W (X~ - X) X^T (X X^T)^-1

it is the same problem around the target W*. A full step to W* is worse than none, in part because the step follows the
noise of the text too: SmolLM2 at W4A4KV4 with 16 samples of 512 tokens has perplexity 20.6 without the step, 18.2 with
a quarter of it, 461 with all of it, and 97 when its length is cross-validated for every linear (0.1 to 0.5). On
another model a quarter is worse than none, and a tenth is not: that is the default (`docs/experiments/learning.md`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spinquant.errors import CalibrationError
from spinquant.quantization.floating import within_reach
from spinquant.quantization.integer import Packed, decode, encode, grid, group_of, quantize_on_grid
from spinquant.quantization.rtn import search_clip
from spinquant.quantization.scheme import Quantizer

# Columns whose errors are subtracted from the rest of the weight by one matrix product (lazy batch updates).
BLOCK_COLUMNS = 128
# Rows of a large matrix that are processed at once, so that intermediate results are small.
PANEL = 512


@dataclass(frozen=True)
class GPTQOptions:
    """Options of GPTQ.

    Attributes:
        damping: added to the diagonal of the second moment, as a fraction of the mean of the diagonal.
        act_order: quantize columns in order of decreasing input magnitude, with the grids of the groups computed
            beforehand.
        asymmetry: fraction in [0, 1] of the step from W to the asymmetric target W* (GPTAQ). None means 0 in `gptq`;
            in `quantize` the method decides.

    Raises:
        CalibrationError: negative damping, or an asymmetry outside [0, 1].

    Example:
        >>> from spinquant import GPTQOptions
        >>> GPTQOptions(damping=0.05, act_order=True)
        GPTQOptions(damping=0.05, act_order=True, asymmetry=None)
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
    """Second moments of the inputs of a linear, summed over calibration tokens, on the inputs' device.

    Attributes:
        tokens: number of tokens so far.
        square: sum of x x^T, shape (in, in), float32 (float64 for float64 inputs); None before the first inputs.
        cross: sum of (x~ - x) x^T with x~ the inputs in the unquantized model, like `square`; None if no x~ was given.

    Example:
        >>> import torch
        >>> from spinquant import Moments
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))  # (batch, tokens, in)
        >>> moments.tokens, moments.square
        (2, tensor([[10.,  2.],
                    [ 2.,  4.]]))
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.square: Tensor | None = None
        self.cross: Tensor | None = None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add inputs to the sums.

        Args:
            x: inputs, shape (.., in).
            exact: the same inputs in the unquantized model, for the asymmetric target.
        """
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
    """Quantize a weight by GPTQ, so that the linear's outputs on the calibration inputs change least.

    Columns of inputs that were always zero are quantized by round-to-nearest (RTN). Memory beside the weight: one
    (in, in) matrix in float64, and one in float32 for an asymmetric target.

    Args:
        weight: shape (out, in).
        moments: second moments of the linear's inputs. They are consumed: `square` and `cross` are None afterwards.
        quantizer: bits, groups and format of the result.
        options: damping, column order and asymmetric target; by default `GPTQOptions()`.

    Returns:
        `Packed` integers with scales in the dtype of the weight (`spinquant.quantization.integer.dequantize` gives the
        numbers back).

    Raises:
        CalibrationError: there are no calibration tokens, or the second moment is not finite, or not positive definite
            even with the damping.
        SchemeError: the group size does not divide the inputs.

    Example:
        >>> import torch
        >>> from spinquant import Moments, Quantizer, gptq
        >>> from spinquant.quantization.integer import dequantize
        >>> weight, x = torch.randn(8, 16), torch.randn(64, 16)
        >>> moments = Moments()
        >>> moments.add(x)
        >>> packed = gptq(weight, moments, Quantizer(bits=8, symmetric=True))
        >>> torch.allclose(x @ dequantize(packed).T, x @ weight.T, atol=0.5)
        True
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
    """The diagonal of the damped second moment, float64. Raises CalibrationError if it is missing or not finite."""
    if moments.square is None or moments.tokens == 0:
        raise CalibrationError(
            "no calibration token reached it: give more text, or use method rtn (round-to-nearest) if the model's "
            "class multiplies by its weight without calling it, as Bloom's slow_but_exact does"
        )
    diagonal = moments.square.diagonal().to(device, torch.float64) / moments.tokens
    if not diagonal.isfinite().all():  # no other element of x x^T is larger
        raise CalibrationError("its inputs are not finite on the calibration text")
    mean = diagonal.mean()
    # A dead input gets an average diagonal, so its column is rounded to nearest and does not affect the others.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    return diagonal + damping * diagonal.mean()


def _factor(moments: Moments, diagonal: Tensor, backwards: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of the damped second moment with its columns reversed; frees the moments.

    Float64, because the inverse loses half the digits. The factor overwrites the matrix.
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
    # Column-major, as LAPACK wants it; any other layout would be copied.
    torch.linalg.cholesky_ex(damped.mT, out=(damped.mT, failed))
    if failed:
        raise CalibrationError(
            f"the second moment of its inputs is singular ({moments.tokens} tokens for {len(damped)} inputs, damping "
            f"{damping}): use more calibration tokens or more damping"
        )
    return damped.mT


def _moved(work: Tensor, cross: Tensor, lower: Tensor, backwards: Tensor, share: float) -> Tensor:
    """W plus a fraction of the step to W*, W C H^-1, by the triangular factor of H with its columns reversed."""
    moved = torch.empty_like(work)
    for rows, target in zip(work.split(PANEL), moved.split(PANEL), strict=True):
        exact = rows.to(lower)
        product = torch.cat([exact @ part.to(lower) for part in cross.split(PANEL, dim=1)], dim=1)
        # cholesky_solve would copy the factor.
        half = torch.linalg.solve_triangular(lower, product[:, backwards].T, upper=False)
        step = torch.linalg.solve_triangular(lower.mT, half, upper=True).T
        target[:, backwards] = rows[:, backwards] + (share * step).to(work.dtype)
    return moved


def _inverse_factor(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """Upper Cholesky factor U of H^-1, from the lower factor L of H with its columns reversed; L is overwritten.

    With P the reversal, P H P = L L^T, so H^-1 = (P L^-1 P)^T (P L^-1 P). L is inverted in place, panel by panel: rows
    of L^-1 are -D^-1 (L_rows X) and D^-1, where X is the part inverted so far and D the diagonal block of the rows.
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
    """Quantize column by column: (rounded weight in the stored dtype, scales, zero points), the latter (out, groups).

    `upper` is in the order of columns given by `order`.
    """
    columns = work.shape[1]
    group = group_of(columns, quantizer)
    scales, zeros = (work.new_empty(work.shape[0], columns // group) for _ in range(2))
    for g in range(columns // group if fixed_grids or group == columns else 0):
        part = slice(g * group, (g + 1) * group)
        scales[:, g : g + 1], zeros[:, g : g + 1] = _grid(work[:, part], quantizer, stored, importance[part])
    if quantizer.kind == "nvfp4":  # the scales of one tensor are not independent
        scales = within_reach(scales, work.unflatten(-1, (-1, group)).abs().amax(dim=-1))
    moving = work[:, order].contiguous()
    rounded = torch.empty_like(moving, dtype=stored)
    places = order.tolist()
    groups = [place // group for place in places]
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        # Transposed, so that one column of the weight is contiguous.
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
    """Columns after the block of a group that starts inside it, compensated for the errors in the block so far."""
    if until <= end:
        return moving[:, :0]
    return moving[:, end:until] - errors.T @ upper[start : start + len(errors), end:until]


def _grid(part: Tensor, quantizer: Quantizer, stored: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    clip = None
    if quantizer.clip == "mse":
        clip = search_clip(part, quantizer, stored=stored, importance=importance).view(-1, 1)
    return grid(part, quantizer, stored, clip=clip)
