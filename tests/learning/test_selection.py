"""Candidates race on held-out text: what is clearly worse drops out, and the winner is scored on all of it."""

from dataclasses import replace

import pytest
import torch

from models import logits, random_weights, tiny_model, tokens
from spinquant import Options, RotationSpec, evaluate, make_rotations, parse_scheme, quantize
from spinquant.evaluation.metrics import divergence, nll
from spinquant.learning import scoring
from spinquant.learning import selection as module
from spinquant.learning.fake_quant import fuse_gains, learning_scheme, rounding
from spinquant.learning.scoring import (
    RATIOS,
    Candidate,
    Exact,
    Observed,
    Rounded,
    Score,
    with_clips,
)
from spinquant.learning.selection import Selection, rounds
from spinquant.plan import CHANNELS
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.transforms import Diagonal

SPEC = RotationSpec("R1,R2,R3,R4", "random-hadamard")
SCHEME = learning_scheme(parse_scheme("W4A4KV4"), weights=True)
CLIPS = tokens(2, 24)


def prepared():
    model = random_weights(tiny_model("llama"))
    plan = plan_of(model)
    fuse_gains(model, plan, make_rotations(plan, SPEC))
    return model, plan


def observed(rounded, candidate, exact):
    seen = scoring.observed(rounded, candidate, exact)
    rounded.close()
    return seen


def scored(model, plan, candidate, windows, scheme=SCHEME, share=1.0):
    """The score by its definition."""
    kl = total = count = 0.0
    for row in windows.split(1):
        exact = logits(model, row)[0, :-1]
        with torch.no_grad(), rounding(model, plan, candidate.rotations, candidate.scheme(scheme)):
            found = logits(model, row)[0, :-1]
        kl, total, count = kl + divergence(exact, found), total + nll(found, row[0, 1:]), count + len(found)
    return kl / count, torch.tensor(total / count).exp().item()


