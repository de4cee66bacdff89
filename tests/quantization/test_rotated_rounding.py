"""Rounding in transformed coordinates, Q(x T) T^-1: its value, and its gradients for x and for a rotation in T."""

import pytest
import torch

from models import well_conditioned
from spinquant import Composed, Diagonal, Hadamard, KroneckerMatrix, Matrix, Quantizer
from spinquant.plan import Span
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.moving import Moving, MovingScales, Tally
from spinquant.quantization.rotated_rounding import Turn, round_rotated, turned, unturned
from spinquant.rotations.rotation import matrix

QUANTIZER = Quantizer(3)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block_matrix(transform, length):
    """The dense matrix of a whole axis."""
    return transform.apply(torch.eye(length, dtype=torch.float64))


TRANSFORMS = {
    "hadamard": lambda: Hadamard(8),
    "matrix": lambda: Matrix(well_conditioned(8, 8)),
    "matrix per head": lambda: Matrix(well_conditioned(2, 8, 8)),
    "kronecker": lambda: KroneckerMatrix((well_conditioned(2, 2), well_conditioned(4, 4))),
    "composed": lambda: Composed(Diagonal(torch.linspace(0.5, 2, 8)), Hadamard(8)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_are_rounded_where_the_transform_takes_them(name):
    transform, x = TRANSFORMS[name](), normal(5, 16)
    dense = block_matrix(transform, 16)
    expected = fake_quantize(x @ dense, QUANTIZER) @ torch.linalg.inv(dense)
    assert torch.allclose(round_rotated(x, (Turn(transform),), QUANTIZER), expected, rtol=0, atol=1e-11)
    assert not torch.allclose(expected, x, atol=1e-2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_for_x_pass_straight_through(name):
    x, gradient = normal(5, 16).requires_grad_(), normal(5, 16, seed=1)
    y = round_rotated(x, (Turn(TRANSFORMS[name]()),), QUANTIZER)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_of_keys_and_values_are_transformed_by_their_own(heads):
    transform, x = TRANSFORMS["matrix per head"](), normal(3, heads, 5, 8)
    weight = matrix(transform).repeat_interleave(heads // 2, 0)
    expected = fake_quantize(x @ weight, QUANTIZER) @ torch.linalg.inv(weight)
    found = round_rotated(x, (Turn(transform, heads=True),), QUANTIZER)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dim", [0, 1])
def test_spans_of_an_axis_are_transformed_and_undone(name, dim):
    """Two periods of 12 numbers, of which 8 from the third on are transformed."""
    transform, x = TRANSFORMS[name](), normal(24, 24)
    turns = (Turn(transform, dim, Span(2, 8, 12)), Turn(Hadamard(8), 1 - dim))
    dense = block_matrix(transform, 16)
    expected = Hadamard(8).apply(x, dim=1 - dim).movedim(dim, -1).unflatten(-1, (2, 12)).clone()
    inside = expected[..., 2:10].flatten(-2) @ dense
    expected[..., 2:10] = inside.unflatten(-1, (2, 8))
    assert torch.allclose(turned(x, turns), expected.flatten(-2).movedim(-1, dim), rtol=0, atol=1e-11)
    assert torch.allclose(unturned(turned(x, turns), turns), x, rtol=0, atol=1e-11)


def test_transforms_of_one_axis_are_undone_in_reverse():
    turns, x = tuple(Turn(TRANSFORMS[name]()) for name in ("matrix per head", "composed", "kronecker")), normal(5, 16)
    dense = torch.linalg.multi_dot([block_matrix(turn.rotation, 16) for turn in turns])
    assert torch.allclose(turned(x, turns), x @ dense, rtol=0, atol=1e-11)
    assert torch.allclose(unturned(x, turns), x @ torch.linalg.inv(dense), rtol=0, atol=1e-11)


@pytest.mark.parametrize("composed", [False, True])
def test_the_gradient_of_a_rotation_after_a_fixed_transform(composed):
    """Errors stay as they are while R moves to R (I - A): what the straight-through estimator assumes."""
    fixed, x, gradient = TRANSFORMS["matrix"](), normal(5, 16), normal(5, 16, seed=1)
    moving = Moving.starting(matrix(Hadamard(8)), range_gradient=False)
    turns = (Turn(Composed(fixed, moving)),) if composed else (Turn(fixed), Turn(moving))
    y = round_rotated(x, turns, QUANTIZER)
    (found,) = torch.autograd.grad(y, moving.skew, gradient)
    z = moving.apply(fixed.apply(x))
    error = (fake_quantize(z, QUANTIZER) - z).unflatten(-1, (2, 8))
    skew = torch.zeros(8, 8, dtype=torch.float64, requires_grad=True)
    moved = moving.weight @ (torch.eye(8, dtype=torch.float64) - (skew - skew.T) / 2)
    surrogate = x + (error @ moved.T @ torch.linalg.inv(matrix(fixed))).flatten(-2)
    (expected,) = torch.autograd.grad(surrogate, skew, gradient)
    assert torch.allclose((found - found.T) / 2, expected, rtol=0, atol=1e-11) and float(expected.abs().max()) > 1e-2


def test_the_expected_cost_is_that_of_the_errors_in_transformed_coordinates():
    fixed, x, gradient, tally = TRANSFORMS["matrix"](), normal(5, 16), normal(5, 16, seed=1), Tally()
    moving = Moving.starting(matrix(Hadamard(8)), tally=tally)
    quantizer = Quantizer(3, group_size=8)  # a group is a block, so that a rotation would keep its length
    y = round_rotated(x, (Turn(fixed), Turn(moving)), quantizer)
    torch.autograd.grad(y, moving.skew, gradient)
    z = moving.apply(fixed.apply(x))
    error = (fake_quantize(z, quantizer) - z).unflatten(-1, (2, 8))
    inside = (gradient.unflatten(-1, (2, 8)) @ torch.linalg.inv(matrix(fixed)).T).square().sum(-1)
    assert tally.take() == pytest.approx(float((inside * error.square().sum(-1)).sum() / 16), rel=1e-9)


def ranged(z, group, quantizer):
    """The rounding error of z as a constant residue times the range of its group, which has a gradient."""
    groups = z.unflatten(-1, (-1, group))
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    span = torch.maximum(high, -low) if quantizer.symmetric else high.clamp(min=0) - low.clamp(max=0)
    residue = ((fake_quantize(z, quantizer) - z).unflatten(-1, (-1, group)) / span).detach()
    return residue * span


LEARNED_QUANTIZERS = [Quantizer(3), Quantizer(4, symmetric=True), Quantizer(3, group_size=8)]


@pytest.mark.parametrize("kind", ["scales", "matrix", "moving scales"])
@pytest.mark.parametrize("quantizer", LEARNED_QUANTIZERS)
def test_gradients_of_a_rotation_before_other_transforms(quantizer, kind):
    """Against autograd through Q(x R D) D^-1 R^T, with the straight-through estimator and ranges; also those of D."""
    x, g = normal(6, 16), normal(6, 16, seed=1)
    scale = torch.logspace(-0.5, 0.5, 16, 10, dtype=torch.float64)
    moving, scales = Moving.starting(matrix(Hadamard(16))), MovingScales.starting(scale)
    last = {"scales": Diagonal(scale), "matrix": Matrix(well_conditioned(16, 16)), "moving scales": scales}[kind]
    skew, logs = (torch.zeros(*n, dtype=torch.float64, requires_grad=True) for n in ((16, 16), (16,)))
    moved = moving.weight @ (torch.eye(16, dtype=torch.float64) - (skew - skew.T) / 2)
    dense = matrix(last) * logs.exp() if kind == "moving scales" else matrix(last)
    z = x @ moved @ dense
    error = ranged(z, quantizer.group_size or 16, quantizer).flatten(-2)
    surrogate = x + error @ torch.linalg.inv(dense) @ moved.T
    expected = torch.autograd.grad(surrogate, (skew, logs) if kind == "moving scales" else (skew,), g)
    found = round_rotated(x, (Turn(Composed(moving, last)),), quantizer)
    assert torch.allclose(found, surrogate, rtol=0, atol=1e-10)
    leaves = (moving.skew, scales.shift) if kind == "moving scales" else (moving.skew,)
    gradients = torch.autograd.grad(found, leaves, g)
    assert torch.allclose((gradients[0] - gradients[0].T) / 2, expected[0], rtol=0, atol=1e-10)
    assert float(expected[0].abs().max()) > 1e-2
    if kind == "moving scales":
        assert torch.allclose(gradients[1], expected[1], rtol=0, atol=1e-10)
        assert float(expected[1].abs().max()) > 1e-2


@pytest.mark.parametrize("quantizer", LEARNED_QUANTIZERS)
def test_gradients_of_the_expected_cost_by_a_rotation_and_scales(quantizer):
    """Against autograd of 1/2 ||g R D^-1||^2 ||e||^2 / n, with errors in proportion to the range."""
    x, g, tally = normal(6, 16), normal(6, 16, seed=1), Tally()
    moving = Moving.starting(matrix(Hadamard(16)), tally=tally)
    scales = MovingScales.starting(torch.logspace(-0.5, 0.5, 16, 10, dtype=torch.float64), tally=tally)
    skew, logs = (torch.zeros(*n, dtype=torch.float64, requires_grad=True) for n in ((16, 16), (16,)))
    moved = moving.weight @ (torch.eye(16, dtype=torch.float64) - (skew - skew.T) / 2)
    scale, group = (scales.logs + logs).exp(), quantizer.group_size or 16
    error = ranged(x @ moved * scale, group, quantizer)
    slopes = (g @ moved / scale).unflatten(-1, (-1, group))
    cost = (slopes.square().sum(-1) * error.square().sum(-1)).sum() / (2 * group)
    expected = torch.autograd.grad(cost, (skew, logs))
    y = round_rotated(x, (Turn(moving), Turn(scales)), quantizer)
    found = torch.autograd.grad(y, (moving.skew, scales.shift), g)
    assert tally.take() == pytest.approx(float(cost.detach()), rel=1e-9)
    assert torch.allclose((found[0] - found[0].T) / 2, expected[0], rtol=0, atol=1e-10)
    assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-10) and float(expected[1].abs().max()) > 1e-2


def test_scales_of_what_reads_are_learned_with_those_of_what_writes():
    """The dual of scales that are learned divides by them, and has their gradient with the opposite sign."""
    w, g = normal(5, 16), normal(5, 16, seed=1)
    scales = MovingScales.starting(torch.logspace(-0.5, 0.5, 16, 10, dtype=torch.float64))
    logs = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    scale = (-(scales.logs + logs)).exp()
    surrogate = w + ranged(w * scale, 16, QUANTIZER).flatten(-2) / scale
    (expected,) = torch.autograd.grad(surrogate, logs, g)
    (found,) = torch.autograd.grad(round_rotated(w, (Turn(scales.dual()),), QUANTIZER), scales.shift, g)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert torch.allclose(matrix(scales.frozen()), torch.diag(scales.logs.exp()))
