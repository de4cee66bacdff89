"""Moments of rounded weights: their cost is the expected cost of the errors, and the closed form lowers it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from models import VOCABULARY, random_weights, tiny_model, tokens
from spinquant import (
    Diagonal,
    LearnOptions,
    Matrix,
    RotationSpec,
    learn,
    make_rotations,
    parse_scheme,
    plan_of,
)
from spinquant.errors import LearningError
from spinquant.evaluation.metrics import drawn
from spinquant.learning.closed_form import Damping, best_transform, expected_cost
from spinquant.learning.fake_quant import fuse_gains
from spinquant.learning.free_transforms import free_spaces
from spinquant.learning.moments import collect_moments, sites_of
from spinquant.learning.options import WEIGHTS_SHARE, for_rounding, learned_spaces
from spinquant.learning.weight_moments import collect_weight_moments
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.integer import fake_quantize
from spinquant.rotations.rotation import matrix
from spinquant.rotations.transforms import compose

SPEC = RotationSpec("R1,R2,R3,R4", "auto")
# Clip ratios of one, as `fake_quantize` needs them.
ALONE, BOTH, ACTIVATIONS = (parse_scheme(name, weight_clip=1.0) for name in ("W4A16", "W4A4", "A4"))
NAMES = ["layers.1.hidden.channels", "layers.1.value", "model.layers.1.post_attention_layernorm"]


def prepared(name="llama"):
    """A model with a few large channels in its MLPs, and weights that read and write values of unlike scales."""
    model = random_weights(tiny_model(name))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::20] *= 30
            layer.mlp.down_proj.weight[:, ::20] /= 30
            layer.self_attn.v_proj.weight[::8] *= 10
            layer.self_attn.o_proj.weight[:, ::8] /= 10
    plan = plan_of(model)
    rotations = make_rotations(plan, SPEC)
    fuse_gains(model, plan, rotations)
    return model, plan, rotations


def collected(names, scheme, *, share=1.0, how=collect_moments, ids=None):
    model, plan, rotations = prepared()
    given = {"generator": torch.Generator().manual_seed(0)} if how is collect_moments else {}
    sites = sites_of(plan, names, scheme, rotations)
    return how(model, plan, sites, scheme, tokens(2, 24) if ids is None else ids, share=share, **given)


def gradients_of(model, names, ids):
    """M of linears, the gradient of log p by the weight, (outputs, inputs), of every sample: by name and number."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number, row in enumerate(ids.split(1)):
        out = model(input_ids=row, use_cache=False).logits[0]
        own = drawn(out.detach().softmax(-1), generator)
        weights = [model.get_submodule(name).weight for name in names]
        gradients = torch.autograd.grad(-out.log_softmax(-1).gather(-1, own).sum(), weights)
        found |= {(name, number): g for name, g in zip(names, gradients, strict=True)}
    return found


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def rounded(m, w):
    """Sum over rows of (M_j . e_j)^2 for the errors e of rounding the rows w: its mean over rotations of the inputs."""
    total = 0.0
    for seed in range(8):
        q = orthogonal(len(w.T), seed)
        total += float((m @ q * (fake_quantize(w @ q, ALONE.weights) - w @ q)).sum(-1).square().sum())
    return total / 8


def white(m, w):
    """What is expected of `rounded` if errors have no direction, and a length in proportion to that of their row."""
    noise = relative_error(w.shape[-1], ALONE.weights) / w.shape[-1]
    return noise * float(m.square().sum(-1) @ w.square().sum(-1))


def cost_of_reading(model, names, transform, ids, cost=rounded):
    """Cost of rounding W T^-T, whose gradients are M T, over all samples."""
    weights = {name: transform.dual().apply(model.get_submodule(name).weight.detach()) for name in names}
    return sum(cost(transform.apply(m), weights[name]) for (name, _), m in gradients_of(model, names, ids).items())


def cost_of_writing(model, space, name, transform, ids, cost=rounded):
    """Cost of rounding T^T W, whose gradients are T^-1 M, over all samples."""
    w = model.get_submodule(name).weight.detach().unflatten(0, (space.heads, -1))  # (heads, size, inputs)
    t = matrix(transform).to(w.dtype).expand(space.heads, -1, -1)
    gradients = (m.unflatten(0, (space.heads, -1)) for m in gradients_of(model, [name], ids).values())
    return sum(cost(torch.linalg.solve(t, m).flatten(0, 1), (t.mT @ w).flatten(0, 1)) for m in gradients)


def expected(moments, p):
    return sum(expected_cost(fold, p) for fold in moments)


