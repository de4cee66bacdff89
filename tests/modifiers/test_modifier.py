"""SpinQuantModifier: equal to `rotate`, trainable rotations, mappings, transform configs, and its lifecycle."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GemmaConfig, Starcoder2Config

from models import CONFIGS, SIZES, logits, tiny_model, tokens
from spinquant import (
    ArchitectureError,
    CheckpointError,
    Options,
    RotationError,
    RotationSpec,
    SpinQuantMapping,
    SpinQuantModifier,
    load,
    make_rotations,
    plan_of,
    quantize,
    rotate,
    save,
)
from spinquant.architectures import llama
from spinquant.evaluation.equivalence import TOLERANCE, Float64Arithmetic
from spinquant.learning.parametrization import LearnableRotation, Learned
from spinquant.models.cache_names import cache_of
from spinquant.modifiers.mapping_plan import plan_from_mappings
from spinquant.modifiers.mappings import NormMapping, infer_mapping, infer_norm_mappings
from spinquant.plan import Plan
from spinquant.rotations.rotation import Hadamard, Orthogonal, matrix
from spinquant.rotations.serialization import restore
from spinquant.rotations.wrappers import InPrecision

ALL = "R1,R2,R3,R4"
TYPES = ["hadamard", "random-hadamard", "random-matrix"]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unchanged(model, act):
    """The error message of an action, which must not change the model."""
    before = weights(model)
    with pytest.raises((RotationError, ArchitectureError)) as caught:
        act()
    assert same(before, weights(model))
    return str(caught.value)


# --- the same as `rotate` ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotations": ["r1"], "transform_type": "random-matrix", "seed": 4},
        {"rotations": ALL, "transform_type": "random-hadamard", "randomize": True, "seed": 1},
        {"rotations": ("R2", "r3"), "transform_block_size": 8},
        {"rotations": ALL, "transform_type": "random-hadamard", "transform_block_size": 4, "precision": "float32"},
        {"rotations": "R3,R4", "precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_apply_equals_rotate_bit_for_bit(options, dtype):
    ours, plain, ids = tiny_model("qwen2", dtype=dtype), tiny_model("qwen2", dtype=dtype), tokens()
    modifier = SpinQuantModifier(**options)
    modifier.apply(ours)
    spec = RotationSpec(
        tuple(modifier.rotations),
        modifier.transform_type,
        modifier.transform_block_size,
        modifier.randomize,
        modifier.seed,
    )
    rotate(plain, spec, options=Options(precision=modifier.precision))
    assert same(weights(ours), weights(plain))
    assert torch.equal(logits(ours, ids), logits(plain, ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_inferred_mappings_and_generated_config_reproduce_the_table(name):
    """Inferred mappings give the table's plan; mappings and the generated config give the same model bit for bit."""
    options = {"rotations": ALL, "transform_type": "random-hadamard", "randomize": True, "seed": 2}
    model = tiny_model(name)
    table = plan_of(model).without("online-R1")  # mappings describe the rotations of llm-compressor
    plan = plan_from_mappings(model, infer_mapping(table), infer_norm_mappings(table))
    assert not plan.refused and plan.linears == table.linears and plan.head == table.head and plan.ties == table.ties
    for field in ("gains", "onlines", "attentions"):
        assert set(getattr(plan, field)) == set(getattr(table, field)), field
    # Mappings describe rotations alone.
    spaces, axes = (
        [{(s.name, s.rotation, s.size) for s in p.spaces if s.rotation} for p in (plan, table)],
        [{(a.tensor, a.dim, a.space, a.reads) for a in p.rotated_axes} for p in (plan, table)],
    )
    assert spaces[0] == spaces[1] and axes[0] == axes[1]
    first = SpinQuantModifier(**options)
    first.apply(model)
    config = first.transform_config.model_dump()
    for given in (
        {**options, "mappings": first.mappings, "norm_mappings": first.norm_mappings},
        {"transform_config": config, "seed": 2},
        {"transform_config": config, "norm_mappings": first.norm_mappings[:1], "seed": 2},
    ):
        again = tiny_model(name)
        SpinQuantModifier(**given).apply(again)
        assert same(weights(again), weights(model))
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("kind", TYPES)
def test_the_function_is_unchanged_at_every_stage(kind, block, learnable):
    model, ids = tiny_model("llama-tied"), tokens()
    before, state = logits(model, ids), SimpleNamespace(model=model)
    modifier = SpinQuantModifier(rotations=ALL, transform_type=kind, transform_block_size=block, learnable=learnable)
    modifier.initialize(state)
    assert torch.equal(logits(model, ids), before)
    modifier.on_start(state)
    assert torch.allclose(logits(model, ids), before, atol=1e-9)
    modifier.finalize(state)
    assert torch.allclose(logits(model, ids), before, atol=1e-9)


