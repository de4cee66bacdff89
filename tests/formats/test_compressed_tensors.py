"""compressed-tensors folders: the library reads the very numbers of the model, and so do transformers and spinquant."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.transform import TransformConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import FAMILIES, tiny
from models import CONFIGS, logits, online_transforms, tiny_model, tokens
from spinquant import (
    Calibration,
    CalibrationError,
    CheckpointError,
    Options,
    RotationError,
    RotationSpec,
    SchemeError,
    load,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize,
    save,
)
from spinquant.formats.compressed_config import (
    REFUSAL,
    as_stored,
    compressed_transform_config,
    quantization_config,
    transform_groups,
)
from spinquant.formats.compressed_tensors import compressed_state
from spinquant.formats.native import detach
from spinquant.formats.runtimes import check_runtime, ignored_cache
from spinquant.models.capture import captured
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import linears_of
from spinquant.rotation_names import ONLINE_R1

FAST = Options(prove=False)
FUSED = RotationSpec("R1,R2", seed=1)
ONLINE = RotationSpec("R1,R2,R4", seed=1)
# Groups divide 48 (hidden), 96 (heads) and 80 (intermediate).
SCHEMES = ["W4A16", "W4g16A16", "W3A16", "W5A16", "W8A16", "W8A8", "W4A8", "WFP8A16", "FP8_DYNAMIC", "NVFP4A16"]
ASYMMETRIC = Scheme(weights=Quantizer(4, group_size=16))
ASYMMETRIC_ACTIVATIONS = Scheme(weights=Quantizer(8, symmetric=True), activations=Quantizer(8))
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}  # MXFP4 has groups of 32


def written(tmp_path, name="llama", scheme="W4A16", spec=FUSED, dtype=torch.float32, **options):
    model = tiny_model(name, dtype=dtype) if isinstance(name, str) else name
    scheme = parse_scheme(scheme, activation_symmetric=True, **options)
    result = quantize(model, scheme, spec, options=FAST)
    save(result, tmp_path / "out", format="compressed-tensors")
    return result, tmp_path / "out"


def config_of(out):
    return json.loads((out / "config.json").read_text())["quantization_config"]


def wide_model(dtype=torch.float32):
    """A Llama whose axes are multiples of 32."""
    config = CONFIGS["llama"]()
    config.update(WIDE)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*SCHEMES, ASYMMETRIC], ids=str)
def test_the_library_unpacks_our_weights_to_the_last_bit(scheme, dtype, tmp_path):
    result, out = written(tmp_path, scheme=scheme, spec=ONLINE, dtype=dtype)
    stored, described = load_file(out / "model.safetensors"), config_of(out)
    described.pop("quantization_status")  # see REFUSAL
    config = QuantizationConfig.model_validate(described)
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for name in linears_of(result.plan, result.scheme):
        keys = compressor.compression_param_names(group)
        packed = {key: stored[f"{name}.{key}"] for key in keys if not key.startswith("input_")}
        weight = compressor.decompress(packed, group)["weight"]
        assert torch.equal(weight.to(dtype), result.model.get_submodule(name).weight), name


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_gives_the_same_logits_to_the_last_bit(name, tmp_path):
    result, out = written(tmp_path, name, "W4A8", RotationSpec("R1,R2,R4", "random-hadamard", {"R4": 16}))
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("scheme", [*SCHEMES, ASYMMETRIC, ASYMMETRIC_ACTIVATIONS, "none"], ids=str)
def test_schemes_load_to_the_last_bit(scheme, tmp_path):
    result, out = written(tmp_path, scheme=scheme, spec=ONLINE, dtype=torch.bfloat16)
    again = load(out)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize("scheme", ["W4g16A16", "W4A8", "NVFP4A16"])
def test_calibrated_weights_load_to_the_last_bit(scheme, method, tmp_path):
    model, ids = tiny_model("llama", dtype=torch.float32), tokens(6, 20)
    parsed = parse_scheme(scheme, activation_symmetric=True)
    result = quantize(model, parsed, ONLINE, method=method, tokens=ids, options=FAST)
    save(result, tmp_path / "out", format="compressed-tensors")
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


STATIC = ["NVFP4", "WFP8AFP8KVFP8", "W4A16KVFP8", "NVFP4KVFP8", "KVFP8"]


def calibrated(tmp_path, scheme, spec=FUSED, dtype=torch.float32, **options):
    model, ids = tiny_model("llama", dtype=dtype), tokens(6, 20)
    parsed = as_stored(parse_scheme(scheme, activation_symmetric=True, **options))
    result = quantize(model, parsed, spec, tokens=ids, options=FAST)
    save(result, tmp_path / "out", format="compressed-tensors")
    return result, tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", STATIC)
def test_static_ranges_load_to_the_last_bit(scheme, dtype, tmp_path):
    result, out = calibrated(tmp_path, scheme, ONLINE, dtype)
    ids = tokens(3, 30, seed=8)
    assert torch.equal(logits(load(out), ids), logits(result.model, ids))
    save(result, tmp_path / "native")
    assert torch.equal(logits(load(tmp_path / "native"), ids), logits(result.model, ids))


@pytest.mark.parametrize("scheme", STATIC)
def test_transformers_computes_the_same_with_static_ranges(scheme, tmp_path):
    """With compressed-tensors alone; tokens whose activations leave the calibrated range are among them."""
    dtype = torch.bfloat16 if "NVFP4" in scheme else torch.float32
    result, out = calibrated(tmp_path, scheme, dtype=dtype)
    ids = tokens(3, 30, seed=8)
    theirs, ours = logits(AutoModelForCausalLM.from_pretrained(out), ids), logits(result.model, ids)
    rounding = (ours - logits(detached_activations(result), ids)).norm()
    assert rounding > 0
    if "KV" in scheme and ignored_cache():
        with pytest.raises(SchemeError, match=r"does not find the KV cache of transformers \d"):
            check_runtime("transformers-ct", parse_scheme(scheme), RotationSpec(()))
        return
    # A number that lies between two codes may fall to the other one, and every later layer makes more of it.
    assert (theirs - ours).norm() < (1.5 if "NVFP4" in scheme else 0.3) * rounding
    if scheme in ("W4A16KVFP8", "KVFP8"):
        torch.testing.assert_close(theirs, ours)


def test_the_library_rounds_activations_as_we_do(tmp_path):
    """Numbers in and out of the calibrated range, and groups down to where scales run out of exponent."""
    result, out = calibrated(tmp_path, "NVFP4", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    name = "model.layers.1.mlp.down_proj"
    linear, quantizer = theirs.get_submodule(name), result.scheme.activations
    quantizer = replace(quantizer, peak=result.clips.inputs[name])
    x = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 64)[:, None]
    found = forward_quantize(linear, x, "input", linear.quantization_scheme.input_activations)
    torch.testing.assert_close(found, fake_quantize(x, quantizer), rtol=1e-6, atol=0)


def test_static_ranges_are_the_largest_magnitudes_of_the_calibration_text(tmp_path):
    result, out = calibrated(tmp_path, "W4A16KVFP8", ONLINE)
    stored = load_file(out / "model.safetensors")
    model = detached_activations(result)
    values = "model.layers.0.self_attn.v_proj"
    with captured(model, [values]) as seen:
        logits(model, tokens(6, 20))
    found = stored["model.layers.0.self_attn.v_scale"]
    torch.testing.assert_close(found, seen[values].abs().amax().reshape(1) / 448)
    assert result.clips.values["model.layers.0.self_attn"] != result.clips.keys["model.layers.0.self_attn"]
    spoil(out, lambda tensors: tensors.update({"model.layers.0.self_attn.v_scale": found * 2}))
    with pytest.raises(CheckpointError, match="v_scale"):
        load(out)


def test_static_ranges_need_tokens():
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(CalibrationError, match="tokens"):
        quantize(model, as_stored(parse_scheme("NVFP4")), FUSED, options=FAST)
    with pytest.raises(SchemeError, match="calibration"):
        fake_quantize(torch.ones(2, 16), Quantizer(4, True, 16, kind="nvfp4", static=True))
    for wrong in ({"bits": 4}, {"bits": 8, "symmetric": True, "kind": "fp8", "group_size": 16}):
        with pytest.raises(SchemeError, match="static"):
            Quantizer(**wrong, static=True)
    with pytest.raises(SchemeError, match="peak"):
        Quantizer(8, True, kind="fp8", peak=3.0)


def test_clip_ratios_that_the_format_cannot_hold_are_refused(tmp_path):
    model, ids = tiny_model("llama", dtype=torch.float32), tokens(6, 20)
    scheme = parse_scheme("W4A4", activation_symmetric=True)
    result = quantize(model, scheme, FUSED, tokens=ids, calibration=Calibration(clips=True), options=FAST)
    with pytest.raises(SchemeError, match="clip ratios"):
        save(result, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16"])
def test_groups_of_thirty_two(scheme, tmp_path):
    result, out = written(tmp_path, wide_model(), scheme, ONLINE)
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


ALONE = [*(f"W{bits}A16" for bits in range(2, 9)), *SCHEMES[1:], "MXFP4", "MXFP4A16", ASYMMETRIC_ACTIVATIONS]


@pytest.mark.parametrize("scheme", ALONE, ids=str)
def test_transformers_computes_the_same_with_compressed_tensors_alone(scheme, tmp_path):
    # The library unpacks four-bit floats to bfloat16, whatever the model.
    dtype = torch.bfloat16 if "FP4" in str(scheme) else torch.float32
    result, out = written(tmp_path, wide_model(dtype) if "MX" in str(scheme) else "llama", scheme, dtype=dtype)
    theirs = logits(AutoModelForCausalLM.from_pretrained(out), tokens())
    ours = logits(result.model, tokens())
    if result.scheme.activations is None:
        assert torch.equal(theirs, ours)
    else:  # they divide the range by 127.5, we by 127, so activations are rounded as much, but not alike
        difference = (theirs - ours).norm() / ours.norm()
        rounding = (ours - logits(detached_activations(result), tokens())).norm() / ours.norm()
        assert difference < 1.5 * rounding


def detached_activations(result):
    """The same weights without rounding of activations."""
    detach(result.model)
    return result.model


@pytest.mark.parametrize("scheme", ["W4A16", "none"])
def test_transformers_refuses_online_rotations(scheme, tmp_path):
    """A warning would not do: the model would load and talk nonsense."""
    _, out = written(tmp_path, scheme=scheme, spec=ONLINE)
    with pytest.raises(ValueError, match=REFUSAL):
        AutoModelForCausalLM.from_pretrained(out)


def test_the_config_says_what_vllm_reads(tmp_path):
    spec = RotationSpec("R1,R2,R3,R4", {"R3": "hadamard"}, {"R4": 16})
    _, out = written(tmp_path, scheme="W4g16A16", spec=spec)
    found = config_of(out)
    assert found["quant_method"] == "compressed-tensors" and found["format"] == "pack-quantized"
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and found["ignore"] == ["lm_head"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"], group["weights"]["strategy"]) == (
        4,
        16,
        "group",
    )
    transforms = TransformConfig.model_validate(found["transform_config"]).config_groups
    assert [a.location for a in transforms["R4"].apply] == ["input", "weight_input"]
    assert [a.inverse for a in transforms["R4"].apply] == [False, True]
    assert transforms["R4"].apply[0].targets == ["re:.*mlp[.]down_proj$"]
    assert (transforms["R4"].type, transforms["R4"].head_dim) == ("random-hadamard", 16)
    assert (transforms["R3"].type, transforms["R3"].head_dim) == ("hadamard", 16)
    assert transforms["R3"].apply[0].targets == ["re:.*self_attn$"]
    stored = [name for name in load_file(out / "model.safetensors") if ".R" in name]
    assert stored == ["model.layers.0.mlp.down_proj.R4_input.weight"]


def test_linears_that_share_a_transformed_input_are_in_one_group(tmp_path):
    """Online R1: q, k, v and gate, up of every layer have one transform, with its matrix stored once."""
    spec = RotationSpec("online-R1,R2,R4", {ONLINE_R1: "hadamard"}, {ONLINE_R1: 16}, seed=1)
    result, out = written(tmp_path, scheme="W4A8", spec=spec)
    found = TransformConfig.model_validate(config_of(out)["transform_config"]).config_groups[ONLINE_R1]
    linears = ("self_attn[.]q_proj", "self_attn[.]k_proj", "self_attn[.]v_proj", "mlp[.]gate_proj", "mlp[.]up_proj")
    assert found.apply[0].targets == [f"re:.*{name}$" for name in linears]
    assert (found.type, found.head_dim, found.apply[0].location) == ("hadamard", 16, "input")
    stored = [name for name in load_file(out / "model.safetensors") if ONLINE_R1 in name]
    assert stored == [f"model.layers.0.self_attn.q_proj.{ONLINE_R1}_input.weight"]
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("name", ["llava", "gemma3-vision", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_transforms_of_a_decoder_do_not_match_its_vision_tower(name):
    """Its linears may have the same names."""
    model = tiny(name)
    plan = plan_of(model)
    allowed = {rotation for rotation in FAMILIES[name].allowed if rotation != "R1"} | {ONLINE_R1}
    rotations = make_rotations(plan, RotationSpec(tuple(allowed), {"R3": "hadamard"} if "R3" in allowed else "auto"))
    groups = transform_groups(plan, rotations)
    assert {ONLINE_R1, "R4"} <= set(groups)
    for group, described in compressed_transform_config(plan, rotations)["config_groups"].items():
        for apply in described["apply"]:
            found = match_named_modules(model, apply["targets"], apply["ignore"])
            assert {name for name, _ in found} == set(groups[group]), group


@pytest.mark.parametrize(("space", "kind"), [("R3", "matrix"), ("R4", "kronecker-matrix")])
def test_online_transforms_that_are_no_rotations_are_refused(space, kind):
    """Runtimes would use the transpose as the inverse, and rotate queries as keys."""
    model = tiny_model("llama", dtype=torch.float32)
    plan = plan_of(model)
    made = {name: made for name, made in online_transforms(plan).items() if plan.space[name].rotation == space}
    with pytest.raises(RotationError, match=rf"transform of layers\.0\.\w+ \({kind}, .*use rotations for {space}"):
        compressed_state(model, plan, made, parse_scheme("none"))
    with pytest.raises(RotationError, match="is no rotation"):
        quantization_config(plan, made, parse_scheme("none"), ignore=())


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_the_stored_matrix_is_the_rotation(kind, tmp_path):
    """x W / sqrt(n), block by block, is what the linear's weight expects: the law that runtimes rely on."""
    block = 16 if kind == "hadamard" else None
    result, out = written(tmp_path, scheme="none", spec=RotationSpec("R4", kind, block, randomize=kind != "hadamard"))
    stored = load_file(out / "model.safetensors")
    for i in range(3):
        group = "R4" if kind == "hadamard" else f"R4_{i}"
        scheme = config_of(out)["transform_config"]["config_groups"][group]
        assert scheme["type"] == ("hadamard" if kind == "hadamard" else "random-hadamard")
        w = stored[f"model.layers.{0 if kind == 'hadamard' else i}.mlp.down_proj.{group}_input.weight"].double()
        n = w.shape[0]
        assert torch.allclose(w @ w.T, n * torch.eye(n, dtype=torch.float64), atol=1e-3)
        x = torch.randn(5, 80, dtype=torch.float64)
        ours = result.rotations[f"layers.{i}.hidden"].apply(x)
        assert torch.allclose((x.unflatten(-1, (-1, n)) @ w / n**0.5).flatten(-2), ours, atol=1e-5)


