"""Free transforms in closed form: kept where they lower KL, fused without changing the function, and started from."""

from dataclasses import replace

import pytest
import torch

from models import close, logits, random_weights, tiny_model, tokens
from spinquant import (
    Diagonal,
    LearnedRotations,
    Matrix,
    RotationSpec,
    attach,
    fuse_module,
    make_rotations,
    parse_scheme,
    plan_of,
)
from spinquant.cli.tables import learning_table
from spinquant.errors import LearningError
from spinquant.learning import free_transforms
from spinquant.learning.activations import collect
from spinquant.learning.closed_form import Damping, Moments
from spinquant.learning.closed_form_steps import MOMENT_SAMPLES, moment_samples
from spinquant.learning.end_to_end import FROM_LOCAL, EndToEndOptions, learn_end_to_end
from spinquant.learning.fake_quant import fuse_gains
from spinquant.learning.free_transforms import (
    HALF_CONDITION,
    KINDS,
    closed_form_transforms,
    composed,
    free_spaces,
    fuse_free,
    parted,
)
from spinquant.learning.layerwise import LocalOptions
from spinquant.learning.learn import learn
from spinquant.learning.options import LearnOptions, check_used, learned_spaces, learns_scales
from spinquant.learning.sensitivity import collect_by_weight
from spinquant.plan import CHANNELS
from spinquant.quantization.moving import Moving, Tally
from spinquant.quantization.rotated_rounding import Turn, round_rotated
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.random_transforms import random_transforms
from spinquant.rotations.rotation import dual, is_orthogonal, matrix
from spinquant.rotations.transforms import LARGEST_CONDITION, apply_to_heads, compose, condition
from spinquant.rotations.wrappers import check_given, online_part

SPEC = RotationSpec("R1,R2,R3,R4", "auto")
GENERAL = ("R2", "R3", "scales of R1", "scales of R4")
QUICKLY = LearnOptions(method="local", baselines=2, local=LocalOptions(steps=5, rows=64, batch=32))


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


def run_learn(options, spec=SPEC, **more):
    texts = tokens(16, 24), tokens(4, 24, seed=9)
    return learn(prepared()[0], parse_scheme("W4A4KV4"), spec, *texts, options, **more)


def test_fused_transforms_keep_the_function_and_can_be_unfused():
    model, plan = prepared()
    ids, before = tokens(), {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = logits(model, ids)
    free = random_transforms(plan, ("R2", "scales of R4"))
    fused = fuse_free(model, plan, free, ids[:1])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[4] for name in changed} == {"up_proj", "down_proj", "v_proj", "o_proj"}
    assert close(logits(model, ids), expected)
    fused.undo()
    assert all(torch.allclose(p, before[n], atol=1e-12) for n, p in model.named_parameters())


def test_fusing_transforms_of_a_wrong_table_raises():
    """gate_proj is scaled in place of up_proj, but its output goes through the activation function."""
    model, plan = prepared()
    axes = tuple(
        replace(axis, tensor=axis.tensor.replace("up_proj", "gate_proj")) if axis.space.endswith(CHANNELS) else axis
        for axis in plan.axes
    )
    with pytest.raises(LearningError, match=r"and it does not\. Learn without"):
        fuse_free(model, replace(plan, axes=axes), random_transforms(plan, ("scales of R4",)), tokens(1))


def test_transforms_are_parted_into_a_free_one_and_a_rotation():
    _, plan = prepared()
    rotations = make_rotations(plan, SPEC)
    free = random_transforms(plan, GENERAL)
    free = {n: Matrix(t.weight @ t.weight.mT) if isinstance(t, Matrix) else t for n, t in free.items()}  # symmetric
    both = composed(rotations, free)
    check_given(plan, SPEC, both)
    turned, rest = parted(plan, both)
    assert set(turned) == set(rotations) and set(rest) == set(free)
    assert all(torch.allclose(matrix(turned[n]), matrix(rotations[n]), atol=1e-8) for n in rotations)
    assert all(torch.allclose(matrix(rest[n]), matrix(free[n]), atol=1e-8) for n in free)


