import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import tiny_model
from spinquant import HadamardOrderError, RotationError, RotationSpec, make_rotations, plan_of
from spinquant.plan import Space
from spinquant.rotations.factory import choose, random_orthogonal, random_signs
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, matrix
from spinquant.rotations.serialization import empty_tensors, restore


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ROTATIONS = {
    "hadamard": lambda: Hadamard(48),
    "random-hadamard": lambda: Hadamard(48, random_signs(48, generator())),
    "orthogonal": lambda: Orthogonal(random_orthogonal(15, generator())),
    "kronecker": lambda: Kronecker(random_orthogonal(9, generator()), 8, random_signs(72, generator())),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_are_orthogonal(kind):
    dense = matrix(ROTATIONS[kind]())
    assert torch.allclose(dense @ dense.T, torch.eye(len(dense), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_apply_is_the_dense_product_block_by_block(kind, blocks):
    rotation = ROTATIONS[kind]()
    x = torch.randn(5, blocks * rotation.order, dtype=torch.float64, generator=generator(1))
    dense = torch.block_diag(*[matrix(rotation)] * blocks)
    assert torch.allclose(rotation.apply(x), x @ dense, atol=1e-12)
    assert torch.allclose(rotation.apply(x, transpose=True), x @ dense.T, atol=1e-12)
    for transpose, y in [(False, x @ dense), (True, x @ dense.T)]:
        stacked = torch.stack([x.T, -x.T])
        expected = torch.stack([y.T, -y.T])
        assert torch.allclose(rotation.apply(stacked, transpose=transpose, dim=1), expected, atol=1e-12)
        assert rotation.apply(stacked, transpose=transpose, dim=-2, out=stacked) is stacked
        assert torch.allclose(stacked, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_description_and_tensors_restore_it(kind):
    rotation = ROTATIONS[kind]()
    description, tensors = rotation.describe(), rotation.tensors()
    empty = empty_tensors(description)
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}
    assert torch.equal(matrix(restore(description, tensors)), matrix(rotation))


def test_restore_refuses_unknown_kinds_and_missing_tensors():
    with pytest.raises(RotationError, match="banana"):
        restore({"kind": "banana"}, {})
    with pytest.raises(RotationError, match="signs"):
        restore({"kind": "random-hadamard", "order": 4}, {})


def test_a_rotation_refuses_an_axis_it_does_not_divide():
    with pytest.raises(RotationError, match="50"):
        Hadamard(48).apply(torch.zeros(2, 50))


@pytest.mark.parametrize(
    ("kind", "randomize"),
    [("hadamard", False), *((k, r) for k in ("random-hadamard", "random-matrix", "auto") for r in (False, True))],
)
def test_the_same_seed_repeats_bit_for_bit(kind, randomize):
    plan = plan_of(tiny_model("llama"))
    spec = RotationSpec("R1,R2,R3,R4", kind, randomize=randomize, seed=3)
    first, second = make_rotations(plan, spec), make_rotations(plan, spec)
    other = make_rotations(plan, RotationSpec("R1,R2,R3,R4", kind, randomize=randomize, seed=4))
    for space, rotation in first.items():
        assert torch.equal(matrix(rotation), matrix(second[space]))
        assert torch.equal(matrix(rotation), matrix(other[space])) == (kind == "hadamard")


def test_leaving_a_rotation_out_does_not_change_the_others():
    plan = plan_of(tiny_model("llama"))
    every, some = (make_rotations(plan, RotationSpec(names, randomize=True)) for names in ("R1,R2,R3,R4", "R4"))
    assert set(some) == {f"layers.{i}.hidden" for i in range(3)}
    assert all(torch.equal(matrix(every[space]), matrix(some[space])) for space in some)


def test_randomize_draws_one_rotation_per_space():
    plan = plan_of(tiny_model("llama"))
    shared = make_rotations(plan, RotationSpec("R2,R3,R4"))
    own = make_rotations(plan, RotationSpec("R2,R3,R4", randomize=True))
    for kind in ("value", "query_key", "hidden"):
        spaces = [f"layers.{i}.{kind}" for i in range(3)]
        assert len({id(shared[space]) for space in spaces}) == 1
        assert len({tuple(matrix(own[space]).flatten().tolist()) for space in spaces}) == 3


def test_types_and_block_sizes_are_set_per_rotation():
    plan = plan_of(tiny_model("llama"))
    spec = RotationSpec("R1,R2,R4", {"R1": "random-matrix"}, block_size={"R4": 20})
    made = make_rotations(plan, spec)
    assert isinstance(made["residual"], Orthogonal)
    assert made["residual"].order == 48
    assert made["layers.0.value"].order == 16
    assert made["layers.0.hidden"].order == 20


def test_a_block_size_that_does_not_divide_names_the_space_and_the_divisors():
    plan = plan_of(tiny_model("llama"))
    with pytest.raises(RotationError, match=r"32 does not divide layers\.0\.value .*size 16.*2, 4, 8, 16"):
        make_rotations(plan, RotationSpec("R2", block_size=32))


def test_an_order_without_hadamard_matrix_names_alternatives_and_auto_uses_one():
    plan = plan_of(tiny_model("llama"))
    odd = RotationSpec("R4", "random-hadamard", block_size={"R4": 10})
    with pytest.raises(HadamardOrderError, match=r"hidden.*10.*(?s:.*)random-matrix"):
        make_rotations(plan, odd)
    made = make_rotations(plan, RotationSpec("R4", "auto", block_size={"R4": 10}))
    assert isinstance(made["layers.0.hidden"], Kronecker)
    assert made["layers.0.hidden"].order == 10


@pytest.mark.parametrize(("order", "odd"), [(13696, 107), (27392, 107), (11008, None)])
def test_by_default_every_dimension_of_a_released_model_has_a_rotation(order, odd):
    chosen = choose(Space("layers.0.hidden", "R4", order), RotationSpec("R4"))
    assert chosen["kind"] == ("random-hadamard" if odd is None else "kronecker")
    assert chosen["order"] == order and (odd is None or chosen["hadamard_order"] * odd == order)


def test_bad_options_are_refused():
    with pytest.raises(RotationError, match="wavelet"):
        RotationSpec("R1", "wavelet")
    with pytest.raises(RotationError, match="-4"):
        RotationSpec("R1", block_size=-4)
    with pytest.raises(RotationError, match="R9"):
        RotationSpec("R1", {"R9": "hadamard"})
    with pytest.raises(RotationError, match="R4, which is not rotated"):
        RotationSpec("R1", block_size={"R4": 8})
    with pytest.raises(RotationError, match="randomize does nothing"):
        RotationSpec("R1,R4", "hadamard", randomize=True)
    assert RotationSpec("R4", {"r4": "hadamard"}).type_of("R4") == "hadamard"


def test_random_orthogonal_matrices_are_unbiased():
    """Plain QR gives R a positive diagonal only up to signs; the mean of Haar matrices is zero."""
    g = generator(5)
    mean = torch.stack([random_orthogonal(3, g) for _ in range(4000)]).mean(0)
    assert mean.abs().max() < 0.04


@pytest.mark.parametrize("kind", ["random-hadamard", "orthogonal", "kronecker"])
def test_cached_factors_work_in_every_torch_mode(kind):
    """A first use in FakeTensorMode or inference mode does not break later ones with gradients."""
    rotation, x = (
        ROTATIONS[kind](),
        torch.randn(3, ROTATIONS[kind]().order, dtype=torch.float64, generator=generator(1)),
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert rotation.apply(mode.from_tensor(x)).shape == x.shape
    with torch.inference_mode():
        rotation.apply(x)
    x.requires_grad_()
    found = rotation.apply(x)
    assert torch.allclose(found, x @ matrix(ROTATIONS[kind]()), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], torch.ones_like(x) @ matrix(rotation).T, atol=1e-12)
