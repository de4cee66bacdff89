"""Channel scales: fused into the writers and readers of a space, they change its activations and nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, tiny
from models import close, logits, random_weights, scaled, tiny_model, tokens
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
from spinquant.errors import LearningError, RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic, compare, snapshot
from spinquant.evaluation.metrics import drawn
from spinquant.learning.channel_scaling import accumulate, fuse_scales, scale_sums, unfuse_scales
from spinquant.learning.end_to_end import FROM_LOCAL, EndToEndOptions
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.learn import learn
from spinquant.learning.options import LearnOptions
from spinquant.models.capture import captured
from spinquant.models.modules import named_tensor
from spinquant.plan import CHANNELS
from spinquant.quantization.scheme import parse_scheme
from spinquant.rotations import fuse
from spinquant.rotations.fuse import fuse_in_place, slices, transform
from spinquant.rotations.rotation import Hadamard, matrix
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


@pytest.mark.parametrize("change", ["space", "shape", "zero", "matrix"])
def test_invalid_scales_are_refused(change):
    plan = plan_of(tiny_model("llama"))
    rotations = scaled(plan, make_rotations(plan, SPEC))
    check_given(plan, SPEC, rotations)
    good, size = rotations["layers.0.hidden.channels"].scale, plan.space["residual"].size
    wrong = {
        "space": ("residual", Diagonal(torch.linspace(1, 2, size)), "scales of residual change the model's function"),
        "shape": ("layers.0.hidden.channels", Diagonal(good[1:]), "has order .* and this model needs"),
        "zero": ("layers.0.hidden.channels", Diagonal(good * 0), "not all finite and other than zero"),
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
        model.model.layers[1].mlp.up_proj.weight.div_(learned.rotations["layers.1.hidden"].scale[:, None])
        attachment = attach(model, plan, learned.rotations)
    assert compare(before, model, plan, learned.rotations).module == "model.layers.1.mlp.up_proj"
    attachment.remove()


# Computing the scales


def scales_of(model, plan, scheme, ids):
    sums = filled(model, plan, make_rotations(plan, SPEC), scheme, ids)
    return {space: both.scale() for space, both in sums.items()}


def filled(model, plan, rotations, scheme, ids):
    sums = scale_sums(plan, rotations, scheme)
    accumulate(model, plan, sums, scheme, ids, generator=torch.Generator().manual_seed(0))
    return sums


def prepared():
    """A model with a few large channels in its MLPs that affect the loss no more than the others."""
    model = random_weights(tiny_model("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::20] *= 30
            layer.mlp.down_proj.weight[:, ::20] /= 30
    plan = plan_of(model)
    fuse_gains(model, plan, make_rotations(plan, SPEC))
    return model, plan


def test_scales_equal_the_formula_and_lower_the_cost_of_rounding():
    model, plan = prepared()
    ids = tokens(3, 12)
    scheme = learning_scheme(parse_scheme("W4A4KV4"), weights=False)
    found = scales_of(model, plan, scheme, ids)
    rows: dict[str, list] = {space: [] for space in found}
    inputs = {f"model.layers.{i}.mlp.down_proj": f"layers.{i}.hidden" for i in range(len(found))}
    generator = torch.Generator().manual_seed(0)
    for row in ids.split(1):
        with captured_inputs(model, inputs) as seen:
            out = model(input_ids=row, use_cache=False).logits[0]
            own = drawn(out.detach().softmax(-1), generator)
            gradients = torch.autograd.grad(-out.log_softmax(-1).gather(-1, own).sum(), list(seen.values()))
        for (space, x), g in zip(seen.items(), gradients, strict=True):
            rows[space].append((x.detach()[0], g[0]))
    for space, pairs in rows.items():
        x, g = (torch.cat(part).square() for part in zip(*pairs, strict=True))
        sensitivity, energy = (g * x.sum(-1, keepdim=True)).sum(0), (x * g.sum(-1, keepdim=True)).sum(0)
        logs = ((sensitivity + 0.1 * sensitivity.mean()).log() - (energy + 0.1 * energy.mean()).log()) / 4
        assert torch.allclose(found[space], (logs - logs.mean()).exp(), rtol=1e-4)

        # They lower the cost of rounding, to second order, almost to the minimum.
        def cost(scale, x=x, g=g):
            return float(((x @ scale.square()) * (g @ scale.square().reciprocal())).sum())

        free = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss = ((x @ (2 * free).exp()) * (g @ (-2 * free).exp())).sum().log()
            loss.backward()
            optimizer.step()
        best, plain = cost(free.detach().exp()), cost(torch.ones_like(free))
        assert best < 0.6 * plain and cost(found[space]) < best + 0.15 * (plain - best)


class captured_inputs:
    """Capture the inputs of modules, with their gradients, under other names."""

    def __init__(self, model, names):
        self.found, self.hooks = {}, []
        for name, other in names.items():
            hook = lambda module, args, other=other: self.found.__setitem__(other, args[0])  # noqa: E731
            self.hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))

    def __enter__(self):
        return self.found

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def test_fused_scales_keep_the_function_and_can_be_unfused():
    model, plan = prepared()
    ids, before = tokens(), {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = logits(model, ids)
    rotations = make_rotations(plan, SPEC)
    scheme = learning_scheme(parse_scheme("W4A4KV4"), weights=False)
    sums = filled(model, plan, rotations, scheme, tokens(2, 12))
    scales = {space: both.scale() for space, both in sums.items()}
    fuse_scales(model, plan, scales, ids[:1])
    assert set(scales) == {space for space in plan.space if space.endswith(CHANNELS)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[4] for name in changed} == {"up_proj", "down_proj"}
    assert close(logits(model, ids), expected)
    unfuse_scales(model, plan, scales)
    assert all(torch.allclose(p, before[n], atol=1e-12) for n, p in model.named_parameters())
    # A space that is not rotated, or not quantized, has no scales.
    assert not scale_sums(plan, {"residual": Hadamard(1)}, scheme) and not scale_sums(
        plan, rotations, parse_scheme("KV4")
    )


def test_fusing_scales_of_a_wrong_table_raises():
    """gate_proj is scaled in place of up_proj, but its output goes through the activation function."""
    model, plan = prepared()
    axes = tuple(
        replace(axis, tensor=axis.tensor.replace("up_proj", "gate_proj")) if axis.space.endswith(CHANNELS) else axis
        for axis in plan.axes
    )
    scheme = learning_scheme(parse_scheme("W4A4KV4"), weights=False)
    wrong = replace(plan, axes=axes)
    with pytest.raises(LearningError, match=r"they are not\. Learn without"):
        sums = filled(model, wrong, make_rotations(plan, SPEC), scheme, tokens(2, 12))
        fuse_scales(model, wrong, {space: both.scale() for space, both in sums.items()}, tokens(1))


def test_learning_can_start_from_learned_rotations_and_scales():
    def run_learn(options, **more):
        texts = tokens(16, 24), tokens(4, 24, seed=9)
        return learn(prepared()[0], parse_scheme("W4A4KV4"), SPEC, *texts, options, **more)

    local = run_learn(QUICKLY)
    assert local.kept in ("local", "scaled") and local.record["scales"]
    again = run_learn(replace(QUICKLY, method="random"), start=local)
    assert again.kept == "given" == again.record["start"] and again.record["learned"]
    assert again.record["scores"]["given"]["kl"] == pytest.approx(local.record["scores"][local.kept]["kl"], rel=1e-3)
    assert set(again.record["scales"]) == set(local.record["scales"]) and again.spec == local.spec
    for space, rotation in local.rotations.items():
        assert torch.equal(matrix(rotation), matrix(again.rotations[space]))
    # End-to-end learning starts from the given rotations (the loss of the first step), and the scales stay.
    through = EndToEndOptions(steps=2, batch=8)
    more = run_learn(replace(QUICKLY, method="end-to-end", end_to_end=through), start=local)
    other = run_learn(replace(QUICKLY, method="local+end-to-end", end_to_end=through))
    assert more.record["steps"][0]["loss"] == pytest.approx(other.record["steps"][0]["loss"], rel=1e-6)
    assert more.record["options"]["end_to_end"]["lr"] == FROM_LOCAL
    assert more.record["scales"].keys() == local.record["scales"].keys()
    # Given rotations that do not beat the random ones are not started from, and their scales are removed.
    wild = dict(local.rotations)
    for space in local.record["scales"]:
        scale = wild[space].scale
        wild[space] = replace(wild[space], scale=scale * torch.logspace(-2, 2, len(scale), dtype=scale.dtype))
    lost = run_learn(replace(QUICKLY, method="random"), start=replace(local, rotations=wild))
    assert lost.record["start"].startswith("random") and lost.kept != "given"
    assert lost.record["scores"]["random 0"] == local.record["scores"]["random 0"]
    with pytest.raises(LearningError, match=r"initial rotations are R1, R2, R3, R4, and this run asks for R1, R2"):
        learn(prepared()[0], parse_scheme("W4A4KV4"), RotationSpec("R1,R2"), tokens(), tokens(), start=local)
    with pytest.raises(LearningError, match="have channel scales"):
        run_learn(LearnOptions("end-to-end", shard=True), start=local)


QUICKLY = LearnOptions(method="local", baselines=2, local=LocalOptions(steps=5, rows=64, batch=32))


@pytest.mark.parametrize("signs", [0, 2])
def test_learning_keeps_scales_that_lower_kl(signs):
    """With signs for R4, the scales need a pass of their own: they change the rows that signs are selected on."""
    model, _ = prepared()
    original, _ = prepared()
    options = replace(QUICKLY, signs=signs)
    learned = learn(model, parse_scheme("W4A4KV4"), SPEC, tokens(16, 24), tokens(4, 24, seed=9), options)
    assert ("scales" in learned.record["seconds"]) == bool(signs)
    scores = {name: score["kl"] for name, score in learned.record["scores"].items()}
    assert scores["scaled"] < 0.9 * min(scores["random 0"], scores["random 1"])
    assert learned.kept in ("local", "scaled")
    assert all(isinstance(learned.rotations[space], Diagonal) for space in learned.record["scales"])
    assert learned.spec.type_of("R4") == SPEC.type_of("R4")  # scales do not make it another kind of rotation
    # The original model, rotated with the learned rotations, has the same logits.
    plan = plan_of(original)
    expected = logits(original, tokens())
    fuse_module(original, plan, learned.rotations)
    with attach(original, plan, online_part(plan, learned.rotations)):
        assert close(logits(original, tokens()), expected)
    without = learn(
        prepared()[0],
        parse_scheme("W4A4KV4"),
        SPEC,
        tokens(16, 24),
        tokens(4, 24, seed=9),
        replace(QUICKLY, scales=False),
    )
    assert "scaled" not in without.record["scores"] and not without.record["scales"]
    assert not any(isinstance(rotation, Diagonal) for rotation in without.rotations.values())


def test_scales_that_raise_kl_are_removed(monkeypatch):
    monkeypatch.setattr(
        "spinquant.learning.channel_scaling.Sums.scale",
        lambda self: torch.linspace(-4, 4, len(self.energy)).double().exp(),
    )
    model, _ = prepared()
    learned = learn(model, parse_scheme("W4A4KV4"), SPEC, tokens(16, 24), tokens(4, 24, seed=9), QUICKLY)
    scores = {name: score["kl"] for name, score in learned.record["scores"].items()}
    assert scores["scaled"] > min(scores["random 0"], scores["random 1"]) and not learned.record["scales"]
    assert not any(isinstance(rotation, Diagonal) for rotation in learned.rotations.values())
    other, _ = prepared()
    without = learn(
        other, parse_scheme("W4A4KV4"), SPEC, tokens(16, 24), tokens(4, 24, seed=9), replace(QUICKLY, scales=False)
    )
    assert abs(without.record["scores"]["local"]["kl"] - scores["local"]) < 1e-6


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