def moments_of_one_direction(plan):
    """Moments of the values of a layer whose rows all have one direction, and gradients another."""
    space = next(space for space in plan.spaces if space.rotation == "R2")
    rows, slopes = torch.zeros(2, space.size, dtype=torch.float64), torch.zeros(2, space.size, dtype=torch.float64)
    rows[:, 0], slopes[:, 1] = 1e6, 1e6
    x, g = ((t.T @ t + 1e-9 * torch.eye(space.size)).expand(1, space.heads, -1, -1) for t in (rows, slopes))
    folds = [[Moments(x, g, space.size)], [Moments(x, g, space.size)]]
    return {space.name: folds}


def test_the_condition_number_of_a_matrix_is_bounded():
    """Also where the moments of one head are those of a single direction, and damping is that of many heads."""
    _, plan = prepared()
    found = closed_form_transforms(plan, moments_of_one_direction(plan), (Damping(1e-14),))
    (matrix_of_values,) = found.values()
    assert 500 < condition(matrix_of_values) <= LARGEST_CONDITION
    check_given(plan, SPEC, {**make_rotations(plan, SPEC), **found})


@pytest.mark.parametrize("rotations", ["R1,R2,R3,R4", "online-R1,R2,R3,R4"])
def test_closed_form_is_kept_by_kind_where_it_lowers_kl(rotations):
    learned = run_learn(LearnOptions("closed-form", baselines=2), RotationSpec(rotations, "auto"))
    tried, scores = learned.record["closed_form"], learned.record["scores"]
    assert set(tried) == set(KINDS) and learned.kept == "closed-form" and tried["scales"]["kept"]
    assert scores["closed-form"]["kl"] < 0.9 * min(scores["random 0"]["kl"], scores["random 1"]["kl"])
    lowest = min(scores["random 0"]["kl"], scores["random 1"]["kl"])
    for kind in KINDS:
        if tried[kind]["kept"]:
            assert tried[kind]["kl"] < lowest
        else:  # with those that were kept at the time
            assert tried[kind]["kl"] >= scores["closed-form"]["kl"]
    general = {name for name, transform in learned.rotations.items() if not is_orthogonal(transform)}
    assert {name for name in general if name.endswith(CHANNELS)}
    # The original model, transformed with what was learned, has the same logits.
    original, plan = random_weights(tiny_model("llama")), prepared()[1]
    expected = logits(original, tokens())
    fuse_module(original, plan, learned.rotations)
    with attach(original, plan, online_part(plan, learned.rotations)):
        assert close(logits(original, tokens()), expected)


def test_samples_for_moments_are_spread_over_all_that_are_given():
    rows = torch.arange(127)[:, None]
    assert moment_samples(rows, 4).flatten().tolist() == [0, 42, 84, 126]
    assert all(len(set(moment_samples(rows[:n]).flatten().tolist())) == min(n, MOMENT_SAMPLES) for n in range(1, 127))


@pytest.mark.parametrize("signs", [0, 2])
def test_local_learning_starts_from_the_closed_form(signs):
    learned = run_learn(replace(QUICKLY, signs=signs))
    scores = {name: score["kl"] for name, score in learned.record["scores"].items()}
    assert scores["closed-form"] < 0.9 * min(scores["random 0"], scores["random 1"])
    assert learned.kept in ("local", "closed-form", "closed-form after learning", "random signs")  # with transforms all
    assert any(isinstance(transform, Diagonal) for transform in learned.rotations.values())
    assert learned.spec.type_of("R4") == SPEC.type_of("R4")  # scales do not make it another kind of rotation
    without = run_learn(replace(QUICKLY, transforms=False))
    assert "closed-form" not in without.record["scores"] and "closed_form" not in without.record
    assert all(map(is_orthogonal, without.rotations.values()))


def test_transforms_that_raise_kl_are_removed(monkeypatch):
    def wild(plan, moments, **_):
        made = {name: torch.linspace(-4, 4, plan.space[name].size).double().exp() for name in moments}
        return {name: Diagonal(scale) for name, scale in made.items() if name.endswith(CHANNELS)}

    monkeypatch.setattr("spinquant.learning.closed_form_steps.closed_form_transforms", wild)
    learned = run_learn(QUICKLY)
    assert not learned.record["closed_form"]["scales"]["kept"]
    assert not any(name.endswith(CHANNELS) for name in learned.rotations)
    monkeypatch.setattr("spinquant.learning.closed_form_steps.closed_form_transforms", lambda *_, **__: {})
    without = run_learn(QUICKLY)
    assert abs(without.record["scores"]["local"]["kl"] - learned.record["scores"]["local"]["kl"]) < 1e-6