@pytest.mark.parametrize("kind", ["scales", "norms"])
def test_expected_cost_of_the_weights_that_read_is_that_of_rounding_them(kind):
    model, plan, rotations = prepared()
    ids = tokens(2, 48)
    name, site = NAMES[0 if kind == "scales" else 2], {"scales": "mlp.down_proj", "norms": "mlp.gate_proj"}[kind]
    readers = next(group for group in plan.linears if group[0].endswith(f"1.{site}"))
    moments = collected([name], ALONE, ids=ids)[name]
    rotated = rotations["layers.1.hidden" if kind == "scales" else "residual"]
    for scale in (torch.ones(plan.space[name].size).double(), torch.linspace(0.5, 2, plan.space[name].size).double()):
        diagonal = Diagonal(scale)
        t = compose(diagonal, rotated) if kind == "scales" else compose(rotated, diagonal)
        measured = cost_of_reading(model, readers, t, ids)
        assert expected(moments, scale.square().view(-1, 1, 1)) == pytest.approx(measured, rel=0.25)


def test_expected_cost_of_the_weights_that_write_values_is_that_of_rounding_them():
    model, plan, _ = prepared()
    ids, space, writer = tokens(2, 48), plan.space[NAMES[1]], "model.layers.1.self_attn.v_proj"
    moments = [fold[1:] for fold in collected([space.name], ALONE, ids=ids)[space.name]]
    root = torch.randn(space.heads, space.size, space.size, generator=torch.Generator().manual_seed(1)).double()
    root = torch.eye(space.size) + 0.04 * (root + root.mT)
    for weight in (torch.eye(space.size).double().expand_as(root).contiguous(), root):
        # Any rotation may follow, and the mean over rotations is expected.
        turned = [Matrix(weight @ orthogonal(space.size, seed)) for seed in range(8)]
        measured = sum(cost_of_writing(model, space, writer, t, ids) for t in turned) / 8
        assert expected(moments, weight @ weight.mT) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_lowers_the_expected_cost_of_rounding_weights(name):
    """Against no transform, and against what is near it."""
    model, plan, rotations = prepared()
    ids, space = tokens(2, 24), plan.space[name]
    moments = collected([name], ALONE, ids=ids)[name]
    p = best_transform([Damping(0.01).of(a + b) for a, b in zip(*moments, strict=True)])
    layer = "model.layers.1"

    def cost(scale):
        """Of rounding all weights that read and write the space; scale: log of what T is multiplied with."""
        if space.allows == "diagonal":
            diagonal = Diagonal((p.flatten().log() / 2 + scale).exp())
            if name.endswith(".channels"):
                t = compose(diagonal, rotations["layers.1.hidden"])
                return cost_of_reading(model, [f"{layer}.mlp.down_proj"], t, ids, white)
            t = compose(rotations["residual"], diagonal)
            return cost_of_reading(model, [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"], t, ids, white)
        values, vectors = torch.linalg.eigh(p)
        root = (vectors * (values.log() / 2 + scale.view(values.shape)).exp().unsqueeze(-2)) @ vectors.mT
        t = compose(Matrix(root), rotations[name])
        reading = cost_of_reading(model, [f"{layer}.self_attn.o_proj"], t, ids, white)
        return reading + cost_of_writing(model, space, f"{layer}.self_attn.v_proj", t, ids, white)

    best, numbers = cost(torch.zeros(p.shape[:-1].numel()).double()), p.shape[:-1].numel()
    undone = torch.linalg.eigvalsh(p).flatten().log() / 2
    assert best < (0.995 if name == NAMES[2] else 0.8) * cost(-undone)
    for seed in range(4):
        noise = torch.randn(numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert best < cost(0.7 * noise)


@pytest.mark.parametrize("how", [collect_moments, collect_weight_moments])
def test_costs_of_activations_and_weights_are_added_and_the_share_is_a_factor(how):
    """W4A16 is what W4A4 has beyond A4, at any transform."""
    collect = partial(collected, NAMES, how=how)
    alone, both, activations = (collect(scheme) for scheme in (ALONE, BOTH, ACTIVATIONS))
    fifth, part = (collect(scheme, share=0.2) for scheme in (ALONE, BOTH))
    assert set(alone) == set(both) == set(activations) == set(NAMES)
    for name, folds in alone.items():
        shape = folds[0][0].x.shape[-4:]
        root = torch.randn(shape[0] * shape[1], *shape[2:], generator=torch.Generator().manual_seed(5)).double()
        p = root @ root.mT + 0.1 * torch.eye(shape[-1])
        weights, of_activations = expected(folds, p), expected(activations[name], p)
        assert weights > 0
        assert expected(both[name], p) == pytest.approx(of_activations + weights, rel=1e-6)
        assert expected(fifth[name], p) == pytest.approx(0.2 * weights, rel=1e-9)
        assert expected(part[name], p) == pytest.approx(of_activations + 0.2 * weights, rel=1e-6)


def test_a_fused_linear_in_columns_has_the_moments_of_its_part():
    """GPT-2 stores (in, out), and one linear writes queries, keys and values."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, n_positions=64)
    model = random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    plan = plan_of(model)
    rotations = make_rotations(plan, SPEC)
    fuse_gains(model, plan, rotations)
    name, writer, ids = "layers.0.value", "transformer.h.0.attn.c_attn", tokens(2, 12)
    sites = sites_of(plan, [name], ALONE, rotations)
    assert [site.name for site in sites] == ["transformer.h.0.attn.c_proj", writer]
    generator = torch.Generator().manual_seed(0)
    found = [fold[1] for fold in collect_moments(model, plan, sites, ALONE, ids, generator=generator)[name]]
    w = model.get_submodule(writer).weight.detach()[:, 96:].T.unflatten(0, (6, 8))
    torch.testing.assert_close(found[0].x[:, 0], w @ w.mT, rtol=1e-5, atol=1e-5)
    heads = [m[:, 96:].T.unflatten(0, (6, 8)) for m in gradients_of(model, [writer], ids).values()]
    d, square = sum(m @ m.mT for m in heads), w.square().sum((1, 2)) / 8
    torch.testing.assert_close(sum(one.g for one in found)[:, 0], square[:, None, None] * d, rtol=1e-4, atol=1e-5)


def test_spaces_of_rounded_weights():
    _, plan, rotations = prepared()
    found = free_spaces(plan, rotations, parse_scheme("W4A16"))
    assert set(found) == {"scales", "values", "norms"} and free_spaces(plan, rotations, parse_scheme("none")) == {}
    assert set(free_spaces(plan, rotations, parse_scheme("W4A16KV4"))) == {"scales", "values", "norms", "keys"}


@pytest.mark.parametrize("moments", ["gradients", "weights"])
def test_transforms_are_learned_for_weights_alone_and_lower_the_error_of_rounding(moments):
    options = LearnOptions("closed-form", baselines=1, rounding="rtn", moments=moments)
    model, plan, _ = prepared()
    learned = learn(model, "W4A16", SPEC, tokens(8, 24), tokens(4, 24, seed=9), options)
    tried, scores = learned.record["closed_form"], learned.record["scores"]
    assert set(tried) == {"scales", "values", "norms"} and learned.kept == "closed-form" and tried["scales"]["kept"]
    assert scores["closed-form"]["kl"] < 0.9 * scores["random 0"]["kl"]
    assert any(name.endswith(".channels") for name in learned.rotations)
    assert learned_spaces(plan, SPEC, parse_scheme("W4A16"), LearnOptions("random")) == {}


@pytest.mark.parametrize("options", [LearnOptions("local"), LearnOptions("auto"), LearnOptions("end-to-end")])
def test_other_methods_learn_from_activations_and_say_what_does_not(options):
    _, plan, _ = prepared()
    with pytest.raises(LearningError, match="--method closed-form"):
        learned_spaces(plan, SPEC, parse_scheme("W4A16"), options)


def test_how_weights_are_rounded_decides_how_much_their_errors_count(monkeypatch):
    given = []

    def watched(*args, share, **kwargs):
        given.append(share)
        return collect_moments(*args, share=share, **kwargs)

    monkeypatch.setattr("spinquant.learning.closed_form_steps.collect_moments", watched)
    for rounding in ("rtn", "gptaq", None):
        options = LearnOptions("closed-form", baselines=1, rounding=rounding)
        learn(prepared()[0], "W4A16", SPEC, tokens(4, 12), tokens(2, 12, seed=9), options)
    assert given == [1.0, WEIGHTS_SHARE["gptaq"], WEIGHTS_SHARE["gptq"]] and given[0] > given[2] >= given[1]
    assert for_rounding(LearnOptions(), parse_scheme("W4A4"), "rtn").rounding == "rtn"
    assert for_rounding(LearnOptions(rounding="gptaq"), parse_scheme("W4A4"), "rtn").rounding == "gptaq"
    assert for_rounding(LearnOptions(), parse_scheme("A4"), "rtn").rounding is None
    with pytest.raises(LearningError, match="unknown rounding 'nearest': expected one of rtn, gptq, gptaq"):
        LearnOptions(rounding="nearest")
    with pytest.raises(LearningError, match=r"leaves weights at 16 bits.*--rounding rtn"):
        learn(prepared()[0], "A4", SPEC, tokens(4, 12), tokens(2, 12), replace(options, rounding="rtn"))
