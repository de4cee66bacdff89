"""The tolerance of an ill-conditioned model is set by its rounding noise, and wrong fusions are still caught."""

import json

import pytest
import torch

from families import FAMILIES
from models import byte_tokenizer, random_weights
from spinquant import Options, ProofError, RotationSpec, rotate_folder
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.evaluation.equivalence import MARGIN, MOST, TOLERANCE, allowed
from spinquant.models.modules import model_class
from spinquant.rotations import fuse
from spinquant.streaming.rounding_noise import Neighbours

SPEC = RotationSpec("R1,R2", "auto", randomize=True)
GIVEN = {"text": "manual", "options": Options(prove=False)}


def saved(path, name, dtype):
    config = FAMILIES[name].config()
    random_weights(model_class(config).from_config(config, dtype=dtype)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def zamba2(tmp_path_factory):
    """An ill-conditioned model, whose recurrence makes errors a thousand times larger."""
    return saved(tmp_path_factory.mktemp("zamba2") / "model", "zamba2", torch.float32)


def test_the_tolerance_of_an_ill_conditioned_model_is_its_rounding_noise(zamba2, tmp_path):
    result = rotate_folder(zamba2, tmp_path / "out", SPEC, **GIVEN)
    rounding = json.loads((tmp_path / "out/spinquant/record.json").read_text())["rounding_alone"]
    assert result.real is not None and result.real.module is None
    # How large the noise is depends on the kernels of the processor: the limit is the one that the library sets.
    assert TOLERANCE[torch.float32] < MARGIN * rounding < MOST
    assert result.real.relative < MARGIN * rounding
    assert rounding == result.notes["rounding_alone"]
    # In float64 the rotation is exact: the change in float32 was rounding.
    wide = rotate_folder(zamba2, tmp_path / "wide", SPEC, dtype=torch.float64, **GIVEN)
    assert wide.real is not None and wide.real.relative < 1e-10 and "rounding_alone" not in wide.notes


@pytest.mark.parametrize("tensor", ["model.layers.1.mamba.out_proj.weight", "model.layers.2.linear.weight"])
def test_a_wrong_fusion_of_an_ill_conditioned_model_is_caught(tensor, zamba2, tmp_path, monkeypatch):
    right = fuse.fuse_in_place

    def wrong(name, rows, *args, **kwargs):
        right(name, rows, *args, **kwargs)
        if name == tensor:
            rows[0] += 0.01

    monkeypatch.setattr(fuse, "fuse_in_place", wrong)
    with pytest.raises(ProofError, match=r"rotating changed this model.*first module that deviates"):
        rotate_folder(zamba2, tmp_path / "out", SPEC, **GIVEN)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_rounding_noise_is_too_large_needs_a_wider_dtype(tmp_path):
    folder = saved(tmp_path / "model", "zamba2", torch.bfloat16)
    with pytest.raises(ProofError, match=r"cannot be told in torch\.bfloat16.*rounding alone.*--dtype float32"):
        rotate_folder(folder, tmp_path / "out", SPEC, **GIVEN)
    assert rotate_folder(folder, tmp_path / "out", SPEC, dtype=torch.float32, **GIVEN).real is not None


def test_the_tolerance_stays_within_its_bounds():
    """Never below the tolerance of the dtype, never so large that a comparison is meaningless."""
    assert allowed(torch.float32) == allowed(torch.float32, 1e-6) == TOLERANCE[torch.float32]
    assert allowed(torch.float32, 1e-3) == MARGIN * 1e-3
    assert allowed(torch.bfloat16, 0.9) == MOST < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neighbours_differ_by_one_rounding_step(dtype, tmp_path):
    folder = saved(tmp_path / "model", "arcee", dtype)
    source = Source(folder, load_config(folder))
    neighbours = Neighbours(source, dtype)
    for name in source.tensors:
        right, moved = source.whole(name), neighbours.whole(name)
        distance = ((moved.double() - right.double()) / right.double()).abs() / torch.finfo(dtype).eps
        assert moved.dtype == dtype and distance.min() >= 0.5 and distance.max() <= 2
        assert (moved > right).any() and (moved < right).any()
        assert torch.equal(moved, neighbours.whole(name))
        assert torch.equal(torch.cat([part.clone() for _, part in neighbours.parts(name)]), moved)
    source.close()