def test_precision_applies_to_online_rotations():
    model = tiny_model("llama", dtype=torch.float32)
    exact = tiny_model("llama", dtype=torch.float64)
    rough = tiny_model("llama", dtype=torch.float32)
    SpinQuantModifier(rotations="R4").apply(model)
    SpinQuantModifier(rotations="R4", precision="bfloat16").apply(rough)
    error = [(logits(m, tokens()).double() - logits(exact, tokens())).norm() for m in (model, rough)]
    assert error[0] < 1e-2 * error[1]
    rotation = InPrecision(Orthogonal(torch.eye(4, dtype=torch.float64)), torch.bfloat16)
    x = torch.randn(3, 4)
    again = restore(rotation.describe(), rotation.tensors())
    assert torch.equal(again.apply(x), x.bfloat16().float()) and torch.equal(x, x)
    assert torch.equal(again.apply(x, out=x.clone()), rotation.apply(x))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_saved_folders_load_bit_for_bit(tmp_path, precision):
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    result = SpinQuantModifier(rotations=ALL, transform_type="random-hadamard", precision=precision).apply(model)
    save(result, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


def test_precision_applies_to_online_rotations_of_quantized_models(tmp_path):
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    result = quantize(model, "W8A8", RotationSpec(ALL), options=Options(precision=torch.bfloat16))
    assert {r["precision"] for r in model.config.quantization_config.rotations} == {"bfloat16"}
    save(result, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


# --- learnable rotations ---


def kurtosis(x):
    return (x**4).mean() / (x**2).mean() ** 2


def loss_of(model, ids):
    """Kurtosis of what R1 to R4 rotate: hidden states, values, cached keys, the down projection."""
    out = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    layer = model.model.layers[1]
    return (
        kurtosis(out.hidden_states[1])
        + kurtosis(layer.self_attn.v_proj.weight)
        + kurtosis(cache_of(out).layers[1].keys)
        + kurtosis(layer.mlp.down_proj.weight)
    )


def learned_matrices(model):
    return {name: rotation.matrix().detach().clone() for name, rotation in model.spinquant_learned.items()}


@pytest.mark.parametrize("randomize", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.5),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    ],
)
def test_any_optimizer_trains_rotations_and_keeps_them_orthogonal(optimizer, randomize):
    model, ids = tiny_model("qwen2"), tokens()
    before = logits(model, ids)
    losses, learned = [], {}

    def train(model):
        start = learned_matrices(model)
        steps = optimizer([p for p in model.parameters() if p.requires_grad])
        for _ in range(8):
            steps.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
            steps.step()
            losses.append(loss.item())
            for name, parameter in model.named_parameters():
                assert parameter.grad is None or name.startswith("spinquant_learned."), name
        learned.update(learned_matrices(model))
        for name, r in learned.items():
            assert (r @ r.T - torch.eye(len(r), dtype=r.dtype)).abs().max() < 1e-10
            used = not randomize or name in ("R1", "layers_1_value", "layers_1_query_key", "layers_1_hidden")
            assert used == ((r - start[name]).abs().max() > 1e-4), name
        assert torch.allclose(logits(model, ids), before, atol=1e-9)

    options = {"rotations": ALL, "transform_type": "random-hadamard", "randomize": randomize, "learnable": True}
    result = SpinQuantModifier(**options).apply(model, train)
    assert losses[-1] < 0.97 * losses[0]
    assert torch.allclose(logits(model, ids), before, atol=1e-9)
    assert torch.equal(matrix(result.rotations["residual"]), learned["R1"])
    assert abs(loss_of(model, ids).item() - losses[-1]) < 0.1 * losses[-1]  # what was learned is what is fused
    # No trace of training is left in the model.
    plain = tiny_model("qwen2")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: True for n, _ in plain.named_parameters()}
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_gradients_accumulate_and_saving_is_refused_during_training():
    """Several backward passes between steps, and gradients equal to finite differences."""
    model, ids = tiny_model("llama"), tokens()
    model.model.norm.weight.requires_grad_(False)
    modifier, state = SpinQuantModifier(learnable=True), SimpleNamespace(model=model)
    modifier.initialize(state)
    modifier.on_start(state)
    skew = model.spinquant_learned["R1"].skew

    def loss():
        return kurtosis(model(input_ids=ids, output_hidden_states=True).hidden_states[1])

    with Float64Arithmetic():
        one, two = loss(), loss()
        one.backward()
        first = skew.grad.clone()
        two.backward()
    assert torch.allclose(skew.grad, 2 * first)
    with torch.no_grad(), Float64Arithmetic():
        value = loss()
        skew[3, 1] += 1e-5
        assert torch.allclose((loss() - value) / 1e-5, first[3, 1], rtol=1e-2, atol=1e-6)
        skew[3, 1] -= 1e-5
    with pytest.raises(CheckpointError, match="still being trained"):
        model.save_pretrained("nowhere")
    with pytest.raises(RotationError, match="already"):
        rotate(model)
    modifier.finalize(state)
    assert "save_pretrained" not in vars(model)
    assert not model.model.norm.weight.requires_grad and model.lm_head.weight.requires_grad


