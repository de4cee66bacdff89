"""Channel scales: fused into the writers and readers of a space, they change its activations and nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, tiny
from models import close, logits, scaled, tiny_model, tokens
from spinquant import (
    LearnedRotations,
    RotationSpec,
    attach,
    fuse_module,
    load,
    make_rotations,
    plan_of,
    quantize,
    quantize_folder,
    save,
)
from spinquant.entrypoints.result import Options
from spinquant.errors import RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic, compare, snapshot
from spinquant.models.capture import captured
from spinquant.models.modules import named_tensor
from spinquant.plan import CHANNELS
from spinquant.quantization.scheme import parse_scheme
from spinquant.rotations import fuse
from spinquant.rotations.fuse import fuse_in_place, slices, transform
from spinquant.rotations.rotation import Hadamard
from spinquant.rotations.serialization import saved, to_save
from spinquant.rotations.transforms import Diagonal
from spinquant.rotations.wrappers import check_given, online_part
from spinquant.streaming import pipeline

SPEC = RotationSpec("R1,R2,R3,R4", "auto")
QUICK = Options(prove=False)


def learned_for(model):
    plan = plan_of(model)
    return LearnedRotations(scaled(plan, make_rotations(plan, SPEC)), SPEC, {"kept": "scaled"})


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_change_only_the_inputs_of_the_scaled_readers(name):
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    factors = {space for space in plan.space if space.endswith(CHANNELS)}
    if not factors:
        pytest.skip("no space of this model is one factor of a product of linears")
    allowed = [r for r in ("R1", "R2", "R4") if r in FAMILIES[name].allowed]
    rotations = scaled(plan, make_rotations(plan, RotationSpec(allowed, "auto", randomize=True)))
    spaces = {o.module: o.space for o in plan.onlines if o.site == "input" and o.space + CHANNELS in factors}
    assert {space + CHANNELS for space in spaces.values()} == factors
    with captured(model, spaces, inputs=True) as before, Float64Arithmetic():
        expected = logits(model, ids)
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations), captured(model, spaces, inputs=True) as after, Float64Arithmetic():
        assert close(logits(model, ids), expected)
    for module, x in before.items():
        rotation = rotations[spaces[module]]
        assert close(after[module], rotation.apply(x * rotations[spaces[module] + CHANNELS].scale)), module
        assert not torch.allclose(after[module], rotation.apply(x), rtol=1e-2), module


def test_gated_mlps_of_every_weight_layout_can_be_scaled():
    """The tensors that write the scaled factor, in one family of each weight layout."""
    found = {}
    for name in ("llama", "phi3", "qwen2_moe", "granitemoeshared", "gemma2", "falcon_h1"):
        plan = plan_of(tiny(name) if name in FAMILIES else tiny_model(name))
        for space in [space for space in plan.space if space.endswith(CHANNELS)][:1]:
            writers = [axis for axis in plan.axes if axis.space == space and not axis.reads]
            found[name] = [(axis.tensor.split("layers.")[1], axis.span) for axis in writers]
    assert [tensor for tensor, _ in found["llama"]] == ["0.mlp.up_proj.weight", "0.mlp.up_proj.bias"]
    span = found["phi3"][0][1]
    assert span is not None and span.start == span.length == span.period // 2
    assert found["qwen2_moe"][0][0] == "0.mlp.shared_expert.up_proj.weight"
    assert found["granitemoeshared"][0][0] == "0.shared_mlp.input_linear.weight"
    assert set(found) == {"llama", "phi3", "qwen2_moe", "granitemoeshared", "gemma2", "falcon_h1"}


@pytest.mark.parametrize("name", ["up_proj.weight", "up_proj.bias", "down_proj.weight", "gate_proj.weight"])
@pytest.mark.parametrize("first", [0, 16])
def test_fusing_slices_applies_the_matching_part_of_the_scales(name, first, monkeypatch):
    """Also for rows from the middle of a tensor, as streaming reads them, and for blocks of a rotated axis."""
    monkeypatch.setattr("spinquant.rotations.fuse.SLICE", 100)
    model = tiny_model("llama")
    plan = plan_of(model)
    rotations = scaled(plan, make_rotations(plan, RotationSpec("R4", block_size=16)))
    tensor = named_tensor(model, full := f"model.layers.0.mlp.{name}").detach()
    expected = transform(full, tensor, plan, {}, rotations)
    assert torch.equal(expected, tensor) == name.startswith("gate")
    assert len(slices(full, tensor, plan, rotations)) > 1 or name.endswith("bias") or name.startswith("gate")
    first = first if name.startswith("up") else 0
    found = tensor[first:].clone()
    fuse_in_place(full, found, plan, {}, rotations, shape=tensor.shape, first=first)
    assert torch.allclose(found, expected[first:], atol=1e-12)


def test_scales_survive_serialization_and_do_not_run_online():
    plan = plan_of(tiny_model("llama"))
    rotations = scaled(plan, make_rotations(plan, replace(SPEC, transform_type={"R4": "random-matrix"})))
    about, tensors = to_save(rotations)
    found = saved(json.loads(json.dumps(about)), tensors)
    x = torch.randn(2, 3, plan.space["layers.0.hidden"].size, dtype=torch.float64)
    for space, rotation in rotations.items():
        if isinstance(rotation, Diagonal):
            again = found[space]
            assert isinstance(again, Diagonal) and torch.equal(again.scale, rotation.scale)
            assert torch.allclose(again.apply(x), rotation.apply(x), atol=1e-12)
    assert not any(isinstance(r, Diagonal) for r in online_part(plan, rotations).values())


def test_scales_of_folders_of_earlier_versions_are_read():
    """They were stored under the name of the product, beside its rotation."""
    plan = plan_of(tiny_model("llama"))
    rotations = make_rotations(plan, SPEC)
    about, tensors = to_save(rotations)
    scale = torch.linspace(0.5, 2, plan.space["layers.0.hidden"].size, dtype=torch.float64)
    found = saved({**about, "scaled": ["layers.0.hidden"]}, {**tensors, "scale.layers.0.hidden": scale})
    assert set(found) == {*rotations, "layers.0.hidden.channels"}
    assert torch.equal(found["layers.0.hidden.channels"].scale, scale)
    check_given(plan, SPEC, found)


@pytest.mark.parametrize("of", [{"size": 24}, {"block": 16}])
def test_rotations_of_another_order_are_refused(of):
    """Rotations of a model of another width are not taken for blocks, even if the width divides this one's."""
    plan = plan_of(tiny_model("llama"))
    spec = RotationSpec("R1", block_size=of.get("block"))
    made = make_rotations(plan, RotationSpec("R1"))
    if "size" in of:
        made = {space: Hadamard(of["size"]) for space in made}
    with pytest.raises(RotationError, match="and this model needs"):
        check_given(plan, spec, made)


