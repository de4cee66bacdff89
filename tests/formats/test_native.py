import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spinquant
from families import tiny
from models import CONFIGS, byte_tokenizer, fuse_duals, logits, online_transforms, tiny_model, tokens
from spinquant import (
    CheckpointError,
    Composed,
    Diagonal,
    Hadamard,
    RotationSpec,
    attach,
    detach,
    load,
    parse_scheme,
    plan_of,
    quantize,
    rotate,
    save,
)
from spinquant.calibration.blockwise import quantize_blocks
from spinquant.formats.native import SpinQuantConfig, is_marked, mark, unmark
from spinquant.rotations.rotation import matrix
from spinquant.rotations.serialization import restore
from spinquant.rotations.wrappers import online_part

ALL = RotationSpec("R1,R2,R3,R4", seed=1)


def saved(tmp_path, name="llama", scheme="W4A4KV4", spec=ALL, dtype=torch.float32):
    model = tiny_model(name, dtype=dtype)
    result = quantize(model, scheme, spec)
    out = tmp_path / "out"
    save(result, out, byte_tokenizer())
    return result, out


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_gives_the_same_logits_to_the_last_bit(name, tmp_path):
    result, out = saved(tmp_path, name)
    ids = tokens()
    assert torch.equal(logits(load(out), ids), logits(result.model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W8A8KV8", "W2A16", "W3g8A6KV3", "W4g16A16"])
def test_schemes_and_dtypes(scheme, dtype, tmp_path):
    result, out = saved(tmp_path, scheme=scheme, dtype=dtype)
    again = load(out)
    assert again.dtype == dtype
    assert torch.equal(logits(again, tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("scheme", ["none", "A4", "KV4", "A8KV8"])
@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix", "auto"])
def test_without_weight_quantization(scheme, kind, tmp_path):
    result, out = saved(tmp_path, scheme=scheme, spec=RotationSpec("R1,R3,R4", kind, randomize=True))
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_online_r1_is_loaded_as_it_was_made(name, tmp_path):
    """The inputs of linears and of experts; Gemma 3 allows no R1 in the residual stream."""
    tiny(name).float().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    result = quantize(model, "W4A4KV4", RotationSpec("online-R1,R2,R3,R4", randomize=True))
    save(result, tmp_path / "out", byte_tokenizer())
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(result.model, tokens()))


def test_lm_head_symmetric_activations_and_clips(tmp_path):
    options = {"activation_symmetric": True, "activation_clip": 0.9, "kv_clip": 0.95, "lm_head": True}
    scheme = parse_scheme("W4A4KV4", **options)
    result, out = saved(tmp_path, "llama-tied", scheme, RotationSpec("R2,R4"))
    assert torch.equal(logits(load(out), tokens()), logits(result.model, tokens()))


def test_saving_what_was_loaded_is_the_identity(tmp_path):
    _, out = saved(tmp_path, spec=RotationSpec("R1,R2,R3,R4", randomize=True))
    load(out).save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "again"), tokens()), logits(load(out), tokens()))


def test_transformers_itself_loads_it_once_spinquant_is_imported(tmp_path):
    result, out = saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model, tokens()), logits(result.model, tokens()))
    eager = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert torch.allclose(logits(eager, tokens()), logits(result.model, tokens()), atol=2e-2)


WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
for scheme in ("W4A4KV4", "none"):
    print(scheme, file=sys.stderr)
    try:
        AutoModelForCausalLM.from_pretrained(f"{folder}/{scheme}/out")
        print("loaded")
    except Exception as error:
        print(error, file=sys.stderr)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/plain")