def test_a_rotation_in_training_applies_like_its_frozen_value():
    """Along any axis, block by block, in both directions."""
    module = LearnableRotation(Hadamard(4), torch.float64, torch.device("cpu"))
    with torch.no_grad():
        module.skew.normal_(generator=torch.Generator().manual_seed(0))
    learned, x = Learned(module), torch.randn(8, 12, dtype=torch.float64)
    frozen = restore(learned.describe(), learned.tensors())
    assert learned.order == frozen.order == 4 and not torch.allclose(matrix(frozen), matrix(Hadamard(4)))
    for dim in (0, 1, -1):
        for transpose in (False, True):
            found = learned.apply(x, dim=dim, transpose=transpose)
            assert torch.allclose(found, frozen.apply(x, dim=dim, transpose=transpose))
        assert torch.allclose(learned.apply(found, dim=dim), x)


def test_learnable_rotations_without_a_step_equal_fixed_ones():
    """Without a training step, learnable=True gives the same weights as learnable=False."""
    learned, plain = tiny_model("llama"), tiny_model("llama")
    options = {"rotations": ALL, "transform_type": "random-matrix"}
    modifier, state = SpinQuantModifier(**options, learnable=True), SimpleNamespace(model=learned)
    modifier.initialize(state)
    modifier.on_start(state)
    modifier.finalize(state)
    SpinQuantModifier(**options).apply(plain)
    a, b = weights(learned), weights(plain)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-12) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_trained_in_low_precision_are_orthogonal(dtype):
    model, ids = tiny_model("llama", dtype=dtype), tokens()
    before = logits(model, ids).float()

    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.step()

    result = SpinQuantModifier(rotations=ALL, learnable=True, precision=dtype).apply(model, train)
    for rotation in result.rotations.values():
        r = matrix(rotation)
        assert (r @ r.T - torch.eye(len(r), dtype=r.dtype)).abs().max() < 1e-12
    assert (logits(model, ids).float() - before).norm() < TOLERANCE[dtype] * before.norm()


