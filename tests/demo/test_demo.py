"""The demo on a tiny model: the files it writes agree, and the page claims no more than was measured."""

import base64
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from models import byte_tokenizer, tiny_model
from spinquant.demo.page import NOTICEABLE, outcome, page
from spinquant.demo.run import _rounded, run_demo, token_kurtosis, variants_of
from spinquant.errors import CheckpointError, SchemeError, SpinquantError
from spinquant.evaluation.plots import downsample_max, number, plot_perplexities, relative_magnitude
from spinquant.formats.load import load_model
from spinquant.quantization.scheme import parse_scheme
from spinquant.rotations.fuse_module import plan_of

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on the tiny model: (result, folder of the output, stages that were reported)."""
    base = tmp_path_factory.mktemp("demo")
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(base / "tiny <model>")
    byte_tokenizer().save_pretrained(base / "tiny <model>")
    stages = []
    result = run_demo(
        base / "out",
        model=base / "tiny <model>",
        windows=2,
        length=24,
        progress=lambda *stage: stages.append(stage),
    )
    return result, base / "out", stages


def test_writes_pictures_numbers_and_one_page_and_nothing_else(ran):
    result, out, _ = ran
    assert {path.name for path in out.iterdir()} == {*result.pictures, "demo.json", "index.html"}
    assert {path.name for path in out.parent.iterdir()} == {"tiny <model>", "out"}
    for name in result.pictures:
        assert (out / name).read_bytes().startswith(PNG)


def test_the_page_embeds_every_picture_and_asks_for_nothing(ran):
    result, out, _ = ran
    text = (out / "index.html").read_text(encoding="utf-8")
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(embedded) == sorted((out / name).read_bytes() for name in result.pictures)
    without = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link(?! rel=\"icon\" href=\"data:,\")", without)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "tiny <model>" not in text and "tiny &lt;model&gt;" in text
    assert str(out.parent) not in text  # no folder of this machine


def test_json_page_and_result_agree(ran):
    result, out, _ = ran
    data = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(result.to_dict()))
    assert [row[0] for row in data["rows"]] == ["16-bit", "W4", "A4", "KV4", "W4A4KV4"]
    text = (out / "index.html").read_text(encoding="utf-8")
    table = re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>", text)
    assert table == [(label, number(plain), number(rotated)) for label, plain, rotated in data["rows"]]
    for deviation in (data["twin"], data["real"]):
        assert f"{deviation['max_abs']:.1e}" in text


def test_rotating_alone_changes_no_perplexity_and_rounding_does(ran):
    result, _, _ = ran
    (_, plain, rotated), *rest = result.rows
    assert rotated == pytest.approx(plain, rel=1e-3)
    assert result.twin.relative < 1e-9 and result.real.relative < 1e-4
    for label, a, b in rest:
        assert a != plain and b != rotated and a != b, label
    assert set(result.rotations) == {"R1", "R2", "R3", "R4"}


def test_progress_reaches_its_end_in_every_stage(ran):
    _, _, stages = ran
    last = {name: (done, total) for name, done, total in stages}
    assert {"perplexity, plain", "perplexity, rotated", "rotate"} <= set(last)
    assert all(done == total for done, total in last.values())
    for stage in last:
        counts = [done for name, done, _ in stages if name == stage]
        assert counts == sorted(counts)


def test_an_existing_folder_is_kept_unless_forced(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "demo.json").write_text("{}")
    seen = []
    with pytest.raises(CheckpointError, match="exists"):
        run_demo(out, model=folder, windows=1, length=8, progress=lambda *stage: seen.append(stage))
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "mine"] and not seen
    result = run_demo(out, model=folder, windows=1, length=8, scheme="A8", force=True)
    assert [row[0] for row in result.rows] == ["16-bit", "A8"]
    assert not (out / "mine").exists()


def test_missing_matplotlib_is_one_clear_error_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    seen = []
    with pytest.raises(SpinquantError, match=r"matplotlib.*spinquant\[plot\]"):
        run_demo(tmp_path / "out", model=folder, windows=1, length=8, progress=lambda *stage: seen.append(stage))
    assert not (tmp_path / "out").exists() and not seen


def test_a_scheme_without_rounding_is_refused(folder, tmp_path):
    with pytest.raises(SchemeError, match="W4A4KV4"):
        run_demo(tmp_path / "out", model=folder, scheme="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "labels"),
    [
        ("W4A4KV4", ["16-bit", "W4", "A4", "KV4", "W4A4KV4"]),
        ("W4g32A8", ["16-bit", "W4g32", "A8", "W4g32A8"]),
        ("KV2", ["16-bit", "KV2"]),
    ],
)
def test_parts_of_a_scheme(scheme, labels):
    found = variants_of(parse_scheme(scheme))
    assert [label for label, _ in found] == labels
    assert found[-1][1] == parse_scheme(scheme)


def test_rounded_weights_come_back_to_the_last_bit(folder):
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name for name, _ in model.named_buffers()}
    with pytest.raises(KeyboardInterrupt), _rounded(model, plan_of(model), parse_scheme("W3")):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, _ in model.named_buffers()} == buffers


@pytest.mark.parametrize("reference", [1.0, 20.0])
def test_words_never_claim_more_than_the_numbers(reference):
    better = math.exp(2 * NOTICEABLE)
    assert "no difference" in outcome(reference, reference, reference)
    assert "worse" in outcome(reference * 2, reference * 2 * better, reference)
    assert "worse" in outcome(reference * 2, math.inf, reference)
    assert "50% removed" in outcome(reference * 4, reference * 2, reference)
    assert "all removed" in outcome(reference * 4, reference, reference)
    assert "no damage" in outcome(reference, reference / 2, reference)
    assert "only when rotated" in outcome(math.inf, reference, reference)
    assert "fails" in outcome(math.nan, math.nan, reference)


def test_the_page_of_a_run_that_failed_says_so(ran, tmp_path):
    """If rotating made the model worse or gave NaN, the page claims no success and the JSON is valid."""
    result, out, _ = ran
    images = {name: (out / name).read_bytes() for name in result.pictures}
    (_, reference, rotated), *_ = result.rows
    for last in (("W4A4KV4", reference * 2, reference * 9), ("W4A4KV4", reference * 2, math.nan)):
        failed = replace(result, rows=(("16-bit", reference, rotated), last))
        text = page(failed, images)
        assert "rotating made it worse" in text and "removed" not in text
        json.dumps(failed.to_dict(), allow_nan=False)
        plot_perplexities(failed.rows[1:], reference, tmp_path / "bars.png", title="worse")


def test_downsampling_keeps_every_peak():
    x = torch.zeros(100, 300)
    x[57, 211] = 5.0
    small = downsample_max(x, 8, 16)
    assert small.shape == (8, 16) and small.max() == 5.0
    assert torch.equal(downsample_max(x, 200, 400), x)


def test_magnitudes_and_kurtosis_against_definitions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    assert relative_magnitude(x).square().mean(-1).allclose(torch.ones(64), atol=1e-4)
    assert relative_magnitude(torch.zeros(2, 3)).eq(0).all()
    assert token_kurtosis(x) == pytest.approx(3.0, abs=0.1)
    assert token_kurtosis(7 * x + 2) == pytest.approx(token_kurtosis(x), rel=1e-3)
    spike = torch.zeros(1, 1000)
    spike[0, 0] = 1.0
    assert token_kurtosis(spike) == pytest.approx(1000, rel=0.01)
    assert token_kurtosis(torch.ones(2, 8)) == 0.0
