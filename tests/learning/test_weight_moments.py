"""Moments of weights: their cost is the error of the outputs that rounding causes, and no gradient is computed."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from models import SIZES, VOCABULARY, random_weights, tiny_model, tokens
from spinquant import LearningError, LearnOptions, RotationSpec, learn, make_rotations, parse_scheme, plan_of
from spinquant.learning import moments as gradient_moments
from spinquant.learning.closed_form import expected_cost
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.moments import FOLDS, collect_moments, sites_of
from spinquant.learning.weight_moments import collect_weight_moments
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.scheme import Quantizer

SPEC = RotationSpec("R1,R2,R3,R4", "auto")


CONFIGS = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, n_positions=64), dtype=torch.float64
    ),
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, num_local_experts=4), dtype=torch.float64, experts_implementation="batched_mm"
    ),
}


def prepared(name="llama"):
    model = random_weights(CONFIGS[name]())
    plan = plan_of(model)
    rotations = make_rotations(plan, SPEC)
    fuse_gains(model, plan, rotations)
    return model, plan, rotations


def collected(spaces, scheme, name="llama"):
    model, plan, rotations = prepared(name)
    sites = sites_of(plan, spaces, learning_scheme(parse_scheme(scheme), weights=True), rotations)
    ids = tokens(2, 12)
    return model, plan, rotations, ids, collect_weight_moments(model, plan, sites, parse_scheme(scheme), ids)


def inputs_of(model, names, ids):
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0][0]}))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def test_the_cost_is_that_of_the_outputs_of_all_readers():
    """sum |x T|^2 |W T^-T|^2, in the coordinates of R1 for the scales of a norm, by fold."""
    name = "model.layers.1.post_attention_layernorm"
    model, plan, rotations, ids, moments = collected([name], "A4")
    readers = next(group for group in plan.linears if group[0].endswith("1.mlp.gate_proj"))
    scales = torch.linspace(0.5, 2, plan.space[name].size).double()
    for fold in range(FOLDS):
        x = inputs_of(model, readers[:1], ids[fold : fold + 1])[readers[0]]
        rows = rotations["residual"].apply(x) * scales
        weights = torch.cat([model.get_submodule(reader).weight.detach() for reader in readers])
        errors = (rotations["residual"].apply(weights) / scales).square().sum()
        (found,) = moments[name][fold]
        expected = found.noise * float(rows.square().sum() * errors) / len(scales)
        assert expected_cost([found], scales.square().view(-1, 1, 1)) == pytest.approx(expected, rel=1e-4)


def test_keys_meet_queries():
    """G is the second moment of the queries that share a key head: cost is that of errors in q k^T."""
    model, plan, _, ids, moments = collected(["layers.0.query_key"], "KV4")
    space, seen = plan.space["layers.0.query_key"], {}
    attention = "model.layers.0.self_attn"
    from transformers import AttentionInterface

    real = AttentionInterface()[model.config._attn_implementation]

    def keep(module, query, key, *args, **kwargs):
        if module is model.get_submodule(attention):
            seen.update(q=query[0], k=key[0])
        return real(module, query, key, *args, **kwargs)

    AttentionInterface.register("keep_queries", keep)
    model.set_attn_implementation("keep_queries")
    with torch.no_grad():
        model(input_ids=ids[:1])
    (found,) = moments[space.name][0]
    group = len(seen["q"]) // space.heads
    for head in range(space.heads):
        q = seen["q"][head * group : (head + 1) * group].flatten(0, 1)
        g, x = q.T @ q, seen["k"][head].T @ seen["k"][head]
        torch.testing.assert_close(found.x[head, 0], x * g.trace(), rtol=1e-4, atol=1e-4 * float(x.trace() * g.trace()))
        torch.testing.assert_close(found.g[head, 0], g * x.trace(), rtol=1e-4, atol=1e-4 * float(x.trace() * g.trace()))


def test_values_meet_the_weights_of_o_proj_in_the_cache_and_at_its_input():
    model, plan, _, _, moments = collected(["layers.0.value"], "A4KV4")
    space = plan.space["layers.0.value"]
    inside, cached = moments[space.name][0]
    w = model.get_submodule("model.layers.0.self_attn.o_proj").weight.detach()
    blocks = w.unflatten(-1, (space.heads, -1, space.size))
    expected = torch.einsum("okci,okcj->kij", blocks, blocks)
    for found, part in ((inside, inside.g[0]), (cached, cached.g[:, 0])):
        ratio = part / expected
        assert found.x.shape[:2] in ((1, space.heads), (space.heads, 1))
        assert torch.allclose(ratio, ratio[:, :1, :1], rtol=1e-3)
    assert torch.allclose(inside.x.diagonal(dim1=-2, dim2=-1).sum(), inside.g.diagonal(dim1=-2, dim2=-1).sum())


def test_rounding_weights_adds_to_the_cost():
    names = ["layers.0.hidden.channels", "layers.0.value"]
    plain, more = (collected(names, scheme)[-1] for scheme in ("A4KV4", "W4A4KV4"))
    (before,), (after,) = plain[names[0]][0], more[names[0]][0]
    added = relative_error(before.length, Quantizer(4, symmetric=True, clip="mse"))
    assert torch.equal(before.x, after.x) and torch.equal(before.g, after.g)
    assert after.noise == pytest.approx(before.noise + added, rel=0.05)
    assert len(more[names[1]][0]) == len(plain[names[1]][0]) + 1


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_layouts_of_weights(name):
    """Conv1D and stacked experts: the cost without a transform is that of the same sums written out."""
    model, plan, rotations = prepared(name)
    scheme = parse_scheme("W4A4KV4")
    names = [space.name for space in plan.spaces if space.allows in ("any", "diagonal")]
    sites = sites_of(plan, names, scheme, rotations)
    ids = tokens(2, 12)
    found = collect_weight_moments(model, plan, sites, scheme, ids)
    exact = collect_moments(model, plan, sites, scheme, ids, generator=torch.Generator().manual_seed(0))
    assert set(found) == set(exact) and len(found) > 2
    for space, folds in exact.items():
        shapes = {(one.x.shape, one.length) for one in folds[0]}
        assert shapes == {(one.x.shape, one.length) for one in found[space][0]}
        for other in found[space][0]:
            assert float(other.x.sum()) > 0 and float(other.g.diagonal(dim1=-2, dim2=-1).sum()) > 0


OPTIONS = LearnOptions("closed-form", baselines=2, moments="weights")


def run(options, monkeypatch=None):
    model = random_weights(tiny_model("llama"))
    return learn(model, "W4A4KV4", SPEC, tokens(8, 24), tokens(4, 24, seed=9), options)


def test_no_backward_pass_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    learned = run(OPTIONS)
    tried = learned.record["closed_form"]
    assert tried and all(one["moments"] == "weights" for one in tried.values())
    with pytest.raises(AssertionError, match="a backward pass"):
        run(LearnOptions("closed-form", baselines=2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of memory"), RuntimeError("DefaultCPUAllocator: no")])
def test_a_backward_pass_without_memory_says_what_takes_less(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(gradient_moments, "backward_own_predictions", fail)
    with pytest.raises(LearningError, match=r"ran out of memory .*--checkpointing.*--moments weights"):
        run(LearnOptions("closed-form", baselines=1))
    monkeypatch.setattr(gradient_moments, "backward_own_predictions", partial(fail_otherwise, "shape"))
    with pytest.raises(RuntimeError, match="shape"):
        run(LearnOptions("closed-form", baselines=1))


def fail_otherwise(message, *args, **kwargs):
    raise RuntimeError(message)


def test_moments_of_weights_need_transforms():
    for others in ({"transforms": False}, {"method": "end-to-end", "shard": True}):
        with pytest.raises(LearningError, match=r"moments of weights are for closed-form transforms"):
            LearnOptions(**{"method": "local", "moments": "weights", **others})
    with pytest.raises(LearningError, match="--moments weights would have no effect"):
        model = random_weights(tiny_model("llama"))
        options = LearnOptions("random", moments="weights")
        learn(model, "KV4", RotationSpec("R2", block_size={"R2": 8}), tokens(4, 12), tokens(2, 12), options)
    assert LearnOptions("random", moments="weights").transforming
