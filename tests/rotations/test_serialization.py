"""Saved transforms are restored to the last bit; of what strangers write, nothing that would spoil a model."""

import json

import pytest
import torch
from safetensors.torch import load, save

from models import well_conditioned
from spinquant.errors import RotationError
from spinquant.rotations.factory import random_signs
from spinquant.rotations.mean_preserving import CentredHadamard
from spinquant.rotations.rotation import ORTHOGONAL, Hadamard, Orthogonal, matrix, off_orthogonal
from spinquant.rotations.serialization import empty_tensors, restore, saved, to_save
from spinquant.rotations.transforms import LARGEST_CONDITION, Composed, Diagonal, KroneckerMatrix, Matrix

SCALE = torch.linspace(0.5, 2, 12, dtype=torch.float64)
SIGNS = random_signs(12, torch.Generator().manual_seed(0))
MADE = {
    "diagonal": lambda: Diagonal(SCALE),
    "diagonal per head": lambda: Diagonal(SCALE.view(3, 4)),
    "matrix": lambda: Matrix(well_conditioned(6, 6)),
    "matrix of one head": lambda: Matrix(well_conditioned(1, 6, 6)),
    "matrix per head": lambda: Matrix(well_conditioned(2, 6, 6)),
    "kronecker": lambda: KroneckerMatrix((well_conditioned(2, 2), well_conditioned(5, 5))),
    "composed": lambda: Composed(Diagonal(SCALE), Hadamard(12, SIGNS)),
    "product of a product": lambda: Composed(Composed(Hadamard(12), Matrix(well_conditioned(12, 12))), Diagonal(SCALE)),
}


