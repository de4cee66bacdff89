"""Laws of quantizing weights that are not nn.Linear: stacked experts, and the Conv1D of GPT-2."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig

from families import FAMILIES
from models import CONFIGS, logits, random_weights, tokens
from spinquant import (
    Calibration,
    GPTQOptions,
    LearnOptions,
    LocalOptions,
    Options,
    RotationSpec,
    SchemeError,
    attach,
    detach,
    fuse_module,
    learn,
    load,
    make_plan,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize,
    quantize_folder,
    save,
)
from spinquant.architectures import FAMILIES as TABLES
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import quantize_blocks
from spinquant.checkpoint.folder import read_headers
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.learning.activations import collect
from spinquant.learning.fake_quant import fuse_gains, rounding
from spinquant.models.capture import captured
from spinquant.models.modules import model_class, named_tensor, tensor_shapes
from spinquant.quantization.gptq import Moments, gptq
from spinquant.quantization.integer import dequantize, fake_quantize
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Quantizer
from spinquant.quantization.targets import weights_of

# Shared blocks are tested elsewhere.
MIXED = [table for table in TABLES if table.experts and table.shared is None]
WITH_EXPERTS = {model_type for table in MIXED for model_type in table.model_types}
# One instance of every family with experts, and GPT-2.
MIXTURES = [
    name
    for name, instance in FAMILIES.items()
    if instance.config().get_text_config().model_type in WITH_EXPERTS | {"gpt2"}
]
# Those of them without stacked experts.
DENSE = ("gpt2", "granitemoehybrid-dense", "youtu", "minicpm3", "llama4_text")
UNPROVED = Options(prove=False)


def tiny(name, dtype=torch.float64):
    config = FAMILIES[name].config()
    model = model_class(config).from_config(config, dtype=dtype)
    exact_experts(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return random_weights(model)


def spec_of(name, seed=1):
    return RotationSpec(",".join(FAMILIES[name].allowed), seed=seed)


def test_the_tested_mixtures_cover_every_layout():
    found = {name: plan_of(tiny(name)) for name in MIXTURES}
    assert sum(bool(plan.experts) for plan in found.values()) >= 18
    assert any(stack.transposed for plan in found.values() for stack in plan.experts)
    assert [name for name, plan in found.items() if plan.transposed] == ["gpt2"]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("scheme", ["W4", "W3g8"])
def test_each_expert_is_quantized_independently(name, scheme):
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    scheme = parse_scheme(scheme)
    try:
        quantize(model, scheme, RotationSpec(()), options=UNPROVED)
    except SchemeError as error:
        assert "does not divide" in str(error)  # 8 does not divide every input of every instance
        return
    covered = weights_of(plan_of(model), scheme)
    for weight in covered:
        matrices = weight.turned(before[weight.tensor])
        found = weight.turned(named_tensor(model, weight.tensor))
        pairs = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (matrices, found)), strict=True)
        for was, now in pairs:
            assert torch.equal(now, dequantize(quantize_weight(was, scheme.weights))), weight.tensor
            assert not torch.equal(now, was)
    names = {weight.tensor for weight in covered}
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, before[key]) == (key not in names), key
    stacks = plan_of(model).experts
    assert {t for e in stacks for t in (*e.first, *e.second)} <= names


@pytest.mark.parametrize("name", MIXTURES)
def test_saving_and_loading_is_the_identity(name, tmp_path):
    """Packed words have integer dtypes, and the names of the checkpoint."""
    model = tiny(name, torch.float32)
    model.save_pretrained(tmp_path / "plain")
    result = quantize(model, "W4A8KV8", spec_of(name), options=UNPROVED)
    expected = logits(model, tokens())
    save(result, tmp_path / "out")
    loaded = load(tmp_path / "out")
    exact_experts(loaded)
    assert torch.equal(logits(loaded, tokens()), expected)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    plan = make_plan(FAMILIES[name].config(), {key: tensor.shape for key, tensor in plain.items()})
    for weight in weights_of(plan, parse_scheme("W4")):
        assert stored[weight.tensor].dtype == torch.int32, weight.tensor
        assert stored[f"{weight.tensor}_scale"].shape[:-1] == stored[weight.tensor].shape[:-1]
    # The loaded model is saved again.
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in again)


@pytest.mark.parametrize("name", MIXTURES)
def test_streaming_experts_equals_quantizing_in_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr("spinquant.streaming.pipeline.BAND", 5000)
    monkeypatch.setattr("spinquant.formats.native_packing.PIECE", 500)
    tiny(name, torch.float32).save_pretrained(tmp_path / "model")
    scheme, spec = parse_scheme("W4A8"), spec_of(name)
    quantize_folder(tmp_path / "model", tmp_path / "out", scheme, spec, text=None, options=UNPROVED)
    save(quantize(load(tmp_path / "model"), scheme, spec, options=UNPROVED), tmp_path / "expected")
    found, expected = (load_file(tmp_path / kind / "model.safetensors") for kind in ("out", "expected"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def reference(module, activation, x, chosen, shares, rotation, quantizer):
    """One module of experts, token by token, with the inputs of both matrix products quantized."""
    out = torch.zeros_like(x)
    read = fake_quantize(x, quantizer)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    for t in range(len(x)):
        for e, share in zip(chosen[t], shares[t], strict=True):
            first, second = up[e], module.down_proj[e]
            first, second = (first.T, second.T) if module.is_transposed else (first, second)
            made = first @ read[t] + (module.gate_up_proj_bias[e] if module.has_bias else 0)
            made = made.unsqueeze(0)
            inner = type(module)._apply_gate(module, made) if module.has_gate else activation(made)
            inner = fake_quantize(inner if rotation is None else rotation.apply(inner), quantizer)
            out[t] += share * (second @ inner[0] + (module.down_proj_bias[e] if module.has_bias else 0))
    return out


@pytest.mark.parametrize("name", [name for name in MIXTURES if name not in DENSE])
@pytest.mark.parametrize("rotations", [(), ("R4",)])
@torch.no_grad()
def test_activations_inside_experts_are_quantized(name, rotations):
    model = tiny(name)
    plan, scheme = plan_of(model), parse_scheme("A4")
    experts = plan.experts[-1]
    module = model.get_submodule(experts.module)
    width = weights_of(plan, scheme)[-2].matrices(model).shape[-1]
    activation = copy.deepcopy(module.act_fn) if hasattr(module, "act_fn") else None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64)
    count = len(module.down_proj)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(6)])
    shares = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    made = make_rotations(plan, RotationSpec(rotations))
    with attach(model, plan, made, scheme), Float64Arithmetic():
        found = module(x, chosen, shares)
    space = plan.read_by_experts(experts)[1]
    expected = reference(module, activation, x, chosen, shares, made.get(space.name), scheme.activations)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found, module(x, chosen, shares))


def dense_and_mixture():
    """A dense model, and a mixture whose only expert is its MLP."""
    config = CONFIGS["mistral"]()
    dense = random_weights(model_class(config).from_config(config, dtype=torch.float64))
    same = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MixtralConfig(**{**same, "num_local_experts": 1, "num_experts_per_tok": 1})
    mixture = model_class(config).from_config(config, dtype=torch.float64)
    exact_experts(mixture)
    wanted = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.data = parameter.data.double()
            if name.endswith("experts.gate_up_proj"):
                path = name.replace("experts.gate_up_proj", "")
                both = [wanted[f"{path}{part}_proj.weight"] for part in ("gate", "up")]
                parameter.copy_(torch.cat(both).unsqueeze(0))
            elif name.endswith("experts.down_proj"):
                parameter.copy_(wanted[name.replace("experts.down_proj", "down_proj.weight")].unsqueeze(0))
            elif not name.endswith("mlp.gate.weight"):
                parameter.copy_(wanted[name])
    return dense, mixture.eval()


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("scheme", ["W4A4", "W3g16A16"])
def test_a_mixture_with_one_expert_is_calibrated_like_a_dense_mlp(method, sequential, scheme):
    """The same quantized weights and clip ratios."""
    if method == "rtn" and (sequential or scheme == "W3g16A16"):
        pytest.skip("rtn takes no such option, or has no clip ratio to search")
    dense, mixture = dense_and_mixture()
    assert torch.allclose(logits(mixture, tokens()), logits(dense, tokens()), atol=1e-9)
    calibration = Calibration(GPTQOptions(act_order=True), clips=scheme == "W4A4", sequential=sequential)
    if method == "rtn":
        calibration = Calibration(clips=True)
    results = [
        quantize(
            model,
            scheme,
            RotationSpec("R1,R4", seed=2),
            method=method,
            tokens=tokens(6, 20),
            calibration=calibration,
            options=UNPROVED,
        )
        for model in (dense, mixture)
    ]
    assert torch.allclose(logits(mixture, tokens()), logits(dense, tokens()), atol=1e-9)
    first, second = (sorted(result.clips.inputs.items()) for result in results)
    assert [ratio for _, ratio in first] == [ratio for _, ratio in second]
    path = "model.layers.1.mlp"
    found = mixture.get_submodule(f"{path}.experts")
    for part, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        wanted = torch.cat([dense.get_submodule(f"{path}.{name}_proj").weight for name in names])
        torch.testing.assert_close(getattr(found, part)[0], wanted, atol=1e-9, rtol=1e-9)


def block_outputs(model, plan, ids):
    """Output of the last block."""
    with Float64Arithmetic(), captured(model, [plan.blocks[-1]]) as found:
        model(input_ids=ids, use_cache=False)
    return found[plan.blocks[-1]]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "gpt2"])
def test_gptq_preserves_outputs_of_experts_better_than_rtn(name):
    ids = tokens(24, 24)
    exact = tiny(name)
    plan = plan_of(exact)
    wanted = block_outputs(exact, plan, ids)
    errors = {}
    for method in ("rtn", "gptq"):
        model = copy.deepcopy(exact)
        quantize(model, "W3", RotationSpec(()), method=method, tokens=ids, options=UNPROVED)
        errors[method] = float((block_outputs(model, plan, ids) - wanted).square().mean())
    assert errors["gptq"] < 0.9 * errors["rtn"], errors


def test_every_expert_is_calibrated_on_its_own_tokens():
    model, ids = tiny("mixtral"), tokens(5, 16)
    plan, quantizer = plan_of(model), parse_scheme("W3").weights
    name = plan.experts[0].module
    module, seen = model.get_submodule(name), []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    rows, chosen = seen[0]
    first, second = module.gate_up_proj.detach().clone(), module.down_proj.detach().clone()
    quantize(model, "W3", RotationSpec(()), method="gptq", tokens=ids, options=UNPROVED)
    for expert in range(len(first)):
        own = rows[[expert in choice for choice in chosen.tolist()]]
        assert 0 < len(own) < len(rows)
        gate, up = (own @ first[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        for x, weight, found in ((own, first, module.gate_up_proj), (inner, second, module.down_proj)):
            moments = Moments()
            moments.add(x)
            expected = dequantize(gptq(weight[expert], moments, quantizer))
            torch.testing.assert_close(found[expert].detach(), expected, atol=1e-7, rtol=1e-7)


def test_an_expert_without_tokens_is_quantized_by_rtn():
    model = tiny("mixtral")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.zero_()  # the router then takes the first experts of all
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize(model, "W4", RotationSpec(()), method="gptq", tokens=tokens(4, 20), options=UNPROVED)
    quantizer = parse_scheme("W4").weights
    experts = plan_of(model).experts[0]
    nearest = [
        torch.equal(now, dequantize(quantize_weight(was, quantizer)))
        for was, now in zip(before[experts.first[0]], named_tensor(model, experts.first[0]), strict=True)
    ]
    assert sorted(nearest) == [False, False, True, True]


def test_a_static_range_covers_the_inputs_of_experts():
    """The largest magnitudes on the calibration text, of the inputs of both matrix products."""
    model = tiny("mixtral")
    plan, ids = plan_of(model), tokens(3, 12)
    static = Quantizer(4, True, 16, kind="nvfp4", static=True)
    scheme = replace(parse_scheme("W16A16"), activations=static)
    spaces = ["residual", *(space.name for space in plan.spaces_of("R4"))]
    sites = collect(model, plan, spaces, scheme, ids, rows=10**6, generator=torch.Generator().manual_seed(0))
    result = quantize(model, scheme, RotationSpec(()), tokens=ids, options=UNPROVED)
    first = plan.experts[0]  # later experts have inputs from quantized ones
    seen = {site.name: float(site.rows.abs().max()) for site in sites}
    assert result.clips.inputs[first.first[0]] > 0 and first.second[0] in result.clips.inputs
    assert result.clips.inputs.keys() == {group[0] for group in plan.linears} | {
        tensor for experts in plan.experts for tensor in (experts.first[0], experts.second[0])
    }
    assert seen[plan.linears[0][0]] == pytest.approx(result.clips.inputs[plan.linears[0][0]])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_learning_collects_the_inputs_of_experts(name):
    model = tiny(name)
    plan, scheme = plan_of(model), parse_scheme("A4")
    made = make_rotations(plan, RotationSpec("R1,R4"))
    fuse_gains(model, plan, made)
    spaces = ["residual", *(space.name for space in plan.spaces_of("R4"))]
    sites = collect(model, plan, spaces, scheme, tokens(4, 12), rows=16, generator=torch.Generator().manual_seed(0))
    found = {site.name: site for site in sites}
    for experts in plan.experts:
        assert found[experts.first[0]].space == "residual"
        assert found[experts.second[0]].rows.shape[1] == plan.read_by_experts(experts)[1].size
    if name == "gpt2":
        assert found["transformer.h.0.mlp.c_fc"].space == "residual"
        assert found["transformer.h.0.mlp.c_proj"].space == "layers.0.hidden"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "gpt2"])
def test_quantizing_in_rotated_coordinates_equals_the_rotated_model(name):
    """Including weights and activations of experts, so that learning sees the model that will be run."""
    model = tiny(name)
    plan, scheme = plan_of(model), parse_scheme("W4A4", weight_clip=1.0)
    spec = RotationSpec(tuple(r for r in FAMILIES[name].allowed if r != "R3"), seed=3)
    made = make_rotations(plan, spec)
    fuse_gains(model, plan, made)
    with rounding(model, plan, made, scheme):
        found = logits(model, tokens())
    rotated = tiny(name)
    quantize(rotated, scheme, spec, rotations=made, options=UNPROVED)
    torch.testing.assert_close(found, logits(rotated, tokens()), atol=1e-8, rtol=1e-8)


def test_a_rotation_is_learned_for_a_mixture():
    model = tiny("qwen3_moe")
    before = logits(model, tokens())
    options = LearnOptions("local", baselines=1, local=LocalOptions(steps=15, rows=64, batch=32))
    found = learn(model, parse_scheme("A4"), RotationSpec("R1,R2,R4"), tokens(6, 16), tokens(2, 16, seed=9), options)
    assert found.record["errors"]["after"].keys() >= {"model.layers.1.mlp.experts.gate_up_proj"}
    assert sum(found.record["errors"]["after"].values()) < sum(found.record["errors"]["before"].values())
    plan = plan_of(model)
    fuse_module(model, plan, found.rotations)
    with attach(model, plan, found.rotations):
        assert torch.allclose(logits(model, tokens()), before, atol=1e-9)


def test_a_detached_model_is_plain():
    model = tiny("gpt_oss")
    quantize(model, "W4A4", RotationSpec("R1,R4"), options=UNPROVED)
    rounded = model.model.layers[0].mlp.experts.gate_up_proj.clone()
    detach(model)
    module = model.model.layers[0].mlp.experts
    assert "gate_up_proj_scale" not in dict(module.named_buffers()) and "_apply_gate" not in vars(module)
    assert torch.equal(module.gate_up_proj, rounded)
    assert torch.isfinite(logits(model, tokens())).all()


@pytest.mark.parametrize(("name", "word"), [("mixtral", "experts"), ("gpt2", "(in, out)")])
def test_compressed_tensors_refuses_experts_and_conv1d_before_any_work(name, word, tmp_path):
    tiny(name, torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(SchemeError, match=word.replace("(", "[(]").replace(")", "[)]")):
        quantize_folder(
            tmp_path / "model",
            tmp_path / "out",
            parse_scheme("W4A16"),
            RotationSpec("R1,R2"),
            format="compressed-tensors",
            options=Options(progress=lambda *_: pytest.fail("work began")),
        )
    assert not (tmp_path / "out").exists()


def test_a_group_must_divide_the_inputs_of_experts(tmp_path):
    tiny("qwen3_moe", torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(SchemeError, match=r"does not divide the 24 inputs of .*experts"):
        quantize_folder(tmp_path / "model", tmp_path / "out", parse_scheme("W4g16"), RotationSpec("R1"), text=None)


def test_module_and_checkpoint_plans_have_the_same_experts(tmp_path):
    model = tiny("qwen3_moe", torch.float32)
    model.save_pretrained(tmp_path)
    inside = make_plan(model.config, tensor_shapes(model))
    stored = make_plan(model.config, {name: info.shape for name, info in read_headers(tmp_path).items()})
    assert [e.module for e in inside.experts] == [e.module for e in stored.experts]
    one, many = inside.experts[0], stored.experts[0]
    assert (len(one.first), len(one.second)) == (1, 1) and (len(many.first), len(many.second)) == (8, 4)
    (outside, hidden), (also, same) = inside.read_by_experts(one), stored.read_by_experts(many)
    assert [space.name for space in outside] == [space.name for space in also] and hidden is not None
    assert hidden == same


def test_an_interrupted_calibration_resumes_with_the_finished_experts(tmp_path):
    ids, scheme, calibration = tokens(4, 16), parse_scheme("W4A4"), Calibration(GPTQOptions(asymmetry=0.25), clips=True)

    def run(stop_after=None):
        model = tiny("mixtral")
        plan = plan_of(model)
        made = make_rotations(plan, RotationSpec("R4"))
        fuse_module(model, plan, made)

        def progress(done, total):
            if done == stop_after:
                raise KeyboardInterrupt

        store = None if stop_after == 0 else BlockStore(Pieces(tmp_path / "store", ["a"]))
        clips = quantize_blocks(model, plan, made, scheme, ids, calibration, store=store, progress=progress)
        return dict(model.named_parameters()), clips

    expected, clips = run(0)
    with pytest.raises(KeyboardInterrupt):
        run(1)
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    found, again = run()
    assert again.to_dict() == clips.to_dict()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
