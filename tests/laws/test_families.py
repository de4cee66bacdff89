"""Every family table: rotating leaves the logits unchanged, and a refused rotation would change them."""

import copy
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import FAMILIES, IMAGE, prepared, tiny
from models import CACHE, close, logits, tokens
from spinquant import (
    RotationSpec,
    attach,
    fuse_module,
    load,
    make_plan,
    make_rotations,
    plan_of,
    prove,
    quantize,
    read_headers,
    rotate,
    save,
)
from spinquant.architectures import FAMILIES as TABLES
from spinquant.architectures import known_model_types
from spinquant.architectures.unsupported import UNSUPPORTED
from spinquant.compute.releases import release_of
from spinquant.entrypoints.result import Options
from spinquant.errors import ArchitectureError, RotationError, SchemeError
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits, output_axes
from spinquant.learning.parametrization import begin_training, end_training
from spinquant.models.capture import captured
from spinquant.models.modules import model_class, tensor_shapes
from spinquant.rotation_names import ROTATION_NAMES
from spinquant.rotations.fuse import rotate_axis, transform
from spinquant.rotations.rotation import matrix

CASES = [(name, rotation) for name, instance in FAMILIES.items() for rotation in (*instance.allowed, "all")]
REFUSED = [(name, rotation) for name, instance in FAMILIES.items() for rotation in instance.refused]


def rotations_of(name, rotation):
    return FAMILIES[name].allowed if rotation == "all" else (rotation,)


def test_every_supported_model_type_has_a_tiny_config():
    from models import CONFIGS

    tried = {instance.config().model_type for instance in FAMILIES.values()}
    tried |= {config().model_type for config in CONFIGS.values()}
    lacked = {name for name in known_model_types() if name not in CONFIG_MAPPING}
    assert set(known_model_types()) - lacked == tried
    assert not lacked or release_of("transformers") < (5, 23)


@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_rotating_leaves_the_logits_unchanged(name, rotation):
    """Of whole sequences, and token by token through the KV cache."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    before = logits(model, ids)
    assert before.isfinite().all()
    with Float64Arithmetic():
        generated = greedy_logits(model, ids)
    rotations = make_rotations(plan, RotationSpec(rotations_of(name, rotation), randomize=True, transform_type="auto"))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations), Float64Arithmetic():
        assert close(logits(model, ids), before)
        assert close(greedy_logits(model, ids), generated)
    # Without the online rotations, if there are any, the logits change.
    online = {o.space for o in plan.onlines if o.site != "query_key"} & set(rotations)
    assert close(logits(model, ids), before) != bool(online)
    with pytest.raises(RotationError, match="no space") if FAMILIES[name].lacks else nullcontext():
        make_rotations(plan, RotationSpec(FAMILIES[name].lacks))
    changed = {n for n, p in model.named_parameters() if n in weights and not torch.equal(p, weights[n])}
    assert changed or rotation == "R3"


@pytest.mark.parametrize("name", FAMILIES)
def test_other_rotation_types_blocks_and_eager_attention_leave_the_logits_unchanged(name):
    instance = FAMILIES[name]
    model, ids = tiny(name, attention="eager"), tokens()
    before = logits(model, ids)
    plan = plan_of(model)
    rotated = [r for r in ("R1", "R2", "R3", "R4") if r in instance.allowed]
    kinds = {"R1": "random-matrix", "R2": "hadamard", "R3": "random-hadamard", "R4": "hadamard"}
    kinds = {r: kind for r, kind in kinds.items() if r in rotated}
    rotations = make_rotations(plan, RotationSpec(rotated, kinds, 8, seed=2))
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations):
        assert close(logits(model, ids), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_rotated(name):
    """Otherwise a plan that does nothing would pass the tests of unchanged logits."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    axes = ((m, axis) for m, _ in model.named_modules() for axis in output_axes(model, plan, m))
    places = {m: axis for m, axis in axes if plan.space[axis.space].rotation}
    allowed = [r for r in ("R1", "R2") if r in FAMILIES[name].allowed]
    spaces = {plan.space[axis.space].rotation for axis in places.values()}
    assert set(allowed) <= spaces
    with captured(model, places) as before:
        logits(model, ids)
    rotations = make_rotations(plan, RotationSpec(allowed, "auto"))
    fuse_module(model, plan, rotations)
    with captured(model, places) as after:
        logits(model, ids)
    for module, axis in places.items():
        if axis.space not in rotations or module not in before:
            continue
        expected = rotate_axis(before[module], -1, rotations[axis.space], axis.span)
        assert close(after[module], expected), module
        assert not torch.allclose(after[module], before[module], atol=1e-2), module


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_is_called_or_listed_as_uncalled(name):
    """The hooks of a linear that is not called would have no effect, without an error."""
    model = tiny(name)
    plan = plan_of(model)
    linears = [linear for group in plan.linears for linear in group]
    with captured(model, linears, inputs=True) as inputs, Float64Arithmetic():
        logits(model, tokens())
    assert set(linears) - set(inputs) == set(plan.uncalled)
    if plan.uncalled:
        with pytest.raises(SchemeError, match=re.escape(plan.uncalled[0])):
            quantize(model, "W4A4")


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_of_r4_and_cached_keys_and_values_are_rotated(name):
    """The inputs of output projections of MLPs (R4), and the keys (R3) and values (R2) in the KV cache."""
    model, ids = tiny(name), tokens(1, 8)
    plan = plan_of(model)
    spaces = {o.module: o.space for o in plan.onlines if o.site == "input"}
    allowed = [r for r in ("R2", "R3", "R4") if r in FAMILIES[name].allowed]
    rotations = make_rotations(plan, RotationSpec(allowed, "auto", randomize=True))
    states = {}
    for when in ("before", "after"):
        with captured(model, spaces, inputs=True) as inputs, Float64Arithmetic(), torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, **({CACHE: cache, "use_cache": True} if plan.attentions else {}))
            states[when] = dict(inputs), cached(cache)
        if when == "before":
            fuse_module(model, plan, rotations)
            attach(model, plan, rotations)
    before, after = states["before"], states["after"]
    for module, space in spaces.items():
        if space in rotations and module in before[0]:
            assert close(after[0][module], rotations[space].apply(before[0][module])), module
            assert not torch.allclose(after[0][module], before[0][module], atol=1e-2), module
    for part, rotation in (("value", "R2"), ("query_key", "R3")):
        if rotation not in allowed:
            continue
        layers = [o.space.rpartition(".")[0] for o in plan.onlines if o.site == "query_key"]
        found = [(old[part], new[part]) for old, new in zip(before[1], after[1], strict=True)]
        assert len(found) == len(layers) > 0
        for layer, (old, new) in zip(layers, found, strict=True):
            turn = rotations.get(f"{layer}.{part}") or rotations.get(f"{layer}.key_value_latent")
            if turn is None:  # R2 rotates only the queries' latent
                assert close(new, old)
            elif old.shape[-1] % turn.order == 0:  # else the cached tensors are not those of heads
                assert close(new, turn.apply(old)), (layer, part)
                assert not torch.allclose(new, old, atol=1e-2), (layer, part)