def test_compressed_tensors_need_not_be_installed(monkeypatch):
    """Transform configs are read without it, from a dict."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # importing it raises
    first, model, again = SpinQuantModifier(rotations=ALL), tiny_model("llama"), tiny_model("llama")
    first.apply(model)
    SpinQuantModifier(transform_config=first.transform_config.model_dump()).apply(again)
    assert same(weights(again), weights(model))


def test_a_single_group_can_be_trained():
    first = SpinQuantModifier(rotations="R1,R2")
    first.apply(tiny_model("llama"))
    config = first.transform_config.model_dump()
    config["config_groups"]["R2"]["requires_grad"] = True
    model, state = tiny_model("llama"), SimpleNamespace(model=tiny_model("llama"))
    modifier = SpinQuantModifier(transform_config=config)
    modifier.apply(model, lambda model: state.__setattr__("names", list(model.spinquant_learned)))
    assert state.names == ["R2"]


def test_train_and_learnable_go_together():
    for options, train in (({"learnable": True}, None), ({}, lambda model: None)):
        model = tiny_model("llama")
        message = unchanged(model, lambda o=options, m=model, t=train: SpinQuantModifier(**o).apply(m, t))
        assert "learnable=True" in message


# --- mappings ---


@pytest.fixture
def no_table_for_gemma(monkeypatch):
    monkeypatch.setattr("spinquant.architectures.FAMILIES", (llama.LLAMA,))


def gemma():
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SIZES), dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval()


def everything(model_name="llama"):
    plan = plan_of(tiny_model(model_name))
    return {"mappings": infer_mapping(plan), "norm_mappings": infer_norm_mappings(plan)}


def test_complete_mappings_replace_a_table(no_table_for_gemma):
    """Gemma: no table here, norms that multiply by 1 + weight, a scaled embedding that is a class of its own."""
    model, ids = gemma(), tokens()
    before = logits(model, ids)
    modifier = SpinQuantModifier(rotations=ALL, transform_type="random-hadamard", **everything())
    result = modifier.apply(model)
    assert torch.allclose(logits(model, ids), before, atol=1e-9)
    assert {gain.offset for gain in result.plan.gains} == {1.0}
    assert result.twin is not None and result.twin.relative < 1e-9
    assert not model.model.norm.weight.any()
    again = gemma()
    SpinQuantModifier(transform_config=modifier.transform_config, **everything()).apply(again)
    assert same(weights(again), weights(model))


def test_incomplete_mappings_do_not_replace_a_table(no_table_for_gemma):
    given = everything()
    given["mappings"] = given["mappings"].model_copy(update={"attn_o": None, "mlp_in": None})
    model = gemma()
    assert "it lacks attn_o, mlp_in" in unchanged(model, lambda: SpinQuantModifier(**given).apply(model))
    message = unchanged(model, lambda: SpinQuantModifier(mappings=everything()["mappings"]).apply(model))
    assert "Norm mappings" in message and "gemma" in message
    assert "gemma" in unchanged(model, lambda: SpinQuantModifier().apply(model))


def test_a_layer_norm_is_refused():
    config = Starcoder2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, residual_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    given = everything()
    update = {"mlp_in": ["re:.*c_fc$"], "mlp_out": ["re:.*c_proj$"]}
    given["mappings"] = given["mappings"].model_copy(update=update)
    given["norm_mappings"][1] = NormMapping(norm="re:.*post_attention_layernorm$", linears="re:.*c_fc$")
    assert "only an RMSNorm" in unchanged(model, lambda: SpinQuantModifier(**given).apply(model))


def test_given_mappings_are_used():
    """R4 only in the layer that the mapping names; the other roles are inferred."""
    model, plain, ids = tiny_model("llama"), tiny_model("llama"), tokens()
    name = "model.layers.1.mlp.down_proj"
    modifier = SpinQuantModifier(rotations="R4", mappings={"mlp_out": name}, transform_type="random-hadamard")
    result = modifier.apply(model)
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {f"{name}.weight"} and list(result.rotations) == ["layers.1.hidden"]
    assert torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-9)
    assert modifier.mappings.attn_q and modifier.mappings.mlp_out == [name]
    assert modifier.transform_config.config_groups["R4"].apply[0].targets == [name]


@pytest.mark.parametrize(
    ("mappings", "message"),
    [
        ({"attn_q": "re:.*nothing$"}, "mappings.attn_q: the target 're:.*nothing\\$' matches no module"),
        ({"attn_q": "re:.*(q|k)_proj$"}, "matched by attn_q and by attn_k"),
        ({"attn_q": "re:("}, "is an invalid regular expression"),
        ({"attn_v": "re:.*k_proj$", "attn_k": "re:.*v_proj$"}, "R1|R2"),
        ({"attn_o": "re:.*layers.0.*o_proj$"}, "mappings.attn_o matches 0 modules in the attention"),
        ({"lm_head": "model.norm"}, "is a LlamaRMSNorm, expected an nn.Linear"),
        ({"embedding": "lm_head", "lm_head": "model.embed_tokens"}, "expected an nn.Embedding"),
        ({"lm_head": "re:.*layers.0.*gate_proj$", "mlp_in": ["re:.*up_proj$"]}, "gate_proj.* has no role"),
        ({"mlp_out": "model.layers.1.mlp.down_proj"}, "R1 is impossible .*down_proj"),
        ({"attn_head_dim": 7}, "does not fit the space"),
        ({"attn_head_dim": 8}, "R2 is impossible .* the size 8, but the model has 16"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(mappings, message):
    model = tiny_model("llama")
    found = unchanged(model, lambda: SpinQuantModifier(mappings=mappings).apply(model))
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([{"norm": "re:.*nothing$"}], "matches no module"),
        ([{"norm": "model.norm", "linears": ["nothing"]}], "linears of 'model.norm': the target 'nothing' matches no"),
        ([{"norm": "model.norm", "linears": ["re:.*layers.0.*q_proj$"]}], "is matched for"),
        ([{"norm": "model.norm", "linears": ["re:.*layers.0.*o_proj$"]}], "has no role"),
        ([{"norm": "re:.*input_layernorm$", "linears": ["re:.*(q|k)_proj$"]}], "R1 is impossible.*v_proj"),
        ([{"norm": "re:.*(input|attention)_layernorm$", "linears": ["re:.*(q|k|v)_proj$"]}], "as near to"),
        ([{"norm": "model.embed_tokens", "linears": ["lm_head"]}], "'lm_head' is matched for 'model.embed_tokens' and"),
        ([{"norm": "re:model.(norm|embed_tokens)$", "linears": ["lm_head"]}], "as near to"),
        ([{"norm": "lm_head"}], "is not a norm"),
        (
            [
                {"norm": "re:.*input_layernorm$", "linears": ["re:.*(gate|up)_proj$"]},
                {"norm": "re:.*post_attention_layernorm$", "linears": ["re:.*(q|k|v)_proj$"]},
            ],
            "R1 is impossible .* are not those that read it",
        ),
    ],
)
def test_norm_mappings_that_do_not_fit_are_refused(norms, message):
    model = tiny_model("llama")
    found = unchanged(model, lambda: SpinQuantModifier(norm_mappings=norms).apply(model))
    assert re.search(message, found), found


def test_partial_norm_mappings_are_completed():
    model, plain = tiny_model("llama"), tiny_model("llama")
    norms = [
        {"norm": "model.layers.1.input_layernorm", "linears": "re:.*layers.1.*(q|k|v)_proj$"},
        {"norm": "model.norm"},
    ]
    modifier = SpinQuantModifier(norm_mappings=norms)
    modifier.apply(model)
    SpinQuantModifier().apply(plain)
    assert same(weights(model), weights(plain))
    assert {"model.layers.0.input_layernorm", "model.layers.2.input_layernorm"} <= {
        m.norm for m in modifier.norm_mappings
    }


# --- transform configs ---


def config_of(**groups):
    return {
        "config_groups": {
            name: {
                "type": "random-hadamard",
                "head_dim": 16,
                "precision": "float64",
                "apply": [
                    {"targets": targets, "location": location, "inverse": inverse}
                    for targets, location, inverse in places
                ],
            }
            for name, places in groups.items()
        }
    }


ATTENTION, O_PROJ, GATE = "re:.*self_attn$", "re:.*o_proj$", "re:.*gate_proj$"


@pytest.mark.parametrize(
    "groups",
    [
        {"mine": [(["re:.*v_proj$"], "weight_output", False), ([O_PROJ], "weight_input", True)]},
        {"mine": [(["re:.*v_proj$"], "weight_output", True), ([O_PROJ], "weight_input", False)]},
        {"a": [([O_PROJ], "input", False), ([O_PROJ], "weight_input", True)]},
        {"a": [(["Linear"], "input", True), (["Linear"], "weight_input", False)]},
        {"a": [([GATE], "input", False), ([GATE], "weight_input", True)]},
        {"q": [([ATTENTION], "q_attn", False), ([ATTENTION], "k_cache", False)]},
        {"q": [(["LlamaAttention"], ["q_attn", "k_cache"][i], True) for i in range(2)]},
    ],
)
@pytest.mark.parametrize("learnable", [False, True])
def test_custom_configs_keep_the_function(groups, learnable):
    """Also with online rotations of any linear's input; only the expected weights change."""
    model, plain, ids = tiny_model("llama"), tiny_model("llama"), tokens()
    config = config_of(**groups)
    for scheme in config["config_groups"].values():
        scheme["requires_grad"] = learnable
    modifier = SpinQuantModifier(transform_config=config, rotations=["R1"])
    result = modifier.apply(model, (lambda model: None) if learnable else None)
    before = logits(plain, ids)
    assert torch.allclose(logits(model, ids), before, atol=1e-9)
    assert result.rotations and modifier.transform_config.model_dump() == modifier.transform_config.model_dump()
    turned = {n for n, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    expected = {axis.tensor for axis in result.plan.axes if axis.space in result.rotations}
    assert turned == expected
    if not turned:  # R3 changes no weight, but the cached keys
        with torch.no_grad():
            keys = [cache_of(m(input_ids=ids)).layers[0].keys for m in (plain, model)]
        assert torch.allclose(result.rotations["layers.0.query_key"].apply(keys[0]), keys[1], atol=1e-9)


def test_precision_of_a_group_applies_to_its_online_rotation():
    found = []
    for precision in ("float32", "bfloat16"):
        config = config_of(a=[([O_PROJ], "input", False), ([O_PROJ], "weight_input", True)])
        config["config_groups"]["a"]["precision"] = precision
        model, plain = tiny_model("llama", dtype=torch.float32), tiny_model("llama", dtype=torch.float32)
        SpinQuantModifier(transform_config=config).apply(model)
        found.append((logits(model, tokens()) - logits(plain, tokens())).norm())
    assert 1e-6 < found[1] and found[0] < 1e-2 * found[1]


def test_inverse_is_the_transpose():
    """v_proj rotated by R and by R^T, with the same seed."""
    found = []
    for inverse in (False, True):
        model = tiny_model("llama")
        groups = {"m": [(["re:.*v_proj$"], "weight_output", inverse), ([O_PROJ], "weight_input", not inverse)]}
        result = SpinQuantModifier(transform_config=config_of(**groups)).apply(model)
        found.append(matrix(result.rotations["layers.0.value"]))
    assert torch.allclose(found[0], found[1].T) and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "self_attn.q_proj"])