def test_learning_can_start_from_learned_transforms():
    local = run_learn(QUICKLY)
    again = run_learn(replace(QUICKLY, method="random"), start=local)
    assert again.kept == "given" == again.record["start"] and again.record["learned"]
    # Its score is that of what it was given as, unless the search of clip ratios ends elsewhere from another start.
    alike = again.record["clips"]["given"] == local.record["clips"][local.kept]
    expected = pytest.approx(local.record["scores"][local.kept]["kl"], rel=1e-3 if alike else 0.2)
    assert again.record["scores"]["given"]["kl"] == expected
    assert again.spec.rotations == local.spec.rotations
    for space, transform in local.rotations.items():
        assert torch.allclose(matrix(transform), matrix(again.rotations[space]), atol=1e-7)
    # End-to-end learning starts from the given ones (the loss of the first step).
    through = EndToEndOptions(steps=2, batch=8)
    more = run_learn(replace(QUICKLY, method="end-to-end", end_to_end=through), start=local)
    assert more.record["options"]["end_to_end"]["lr"] == FROM_LOCAL
    # Those that do not beat the random ones are not started from, and are removed.
    wild = dict(local.rotations)
    for space, transform in local.rotations.items():
        if space.endswith(CHANNELS):
            assert isinstance(transform, Diagonal)
            wild[space] = Diagonal(transform.scale * torch.logspace(-2, 2, len(transform.scale), dtype=torch.float64))
    lost = run_learn(replace(QUICKLY, method="random"), start=replace(local, rotations=wild))
    assert lost.record["start"].startswith("random") and lost.kept != "given"
    assert lost.record["scores"]["random 0"] == local.record["scores"]["random 0"]
    with pytest.raises(LearningError, match=r"initial rotations are R1, R2, R3, R4, and this run asks for R1, R2"):
        run_learn(QUICKLY, RotationSpec("R1,R2"), start=local)
    with pytest.raises(LearningError, match="have transforms that are fused"):
        run_learn(LearnOptions("end-to-end", shard=True), start=local)


def test_a_killed_run_does_not_compute_transforms_again(tmp_path, monkeypatch):
    first = run_learn(LearnOptions("closed-form", baselines=1), store=tmp_path)
    calls = []
    monkeypatch.setattr(free_transforms, "chosen_transforms", lambda *_: calls.append(1))
    monkeypatch.setattr("spinquant.learning.closed_form_steps.collect_moments", lambda *_, **__: calls.append(1))
    monkeypatch.setattr("spinquant.learning.learn_run.collect_jointly", lambda *_, **__: calls.append(1))
    again = run_learn(LearnOptions("closed-form", baselines=1), store=tmp_path)
    assert not calls and again.digest() == first.digest() and again.record["scores"] == first.record["scores"]


def test_blocks_and_plain_hadamard_matrices_stay():
    """Runtimes know no other R3, and a saved spec has the size of the blocks."""
    _, plan = prepared()
    scheme = parse_scheme("W4A4KV4")
    blocks = make_rotations(plan, RotationSpec("R1,R2,R3,R4", block_size={"R2": 8, "R3": 8}))
    assert set(free_spaces(plan, blocks, scheme)) == {"scales", "norms"}
    plain = make_rotations(plan, RotationSpec("R1,R2,R3,R4", {"R3": "hadamard"}))
    assert set(free_spaces(plan, plain, scheme)) == {"scales", "values", "norms"}
    learned = run_learn(LearnOptions("closed-form", baselines=1), RotationSpec("R1,R2,R3,R4", block_size={"R2": 8}))
    check_given(plan, learned.spec, learned.rotations)


def test_half_precision_weights_are_restored_bit_for_bit():
    model, plan = prepared()
    model.bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wild = {n: Diagonal(t.scale**20) for n, t in random_transforms(plan, ("scales of R4",)).items()}
    mild = random_transforms(plan, ("scales of R4",))
    for free in (mild, {n: Matrix(t.weight) for n, t in random_transforms(plan, ("R2",)).items()}, wild):
        fused = fuse_free(model, plan, free, tokens(1))
        fused.undo()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    found = closed_form_transforms(plan, moments_of_one_direction(plan), (Damping(1e-14),), dtype=torch.bfloat16)
    assert all(condition(transform) <= HALF_CONDITION for transform in found.values())


