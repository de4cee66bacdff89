"""Every family table: each kind of transform that a space allows leaves the logits unchanged."""

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, tiny
from models import byte_tokenizer, close, logits, tiny_model, tokens
from spinquant import (
    CalibrationText,
    LearnedRotations,
    RotationSpec,
    attach,
    calibration_tokens,
    fuse_module,
    load,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize,
    quantize_folder,
    read_learned,
    rotate,
    save,
)
from spinquant.entrypoints.learn import write_files
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.learning.free_transforms import composed
from spinquant.rotation_names import ONLINE_R1
from spinquant.rotations.random_transforms import random_transforms

GENERAL = ("R2", "R3", "scales of R1", "scales of R4")


@pytest.mark.parametrize("rotated", [False, True], ids=["alone", "rotated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_allowed_transform_leaves_the_logits_unchanged(name, rotated):
    """Scales of factors and of the outputs of norms, matrices of values, and of keys with the dual for queries.

    A key-value head's matrix is that of all query heads that share it. Without rotations, the inputs of all linears and
    experts that read the residual stream have a matrix each, at run time (online R1).
    """
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    refused = {name for name, _ in plan.refused}
    made = random_transforms(plan, (*GENERAL, "scales of R2", *(() if rotated else (ONLINE_R1,))))
    made = {name: made[name] for name in made if plan.space[name].rotation not in refused}
    if not made:
        pytest.skip("no space of this model takes more than a rotation")
    with Float64Arithmetic():
        before, generated = logits(model, ids), greedy_logits(model, ids)
    spec = RotationSpec(FAMILIES[name].allowed if rotated else (), "auto", randomize=True)
    transforms = {**make_rotations(plan, spec), **made}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fuse_module(model, plan, transforms)
    with attach(model, plan, transforms), Float64Arithmetic():
        assert close(logits(model, ids), before)
        assert close(greedy_logits(model, ids), generated)
    parameters = dict(model.named_parameters())
    changed = {axis.tensor for axis in plan.axes if axis.space in made} & set(weights)
    assert all(not torch.equal(parameters[n], weights[n]) for n in changed)
    assert {plan.space[space].rotation for space in made} & {"R2", "R3", ""}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_streamed_and_in_memory_quantization_with_transforms_are_equal(method, tmp_path):
    """Every kind at once, through a folder of what was learned, proofs included, and loaded again."""
    model = tiny_model("llama").float()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    plan, spec = plan_of(model), RotationSpec("R1,R2,R3,R4", "auto")
    rotations = make_rotations(plan, spec)
    transforms = composed(rotations, random_transforms(plan, GENERAL))
    record = {"kept": "closed-form", "rotation_of": {s.name: s.rotation or s.beside for s in plan.spaces}}
    write_files(LearnedRotations(transforms, spec, record), tmp_path)
    learned = read_learned(tmp_path)
    text = CalibrationText("manual", 4, 24)
    given = {"learned": learned, "text": None, "method": method, "calibration_text": text if method == "gptq" else None}
    quantize_folder(tmp_path / "model", tmp_path / "disk", parse_scheme("W4A4KV4"), spec, **given)
    ids = calibration_tokens(model, byte_tokenizer(), text)[1] if method == "gptq" else None
    result = quantize(model, "W4A4KV4", spec, rotations=learned.rotations, method=method, tokens=ids)
    save(result, tmp_path / "memory")
    disk, memory = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "memory"))
    assert disk.keys() == memory.keys() and all(torch.equal(disk[n], memory[n]) for n in disk)
    loaded = load(tmp_path / "disk")
    assert torch.equal(logits(loaded, tokens()), logits(result.model, tokens()))


def test_rotating_with_transforms_moves_logits_by_rounding_alone(tmp_path):
    """In float32: what is fused, what runs online, and what is loaded again."""
    model = tiny_model("llama").float()
    expected = logits(model, tokens())
    plan, spec = plan_of(model), RotationSpec("R1,R2,R3,R4", "auto")
    transforms = composed(make_rotations(plan, spec), random_transforms(plan, GENERAL))
    result = rotate(model, spec, rotations=transforms, sample=tokens())
    assert result.real is not None and result.real.relative < 1e-5
    save(result, tmp_path / "out")
    assert torch.allclose(logits(load(tmp_path / "out"), tokens()), expected, atol=1e-4)