def test_saving_a_custom_online_rotation_is_refused(linear, tmp_path):
    """q_proj too, whose input online R1 rotates in the table's plan, with those of k_proj and v_proj."""
    model = tiny_model("llama")
    targets = [f"re:.*{linear.rpartition('.')[2]}$"]
    groups = {"a": [(targets, "input", False), (targets, "weight_input", True)]}
    result = SpinQuantModifier(transform_config=config_of(**groups)).apply(model)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.{linear} is rotated online by a custom plan"):
        save(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"a": [(["re:.*v_proj$"], "weight_output", False)]},
            "weight_input of 'model.layers.0.self_attn.o_proj' is not",
        ),
        ({"a": [([O_PROJ], "weight_input", True)]}, "weight_output of 'model.layers.0.self_attn.v_proj' is not"),
        (
            {"a": [(["re:.*v_proj$"], "weight_output", False), ([O_PROJ], "weight_input", False)]},
            "is rotated differently",
        ),
        (
            {"a": [(["re:.*v_proj$"], "weight_output", False)], "b": [([O_PROJ], "weight_input", True)]},
            "is rotated differently \\(by 'b'",
        ),
        ({"a": [([O_PROJ], "input", False)]}, "does not undo it"),
        ({"a": [([O_PROJ], "input", False), ([O_PROJ], "weight_input", False)]}, "does not undo it"),
        ({"a": [([O_PROJ], "output", False)]}, "location 'output' of .* is not supported"),
        ({"a": [(["lm_head"], "weight_output", False)]}, "is in no space"),
        ({"a": [(["model.embed_tokens"], "weight_input", False)]}, "is in no space"),
        ({"a": [(["model.norm"], "weight_output", False)]}, "is in no space"),
        ({"a": [([ATTENTION], "input", False)]}, "need an nn.Linear"),
        ({"a": [([ATTENTION], "q_attn", False)]}, "not rotated alike"),
        ({"a": [([ATTENTION], "q_attn", False), ([ATTENTION], "k_cache", True)]}, "not rotated alike"),
        ({"a": [(["model.norm"], "q_attn", False), (["model.norm"], "k_cache", False)]}, "is not an attention"),
        ({"a": [(["re:.*nothing"], "input", False)]}, "'a', input: the target 're:.*nothing' matches no"),
        ({"a": [([O_PROJ], "input", False)], "b": [(["re:.*layers.1.*o_proj$"], "input", False)]}, "by 'a' and by 'b'"),
        ({"a": [(["re:.*down_proj$"], "weight_input", True)]}, "input of 'model.layers.0.mlp.down_proj' is not"),
    ],
)
def test_configs_that_would_change_the_function_are_refused(groups, message):
    model = tiny_model("llama")
    found = unchanged(model, lambda: SpinQuantModifier(transform_config=config_of(**groups)).apply(model))
    assert re.search(message, found), found