def test_the_winner_is_scored_on_all_windows_and_others_relative_to_it():
    model, plan = prepared()
    held_out = tokens(8, 24, seed=9)
    made = {f"random {i}": make_rotations(plan, replace(SPEC, seed=i)) for i in range(5)}
    selection = Selection(model, plan, SCHEME, CLIPS, held_out)
    selection.enter_all(made)
    winner = selection.leader
    assert selection.scores[winner].tokens == 8 * 23 == selection.scores["16-bit"].tokens
    kl, perplexity = scored(model, plan, selection.leading, held_out)
    assert selection.scores[winner].kl == pytest.approx(kl)
    assert selection.scores[winner].perplexity == pytest.approx(perplexity)
    assert sorted(score.tokens // 23 for name, score in selection.scores.items() if name != "16-bit") in (
        [2, 2, 4, 8, 8],
        [2, 2, 2, 4, 8],
        [2, 2, 2, 2, 8],
    )
    for name, score in selection.scores.items():
        if name not in (winner, "16-bit"):
            windows = held_out[: score.tokens // 23]
            here, best = (scored(model, plan, selection.candidates[n], windows) for n in (name, winner))
            assert score.kl - kl == pytest.approx(here[0] - best[0], abs=1e-6) and score.kl >= kl
            assert score.perplexity / perplexity == pytest.approx(here[1] / best[1])
    parameters = dict(model.named_parameters())
    assert not any("parametrizations" in name for name in parameters), "the model stays rounded"


def test_what_is_clearly_worse_drops_out_and_what_is_not_is_seen_on_everything(monkeypatch):
    model, plan = prepared()
    selection = Selection(model, plan, SCHEME, CLIPS, tokens(8, 24, seed=9))
    selection.enter_all({"random 0": make_rotations(plan, SPEC)})
    wild = {
        s.name: Diagonal(torch.linspace(-3, 3, s.size).double().exp()) for s in plan.spaces if s.name.endswith(CHANNELS)
    }
    assert wild
    selection.enter("wild", selection.leading.rotations, wild)
    assert selection.leader == "random 0" and selection.scores["wild"].tokens == 2 * 23 and not selection.free
    same = dict(selection.leading.rotations)  # another object: nothing says that it is the same
    selection.enter("same", same)
    assert selection.scores["same"] == selection.scores["random 0"] and selection.leader == "random 0"
    monkeypatch.setattr(module, "CLEAR", float("inf"))
    selection.enter("wild again", selection.leading.rotations, wild)
    assert selection.scores["wild again"].tokens == 8 * 23


def test_clear_is_by_differences_on_the_same_tokens():
    one = Observed([[1.0, 2.0, 3.0, 4.0]], [5.0], [256])
    other = Observed([[1.1, 2.1, 3.1, 4.1], [9.0]], [5.0, 5.0], [256, 64])
    assert other.beyond(one) > 1e6 and one.beyond(other) < -1e6  # by 0.1 everywhere
    noisy = Observed([[2.0, 1.0, 4.0, 3.1]], [5.0], [256])
    assert 0 < noisy.beyond(one) < 1 and one.beyond(one) == 0
    assert one.score() == Score(10 / (256), pytest.approx(torch.tensor(5 / (256)).exp().item()), 256)
    assert rounds(8) == [2, 4, 8] and rounds(5) == [2, 4, 5] and rounds(1) == [1]


def test_the_score_is_that_of_the_quantized_model():
    """With weights rounded to nearest at a fixed clip ratio: of the product that `quantize` makes."""
    model, plan = prepared()
    scheme = parse_scheme("W4A4KV4", weight_clip=0.9, activation_clip=0.85, kv_clip=0.95)
    windows, candidate = tokens(3, 24, seed=9), Candidate(make_rotations(plan, SPEC), {}, 0.85, 0.95)
    score = observed(Rounded(model, plan, scheme, 1.0), candidate, Exact(model, windows)).score()
    plain, original = (random_weights(tiny_model("llama")) for _ in range(2))
    quantize(plain, scheme, SPEC, rotations=candidate.rotations, options=Options(prove=False))
    found = evaluate(plain, windows, reference=original)
    assert score.kl == pytest.approx(found.kl, rel=1e-3) and score.perplexity == pytest.approx(
        found.perplexity, rel=1e-3
    )


def test_what_dropped_out_never_leads(monkeypatch):
    """Whatever varies more than what dropped out, and wins in the end, is better than it on all windows."""
    model, plan = prepared()
    kl = {  # by window: the second differs clearly from the first, the third is noisy and then the best
        "random 0": [1.0] * 8,
        "random 1": [1.01] * 8,
        "random 2": [1.3, 0.875, *[0.8] * 6],
        "random 3": [3.0] * 8,
        "random 4": [3.0] * 8,
    }
    made = {name: make_rotations(plan, replace(SPEC, seed=i)) for i, name in enumerate(kl)}
    names = {id(rotations): name for name, rotations in made.items()}

    def observe(rounded, candidate, exact, numbers, seen):
        for number in numbers:
            level, name = kl[names[id(candidate.rotations)]][number], names[id(candidate.rotations)]
            noise = [0.9, 1.1] * 4 if name == "random 2" and number < 2 else [1.0] * 8
            seen.kl.append([23 / 8 * level * one for one in noise])
            seen.nll.append(1.0)
            seen.tokens.append(23)

    monkeypatch.setattr(module, "observe", observe)
    monkeypatch.setattr(module, "with_clips", lambda rounded, candidate, exact: candidate)
    selection = Selection(model, plan, SCHEME, CLIPS, tokens(8, 24, seed=9))
    selection.enter_all(made)
    assert selection.scores[selection.leader].tokens == 8 * 23
    assert selection.leader == "random 0"


def test_a_candidate_that_overflows_loses(monkeypatch):
    wild = Observed([[float("inf"), 1.0]], [float("inf")], [64])
    fine = Observed([[1.0, 1.0]], [5.0], [64])
    assert wild.beyond(fine) == float("inf") and fine.beyond(wild) == -float("inf") and wild.beyond(wild) == 0
    model, plan = prepared()
    selection = Selection(model, plan, SCHEME, CLIPS, tokens(2, 24, seed=9))
    selection.enter_all({"random 0": make_rotations(plan, SPEC)})
    broken, real = dict(selection.leading.rotations), Rounded.observe
    lost = lambda self, one, row: real(self, one, row) * (float("nan") if one.rotations is broken else 1)  # noqa: E731
    monkeypatch.setattr(Rounded, "observe", lost)
    selection.enter("broken", broken)
    assert selection.leader == "random 0" and selection.scores["broken"].kl == float("inf")


def test_weights_are_rounded_by_their_share():
    """The error is share ** 0.5 of that of rounding to nearest: of a share of one all, of none nothing."""
    model, plan = prepared()
    windows, candidate = tokens(2, 24, seed=9), Candidate(make_rotations(plan, SPEC), {}, 0.9, 0.95)
    found = {
        s: observed(Rounded(model, plan, SCHEME, s), candidate, Exact(model, windows)).score() for s in (0, 0.25, 1)
    }
    assert found[1].kl == pytest.approx(scored(model, plan, candidate, windows)[0])
    alone = learning_scheme(parse_scheme("W4A4KV4"), weights=False)
    assert found[0].kl == pytest.approx(scored(model, plan, candidate, windows, alone)[0])
    # With nothing else rounded, KL is in proportion to the squared error, to second order.
    weights = learning_scheme(parse_scheme("W8"), weights=True)
    kl = {s: observed(Rounded(model, plan, weights, s), candidate, Exact(model, windows)).score().kl for s in (0.25, 1)}
    assert kl[0.25] == pytest.approx(0.25 * kl[1], rel=0.1)


def test_ratios_that_are_clearly_worse_do_not_see_all_windows(monkeypatch):
    model, plan = prepared()
    windows, passes = tokens(6, 24, seed=3), []
    candidate, rounded = Candidate(make_rotations(plan, SPEC)), Rounded(model, plan, SCHEME, 0.2)
    found, counts = {}, {}
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    for clear in (scoring.CLEAR, float("inf")):
        monkeypatch.setattr(scoring, "CLEAR", clear)
        passes.clear()
        found[clear], counts[clear] = with_clips(rounded, candidate, Exact(model, windows)), len(passes)
    handle.remove()
    rounded.close()
    few, many = found
    assert found[few] == found[many] and counts[few] < counts[many]


@pytest.mark.parametrize("scheme", ["A4KV4", "W4A4KV4"])
def test_the_clip_search_finds_the_minimum_and_starts_from_known_ratios(scheme):
    model, plan = prepared()
    scheme = learning_scheme(parse_scheme(scheme), weights=True)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    exact, rounded = Exact(model, CLIPS), Rounded(model, plan, scheme, 0.2)
    found = with_clips(rounded, Candidate(make_rotations(plan, SPEC)), exact)
    choices = {ratio: replace(found, activation_clip=ratio, kv_clip=0.9) for ratio in RATIOS}
    kl = {ratio: observed(rounded, one, exact).score().kl for ratio, one in choices.items()}
    assert found.activation_clip == min(RATIOS, key=lambda ratio: kl[ratio])
    calls.clear()
    assert with_clips(rounded, found, exact) == found
    assert 0 < len(calls) <= len(CLIPS) * 5
    handle.remove()
    rounded.close()


def test_ratios_that_are_worse_on_held_out_text_are_not_taken(monkeypatch):
    model, plan = prepared()
    selection = Selection(model, plan, SCHEME, CLIPS, tokens(4, 24, seed=9))
    selection.enter_all({"random 0": make_rotations(plan, SPEC)})
    part = {
        s.name: Diagonal(torch.full((s.size,), 2.0)) for s in plan.spaces if s.name.endswith(CHANNELS)
    }  # changes nothing
    monkeypatch.setattr(module, "with_clips", lambda rounded, candidate, exact: replace(candidate, activation_clip=0.3))
    before = selection.leading
    monkeypatch.setattr(module.Selection, "_race", raced(module.Selection._race))
    tried = selection.enter_kinds("kinds", [part], ["scales"])
    assert tried["scales"]["kept"]
    assert selection.candidates["kinds"].clips == before.clips


def raced(race):
    """A race that every part of a candidate wins by a little."""

    def run(self, candidates, **how):
        found = race(self, candidates, **how)
        last = list(candidates)[-1]
        if last.startswith("kinds:"):
            found[last] = replace(found[last], kl=min(one.kl for one in found.values()) - 1e-9)
        return found

    return run


@pytest.mark.parametrize("most", [1 << 30, 0])
def test_predictions_at_16_bits_are_kept_as_far_as_they_fit(most, monkeypatch):
    monkeypatch.setattr("spinquant.learning.scoring.EXACT_BYTES", most)
    windows, (model, plan) = tokens(3, 24), prepared()
    exact = Exact(model, windows)
    held = [exact.hold(range(3)), exact.hold(range(1, 3))]
    for number in held[1]:
        assert torch.equal(exact[number], model(input_ids=windows[number : number + 1]).logits[0, :-1])
    assert [list(one) for one in held] == ([[0, 1, 2], [1, 2]] if most else [[0], [1]])
    assert len(exact.kept) == (3 if most else 1)
    candidate = Candidate(make_rotations(plan, SPEC))
    assert observed(Rounded(model, plan, SCHEME, 1.0), candidate, exact).score().kl == pytest.approx(
        scored(model, plan, candidate, windows)[0]
    )


def test_a_kind_is_tried_again_if_others_were_kept_after_it(monkeypatch):
    """Where one site costs most of KL, what others gain is lost in it."""
    model, plan = prepared()
    selection = Selection(model, plan, SCHEME, CLIPS, tokens(2, 24, seed=9))
    selection.enter_all({"random 0": make_rotations(plan, SPEC)})
    space = next(space for space in plan.spaces if space.name.endswith(CHANNELS))
    parts = [{space.name: Diagonal(torch.full((space.size,), 1.0 + i))} for i in range(4)]
    wins, raced = {"a": [False, True], "b": [True], "c": [False, False], "d": [True]}, []

    def race(self, candidates, **how):
        names = list(candidates)
        raced.append(names[-1])
        base = how.get("known") or replace(self.scores["random 0"], kl=0.0)  # the last race: of what was kept
        kind = names[-1].removeprefix("made: ").split()[0]
        better = len(names) > 1 and kind in wins and wins[kind].pop(0)
        self.found["seen"].update({module._key(name, one): {} for name, one in candidates.items()})
        return {name: replace(base, kl=base.kl - (better and name == names[-1]) * 1e-3) for name in names}

    monkeypatch.setattr(Selection, "_race", race)
    monkeypatch.setattr(module, "with_clips", lambda rounded, candidate, exact: candidate)
    tried = selection.enter_kinds("made", parts, list("abcd"))
    assert raced[:6] == ["made: a", "made: b", "made: c", "made: d", "made: a again", "made: c again"]
    assert {kind: one["kept"] for kind, one in tried.items()} == {"a": True, "b": True, "c": False, "d": True}
