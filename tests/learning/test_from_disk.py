"""`learn` on a model larger than memory selects what it selects in memory, with a few walks through its blocks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import saved
from spinquant import (
    LearningError,
    LearnOptions,
    RotationSpec,
    learn_folder,
    parse_scheme,
    quantize_folder,
    read_learned,
)
from spinquant.calibration.data import CalibrationText
from spinquant.entrypoints.request import LearnText
from spinquant.entrypoints.result import Options
from spinquant.learning.from_disk import MOST_WALKS, check_from_disk
from spinquant.learning.options import Watch
from spinquant.rotations.rotation import matrix

SCHEME, SPEC = parse_scheme("W4A4KV4"), RotationSpec("R1,R2,R3,R4", "random-hadamard")
TEXT = LearnText(CalibrationText("manual", 6, 24), windows=2)
OPTIONS = LearnOptions("closed-form", baselines=2)
LITTLE = 1000  # bytes of memory


def learned(folder, out, scheme=SCHEME, **given):
    arguments = {"text": TEXT, "options": OPTIONS, **given}
    return learn_folder(folder, out, scheme, SPEC, **arguments)


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A16"])
def test_learning_from_disk_selects_what_learning_in_memory_selects(scheme, tmp_path):
    folder = with_large_channels(saved(tmp_path / "model", "qwen3", torch.float64))
    expected = learned(folder, tmp_path / "memory", parse_scheme(scheme))
    found = learned(folder, tmp_path / "disk", parse_scheme(scheme), memory=LITTLE)
    for key in ("kept", "learned", "start", "clips", "rotation_of", "tokens", "scheme"):
        assert found.record[key] == expected.record[key], key
    assert found.record["closed_form"].keys() == expected.record["closed_form"].keys()
    for kind, about in expected.record["closed_form"].items():
        assert found.record["closed_form"][kind] == {**about, "kl": pytest.approx(about["kl"], rel=1e-3)} | {
            "condition": pytest.approx(about["condition"], rel=1e-3)
        }
    for candidate, score in expected.record["scores"].items():
        assert found.record["scores"][candidate]["kl"] == pytest.approx(score["kl"], rel=1e-3, abs=1e-9), candidate
    assert found.kept == expected.kept and found.rotations.keys() == expected.rotations.keys()
    for space, transform in expected.rotations.items():
        a, b = (matrix(one).double() for one in (found.rotations[space], transform))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())), space
    least = 7 if scheme == "W4A4KV4" else 3  # without clip ratios
    assert least <= found.record["walks"] <= MOST_WALKS and "walks" not in expected.record
    assert any(about["kept"] for about in found.record["closed_form"].values())


def test_kinds_that_do_not_help_are_left_out_as_in_memory(tmp_path, monkeypatch):
    """Kinds behind one that is not kept are judged again without it."""
    folder = with_large_channels(saved(tmp_path / "model", "llama", torch.float64))
    for name in ("spinquant.learning.closed_form_steps", "spinquant.learning.from_disk"):
        monkeypatch.setattr(f"{name}.closed_form_transforms", spoiled)
    expected = learned(folder, tmp_path / "memory").record["closed_form"]
    found = learned(folder, tmp_path / "disk", memory=LITTLE).record["closed_form"]
    kept = {kind: about["kept"] for kind, about in expected.items()}
    assert not kept["values"] and any(kept.values())
    assert {kind: about["kept"] for kind, about in found.items()} == kept
    assert all(about["kl"] == pytest.approx(expected[kind]["kl"], rel=1e-3) for kind, about in found.items())


def with_large_channels(folder):
    """The model with a few large channels in its MLPs, which scales make small, and the same function."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, weight in tensors.items():
        if name.endswith("up_proj.weight"):
            weight[::20] *= 30
            if (bias := name.replace("weight", "bias")) in tensors:
                tensors[bias][::20] *= 30
            tensors[name.replace("up_proj", "down_proj")][:, ::20] /= 30
    save_file(tensors, file, {"format": "pt"})
    return folder