def test_configs_with_invalid_block_size_or_randomize_are_refused():
    places = [(["re:.*v_proj$"], "weight_output", False), ([O_PROJ], "weight_input", True)]
    model, config = tiny_model("llama"), config_of(m=places)
    config["config_groups"]["m"]["head_dim"] = 5
    assert "block size 5" in unchanged(model, lambda: SpinQuantModifier(transform_config=config).apply(model))
    config["config_groups"]["m"].update(head_dim=None, type="hadamard", randomize=True)
    assert "has no effect" in unchanged(model, lambda: SpinQuantModifier(transform_config=config).apply(model))


# --- fields and lifecycle ---


def test_fields_are_parsed_and_validated():
    assert SpinQuantModifier().rotations == ["R1", "R2"]
    assert SpinQuantModifier().transform_type == "hadamard" and SpinQuantModifier().precision == torch.float64
    assert SpinQuantModifier(rotations=iter(["r4", "R1"])).rotations == ["R1", "R4"]
    assert SpinQuantModifier(precision="torch.bfloat16").precision == torch.bfloat16
    for options, message in [
        ({"rotations": ["R5"]}, "unknown rotation"),
        ({"transform_type": "auto"}, "transform_type"),
        ({"precision": "int8"}, "not a floating-point dtype"),
        ({"precision": "nonsense"}, "not a floating-point dtype"),
        ({"transform_block_size": 0}, "greater than 0"),
        ({"randomise": True}, "Extra inputs"),
        ({"randomize": True}, "does nothing to type hadamard"),
        ({"transform_config": {"config_groups": {"a": {"type": "dct"}}}}, "random-matrix"),
    ]:
        with pytest.raises(ValidationError, match=message):
            SpinQuantModifier(**options)


