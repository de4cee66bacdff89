"""R1 learned together with the scales of norms: the start, the loss, what is kept, and what is resumed."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

from models import close, logits, random_weights, tiny_model, tokens
from spinquant import Quantizer, RotationSpec, attach, fuse_module, learn, make_rotations, parse_scheme, plan_of
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.evaluation.metrics import drawn
from spinquant.learning import joint
from spinquant.learning.activations import ActivationSite
from spinquant.learning.end_to_end import EndToEndOptions, learn_end_to_end
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import kind_of
from spinquant.learning.joint import (
    closed_form_scales,
    expected_costs,
    held_out_costs,
    learn_jointly,
    sorted_start,
)
from spinquant.learning.joint_sites import JointSite, collect_jointly
from spinquant.learning.joint_steps import joint_spaces, start_of, transforms_of
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.options import LearnOptions
from spinquant.learning.parametrization import begin_training, end_training
from spinquant.models.modules import in_eval_mode
from spinquant.quantization.integer import fake_quantize
from spinquant.rotations.mean_preserving import check_mean_preserving
from spinquant.rotations.random_transforms import random_transforms
from spinquant.rotations.rotation import Orthogonal, matrix, off_orthogonal
from spinquant.rotations.transforms import LARGEST_CONDITION, Diagonal, check_conditioned, condition
from spinquant.rotations.wrappers import check_given, online_part

SCHEME = parse_scheme("W4A4KV4")
OPTIONS = LocalOptions(steps=40, batch=32, save_every=10)
SPEC = RotationSpec("R1,R2,R3,R4")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sites(count=2, width=48, rows=512, seed=0, weights=True):
    """Sites that want scales, partly the same ones, and whose rows have two strong directions, which R can spread."""
    found, directions = [], normal(2, width, seed=7) / width**0.5
    for i in range(count):
        wanted = (0.7 * normal(width, seed=seed) + 0.5 * normal(width, seed=100 + i + seed)).exp()
        x = normal(rows, width, seed=i + 10) + 12 * normal(rows, 2, seed=i + 50).pow(3) @ directions
        x, g = x / wanted, normal(rows, width, seed=i + 20) * wanted
        w = normal(64, width, seed=i + 30) * wanted
        site = ActivationSite(f"reader {i}", "residual", Quantizer(4), x, 1.0 + i, f"norm {i}", g)
        w = w / w.norm(dim=-1, keepdim=True)
        found.append(JointSite(site, w, 2.0) if weights else JointSite(site))
    return found


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [48, 64, 96, 576, 896])
def test_the_sorted_start_is_orthogonal_and_mixes_channels_of_like_scales(size, centred):
    own = sites(width=size)
    start = sorted_start(own, size, SCHEME.weights, centred=centred)
    assert start is not None and off_orthogonal(start) < 1e-12
    if centred:
        assert torch.allclose(start.sum(0), torch.ones(size).double()) and torch.allclose(
            start.sum(1), torch.ones(size).double()
        )
    scales = closed_form_scales(own, None, SCHEME.weights)
    block = int((start[0] != 0).sum())
    assert block > 8 and size % block == 0
    mean = sum(scales[f"norm {i}"] for i in range(2)) / 2  # the pooled one up to the weights of the sites
    columns = [mean[start[:, i] != 0] for i in range(0, size, block)]
    if len(columns) > 1:
        assert all(one.mean() < other.mean() for one, other in pairwise(columns))
        assert sum(one.var() for one in columns) / len(columns) < 0.5 * mean.var()


def test_sizes_without_a_hadamard_block_have_no_sorted_start():
    assert sorted_start(sites(width=35), 35, SCHEME.weights, centred=False) is None
    assert sorted_start(sites(width=40), 40, SCHEME.weights, centred=True) is None
    assert sorted_start(sites(width=40), 40, SCHEME.weights, centred=False) is not None


@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(8, symmetric=True), Quantizer(4, group_size=16)])
def test_the_expected_cost_is_that_of_rounding(quantizer):
    """Against the rounding errors themselves, on Gaussian rows, at the best clip ratio."""
    x, g, w = (normal(2000, 64, seed=i) for i in range(3))
    x, g, w = (t / t.norm(dim=-1, keepdim=True) for t in (x, g, w))
    g = g * torch.linspace(0.5, 1.5, 2000)[:, None] * (1 + 3 * (torch.arange(64) < 16))
    act, rounding = expected_costs(x, g, w, quantizer, quantizer)
    lowest = min(
        float((g.square() * (fake_quantize(x, replace(quantizer, clip=ratio)) - x).square().mean()).sum(-1).mean())
        for ratio in (1.0, 0.95, 0.9, 0.85, 0.8)
    )
    assert float(act) == pytest.approx(64 * lowest, rel=0.15 if quantizer.group_size is None else 0.3)
    errors = min(
        float((fake_quantize(w, replace(quantizer, clip=ratio)) - w).square().sum(-1).mean())
        for ratio in (1.0, 0.95, 0.9, 0.85, 0.8)
    )
    assert float(rounding) == pytest.approx(errors, rel=0.15)


@pytest.mark.parametrize("weights", [SCHEME.weights, None])
def test_the_loss_falls_on_rows_that_are_not_learned_from(weights):
    own = sites(width=96, weights=weights is not None)
    start = sorted_start(own, 96, weights, centred=False)
    assert start is not None
    scales = closed_form_scales(own, start.float(), weights)
    before = held_out_costs(own, start.float(), scales, weights)
    assert before["activations"] < 0.7 * held_out_costs(own, start.float(), {}, weights)["activations"]
    r, learned, losses = learn_jointly(own, start.float(), scales, weights, OPTIONS)
    after = held_out_costs(own, r, learned, weights)
    assert sum(after.values()) < 0.97 * sum(before.values())
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert off_orthogonal(r) < 1e-5 and not torch.equal(learned["norm 0"], scales["norm 0"])


def test_a_scheme_without_weights_ignores_them():
    own, without = sites(width=48), sites(width=48, weights=False)
    start = sorted_start(own, 48, None, centred=False)
    assert start is not None and torch.equal(start, sorted_start(without, 48, None, centred=False))
    scales = closed_form_scales(own, start.float(), None)
    assert all(torch.equal(scales[n], d) for n, d in closed_form_scales(without, start.float(), None).items())
    found = [learn_jointly(one, start.float(), scales, None, replace(OPTIONS, steps=5)) for one in (without, without)]
    assert torch.equal(found[0][0], found[1][0]), "deterministic by seed"
    assert held_out_costs(own, start.float(), scales, None)["weights"] == 0
    weighed = learn_jointly(own, start.float(), scales, SCHEME.weights, replace(OPTIONS, steps=5))
    assert not torch.allclose(weighed[0], found[0][0], atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    own = sites(width=48)
    start = torch.eye(48)
    scales = closed_form_scales(own, start, SCHEME.weights)
    given = (own, start, scales, SCHEME.weights)
    expected = learn_jointly(*given, OPTIONS)

    def stop(step, loss):
        if step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_jointly(*given, OPTIONS, pieces=Pieces(tmp_path), report=stop)
    steps = []
    found = learn_jointly(*given, OPTIONS, pieces=Pieces(tmp_path), report=lambda step, loss: steps.append(step))
    assert steps[0] == 21 and torch.equal(found[0], expected[0]) and found[2] == expected[2]
    assert all(torch.equal(found[1][name], logs) for name, logs in expected[1].items())


def test_scales_stay_bounded():
    """Also where rows and gradients ask for much more, in closed form and in every step."""
    own = sites(width=48)
    wild = torch.linspace(-20, 20, 48).exp()
    site = replace(own[0].site, rows=own[0].site.rows / wild, slopes=own[0].site.slopes * wild)
    own = [replace(own[0], site=site)]
    scales = closed_form_scales(own, torch.eye(48), None)
    assert 10 < float(scales["norm 0"].exp().max() / scales["norm 0"].exp().min()) <= LARGEST_CONDITION
    scales = {"norm 0": torch.linspace(-9, 9, 48)}
    _, learned, _ = learn_jointly(own, torch.eye(48), scales, None, replace(OPTIONS, steps=3, lr=50.0))
    ((transform,),) = ((t for t in transforms_of("residual", torch.eye(48), learned)[1].values()),)
    assert condition(transform) <= LARGEST_CONDITION and math.isfinite(condition(transform))
    check_conditioned("norm 0", transform)


def centred_model():
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        use_parallel_residual=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float64))


def expert_model():
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_local_experts=4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.set_experts_implementation("batched_mm")
    return random_weights(model)


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "tied": lambda: tiny_model("llama-tied"),
    "LayerNorm": centred_model,
    "experts": expert_model,
}


@pytest.mark.parametrize("scheme", ["W4A4KV4", "A4", "W4A4-head"])
@pytest.mark.parametrize("name", MODELS)
def test_the_transformed_model_is_exact(name, scheme):
    wanted = replace(SCHEME, lm_head=True) if scheme.endswith("head") else parse_scheme(scheme)
    model, ids = MODELS[name](), tokens(4, 20)
    expected = logits(model, ids)
    plan = plan_of(model)
    made = make_rotations(plan, RotationSpec("R1"))
    original = MODELS[name]()
    fuse_gains(model, plan, made)
    learning = learning_scheme(wanted, weights=False)
    spaces = joint_spaces(plan, made, learning)
    assert spaces == ["residual"]
    with in_eval_mode(model):
        _, found = collect_jointly(
            model,
            plan,
            spaces,
            spaces,
            learning,
            ids,
            seed=0,
            weights=wanted.weights,
            rows=128,
            generator=torch.Generator().manual_seed(0),
        )
    own = found["residual"]
    read = sum(plan.read_by(group[0]) == plan.space["residual"] for group in plan.linears) + len(plan.experts)
    assert len(own) == read + wanted.lm_head and all(one.site.scales for one in own)
    assert all((one.w is not None and one.weight_share > 0) == (wanted.weights is not None) for one in own)
    centred = plan.space["residual"].centred
    r, scales = start_of(plan, "residual", own, made, wanted.weights, None, "cpu")
    options = replace(OPTIONS, steps=5)
    r, scales, _ = learn_jointly(own, r, scales, wanted.weights, options, centred=centred)
    turned, scaled = transforms_of("residual", r, scales)
    check_mean_preserving(plan, turned)
    assert any(condition(transform) > 1.1 for transform in scaled.values())
    if scheme == "W4A4-head":
        assert len(scaled) == len({axis.space for axis in plan.axes if axis.space in scaled})
    fuse_module(original, plan, {**turned, **scaled})
    atol = 1e-4 if centred else 1e-9  # the mean is preserved as far as float32 goes
    assert torch.allclose(logits(original, ids), expected, atol=atol, rtol=atol)


def test_the_cost_of_weights_is_that_of_their_gradients():
    """By autograd through the whole model: squared gradients of a sample, with the squared weights of each row."""
    model, ids = tiny_model("llama", dtype=torch.float32), tokens(1, 12)
    plan = plan_of(model)
    fuse_gains(model, plan, make_rotations(plan, RotationSpec("R1")))
    learning = learning_scheme(SCHEME, weights=False)

    def collected(**more):
        how = {"seed": 0, "weights": SCHEME.weights, "rows": 3000, "generator": torch.Generator().manual_seed(0)}
        with in_eval_mode(model):
            _, found = collect_jointly(model, plan, ["residual"], ["residual"], learning, ids, **how, **more)
        return next(one for one in found["residual"] if one.site.name.endswith("layers.2.mlp.gate_proj"))

    one = collected()
    found = model(input_ids=ids, use_cache=False).logits[0]
    own = drawn(found.detach().softmax(-1), torch.Generator().manual_seed(0))  # the labels that were sampled
    weights = [getattr(model.model.layers[2].mlp, name).weight for name in ("gate_proj", "up_proj")]
    slopes = torch.autograd.grad(found.log_softmax(-1).gather(-1, own).sum(), weights)
    pairs = zip(weights, slopes, strict=True)
    cost = sum(float((w.detach().square().sum(-1) * g.square().sum(-1)).sum()) for w, g in pairs)
    assert one.weight_share == pytest.approx(0.5 * cost / one.width / ids.numel(), rel=1e-3)
    assert collected(share=0.2).weight_share == pytest.approx(0.2 * one.weight_share)
    stored = torch.cat([weight.detach() for weight in weights])
    stored = stored / stored.norm(dim=-1, keepdim=True)
    assert one.w is not None and float((one.w @ stored.T).amax(-1).min()) > 1 - 1e-4, "rows of the weights"


def uneven_model():
    """A model of one layer whose residual stream has channels of different sizes."""
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight *= normal(48).exp()
    return model


def run_learn(method, start=None, options=None):
    model = uneven_model()
    through = EndToEndOptions(steps=2, batch=4)
    local = options or LocalOptions(steps=60, rows=128, batch=48)
    how = LearnOptions(method, baselines=1, rounding="rtn", local=local, end_to_end=through)
    return learn(model, SCHEME, SPEC, tokens(8, 16), tokens(4, 16, seed=9), how, start=start)


def test_local_learning_learns_both_and_what_is_kept_is_exact():
    learned = run_learn("local")
    assert set(learned.record["joint"]) == {"residual"} and len(learned.record["local_steps"]["residual"]) == 60
    costs = learned.record["joint"]["residual"]
    assert sum(costs["after"].values()) < sum(costs["before"].values())
    assert learned.record["predicted_kl"]["after"].keys() == learned.record["predicted_kl"]["before"].keys()
    scaled = [t for n, t in learned.rotations.items() if n.endswith("layernorm")]
    assert learned.kept.startswith(("local", "closed-form after")) and scaled
    assert isinstance(learned.rotations["residual"], Orthogonal) and all(isinstance(t, Diagonal) for t in scaled)
    original = uneven_model()
    plan, expected = plan_of(original), logits(original, tokens())
    fuse_module(original, plan, learned.rotations)
    with attach(original, plan, online_part(plan, learned.rotations)):
        assert close(logits(original, tokens()), expected)
    # From there, learning goes on with its scales, through the network and on rows.
    more = run_learn("local", start=learned)
    assert more.record["start"] == "given"
    assert sum(more.record["joint"]["residual"]["before"].values()) < 1.2 * sum(costs["after"].values())
    through = run_learn("end-to-end", start=learned)
    moved = [n for n in learned.rotations if n.endswith("layernorm")]
    if through.kept == "end-to-end":
        assert any(not torch.equal(through.rotations[n].scale, learned.rotations[n].scale) for n in moved)


@pytest.mark.parametrize("options", [{"solver": "procrustes"}, {"objective": "whip"}, {"weighting": "uniform"}])
def test_other_ways_to_learn_stay_as_they_are(options):
    usual = {"objective": "error", "solver": "cayley", "weighting": "fisher"}
    local = LocalOptions(steps=2, rows=64, **{**usual, **options})
    learned = run_learn("local", options=local)
    assert "joint" not in learned.record


def test_rotations_in_blocks_are_not_learned_together_with_scales():
    model = tiny_model("llama")
    plan = plan_of(model)
    blocks = make_rotations(plan, RotationSpec("R1,R2", block_size={"R1": 16}))
    assert joint_spaces(plan, blocks, SCHEME) == []
    assert joint_spaces(plan, make_rotations(plan, SPEC), replace(SCHEME, activations=None)) == []
    assert joint.SMALLEST_BLOCK == 8


def scaled_model():
    """A model with its gains fused, random rotations, and scales of its norms."""
    model = tiny_model("llama", layers=1)
    plan = plan_of(model)
    made = make_rotations(plan, RotationSpec("R1,R2"))
    fuse_gains(model, plan, made)
    made |= random_transforms(plan, ("scales of R1",))
    names = {s.name: "R1" if s.rotation == "R1" else s.name for s in plan.spaces if s.rotation in ("R1", "R2")}
    return model, plan, made, names


@pytest.mark.parametrize("loss", ["fisher", "cross-entropy"])
def test_scales_are_learned_end_to_end_and_resumed(tmp_path, loss):
    model, plan, made, names = scaled_model()
    options = EndToEndOptions(loss=loss, steps=6, batch=2, save_every=2)
    given = (model, plan, made, names, parse_scheme("A4"), tokens(4, 16), options)
    expected, _ = learn_end_to_end(*given)
    norms = [name for name in made if kind_of(plan.space[name]) == "norms"]
    read = [name for name in norms if any(a.space == name and "proj" in a.tensor for a in plan.axes)]
    assert len(read) == 2 and all(not torch.allclose(matrix(made[n]), matrix(expected[n]), atol=1e-3) for n in read)

    def stop(step):
        if step.number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_end_to_end(*given, pieces=Pieces(tmp_path), report=stop)
    steps = []
    found, _ = learn_end_to_end(*given, pieces=Pieces(tmp_path), report=steps.append)
    assert steps[0].number == 5
    assert all(torch.equal(matrix(found[name]), matrix(transform)) for name, transform in expected.items())
    check_given(plan, RotationSpec("R1,R2"), found)
    # Without R1, scales stay as they are.
    others = {space: name for space, name in names.items() if name != "R1"}
    fixed, _ = learn_end_to_end(model, plan, made, others, *given[4:])
    assert all(torch.equal(matrix(fixed[name]), matrix(made[name])) for name in norms)


def test_the_expected_cost_falls_with_scales_end_to_end():
    model, plan, made, names = scaled_model()
    ids = tokens(2, 24)
    options = EndToEndOptions(steps=25, batch=2)
    _, steps = learn_end_to_end(model, plan, made, names, parse_scheme("A4"), ids, options)
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_a_trainable_rotation_before_scales_is_exact_and_has_the_right_gradient():
    """Against the skew-symmetric derivative of a loss of a model that is transformed with the rotation itself."""
    model, plan, made, _ = scaled_model()
    model, ids = tiny_model("llama", layers=1), tokens(1, 8)
    expected = logits(model, ids)
    names = {"residual": "R1"}
    training = begin_training(model, plan, made, names, online=made, precision=torch.float64)
    module = training.model.spinquant_learned["R1"]
    assert close(logits(model, ids), expected)
    direction = torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1)

    def readers():
        """A loss of the transformed weights that read the norm, which depends on R."""
        return sum(layer.self_attn.q_proj.weight.pow(4).sum() for layer in model.model.layers)

    readers().backward()
    slope = float((module.skew.grad * direction).sum())
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            module.skew.copy_(sign * 1e-5 * direction)
            assert close(logits(model, ids), expected)
            found.append(float(readers()))
    assert abs((found[0] - found[1]) / 2e-5 - slope) < 1e-5 * abs(slope)
    end_training(training)