def spoiled(plan, moments, **options):
    """Closed-form transforms, those of values inverted, so that they make rounding worse."""
    from spinquant import Matrix
    from spinquant.learning.free_transforms import closed_form_transforms, kind_of

    found = closed_form_transforms(plan, moments, **options)
    return {
        name: Matrix(torch.linalg.inv(one.weight)) if kind_of(plan.space[name]) == "values" else one
        for name, one in found.items()
    }


def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path):
    given, stages = {"scheme": parse_scheme("A4"), "memory": LITTLE}, []
    expected = learned(folder, tmp_path / "whole", **given)

    def stop(name, done, total):
        if name == "collect moments" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(folder, tmp_path / "out", **given, watch=Watch(stop))
    found = learned(folder, tmp_path / "out", **given, watch=Watch(lambda *n: stages.append(n)))
    assert stages[0] == ("collect moments", 6, 7) and not any("random" in name for name, _, _ in stages)
    assert found.rotations.keys() == expected.rotations.keys()
    assert found.record["scores"] == expected.record["scores"]
    tensors = [load_file(tmp_path / out / "rotations.safetensors") for out in ("whole", "out")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_an_interrupted_run_goes_on_as_it_began_whatever_memory_is_free(folder, tmp_path, monkeypatch):
    given, stages = {"scheme": parse_scheme("A4")}, []
    expected = learned(folder, tmp_path / "whole", **given)

    def stop(name, done, total):
        if name == "collect moments":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(folder, tmp_path / "out", **given, watch=Watch(stop))
    monkeypatch.setattr("spinquant.entrypoints.learn.fits_in_memory", lambda *_, **__: False)
    found = learned(folder, tmp_path / "out", **given, watch=Watch(lambda *n: stages.append(n)))
    assert not any("random" in name for name, _, _ in stages) and "walks" not in found.record
    assert found.record["scores"] == expected.record["scores"]
    assert "walks" in learned(folder, tmp_path / "new", **given).record


def test_quantize_learns_from_disk_within_its_memory(folder, tmp_path):
    options = Options(prove=False, memory=LITTLE)
    given = {"learn": LearnOptions("random", baselines=1), "learn_text": TEXT, "text": None, "options": options}
    result = quantize_folder(folder, tmp_path / "out", "A4", SPEC, **given)
    assert result.learned is not None and result.learned.record["walks"] > 0
    record = json.loads((tmp_path / "out" / "spinquant" / "record.json").read_text())
    assert record["learned"]["kept"] == result.learned.kept


def test_the_command_reads_from_disk_within_the_memory_given(run, folder, tmp_path):
    out = tmp_path / "learned"
    words = ["learn", folder, out, "--scheme", "A4KV4", "--samples", 4, "--sample-length", 16, "--windows", 2]
    code, _, err = run(*words, "--method", "random", "--baselines", 2, "--memory", "1KB", "--quiet")
    assert code == 0, err
    assert read_learned(out).record["walks"] >= 3
    code, _, err = run(*words, "--force", "--method", "local", "--memory", "1KB", "--quiet")
    assert code != 0 and "--method local needs the model in memory" in err


@pytest.mark.parametrize(
    ("options", "start", "named"),
    [
        (LearnOptions("auto"), False, "--method auto"),
        (LearnOptions("random", transforms=True), False, "--transforms"),
        (LearnOptions("closed-form", signs=2), False, "--signs"),
        (LearnOptions("closed-form"), True, "--start"),
    ],
)
def test_options_that_need_the_model_in_memory_are_refused(options, start, named):
    with pytest.raises(LearningError, match=f"{named} needs the model in memory"):
        check_from_disk(options, start=start)


def test_text_that_the_model_generates_is_that_in_memory(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    text = LearnText(CalibrationText("generated", 4, 12), windows=2)
    options = LearnOptions("random", baselines=1)
    first, second = (
        learned(folder, tmp_path / str(memory), memory=memory, text=text, options=options) for memory in (None, LITTLE)
    )
    assert first.record["tokens"] == second.record["tokens"]
    assert second.record["scores"]["random 0"]["kl"] == pytest.approx(
        first.record["scores"]["random 0"]["kl"], rel=1e-3
    )
