"""Method auto with a budget: it ends in time, tries more with more time, and counts the time before an interruption."""

from dataclasses import replace

import pytest
import torch

from models import random_weights, tiny_model, tokens
from spinquant import EndToEndOptions, LearningError, LearnOptions, LocalOptions, RotationSpec, learn
from spinquant.cli.tables import learning_table
from spinquant.learning import budget
from spinquant.learning import closed_form_steps as steps
from spinquant.learning.auto import Allowed
from spinquant.learning.budget import Budget, duration, parse_duration
from spinquant.learning.free_transforms import KINDS
from spinquant.learning.learn_run import Run
from spinquant.learning.options import Watch
from spinquant.learning.step_times import StepTimes

SPEC = RotationSpec("R1,R2,R3,R4", "random-hadamard")
OPTIONS = LearnOptions(
    "auto",
    baselines=3,
    local=LocalOptions(steps=20, rows=64, batch=8),
    end_to_end=EndToEndOptions(steps=12, batch=4, micro_batch=1, lr=0.2),
)
MANY = replace(OPTIONS, baselines=9)


class Clock:
    """Time that passes by one second for every forward pass of a model."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(budget, "clock", lambda: self.now)

    def model(self):
        model = random_weights(tiny_model("llama", layers=1))
        model.register_forward_pre_hook(lambda *_: setattr(self, "now", self.now + 1))
        return model

    def learn(self, seconds, **how):
        options = replace(OPTIONS, budget=seconds)
        return learn(self.model(), "A4KV4", SPEC, tokens(8, 16), tokens(4, 16, seed=9), options, **how)


def test_more_time_is_used_for_more_and_never_exceeded(monkeypatch):
    clock, tried = Clock(monkeypatch), []
    for seconds in (40, 100, 160, 2000):
        learned = clock.learn(seconds)
        about = learned.record["budget"]
        assert about["seconds"] == seconds and about["spent"] <= seconds
        scores = learned.record["scores"]
        missing = set(about["left_out"])
        if "learning after the closed form" in missing and scores.keys() & {"closed-form"}:
            missing |= {"local", "end-to-end"}
        tried.append({"closed form", "local", "end-to-end"} - missing)
        assert learned.kept == min((one for one in scores if one != "16-bit"), key=lambda name: scores[name]["kl"])
        steps = len(learned.record["steps"])
        assert ("local" in scores) == ("local" in tried[-1] or bool(learned.record.get("local_steps")))
        assert 0 < steps < 12 if "steps" in about["left_out"].get("end-to-end", "") else steps in (0, 12)
    assert tried[0] < tried[-1] == {"closed form", "local", "end-to-end"}
    assert any(0 < len(one) < 3 for one in tried)
    short, long = (learning_table(one, "OUT").caption for one in (clock.learn(40), learned))
    assert isinstance(short, str) and isinstance(long, str)
    assert " of 40 s spent" in short and "there was no time for anything else" in short
    assert "budget, local: left out: it takes about" in short and "left out" not in long
    assert learned.record["budget"]["left_out"] == {} and len(learned.record["scores"]) >= 6


def test_steps_that_are_cut_decay_over_those_that_are_made(monkeypatch):
    clock, lengths, totals = Clock(monkeypatch), [], set()
    from spinquant.learning.cayley import Descent

    real = Descent.step

    def step(self, gradients, length):
        lengths.append(length)
        return real(self, gradients, length)

    for seconds in range(60, 300, 8):
        lengths.clear()
        learned = clock.learn(seconds, watch=Watch(step=lambda name, one, steps: totals.add(steps)))
        steps = len(learned.record["steps"])
        if 0 < steps < 12:
            break
        totals.clear()
    assert 0 < steps < 12 and totals == {steps}
    assert f"{steps} of 12 steps" in learned.record["budget"]["left_out"]["end-to-end"]
    monkeypatch.setattr(Descent, "step", step)
    clock.learn(seconds)
    made = torch.tensor(lengths[-steps:])
    expected = 0.5 * (1 + torch.cos(torch.pi * torch.arange(steps) / steps))
    torch.testing.assert_close(made / made[0], expected, rtol=1e-5, atol=1e-6)


def test_random_rotations_take_a_third_of_the_time_at_most(monkeypatch):
    clock, ends, counts = Clock(monkeypatch), [], []
    real = Run.score_baselines

    def score_baselines(self, random, given):
        real(self, random, given)
        ends.append(clock.now - begun)
        counts.append(len(random))

    monkeypatch.setattr(Run, "score_baselines", score_baselines)
    monkeypatch.setattr("spinquant.learning.learn.transform_in_closed_form", lambda *_: None)
    monkeypatch.setattr(Allowed, "is_over", True)  # nothing else is tried
    for seconds in (30, 130, 170, 400):
        begun = clock.now
        learn(clock.model(), "A4KV4", SPEC, tokens(8, 16), tokens(8, 16, seed=9), replace(MANY, budget=seconds))
    assert counts[0] == 1 < counts[1] < counts[2] < counts[3] == 9
    assert all(end <= seconds / 3 for end, seconds in zip(ends[1:], (130, 170, 400), strict=True))


def test_a_short_budget_takes_fewer_samples_and_all_transforms_at_once(monkeypatch):
    clock, samples = Clock(monkeypatch), []
    real = steps.moment_samples
    monkeypatch.setattr(steps, "moment_samples", lambda rows, count: samples.append(count) or real(rows, count))
    short, long = clock.learn(62), clock.learn(2000)
    count = samples[0]
    assert 4 <= count < 8 and samples[1:] == [8, 8]
    assert f"{count} of 8 samples: " in short.record["budget"]["left_out"]["closed form"]
    assert short.record["budget"]["spent"] <= 62
    # Those of norms too, since nothing is learned that they depend on; not all kinds have one from so few tokens.
    assert {"scales", "values", "norms"} <= set(short.record["closed_form"]) <= set(KINDS)
    # What is kept has the clip ratios of the rotations that it was added to.
    assert "clip ratios of closed-form" in short.record["budget"]["left_out"]
    assert short.record["clips"]["closed-form"] == short.record["clips"]["random 0"]
    assert not short.record["scores"].keys() & {"local", "end-to-end", "closed-form after learning"}
    assert not long.record["budget"]["left_out"]


class Killed(Exception):
    pass


def test_time_before_an_interruption_counts(monkeypatch, tmp_path):
    whole = Clock(monkeypatch).learn(250, store=tmp_path / "whole").record["budget"]
    clock = Clock(monkeypatch)

    def stage(name, done, total):
        if name == "collect moments" and done == total:
            raise Killed

    with pytest.raises(Killed):
        clock.learn(250, store=tmp_path / "run", watch=Watch(stage=stage))
    before = clock.now - 1000.0
    clock.now = 9e9  # another process, later
    resumed = clock.learn(250, store=tmp_path / "run").record["budget"]
    assert resumed["spent"] >= before and clock.now - 9e9 + before >= resumed["spent"] >= 0.8 * whole["spent"]
    state = Budget(250, None)
    assert state.left == 250
    clock.now += 200
    assert state.left == 50 and not state.fits("much", lambda: 45.0) and state.fits("little", lambda: 40.0)
    assert "much" in state.left_out and state.decided == {"much": 0, "little": 1}


def test_without_a_budget_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("spinquant.learning.step_times.StepTimes._measured", lambda *_: pytest.fail("measured"))
    learned = Clock(monkeypatch).learn(None)
    assert "budget" not in learned.record and "local" in learned.record["scores"]


def test_nothing_is_measured_without_time_left(monkeypatch):
    monkeypatch.setattr("spinquant.learning.step_times.StepTimes._measured", lambda *_: pytest.fail("measured"))
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Budget, "spent", property(lambda self: 2.0))
    learned = clock.learn(1)
    assert learned.kept == "random 0"
    assert all("no time was left" in why or "too short" in why for why in learned.record["budget"]["left_out"].values())


def test_what_learning_does_once_is_not_counted_in_every_step(monkeypatch):
    times = StepTimes.__new__(StepTimes)
    seconds = {1: 14.0, 2: 16.0}
    monkeypatch.setattr(StepTimes, "_measured", lambda self, action: seconds[action()])
    assert times._parts(lambda count: count) == (12.0, 2.0)


def test_durations():
    assert [parse_duration(text) for text in ("90s", "10m", "1.5h", None)] == [90, 600, 5400, None]
    for text in ("10", "m", "0s", "-5m", "1d"):
        with pytest.raises(LearningError, match=r"such as 90s, 10m or 1h \(--budget\)"):
            parse_duration(text)
    assert [duration(one) for one in (2.46, 12, 210, 9000)] == ["2.5 s", "12 s", "3.5 min", "2.5 h"]


def test_a_budget_needs_method_auto():
    with pytest.raises(LearningError, match=r"budget of 90 s with method local.*learn --method auto.*--budget"):
        LearnOptions("local", budget=90)
    with pytest.raises(LearningError, match="budget is 0: expected a positive number"):
        LearnOptions("auto", budget=0)
