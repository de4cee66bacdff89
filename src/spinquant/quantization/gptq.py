"""GPTQ: round a weight column by column, each time moving the remaining columns to make up for the error.

With x the inputs of a linear on calibration text, the rounded Q should keep the outputs: least ||(Q - W) X||^2. The
columns are taken in order; the error of column j, divided by U[j, j], is taken out of the later columns along row j of
U, the upper Cholesky factor of (X X^T)^-1 (Frantar et al., arXiv 2210.17323).

The asymmetric target (GPTAQ, arXiv 2504.02692) asks for the outputs W X~ of the unquantized model on its own inputs
X~, where the quantized model only has X. Since

    ||Q X - W X~||^2 = ||(Q - W*) X||^2 + const,     W* = W + W (X~ - X) X^T (X X^T)^-1

it is the same problem around the moved weight W*. The least-squares step W* - W follows the noise of the calibration
text too: on SmolLM2 with 4-bit activations the whole step, learned on 16 samples of 512 tokens, is far worse than none.
How much of it is gone is therefore found by cross-validation: the step of either half of the text, on the other half.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spinquant.errors import CalibrationError
from spinquant.quantization.integer import Packed, decode, encode, grid, group_of, quantize_on_grid
from spinquant.quantization.rtn import search_clip
from spinquant.quantization.scheme import Quantizer

# Columns whose errors are taken out of the rest of the weight at once, by one product.
BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ goes about it.

    damping: share of the mean of the diagonal that is added to it. act_order: columns of large inputs first, with the
    grids of the groups fixed beforehand. asymmetry: how much of the way from W to the asymmetric target W* is gone: 0
    for plain GPTQ, "auto" to find it by cross-validation.
    """

    damping: float = 0.01
    act_order: bool = False
    asymmetry: float | Literal["auto"] = 0.0

    def __post_init__(self):
        if not self.damping >= 0:
            raise CalibrationError(f"damping {self.damping} is negative: expected a small number such as 0.01")
        if self.asymmetry != "auto" and not 0 <= self.asymmetry <= 1:
            raise CalibrationError(f"asymmetry {self.asymmetry!r} is not in [0, 1], and not 'auto'")


@dataclass
class Sums:
    """Second moments summed over tokens: square of x x^T, (in, in), and cross of (x~ - x) x^T where x~ was given."""

    square: Tensor
    cross: Tensor | None = None
    tokens: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return Sums(self.square + other.square, cross, self.tokens + other.tokens)


class Moments:
    """Second moments of the inputs of a linear, on the inputs' device, in float32 or wider.

    Samples given together with those of the unquantized model are kept in two halves, for cross-validation.
    """

    def __init__(self) -> None:
        self.halves: list[Sums] = []
        self._calls = 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count inputs x of shape (.., in), and the same inputs in the unquantized model."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        half = 0 if exact is None else self._calls % 2
        self._calls += 1
        if half == len(self.halves):
            square = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.halves.append(Sums(square, None if exact is None else torch.zeros_like(square)))
        sums = self.halves[half]
        sums.square.addmm_(rows.T, rows)
        sums.tokens += len(rows)
        if exact is not None and sums.cross is not None:
            sums.cross.addmm_((exact.reshape(rows.shape).to(rows.dtype) - rows).T, rows)

    def total(self) -> Sums:
        """Both halves together. Raises CalibrationError when nothing was counted."""
        if not self.halves or not sum(sums.tokens for sums in self.halves):
            raise CalibrationError(
                "no calibration token reached it: give more text, or leave it out of the quantization"
            )
        return self.halves[0] if len(self.halves) == 1 else self.halves[0] + self.halves[1]


