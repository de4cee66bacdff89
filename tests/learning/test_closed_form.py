"""The closed form: it is the minimum of the expected cost, for every shape of T and for several quantizers at once."""

import pytest
import torch
from torch import Tensor

from spinquant.learning.closed_form import (
    DIAGONAL,
    MATRIX,
    Damping,
    Moments,
    best_transform,
    choose_damping,
    chosen_transforms,
    expected_cost,
    second_moments,
    symmetric_root,
)

SHAPES = {"diagonal": (1, 6, 1), "matrix": (1, 1, 6), "heads of one row": (1, 3, 4), "heads of a cache": (3, 1, 4)}


def positive(shape: tuple[int, int, int], seed: int) -> Tensor:
    terms, blocks, n = shape
    rows = torch.randn(terms, blocks, n, 3 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scales = torch.linspace(0.2, 3.0, blocks * n, dtype=torch.float64).view(blocks, n, 1)
    return (scales * rows) @ (scales * rows).mT


def moments(shape: tuple[int, int, int], seed: int, length: int = 6) -> Moments:
    return Moments(positive(shape, seed), positive(shape, seed + 100), length)


def moved(p: Tensor, seed: int, size: float) -> Tensor:
    """P after a small change of T: every block is multiplied from both sides by I + size * noise."""
    noise = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
    step = torch.eye(p.shape[-1], dtype=p.dtype) + size * noise
    return step.mT @ p @ step


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_no_change_of_the_closed_form_has_a_lower_cost(shape, size):
    costs = [moments(shape, 1)]
    p = best_transform(costs)
    least = expected_cost(costs, p)
    assert all(expected_cost(costs, moved(p, seed, size)) >= least * (1 - 1e-12) for seed in range(20))


def test_the_cost_of_the_rows_themselves():
    """Where lengths of rows and of gradients are independent, the cost is the mean of their product after T."""
    x, g = torch.randn(2, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(4)
    sums = Moments((x.T @ x)[None, None], (g.T @ g)[None, None], 4, noise=0.5)
    lengths = (x @ t).square().sum(-1)[:, None] * (g @ torch.linalg.inv(t).T).square().sum(-1)
    assert expected_cost([sums], (t @ t.T)[None]) == pytest.approx(
        0.5 * float(lengths.sum()) / 4 / float(x.square().sum())
    )


def test_diagonal_formula():
    one = moments(SHAPES["diagonal"], 2)
    s = symmetric_root(best_transform([one])).flatten()
    formula = (one.g / one.x).flatten().pow(0.25)
    torch.testing.assert_close(s / s[0], formula / formula[0])


def test_any_orthogonal_matrix_may_follow():
    one = moments(SHAPES["matrix"], 3)
    t = symmetric_root(best_transform([one]))
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    assert expected_cost([one], (t @ q) @ (t @ q).mT) == pytest.approx(expected_cost([one], t @ t.mT))


def test_two_quantizers_have_one_transform_that_is_best_for_both():
    # As value heads: rounded one by one in the cache, and together at the input of o_proj.
    costs = [moments((3, 1, 4), 4, length=4), moments((1, 3, 4), 5, length=12)]
    p = best_transform(costs)
    least = expected_cost(costs, p)
    assert least < min(expected_cost(costs, best_transform([one])) for one in costs)
    assert all(expected_cost(costs, moved(p, seed, 1e-2)) > least for seed in range(20))


def test_the_cost_has_no_unit():
    # T and 2 T round alike, so P is normalized; and moments of another model's size give the same one.
    one = moments(SHAPES["matrix"], 6)
    p = best_transform([one])
    assert float(torch.linalg.det(p)) == pytest.approx(1)
    torch.testing.assert_close(best_transform([Moments(7 * one.x, 1e-9 * one.g, 6)]), p)


@pytest.mark.parametrize("mean", [1.0, 0.01])
def test_damping_bounds_the_condition_number(mean):
    rows = torch.zeros(1, 1, 6, 1, dtype=torch.float64)
    rows[..., 0, 0] = 1  # of rank one: without damping T would be infinite
    other = rows.flip(-2)
    damped = Damping(mean).of(Moments(rows @ rows.mT, other @ other.mT, 6))
    condition = float(torch.linalg.cond(symmetric_root(best_transform([damped]))))
    assert 1 < condition <= (6 / mean + 1) ** 0.5 * (1 + 1e-9)


def test_damping_shrinks_towards_the_diagonal():
    one = moments(SHAPES["matrix"], 7)
    p = best_transform([Damping(0.0, 1.0).of(one)])
    torch.testing.assert_close(p, torch.diag_embed(p.diagonal(dim1=-2, dim2=-1)))


def test_nothing_is_kept_where_nothing_is_to_be_gained():
    """White rows and gradients: what a few of them show is noise, and held-out rows say so."""
    folds = []
    for seed in range(2):
        x, g = torch.randn(2, 64, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        folds.append([second_moments(x[:, None, None, None], g[:, None, None, None], 12)])
    assert choose_damping(folds, MATRIX) == (None, 1.0)
    assert chosen_transforms([folds], MATRIX) == [(None, None, 1.0)]


def test_damping_that_held_out_rows_choose():
    """Few rows want much damping, many rows little; the ratio is that of the cost on the other fold."""
    scales = torch.logspace(-0.3, 0.3, 8, dtype=torch.float64)

    def folds(rows: int) -> list[list[Moments]]:
        found = []
        for seed in range(2):
            x, g = torch.randn(2, rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            found.append(
                [second_moments((x * scales)[:, None, :, None, None], (g / scales)[:, None, :, None, None], 8)]
            )
        return found

    (few, worse), (many, better) = (choose_damping(folds(rows), DIAGONAL) for rows in (4, 400))
    assert few is not None and many is not None
    assert few.mean > many.mean and better < worse < 1
    ((p, damping, ratio),) = chosen_transforms([folds(400)], DIAGONAL)
    assert p is not None and (damping, ratio) == (many, better)
    torch.testing.assert_close(p.flatten().sqrt() * scales, torch.ones(8, dtype=torch.float64), rtol=0.5, atol=0.0)