def test_subsets_of_what_was_learned():
    """Scales go with the rotation in whose coordinates they are; also those of folders of earlier versions."""
    _, plan = prepared()
    rotations = make_rotations(plan, SPEC)
    transforms = {**rotations, **random_transforms(plan, ("scales of R4",))}
    of = {space.name: space.rotation for space in plan.spaces if space.name in rotations}
    old = LearnedRotations(transforms, SPEC, {"kept": "scaled", "rotation_of": of})
    assert set(old.only(["R1"]).rotations) == {"residual"}
    assert {name for name in old.only(["R4"]).rotations if name.endswith(CHANNELS)}
    norms = {**make_rotations(plan, RotationSpec("R2,R3")), **random_transforms(plan, ("scales of R1",))}
    none = {space: of.get(space, "") for space in norms}
    without = LearnedRotations(norms, RotationSpec("R2,R3"), {"kept": "closed-form", "rotation_of": none})
    assert set(without.only(["R2"]).rotations) > {name for name in norms if "layernorm" in name}


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(LearningError, match="leave out --no-transforms"):
        LearnOptions("closed-form", transforms=False)
    closed, cache = LearnOptions("closed-form"), parse_scheme("KV4")
    plan = prepared()[1]
    for rotations in ("R2", "R3"):  # a matrix for each head, for the cache alone
        check_used(plan, RotationSpec(rotations), cache, {}, closed)
    for spec in (RotationSpec("R3", "hadamard"), RotationSpec("R2", block_size=8)):
        with pytest.raises(LearningError, match="closed-form would have no effect"):
            check_used(plan, spec, cache, {}, closed)


def test_a_kind_that_was_not_scored_is_said_in_the_table():
    learned = run_learn(LearnOptions("closed-form", baselines=1))
    tried = {"kl": None, "kept": False, "spaces": 3, "condition": 30.0}
    record = {**learned.record, "closed_form": {"values": tried}}
    caption = learning_table(replace(learned, record=record), "OUT").caption
    assert "closed form, values: not scored, not kept (3 spaces" in str(caption)


def test_methods_without_learned_rotations_need_none_and_online_r1_is_learned_end_to_end_alone():
    plan, scheme, spec = prepared()[1], parse_scheme("W4A4KV4"), RotationSpec("online-R1,R4")
    for method in ("closed-form", "random"):
        assert learned_spaces(plan, spec, scheme, LearnOptions(method)) == {}
    with pytest.raises(LearningError, match=r"cannot learn nothing.*by default R1, R2 and R3"):
        learned_spaces(plan, spec, scheme, LearnOptions("local"))
    blocks = RotationSpec("online-R1,R4", block_size={"online-R1": 16})
    for method in ("local", "auto", "local+end-to-end"):
        with pytest.raises(LearningError, match="learn it end to end"):
            learned_spaces(plan, blocks, scheme, LearnOptions(method, rotations=("online-R1",)))
    found = learned_spaces(plan, blocks, scheme, LearnOptions("end-to-end", rotations=("online-R1",)))
    assert set(found) == {space.name for space in plan.spaces_of("online-R1")}


def test_r1_is_learned_with_scales_only_from_rows_enough_to_hold_some_out():
    assert learns_scales(LearnOptions("local", local=LocalOptions(rows=8, batch=4)))
    assert not learns_scales(LearnOptions("local", local=LocalOptions(rows=7, batch=4)))


# Matrices of keys, which come before R3


def key_matrices(plan):
    """A different matrix for each head of the keys of each layer."""
    return random_transforms(plan, ("R3",))


def test_keys_are_captured_after_their_matrices():
    model, plan = prepared()
    scheme, keys = parse_scheme("A4KV4"), key_matrices(plan)
    how = {"rows": 10**6, "keys": keys}
    found = collect(model, plan, list(keys), scheme, tokens(1), generator=torch.Generator(), **how)
    raw = collect(model, plan, list(keys), scheme, tokens(1), generator=torch.Generator(), **{**how, "keys": None})
    for one, other in zip(found, raw, strict=True):
        weight = keys[one.space].weight
        assert len(weight) > 1 and len(one.rows) == len(weight) * len(tokens(1)[0])
        possible = torch.stack([other.rows.double() @ w for w in weight])  # (heads, rows, size)
        distance = (possible - one.rows.double()).norm(dim=-1) / one.rows.double().norm(dim=-1)
        least, head = distance.min(0)
        assert least.max() < 1e-5 and head.bincount().tolist() == [len(tokens(1)[0])] * len(weight)
    assert torch.allclose(logits(model, tokens(1)), logits(prepared()[0], tokens(1))), "the model is restored"