@pytest.mark.parametrize("change", ["space", "shape", "matrix"])
def test_invalid_scales_are_refused(change):
    plan = plan_of(tiny_model("llama"))
    rotations = scaled(plan, make_rotations(plan, SPEC))
    check_given(plan, SPEC, rotations)
    good, size = rotations["layers.0.hidden.channels"].scale, plan.space["residual"].size
    wrong = {
        "space": (
            "residual",
            Diagonal(torch.linspace(1, 2, size)),
            "no rotation: it would change the model's function",
        ),
        "shape": ("layers.0.hidden.channels", Diagonal(good[1:]), "has order .* and this model needs"),
        "matrix": ("layers.0.hidden.channels", Hadamard(len(good)), "allows channel scales alone"),
    }[change]
    with pytest.raises(RotationError, match=wrong[2]):
        check_given(plan, SPEC, {**rotations, wrong[0]: wrong[1]})


@pytest.mark.parametrize("scheme", ["none", "W4A4KV4"])
def test_streamed_and_in_memory_quantization_with_scales_are_equal(scheme, tmp_path, monkeypatch):
    model = tiny_model("llama").float()
    model.save_pretrained(tmp_path / "model")
    learned = learned_for(model)
    for module, name in ((pipeline, "BAND"), (fuse, "SLICE")):
        monkeypatch.setattr(module, name, 500)  # several bands of every tensor that can be cut
    given = {"learned": learned, "text": None, "options": QUICK}
    quantize_folder(tmp_path / "model", tmp_path / "disk", parse_scheme(scheme), SPEC, **given)
    result = quantize(load(tmp_path / "model"), scheme, SPEC, rotations=learned.rotations, options=QUICK)
    save(result, tmp_path / "memory")
    disk, memory = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "memory"))
    assert disk.keys() == memory.keys() and all(torch.equal(disk[n], memory[n]) for n in disk)
    found = logits(load(tmp_path / "disk"), tokens())
    assert torch.equal(found, logits(result.model, tokens()))
    if scheme == "none":
        assert torch.allclose(found, logits(model, tokens()), atol=1e-3)


def test_the_comparison_from_disk_undoes_scales_and_names_an_unscaled_writer(tmp_path):
    """It passes if scales are fused on both sides; if a writer is not scaled, it names the module that deviates."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    learned = learned_for(model)
    given = {"learned": learned, "text": "manual", "options": QUICK}
    result = quantize_folder(tmp_path / "model", tmp_path / "out", parse_scheme("none"), SPEC, **given)
    assert result.real is not None and result.real.relative < 1e-9
    plan, before = plan_of(model), snapshot(model, plan_of(model), tokens())
    with torch.no_grad():
        fuse_module(model, plan, learned.rotations)
        model.model.layers[1].mlp.up_proj.weight.div_(learned.rotations["layers.1.hidden.channels"].scale[:, None])
        attachment = attach(model, plan, learned.rotations)
    assert compare(before, model, plan, learned.rotations).module == "model.layers.1.mlp.up_proj"
    attachment.remove()


def test_scales_in_compressed_tensors_format_equal_those_in_native_format(tmp_path):
    """R4 runs the same in both formats, on inputs that up_proj has scaled."""
    model = tiny_model("llama").float()
    model.save_pretrained(tmp_path / "model")
    plan, spec = plan_of(model), RotationSpec("R1,R2,R4", {"R4": "hadamard"}, {"R4": 16})
    learned = LearnedRotations(scaled(plan, make_rotations(plan, spec)), spec, {"kept": "scaled"})
    found = []
    for format in ("native", "compressed-tensors"):
        given = {"learned": learned, "text": None, "options": QUICK, "format": format}
        quantize_folder(tmp_path / "model", tmp_path / format, parse_scheme("W8"), spec, **given)
        found.append(logits(load(tmp_path / format), tokens()))
    assert torch.allclose(*found, atol=1e-3)
    assert (found[1] - logits(model, tokens())).norm() < 0.05 * found[1].norm()