def test_model_dump_round_trips():
    modifier = SpinQuantModifier(
        rotations="R1,R4",
        transform_type="random-hadamard",
        precision="float32",
        mappings=SpinQuantMapping(mlp_out="re:.*down_proj$"),
        norm_mappings=[NormMapping(norm="model.norm")],
        transform_config=config_of(a=[([O_PROJ], "input", False)]),
        seed=3,
    )
    assert SpinQuantModifier.model_validate(modifier.model_dump()) == modifier
    assert SpinQuantModifier.model_validate_json(modifier.model_dump_json()) == modifier


class Event:
    def __init__(self, kind, index=0):
        self.type_, self.current_index = kind, index


@pytest.mark.parametrize("names", [("on_start",), ("on_calibration_start",), ("on_calibration_start", "on_start")])
def test_start_hooks_rotate_only_once(names):
    model, plain = tiny_model("llama"), tiny_model("llama")
    state, modifier = SimpleNamespace(model=model), SpinQuantModifier(rotations="R1,R4")
    assert modifier.on_initialize(state) is True
    for name in names:
        getattr(modifier, name)(state, None)
    modifier.on_sequential_epoch_end(state, None, modules=[])
    modifier.on_end(state)
    assert modifier.on_finalize(state) is True
    SpinQuantModifier(rotations="R1,R4").apply(plain)
    assert same(weights(model), weights(plain))


