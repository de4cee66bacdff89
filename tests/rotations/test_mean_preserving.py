import pytest
import torch

from spinquant.errors import HadamardOrderError, RotationError
from spinquant.plan import Plan, Space
from spinquant.rotations.factory import RotationSpec, make_rotation, make_rotations, random_signs
from spinquant.rotations.mean_preserving import (
    CentredHadamard,
    CentredRandomHadamard,
    check_mean_preserving,
    factors_of,
)
from spinquant.rotations.rotation import Hadamard, matrix
from spinquant.rotations.serialization import restore

ORDERS = [1, 2, 3, 4, 6, 8, 12, 15, 16, 18, 20, 49, 64, 80, 96, 160, 768]


def space(order, *, centred=True):
    return Space("residual", "R1", order, "mean-preserving" if centred else "orthogonal")


def plan(order):
    return Plan("toy", (space(order),), (), (), (), (), (), (), (), "head")


def known(order, kind):
    try:
        return make_rotation(space(order), RotationSpec("R1", kind, seed=3), "x")
    except HadamardOrderError:
        pytest.skip("no Hadamard matrix of this order")


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix", "auto"])
@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_and_keeps_the_mean(order, kind):
    r = matrix(known(order, kind))
    one = torch.ones(order, dtype=torch.float64)
    assert torch.allclose(r @ r.T, torch.eye(order, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(r @ one, one, atol=1e-10) and torch.allclose(one @ r, one, atol=1e-10)


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix", "auto"])
def test_layer_norm_commutes_with_it(kind):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    norm = torch.nn.LayerNorm(96, dtype=torch.float64, elementwise_affine=False)
    blocks = make_rotation(space(96), RotationSpec("R1", kind, 12), "x")
    for rotation in (known(96, kind), blocks):
        assert torch.allclose(norm(rotation.apply(x)), rotation.apply(norm(x)), atol=1e-12)


@pytest.mark.parametrize("order", [4, 16, 64, 1024])
def test_orders_that_are_powers_of_four_give_flat_matrices(order):
    assert torch.allclose(matrix(CentredHadamard(order)).abs(), torch.tensor(order**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("order", range(1, 200))
def test_factors_multiply_to_the_order(order):
    product = 1
    for factor in factors_of(order):
        product *= factor
    assert product == order


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix", "auto"])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 48, 5), (24, 7)])
def test_every_axis_transpose_out_and_saving(kind, shape):
    rotation = make_rotation(space(24), RotationSpec("R1", kind, seed=1), "x")
    dim = next(d for d, n in enumerate(shape) if n % 24 == 0)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = matrix(rotation)
    expected = (x.movedim(dim, -1).unflatten(-1, (-1, 24)) @ r).flatten(-2).movedim(-1, dim)
    assert torch.allclose(rotation.apply(x, dim=dim), expected, atol=1e-12)
    assert torch.allclose(rotation.apply(expected, dim=dim, transpose=True), x, atol=1e-12)
    again = restore(rotation.describe(), rotation.tensors())
    assert torch.equal(again.apply(x, dim=dim), rotation.apply(x, dim=dim))
    place = x.clone()
    assert rotation.apply(place, dim=dim, out=place) is place
    assert torch.allclose(place, expected, atol=1e-12)


def test_auto_falls_back_where_no_hadamard_matrix_is_known():
    with pytest.raises(HadamardOrderError):
        make_rotation(space(18), RotationSpec("R1", "random-hadamard"), "x")
    rotation = make_rotation(space(18), RotationSpec("R1", "auto"), "x")
    assert isinstance(rotation, CentredRandomHadamard) and rotation.weight is not None


def test_seeds_repeat_and_half_precision_stays_close():
    first, again = (make_rotations(plan(64), RotationSpec("R1", seed=5))["residual"] for _ in range(2))
    other = make_rotations(plan(64), RotationSpec("R1", seed=6))["residual"]
    assert torch.equal(matrix(first), matrix(again)) and not torch.equal(matrix(first), matrix(other))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert first.apply(x).dtype == torch.bfloat16
    assert torch.allclose(first.apply(x).float(), first.apply(x.float()), atol=0.05)


def test_a_rotation_that_changes_the_mean_is_refused_by_name():
    signs = random_signs(16, torch.Generator().manual_seed(0))
    with pytest.raises(RotationError, match=r"mean of the space .residual"):
        check_mean_preserving(plan(16), {"residual": Hadamard(16, signs)})
    check_mean_preserving(plan(16), {"residual": CentredHadamard(16)})
    check_mean_preserving(plan(16), {})
