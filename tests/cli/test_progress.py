"""Progress as plain lines, by a clock that the tests move."""

import json
from datetime import datetime

import pytest

from spinquant.cli.progress import PlainProgress, stages, step_report
from spinquant.entrypoints import hub
from spinquant.entrypoints.stream import STREAMED
from spinquant.learning.end_to_end import Step

NOON = datetime(2026, 3, 1, 12, 0, 0).timestamp()


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self):
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain():
    lines, clock = [], Clock()
    return PlainProgress(lines.append, clock), lines, clock


def test_a_stage_is_a_line_at_its_beginning_one_a_minute_and_one_at_its_end(plain):
    progress, lines, clock = plain
    for done in range(0, 11):
        progress("calibrate", done, 10)
        clock.now += 30
    assert lines == [
        "calibrate: started, 0/10 done",
        "calibrate: 2/10 (20 %), 1 min 00 s elapsed, 4 min 00 s left, expected end 12:05",
        "calibrate: 4/10 (40 %), 2 min 00 s elapsed, 3 min 00 s left, expected end 12:05",
        "calibrate: 6/10 (60 %), 3 min 00 s elapsed, 2 min 00 s left, expected end 12:05",
        "calibrate: 8/10 (80 %), 4 min 00 s elapsed, 1 min 00 s left, expected end 12:05",
        "calibrate: finished, 10/10 in 5 min 00 s",
    ]


def test_minutes_pass_while_nothing_is_reported(plain):
    progress, lines, clock = plain
    progress("judge", 0, 4)
    clock.now += 59
    progress.tick()
    assert len(lines) == 1
    clock.now += 1
    progress.tick()
    progress.tick()
    assert lines[1:] == ["judge: 0/4 (0 %), 1 min 00 s elapsed, end unknown yet"]


def test_the_expected_end_is_that_of_the_work_of_this_run(plain):
    """A run that is resumed begins with work that took it no time; an end on another day is given with its date."""
    progress, lines, clock = plain
    progress("learn R1", 50, 100)
    clock.now += 24 * 3600
    progress("learn R1", 60, 100)
    assert lines[-1] == "learn R1: 60/100 (60 %), 24 h 00 min elapsed, 96 h 00 min left, expected end 2026-03-06 12:00"


def test_short_stages_and_stages_that_come_again(plain):
    progress, lines, clock = plain
    progress("compare", 1, 1)
    progress("compare", 1, 1)
    progress("compare", 0, 1)
    clock.now += 2
    progress("compare", 1, 1)
    assert lines == [
        "compare: finished, 1/1 in 0 s",
        "compare: started, 0/1 done",
        "compare: finished, 1/1 in 2 s",
    ]


def test_bytes_are_given_with_their_speed_and_steps_with_their_loss(plain):
    progress, lines, clock = plain
    progress(STREAMED, 0, 4 * 10**9)
    clock.now += 60
    progress(STREAMED, 10**9, 4 * 10**9)
    assert lines[1].startswith(f"{STREAMED}: 1.00/4.00 GB, 17 MB/s (25 %)")
    step_report(progress)("end-to-end", Step(1, 0.5, 1e-7, 1000.0), 10)
    assert lines[2] == "learn end-to-end: started, 1/10 done; loss 0.5000, 1000 tokens/s, off orthogonal by 1e-07"


def test_quiet_says_nothing_and_an_interrupt_says_what_to_do(capsys, tmp_path):
    with stages(quiet=True) as progress:
        progress("stage", 0, 2)
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt), stages(out=tmp_path / "out"):
        raise KeyboardInterrupt
    said = " ".join(capsys.readouterr().err.split())
    assert said == f"interrupted: nothing was written to {tmp_path / 'out'}; rerun the same command to resume"


def test_the_command_line_reports_plain_lines_and_keeps_json_pure(run, folder, tmp_path, monkeypatch):
    """No terminal here. The url of what was pushed goes to standard error."""
    pushed = []
    monkeypatch.setattr(hub, "check_repo", lambda repo: None)
    monkeypatch.setattr(hub, "push_folder", lambda *given: pushed.append(given) or f"https://huggingface.co/{given[1]}")
    command = ("rotate", folder, tmp_path / "out", "--text", "manual", "--json", "--push-to-hub", "me/out")
    code, out, errors = run(*command)
    assert code == 0, errors
    assert json.loads(out)["spec"]
    assert f"{STREAMED}: finished" in errors and "https://huggingface.co/me/out" in errors
    assert pushed == [(tmp_path / "out", "me/out")]
    code, out, errors = run(*command, "--force", "--quiet")
    assert (code, errors) == (0, "") and json.loads(out)["spec"] and len(pushed) == 2


def test_learn_reports_every_stage(run, folder, tmp_path):
    command = [
        "learn",
        folder,
        tmp_path / "out",
        "--scheme",
        "A4KV4",
        "--rotations",
        "R1,R2",
        "--calibration",
        "manual",
    ]
    command += ["--samples", "6", "--sample-length", "24", "--windows", "2", "--baselines", "2", "--steps", "3"]
    code, _, errors = run(*command, "--method", "local+end-to-end", "--batch", "2", "--rows", "32")
    assert code == 0, errors
    for stage in (
        "score random rotations",
        "capture activations",
        "learn residual",
        "score local",
        "learn local+end-to-end",
    ):
        assert f"{stage}: finished" in errors, errors
    assert "loss" in errors