torch.save(model(input_ids=torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
assert "spinquant" not in sys.modules
"""


def test_without_spinquant_only_plain_folders_load(tmp_path):
    """A warning would not do: the model would load and talk nonsense."""
    for scheme in ("W4A4KV4", "none"):
        (tmp_path / scheme).mkdir()
        saved(tmp_path / scheme, scheme=scheme)
    model, ids = tiny_model("qwen3", dtype=torch.float32), tokens()
    before = logits(model, ids)
    save(rotate(model, RotationSpec("R1,R2")), tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.save(ids, tmp_path / "ids.pt")
    run = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "loaded" not in run.stdout
    for errors in run.stderr.split("W4A4KV4\n", 1)[1].split("none\n", 1):
        assert "MISMATCH" in errors and "down_proj.weight" in errors
        assert "Unknown quantization type, got spinquant" in errors
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), before, atol=1e-4)


def test_packed_weights_take_the_bits_they_should(tmp_path):
    _, out = saved(tmp_path, scheme="W4A16", spec=RotationSpec(()))
    stored = load_file(out / "model.safetensors")
    linears = [name for name in stored if name.endswith("proj.weight")]
    assert len(linears) == 21
    for name in linears:
        assert stored[name].dtype == torch.int32
    words = stored["model.layers.0.mlp.down_proj.weight"]
    assert words.nbytes * 8 == 48 * 80 * 4


def test_the_record_and_rotations_repeat_the_run(tmp_path):
    result, out = saved(tmp_path, spec=RotationSpec("R1,R2,R3,R4", randomize=True, seed=5))
    record = json.loads((out / "spinquant" / "record.json").read_text())
    assert record["spec"]["seed"] == 5
    assert record["scheme"]["weights"]["bits"] == 4
    assert record["proof"]["twin"]["relative"] < 1e-9
    tensors = load_file(out / "spinquant" / "rotations.safetensors")
    for space, index in record["spaces"].items():
        parts = {k.removeprefix(f"{index}."): v for k, v in tensors.items() if k.startswith(f"{index}.")}
        again = restore(record["rotations"][index], parts)
        assert torch.equal(matrix(again), matrix(result.rotations[space]))


@pytest.mark.parametrize("loaded", [False, True])
def test_detach_leaves_a_plain_model_that_computes_the_same(loaded, tmp_path):
    """R4 is fused into down_proj: taking its hook off alone would leave nonsense."""
    before = logits(tiny_model("llama", dtype=torch.float32), tokens())
    result, out = saved(tmp_path, scheme="none")
    model = load(out) if loaded else result.model
    detach(model)
    assert torch.allclose(logits(model, tokens()), before, atol=1e-3)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain"), tokens()), logits(model, tokens()))
    if not loaded:
        with pytest.raises(CheckpointError, match="removed"):
            save(result, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["matrix", "per head", "composed"])
def test_online_transforms_that_are_no_rotations_are_saved_loaded_and_detached(kind, dtype, tmp_path):
    before, ids = logits(tiny_model("llama", dtype=dtype), tokens()), tokens()
    model = tiny_model("llama", dtype=dtype)
    plan = plan_of(model)
    made = online_transforms(plan, heads=2 if kind == "per head" else 0)
    if kind == "composed":
        scale = torch.rand(80, dtype=torch.float64) + 0.5
        made |= {f"layers.{i}.hidden": Composed(Diagonal(scale), Hadamard(80)) for i in range(3)}
    fuse_duals(model, plan, made)
    attach(model, plan, made)
    mark(model, plan, made, RotationSpec("R3,R4"), parse_scheme("none"))
    expected, close = logits(model, ids), 1e-9 if dtype == torch.float64 else 1e-3
    assert torch.allclose(expected, before, rtol=0, atol=close)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again, ids), expected)
    for space, transform in again.hf_quantizer.rotations.items():
        assert torch.equal(matrix(transform), matrix(made[space]))
    detach(again)
    assert not is_marked(again) and torch.allclose(logits(again, ids), before, rtol=0, atol=close)


def test_detach_forgets_the_grids(tmp_path):
    result, _ = saved(tmp_path)
    detach(result.model)
    assert not [name for name, _ in result.model.named_buffers() if "weight_" in name]


def test_a_scheme_of_nothing_without_online_rotations_is_a_plain_folder(tmp_path):
    _, out = saved(tmp_path, scheme="none", spec=RotationSpec("R1,R2"))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pickled", [False, True])
def test_narrowing_the_dtype_keeps_the_last_bit(dtype, pickled, folder, tmp_path):
    """The rotary frequencies must stay wide, as they are after loading."""
    spec = RotationSpec("R1,R2,R3,R4")
    given: dict = {
        "calibration": spinquant.Calibration(clips=True),
        "calibration_text": spinquant.CalibrationText("manual", samples=2, length=32),
    }
    wide, ids = load(folder), tokens(1, 200)
    if pickled:  # which are loaded as a whole
        torch.save(wide.state_dict(), folder / "pytorch_model.bin")
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        given["allow_pickle"] = True
    scheme, out = parse_scheme("W8A8"), tmp_path / "out"
    result = spinquant.quantize_folder(folder, out, scheme, spec, dtype=dtype, text="manual", **given)
    found = load(out)
    assert found.dtype == dtype
    assert torch.equal(found.model.rotary_emb.inv_freq, wide.model.rotary_emb.inv_freq)
    assert (result.model is None) != pickled
    if pickled:
        expected = result.model
    else:  # rotated in the dtype of the source, then narrowed, then calibrated
        rotated = spinquant.rotate(wide, spec, options=spinquant.Options(prove=False))
        unmark(wide)
        for parameter in wide.parameters():
            parameter.data = parameter.data.to(dtype)
        _, text = spinquant.calibration_tokens(wide, spinquant.load_tokenizer(folder), given["calibration_text"])
        online = online_part(rotated.plan, rotated.rotations)
        clips = quantize_blocks(wide, rotated.plan, online, scheme, text, given["calibration"], error_feedback=False)
        spinquant.attach(wide, rotated.plan, online, scheme, clips)
        expected = wide
    assert torch.equal(logits(found, ids), logits(expected, ids))


def test_nothing_but_weights_lies_beside_the_weights(tmp_path):
    """Runtimes load every safetensors file of a folder as weights."""
    _, out = saved(tmp_path)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_weights_changed_after_quantizing_are_not_saved(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    result = quantize(model, "W4A16", RotationSpec(()))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        save(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_to_our_own_folders_is_named(tmp_path):
    _, out = saved(tmp_path)
    tensors = load_file(out / "model.safetensors")
    del tensors["spinquant_rotations.1.signs"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"spinquant_rotations\.1\.signs"):
        load(out)


def test_folders_of_a_newer_version_are_refused():
    with pytest.raises(CheckpointError, match="upgrade"):
        SpinQuantConfig({}, {}, [], {}, format_version=99)


def test_quantizing_twice_is_refused(tmp_path):
    _, out = saved(tmp_path)
    with pytest.raises(CheckpointError, match="quantized already"):
        spinquant.quantize_folder(out, tmp_path / "twice", parse_scheme("W4A16"), RotationSpec(()), text="manual")


PARTS = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("scheme", ["W4A4KV4", "none"])
def test_offloading_is_refused(scheme, tmp_path):
    """Packed weights cannot be read from disk module by module, as transformers would."""
    pytest.importorskip("accelerate")
    result, out = saved(tmp_path, scheme=scheme)
    folder = {"offload_folder": str(tmp_path / "offloaded")}
    mapped = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1' on 'disk'.*one device"):
        AutoModelForCausalLM.from_pretrained(out, device_map=mapped, **folder)
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens' on 'cpu'.*one device"):
        AutoModelForCausalLM.from_pretrained(out, device_map={**mapped, "model.layers.1": "meta"})
    with pytest.raises(CheckpointError, match=r"on 'disk'.*one device"):
        AutoModelForCausalLM.from_pretrained(out, device_map="auto", max_memory={"cpu": 120_000}, **folder)
    for allowed in ("cpu", "auto", dict.fromkeys(PARTS, "cpu")):
        again = AutoModelForCausalLM.from_pretrained(out, device_map=allowed, dtype="auto")
        assert torch.equal(logits(again, tokens()), logits(result.model, tokens()))