def cached(cache):
    """Keys and values of the layers of a cache that have them, (batch, heads, tokens, size)."""
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    return [{"query_key": layer.keys.clone(), "value": layer.values.clone()} for layer in layers]


def test_tiny_configs_cover_every_layer_type_of_their_class():
    """Such as sliding-window and full attention."""
    from models import CONFIGS

    tried = {}
    for make in (*(instance.config for instance in FAMILIES.values()), *CONFIGS.values()):
        text = make().get_text_config()
        tried.setdefault(text.model_type, set()).update(getattr(text, "layer_types", None) or ())
    for model_type, kinds in tried.items():
        usual = getattr(AutoConfig.for_model(model_type).get_text_config(), "layer_types", None) or ()
        assert set(usual) <= kinds, model_type


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rotated_model_is_the_same_after_save_and_load(name, tmp_path):
    """Checkpoint and module names give the same plan, and a rotated model loads as its original class."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    model.save_pretrained(tmp_path / "original")
    shapes = {n: info.shape for n, info in read_headers(tmp_path / "original").items()}
    found = make_plan(AutoConfig.from_pretrained(tmp_path / "original"), shapes)
    for part in ("family", "spaces", "onlines", "linears", "attentions", "blocks", "head", "refused"):
        assert getattr(found, part) == getattr(plan, part)
    if set(shapes) <= {n for n, _ in model.named_parameters(remove_duplicate=False)}:
        assert found == plan
    if found.spaces_of("R1") and "R1" not in dict(found.refused):
        assert {gain.norm for gain in found.gains} <= {*shapes, *found.tied}
    # Loaded too, because buffers of a loaded model are computed in another precision.
    original = model_class(model.config).from_pretrained(tmp_path / "original", dtype=torch.float64)
    before = logits(prepared(original), ids)
    allowed = [r for r in ("R1", "R2") if r in FAMILIES[name].allowed]
    spec = RotationSpec(allowed, "auto")
    fuse_module(model, plan, make_rotations(plan, spec))
    model.save_pretrained(tmp_path / "rotated")
    loaded = model_class(model.config).from_pretrained(tmp_path / "rotated", dtype=torch.float64)
    assert type(loaded) is type(model)
    # Some classes keep their routers in float32, for any dtype.
    tolerance = 1e-9 if all(p.dtype == torch.float64 for p in loaded.parameters()) else 1e-4
    assert torch.allclose(logits(prepared(loaded), ids), before, atol=tolerance)
    rotate_checkpoint(tmp_path / "original", tmp_path / "tensors", found, make_rotations(found, spec))
    again = model_class(model.config).from_pretrained(tmp_path / "tensors", dtype=torch.float64)
    for (n, fused), tensor in zip(loaded.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(fused, tensor.double(), atol=tolerance), n


def rotate_checkpoint(source, out, plan, rotations):
    """Rotate a folder tensor by tensor, under the names that it has there."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for tie in plan.ties if "residual" in rotations else ():
        tensors[tie.tensor] = tensors[tie.source]
    gains = {gain.norm: tensors[gain.norm] for gain in plan.gains if gain.space in rotations}
    fused = {n: transform(n, t, plan, gains, rotations).clone() for n, t in tensors.items()}
    save_file(fused, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    if "residual" in rotations:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))