@torch.no_grad()
def gptq(weight: Tensor, moments: Moments, quantizer: Quantizer, options: GPTQOptions | None = None) -> Packed:
    """A weight (out, in) as packed integers that keep the linear's outputs on the calibration inputs.

    Inputs that were always zero are rounded to nearest. Raises CalibrationError when the second moment is not positive
    definite even with the damping, or is not finite.
    """
    options = options or GPTQOptions()
    sums = moments.total()
    square, root = _factors(sums, weight.device, options.damping)
    wide = torch.promote_types(weight.dtype, torch.float32)
    work = weight.to(wide)
    if options.asymmetry and sums.cross is not None:
        share = options.asymmetry
        if share == "auto":
            share = _share_of_step(work, moments, options.damping)
        work = work + (share * _step(work, sums, root)).to(wide)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True).to(wide)
    importance = square.diagonal().to(wide)
    if options.act_order:
        order = importance.argsort(descending=True, stable=True)
        reordered = square[order][:, order]
        root = torch.linalg.cholesky(reordered)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True).to(wide)
    else:
        order = torch.arange(weight.shape[1], device=weight.device)
    rounded, scale, zero = _round_columns(work, upper, order, importance, quantizer, weight.dtype, options.act_order)
    return quantize_on_grid(rounded.to(weight.dtype), scale.to(weight.dtype), zero, quantizer)


def _step(work: Tensor, sums: Sums, root: Tensor) -> Tensor:
    """W C H^-1: from the weight to the least-squares fit of the unquantized model's outputs, float64."""
    assert sums.cross is not None
    return torch.cholesky_solve((work.to(root) @ (sums.cross.to(root) / sums.tokens)).T, root).T


def _share_of_step(work: Tensor, moments: Moments, damping: float) -> float:
    """How much of the step of one half is best for the other, in [0, 1]; the mean of both ways.

    With D the step and C, H of the other half, ||(W + a D) X - W X~||^2 is least at a = <W C, D> / <D H, D>.
    """
    if len(moments.halves) < 2:
        return 0.0
    shares = []
    for one, other in (moments.halves, moments.halves[::-1]):
        step = _step(work, one, _factors(one, work.device, damping)[1])
        assert other.cross is not None
        gain = (work.to(step) @ other.cross.to(step)).mul_(step).sum()
        curvature = (step @ other.square.to(step)).mul_(step).sum()
        shares.append(float((gain / curvature).clamp(0, 1)) if curvature > 0 else 0.0)
    return sum(shares) / 2


def _factors(sums: Sums, device: torch.device, damping: float) -> tuple[Tensor, Tensor]:
    """The damped second moment and its lower Cholesky factor, float64: half the digits are lost in the inverse."""
    square = sums.square.to(device, torch.float64) / sums.tokens
    if not square.isfinite().all():
        raise CalibrationError("its inputs are not finite on the calibration text")
    diagonal = square.diagonal()
    mean = diagonal.mean()
    # Alone and of average size, a dead input is rounded to nearest and takes no part in the rest.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damping * diagonal.mean()
    root, failed = torch.linalg.cholesky_ex(square)
    if failed:
        raise CalibrationError(
            f"the second moment of its inputs is singular ({sums.tokens} tokens for {len(square)} inputs, damping "
            f"{damping}): give more calibration tokens, or more damping"
        )
    return square, root


def _round_columns(
    work: Tensor,
    upper: Tensor,
    order: Tensor,
    importance: Tensor,
    quantizer: Quantizer,
    stored: torch.dtype,
    fixed_grids: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded weight, scales (out, groups), zero points (out, groups). `upper` is in the order of the columns."""
    columns = work.shape[1]
    group = group_of(columns, quantizer)
    scales, zeros = (work.new_empty(work.shape[0], columns // group) for _ in range(2))
    for g in range(columns // group if fixed_grids or group == columns else 0):
        part = slice(g * group, (g + 1) * group)
        scales[:, g : g + 1], zeros[:, g : g + 1] = _grid(work[:, part], quantizer, stored, importance[part])
    moving = work[:, order].contiguous()
    rounded = torch.empty_like(moving)
    groups = (order // group).tolist()
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
            rounded[:, start + j] = nearest
            torch.sub(column, nearest, out=errors[j]).div_(corner[j, j])
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        moving[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    back = torch.empty_like(rounded)
    back[:, order] = rounded
    return back, scales, zeros


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