def test_batch_events_start_and_end_at_the_given_steps():
    """A modifier that starts at step 2 and ends at step 4."""
    model = tiny_model("llama")
    before, state = weights(model), SimpleNamespace(model=model)
    modifier = SpinQuantModifier(start=2, end=4)
    modifier.initialize(state)
    for step in range(6):
        modifier.update_event(state, Event("batch_start", step))
        assert same(before, weights(model)) == (step < 2) and modifier.started_ == (step >= 2)
        modifier.update_event(state, Event("batch_end", step))
        assert modifier.ended_ == (step >= 4)
    modifier.finalize(state)
    started = SpinQuantModifier(start=-1)
    started.initialize(SimpleNamespace(model=tiny_model("llama")))
    assert started.started_


def test_lifecycle_calls_out_of_order_are_refused():
    model = tiny_model("llama")
    state, modifier = SimpleNamespace(model=model), SpinQuantModifier()
    for act in (
        lambda: modifier.on_start(state),
        lambda: modifier.finalize(state),
        lambda: modifier.update_event(state, Event("batch_start")),
        lambda: modifier.result,
        lambda: modifier.initialize(SimpleNamespace()),
    ):
        unchanged(model, act)
    modifier.initialize(state)
    assert "initialized already" in unchanged(model, lambda: modifier.initialize(state))
    assert "before it was started" in unchanged(model, lambda: modifier.finalize(state))
    modifier.on_start(state)
    modifier.finalize(model)  # a model can be passed as the state, though it has a `.model` of its own
    assert "finalized already" in unchanged(model, lambda: modifier.finalize(state))


def test_a_rotated_model_and_an_attention_without_r3_are_refused():
    model = tiny_model("llama")
    SpinQuantModifier(rotations="R4").apply(model)
    assert "already" in unchanged(model, lambda: SpinQuantModifier().apply(model))
    other = tiny_model("llama")
    other.config._attn_implementation = "flash_attention_2"
    assert "attention implementation" in unchanged(other, lambda: SpinQuantModifier(rotations="R3").apply(other))


def test_plans_from_configs_compare_equal():
    """Two models with equal configs have equal plans."""
    groups = {"a": [([GATE], "input", False), ([GATE], "weight_input", True)]}
    one, two = (SpinQuantModifier(transform_config=config_of(**groups)).apply(tiny_model("llama")) for _ in range(2))
    assert isinstance(one.plan, Plan) and one.plan == two.plan
    assert ("model.layers.0.mlp.gate_proj",) in one.plan.linears
    assert set(make_rotations(plan_of(tiny_model("llama")), RotationSpec(("R1",)))) == {"residual"}