def test_checkpoints_without_the_prefix_of_the_model():
    """As the first GPT-2 checkpoints, of the model without its head."""
    model = tiny("gpt2")
    shapes = tensor_shapes(model)
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items() if name != "lm_head.weight"}
    plan, found = plan_of(model), make_plan(model.config, bare)
    assert [(a.dim, a.space, a.span) for a in found.axes] == [(a.dim, a.space, a.span) for a in plan.axes]
    assert {axis.tensor for axis in found.axes} <= {*bare, "lm_head.weight"}
    assert {gain.bias for gain in found.gains} <= set(bare)
    assert found.linears == plan.linears and found.onlines == plan.onlines


@pytest.mark.parametrize("name", FAMILIES)
def test_prove_passes_on_the_tiny_model(name):
    spec = RotationSpec(FAMILIES[name].allowed, "auto", randomize=True)
    assert prove(FAMILIES[name].config(), spec).relative < 1e-12


@pytest.mark.parametrize(("name", "rotation"), REFUSED)
def test_a_refused_rotation_would_change_the_logits(name, rotation):
    """The message gives the reason, and forcing the rotation changes the function."""
    model, ids = tiny(name), tokens()
    plan = plan_of(model)
    with pytest.raises(RotationError, match=rf"{rotation} is impossible for .*: .{{40}}"):
        make_rotations(plan, RotationSpec(rotation))
    forced = replace(plan, refused=())
    if not forced.spaces_of(rotation):
        pytest.skip("the model has no such space")
    before = logits(model, ids)
    rotations = make_rotations(forced, RotationSpec(rotation, "auto"))
    fuse_module(model, forced, rotations)
    try:
        with attach(model, forced, rotations) as attachment:
            attachment.stop_checking()
            assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    except (AttributeError, KeyError, TypeError, RotationError):
        # The attention has no queries or keys that could be rotated, or the experts no gate.
        assert rotation == "R3" or (name, rotation) == ("aria_text", "R4")


def test_every_refusal_in_the_tables_is_tested():
    """Each refused rotation of each table has a tiny model in `REFUSED`."""
    tried = set()
    for name, rotation in REFUSED:
        tried.add((plan_of(tiny(name)).family, rotation))
    here = [table for table in TABLES if set(table.model_types) & set(CONFIG_MAPPING)]
    refused = {(t.name, r.rotation) for t in here for r in t.refused if not r.is_past}
    assert refused <= tried
    assert {r.rotation for table in TABLES for r in table.refused} <= set(ROTATION_NAMES)


def test_an_experts_implementation_that_skips_r4_raises():
    """The eager loop over experts does not call the method that applies R4."""
    model, ids = tiny("qwen3_moe"), tokens()
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R4"))
    before = logits(model, ids)
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations):
        copied = copy.deepcopy(model)  # has online parts of its own
        model.set_experts_implementation("eager")
        with pytest.raises(RotationError, match=r"mlp\.experts|grouped_mm"):
            logits(model, ids)
        model.set_experts_implementation("batched_mm")
        assert close(logits(model, ids), before)
    assert not close(logits(model, ids), before)
    assert close(logits(copied, ids), before)
    assert "_apply_gate" not in vars(model.model.layers[1].mlp.experts)


def test_a_rotated_moe_model_loads_with_its_online_rotations(tmp_path):
    model, ids = tiny("qwen3_moe").float(), tokens()
    before = model(ids).logits
    rotate(model, RotationSpec("R1,R2,R4"), options=Options(prove=False))
    model.save_pretrained(tmp_path / "rotated")
    loaded = load(tmp_path / "rotated")
    loaded.set_experts_implementation("batched_mm")
    assert torch.allclose(loaded(ids).logits, before, atol=1e-3)