def test_the_head_can_be_quantized_too(tmp_path):
    result, out = written(tmp_path, "llama-tied", "W4A16", RotationSpec("R2"), lm_head=True)
    assert config_of(out)["ignore"] == []
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


def test_the_model_in_memory_stays_as_it_is(tmp_path):
    result, out = written(tmp_path, scheme="W4A8", spec=ONLINE)
    before = logits(result.model, tokens())
    save(result, tmp_path / "native")
    assert torch.equal(logits(load(tmp_path / "native"), tokens()), before)
    again = load(out)
    again.save_pretrained(tmp_path / "from-compressed")  # what was loaded saves in our own format
    assert torch.equal(logits(load(tmp_path / "from-compressed"), tokens()), before)


REFUSED = {
    "W4A4KV4": (FUSED, SchemeError, "KV"),
    "A8": (FUSED, SchemeError, "W8"),
    "W4A8g16": (FUSED, SchemeError, "per token"),
    "NVFP4": (FUSED, SchemeError, "static"),
    "W8A8KVFP8": (FUSED, SchemeError, "static"),
    "W4AFP8": (FUSED, SchemeError, "one number format"),
    "WFP8g16A16": (FUSED, SchemeError, "leave out the group"),
    "none": (FUSED, SchemeError, "hf"),
    "W4A16": (RotationSpec("R3"), RotationError, "R3=hadamard"),
}