def test_the_weight_of_keys_is_measured_after_their_matrices():
    """||x T||^2 ||g T^-T||^2 in the place of ||x||^2 ||g||^2."""
    model, plan = prepared()
    scheme, keys = parse_scheme("KV4"), {n: Matrix(t.weight[0]) for n, t in key_matrices(plan).items()}

    def collected(given):
        generator = torch.Generator().manual_seed(0)
        how = {"rows": 20000, "generator": generator, "slopes": list(keys), "keys": given}
        return collect_by_weight(model, plan, list(keys), scheme, tokens(1), **how)

    for before, after in zip(collected(None), collected(keys), strict=True):
        x, g = before.rows.double(), before.slopes.double()
        ratio = (keys[before.space].apply(x).norm(dim=-1) * dual(keys[before.space]).apply(g).norm(dim=-1)) / (
            x.norm(dim=-1) * g.norm(dim=-1)
        )
        assert after.share == pytest.approx(before.share * float(ratio.square().mean()), rel=0.05)
        assert abs(after.share / before.share - 1) > 0.1, "the matrices change the weight"


@pytest.mark.parametrize("tallied", [True, False])
def test_r3_learns_after_matrices_as_from_keys_that_have_them(tallied):
    generator = torch.Generator().manual_seed(0)
    matrices = next(iter(key_matrices(prepared()[1]).values()))
    heads, size, _ = matrices.weight.shape
    x, slope = (torch.randn(2, heads, 5, size, dtype=torch.float64, generator=generator) for _ in range(2))
    start = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    both, alone = (Moving.starting(start, tally=Tally() if tallied else None) for _ in range(2))
    one = round_rotated(x, (Turn(compose(matrices, both), heads=True),), Quantizer(4))
    inside = round_rotated(apply_to_heads(matrices, x), (Turn(alone, heads=True),), Quantizer(4))
    other = apply_to_heads(dual(matrices), inside, transpose=True)
    torch.testing.assert_close(one, other)
    for y in (one, other):
        (y * slope).sum().backward()
    torch.testing.assert_close(both.skew.grad - both.skew.grad.T, alone.skew.grad - alone.skew.grad.T)
    assert alone.skew.grad.norm() > 0
    if tallied:
        assert both.tally.take() == pytest.approx(alone.tally.take())


def test_end_to_end_learning_leaves_the_matrices_of_keys_as_they_are():
    model, plan = prepared()
    made, keys = make_rotations(plan, SPEC), key_matrices(plan)
    names = {space.name: space.name for space in plan.spaces_of("R3")}
    args = model, plan, {name: made[name] for name in names}, names, parse_scheme("KV4"), tokens(4, 16)
    options = EndToEndOptions(steps=3, batch=2)
    (found, after), (other, before) = (learn_end_to_end(*args, options, keys=given) for given in (keys, None))
    assert all(is_orthogonal(found[name]) for name in names)
    assert any(not torch.allclose(matrix(found[name]), matrix(other[name]), atol=1e-3) for name in names)
    assert abs(after[0].loss / before[0].loss - 1) > 0.05, "they change the expected cost"


def test_local_learning_keeps_the_matrices_of_keys():
    """Where biases make a few channels of keys large: the matrices are kept, and R3 is learned after them."""
    model, _ = prepared()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[::8] = 20.0
    texts = tokens(16, 24), tokens(4, 24, seed=9)
    learned = learn(model, parse_scheme("W4A4KV4"), SPEC, *texts, QUICKLY)
    plan = plan_of(model)
    assert learned.record["closed_form"]["keys"]["kept"]
    start = make_rotations(plan, replace(SPEC, seed=SPEC.seed + int(learned.record["start"].split()[-1])))
    turned, free = parted(plan, learned.rotations)
    for space in plan.spaces_of("R3"):
        assert space.name in free and condition(free[space.name]) > 1.5
        moved = not torch.allclose(matrix(turned[space.name]), matrix(start[space.name]), atol=1e-3)
        assert moved == (learned.record["kept"] not in ("closed-form",))