def test_a_zero_in_the_scale_of_a_norm_is_refused_by_name():
    """The bias of the norm would have to be divided by it."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] = 0
    plan = plan_of(model)
    with pytest.raises(RotationError, match=r"h\.1\.ln_2\.weight"):
        fuse_module(model, plan, make_rotations(plan, RotationSpec("R1")))


def test_a_missing_part_of_an_alternative_is_refused_by_name(tmp_path):
    """A layer has stacked experts, or single experts, or a dense MLP, and all tensors of that alternative."""
    model = tiny("qwen3_moe")
    stacked = tensor_shapes(model)
    model.save_pretrained(tmp_path)
    single = {n: info.shape for n, info in read_headers(tmp_path).items()}
    for shapes, lost in (
        (stacked, "model.layers.1.mlp.experts.down_proj"),
        (stacked, "model.layers.1.mlp.gate.weight"),
        (stacked, "model.layers.0.mlp.up_proj.weight"),
        (single, "model.layers.1.mlp.experts.2.up_proj.weight"),
    ):
        with pytest.raises(ArchitectureError, match=re.escape(lost)):
            make_plan(model.config, {n: s for n, s in shapes.items() if n != lost})
    without = {n: s for n, s in stacked.items() if not n.startswith("model.layers.1.mlp")}
    with pytest.raises(ArchitectureError, match="layer 1 has none of"):
        make_plan(model.config, without)


def image_for(name, model):
    """Tokens with one image among them, and the keyword arguments of the model for that image."""
    generator = torch.Generator().manual_seed(4)
    vision, kind = model.config.vision_config, FAMILIES[name].config().model_type
    if "spatial_merge_size" in vision.to_dict() and hasattr(vision, "depth"):  # Qwen: 4 x 4 patches, merged in fours
        elements = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels, count = torch.randn(16, elements, generator=generator, dtype=torch.float64), 4
        more = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        pixels = torch.randn(1, 3, 28, 28, generator=generator, dtype=torch.float64)
        count, more = {"smolvlm": 1, "idefics3": 1, "mistral3": 2}.get(kind, 4), {}
        if kind in ("smolvlm", "idefics3"):
            pixels = pixels.unsqueeze(1)
        if kind == "mistral3":
            pixels = torch.cat([pixels, pixels.flip(2)], dim=3)
            more = {"image_sizes": torch.tensor([[28, 56]])}
    ids = tokens(1, 12)
    ids[0, 2 : 2 + count] = IMAGE
    kinds = (ids == IMAGE).int()
    more["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] = kinds
    if kind not in ("gemma3",) and "image_grid_thw" not in more:
        del more["mm_token_type_ids"]
    return ids, {"pixel_values": pixels, **more}


@pytest.mark.parametrize("name", [name for name in FAMILIES if hasattr(FAMILIES[name].config(), "vision_config")])
def test_rotating_leaves_the_logits_of_images_unchanged(name):
    """Image features are written to the residual space by the projector and, in Qwen3-VL, after several layers too."""
    model = tiny(name)
    ids, image = image_for(name, model)
    before = logits(model, ids, **image)
    other = {**image, "pixel_values": image["pixel_values"].flip(-1)}
    assert not torch.allclose(logits(model, ids, **other), before, atol=1e-3)  # the image matters
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec(FAMILIES[name].allowed, "auto"))
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations):
        assert close(logits(model, ids, **image), before)


@pytest.mark.parametrize("name", ["gpt2", "nemotron"])
def test_a_learned_rotation_preserves_the_mean(name):
    """For any value of the learned parameter."""
    model, ids = tiny(name), tokens()
    before = logits(model, ids)
    plan = plan_of(model)
    rotations = make_rotations(plan, RotationSpec("R1"))
    learning = begin_training(model, plan, rotations, {"residual": "R1"}, online={}, precision=torch.float64)
    with torch.no_grad():
        model.get_submodule("spinquant_learned.R1").skew.normal_(generator=torch.Generator().manual_seed(0))
    assert close(logits(model, ids), before)
    learned = end_training(learning)
    fuse_module(model, plan, learned)
    assert close(logits(model, ids), before)
    assert not torch.allclose(matrix(learned["residual"]), matrix(rotations["residual"]), atol=0.1)


def test_the_compressed_tensors_format_refuses_r4_inside_experts(tmp_path):
    result = rotate(tiny("mixtral"), RotationSpec("R4"), options=Options(prove=False))
    with pytest.raises(RotationError, match="stacked experts"):
        save(result, tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_model_type_is_refused_with_its_reason():
    listed = [model_type for names in UNSUPPORTED.values() for model_type in names]
    assert len(listed) == len(set(listed)) and not set(listed) & set(known_model_types())
    with pytest.raises(ArchitectureError, match=r"model_type 'longcat_flash'\. Reason: .*zero_expert_num.*--probe"):
        make_plan(AutoConfig.for_model("longcat_flash"), {})