@pytest.mark.parametrize("scheme", REFUSED)
def test_what_the_format_cannot_hold_is_refused(scheme, tmp_path):
    spec, error, word = REFUSED[scheme]
    with pytest.raises(error, match=word):
        written(tmp_path, scheme=scheme, spec=spec)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_left_its_grid_is_refused(tmp_path):
    result = quantize(tiny_model("llama", dtype=torch.float32), "W4A16", FUSED, options=FAST)
    result.model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight would change"):
        save(result, tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


def spoil(out, change):
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


R4 = "model.layers.0.mlp.down_proj.R4_input.weight"
PACKED = "model.layers.2.self_attn.o_proj.weight_packed"
SPOILT = {
    "another rotation": (lambda t: t.update({R4: -t[R4]}), "not the rotation"),
    "no rotation": (lambda t: t.pop(R4), "lacks the online rotation"),
    "no weight": (lambda t: t.pop(PACKED), "o_proj.weight_packed"),
    "one too many": (lambda t: t.update({"model.extra": torch.zeros(1)}), "model.extra"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_folders_are_refused(how, tmp_path):
    _, out = written(tmp_path, spec=ONLINE)
    spoil(out, SPOILT[how][0])
    with pytest.raises(CheckpointError, match=SPOILT[how][1]):
        load(out)


def test_folders_of_others_are_refused(tmp_path):
    _, out = written(tmp_path, spec=ONLINE)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config_groups"):
        load(out)
    (out / "spinquant" / "record.json").unlink()
    with pytest.raises(CheckpointError, match="without spinquant's record"):
        load(out)


def test_another_dtype_is_refused(tmp_path):
    _, out = written(tmp_path)
    with pytest.raises(CheckpointError, match=r"torch\.float32"):
        load(out, dtype=torch.bfloat16)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    result = quantize(tiny_model("llama", dtype=torch.float32), "W4A16", FUSED, options=FAST)
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(SchemeError, match=r"spinquant\[compressed-tensors\]"):
        save(result, tmp_path / "out", format="compressed-tensors")