@pytest.mark.parametrize("name", MADE)
def test_saved_transforms_are_restored_to_the_last_bit(name):
    made = MADE[name]()
    about, tensors = to_save({"one": made, "two": made, "three": made.dual()})
    assert len(about["rotations"]) == 2
    found = saved(json.loads(json.dumps(about)), load(save(tensors)))
    assert found["one"] is found["two"] and found["one"].describe() == made.describe()
    assert type(found["one"]) is type(made)
    for space, expected in (("one", made), ("three", made.dual())):
        assert torch.equal(matrix(found[space]), matrix(expected))
        assert torch.allclose(matrix(found[space].dual()), matrix(expected.dual()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MADE)
def test_a_loader_is_told_the_tensors(name):
    made = MADE[name]()
    layout = {k: (t.dtype, t.shape) for k, t in empty_tensors(made.describe()).items()}
    assert layout == {k: (t.dtype, t.shape) for k, t in made.tensors().items()} and layout


def test_transforms_that_share_a_tensor_are_saved_apart():
    scale = SCALE.clone()
    pair = {"a": Composed(Diagonal(scale), Hadamard(12)), "b": Composed(Diagonal(scale), Hadamard(12, SIGNS))}
    about, tensors = to_save(pair)
    found = saved(about, load(save(tensors)))
    assert all(torch.equal(matrix(found[space]), matrix(made)) for space, made in pair.items())


BAD = torch.diag(torch.tensor([1.0, 2 * LARGEST_CONDITION], dtype=torch.float64))
LARGE = {"kind": "matrix", "order": 1 << 22}
HEADS = {"kind": "diagonal", "order": 1 << 22, "heads": 1 << 22}
TWO = {"kind": "composed", "order": 2, "parts": [{"kind": "hadamard", "order": 2}] * 2}
NESTED = {"kind": "composed", "order": 2, "parts": [TWO, TWO]}
WRONG = {
    "singular": ({"kind": "matrix", "order": 2}, {"weight": torch.ones(2, 2)}, "no inverse"),
    "nan": ({"kind": "matrix", "order": 2}, {"weight": torch.full((2, 2), torch.nan)}, "expected finite"),
    "ill-conditioned": ({"kind": "matrix", "order": 2}, {"weight": BAD}, "condition number"),
    "another shape": ({"kind": "matrix", "order": 2}, {"weight": torch.eye(3)}, r"of shape \(2, 2\)"),
    "another heads": ({"kind": "matrix", "order": 2, "heads": 2}, {"weight": torch.eye(2)}, r"of shape \(2, 2, 2\)"),
    "integers": ({"kind": "matrix", "order": 2}, {"weight": torch.eye(2).int()}, "floating-point"),
    "missing": ({"kind": "matrix", "order": 2}, {}, "lacks 'weight'"),
    "zero": ({"kind": "diagonal", "order": 2}, {"scale": torch.zeros(2)}, "other than zero"),
    "infinite": ({"kind": "diagonal", "order": 2}, {"scale": torch.tensor([1.0, torch.inf])}, "finite"),
    "unequal": ({"kind": "diagonal", "order": 2}, {"scale": torch.tensor([1e-4, 1e4])}, "condition number"),
    "heads": ({"kind": "diagonal", "order": 2, "heads": -1}, {"scale": torch.ones(2)}, "heads"),
    "factors": ({"kind": "kronecker-matrix", "order": 4, "factors": [2, 3]}, {}, "factors whose product is the order"),
    "no factors": ({"kind": "kronecker-matrix", "order": 1}, {}, "factors whose product is the order"),
    "a factor": (
        {"kind": "kronecker-matrix", "order": 4, "factors": [2, 2]},
        {"factor0": torch.eye(2), "factor1": BAD},
        "condition number",
    ),
    "one part": ({"kind": "composed", "order": 2, "parts": [{"kind": "hadamard", "order": 2}]}, {}, "at least two"),
    "nested": (NESTED, {}, "no composed"),
    "many parts": ({"kind": "composed", "order": 2, "parts": [{"kind": "hadamard", "order": 2}] * 9}, {}, "parts"),
    "orders": (
        {"kind": "composed", "order": 4, "parts": [{"kind": "hadamard", "order": 2}] * 2},
        {},
        "has order 4, and its tensors 2",
    ),
    "spoilt part": (
        {"kind": "composed", "order": 2, "parts": [{"kind": "hadamard", "order": 2}, {"kind": "matrix", "order": 2}]},
        {"1_weight": torch.ones(2, 2)},
        "no inverse",
    ),
    "large": (LARGE, {}, "at most those of a matrix"),
    "large heads": (HEADS, {}, "at most those of a matrix"),
    "large part": ({"kind": "composed", "order": 1 << 22, "parts": [LARGE, LARGE]}, {}, "at most those of a matrix"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_strangers_write_is_checked(name):
    about, tensors, message = WRONG[name]
    with pytest.raises(RotationError, match=message):
        restore(about, tensors)


def test_no_memory_is_taken_for_what_a_stranger_describes():
    for about in (LARGE, HEADS, {"kind": "composed", "order": 1 << 22, "parts": [LARGE, LARGE]}):
        with pytest.raises(RotationError, match="at most those of a matrix"):
            empty_tensors(about)
    with pytest.raises(RotationError, match="does not run online"):
        empty_tensors({"kind": "composed", "order": 4, "parts": [CentredHadamard(4).describe()] * 2})


def test_folders_of_earlier_versions_still_load():
    """As version 0.2 described a rotation with scales: the scales have an entry of their own."""
    about = {"rotations": [{"kind": "hadamard", "order": 2, "construction": "2"}], "spaces": {"a": 0}, "scaled": ["a"]}
    found = saved(about, {"scale.a": torch.tensor([1.0, 2.0])})["a"]
    assert torch.equal(matrix(found), matrix(Hadamard(2)))


@pytest.mark.parametrize("seed", range(3))
def test_matrices_computed_in_float32_are_read_and_rounded_ones_refused(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(512, 512, generator=generator)).Q
    assert 3 * off_orthogonal(weight) < ORTHOGONAL  # with room for other processors
    found = restore(Orthogonal(weight).describe(), {"weight": weight})
    assert isinstance(found, Orthogonal) and torch.equal(found.weight, weight)
    for wrong in (weight.bfloat16(), weight * (1 + ORTHOGONAL), weight.clone().fill_(torch.nan)):
        with pytest.raises(RotationError, match="not orthogonal"):
            restore(Orthogonal(weight).describe(), {"weight": wrong})
