"""Laws of tuning: gradients, what stays, what is restored, and that the folder computes what was tuned."""

import copy
from dataclasses import replace

import pytest
import torch

from families import tiny
from models import CONFIGS, logits, tiny_model, tokens
from spinquant import (
    CalibrationError,
    LearningError,
    Options,
    RotationSpec,
    SchemeError,
    TuneOptions,
    attach,
    load,
    parse_scheme,
    plan_of,
    quantize,
    save,
)
from spinquant.calibration.block_store import BlockStore
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.learning.continuous import Scales, movables
from spinquant.learning.tuning import _kl, _mean_kl, predictions, split_held_out
from spinquant.quantization.integer import quantize_on_grid
from spinquant.quantization.rtn import round_weights
from spinquant.quantization.targets import weights_of

ALL = "R1,R2,R3,R4"
QUICK = TuneOptions(steps=5, batch=2, lr=0.01, windows=2)


def small():
    """A Llama of one layer with biases."""
    return tiny_model("llama", dtype=torch.float32, layers=1)


def repeated(count=12, length=16):
    """Calibration tokens whose end repeats their beginning, so that tuning on them helps the held-out windows too."""
    one = tokens(2, length)
    return one.repeat(count // 2, 1)


def tuned(model, scheme="W4A4KV4", options=QUICK, ids=None, **given):
    """Quantize and tune a model; the result."""
    ids = repeated() if ids is None else ids
    return quantize(model, scheme, RotationSpec(ALL), tune=options, tokens=ids, options=Options(prove=False), **given)


def everything(model):
    """All numbers of a model: the state dict and the grids of the weights."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def codes(model, scheme):
    """The codes of all weights."""
    plan, found = plan_of(model), {}
    for weight in weights_of(plan, scheme):
        scale, zero = weight.grid(model)
        found[weight.tensor] = quantize_on_grid(weight.matrices(model), scale, zero, scheme.weights).words
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4g8A16"])
def test_gradients_are_derivatives(name, scheme):
    """Without quantized activations the loss is smooth in scales, norms and biases; Conv1D and experts included."""
    model = (tiny_model(name, layers=2) if name in CONFIGS else tiny(name)).requires_grad_(False)
    plan, scheme = plan_of(model), parse_scheme(scheme)
    with Float64Arithmetic():
        wanted = predictions(model, tokens(1), replace(QUICK, top_tokens=20))
        wanted = replace(wanted, values=wanted.values.double())
        round_weights(model, plan, scheme)
        with attach(model, plan, {}, scheme) as attachment:
            found = movables(model, plan, scheme, attachment)
            assert {one.kind for one in found} >= {"scales", "norms"}
            generator = torch.Generator().manual_seed(0)
            directions = [torch.randn(one.theta.shape, generator=generator, dtype=torch.float64) for one in found]
            for kind in {one.kind for one in found}:
                chosen = [(one, d) for one, d in zip(found, directions, strict=True) if one.kind == kind]
                slope = sum(float((d * gradient_of(model, wanted, one)).sum()) for one, d in chosen)
                step, losses = 1e-6, []
                for sign in (1, -1):
                    for one, direction in chosen:
                        one.theta.copy_(sign * step * direction)
                        one.write()
                    losses.append(float(_kl(model, wanted, 0)))
                for one, _ in chosen:
                    one.theta.zero_()
                    one.write()
                assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8), kind


def gradient_of(model, wanted, one):
    """The gradient of the loss by the theta of one part."""
    with one.listening():
        _kl(model, wanted, 0).backward()
    gradient, one.theta.grad = one.theta.grad, None
    return torch.zeros_like(one.theta) if gradient is None else gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W3g8A8", "WFP8AFP8"])
def test_theta_of_zero_changes_no_bit(dtype, scheme):
    model, scheme = tiny_model("llama", dtype=dtype), parse_scheme(scheme)
    plan = plan_of(model)
    round_weights(model, plan, scheme)
    before = copy.deepcopy(everything(model))
    with attach(model, plan, {}, scheme) as attachment:
        for one in movables(model, plan, scheme, attachment):
            one.write()
    assert same(everything(model), before)


@pytest.mark.parametrize(
    ("scheme", "format", "dtype"),
    [
        ("W4A4KV4", "native", torch.float32),
        ("W4g8A4KV4", "native", torch.bfloat16),
        ("A4KV4", "native", torch.float32),
        ("W4A8", "compressed-tensors", torch.float32),
        ("W4g16A16", "compressed-tensors", torch.bfloat16),
    ],
)
def test_the_folder_computes_what_was_tuned(tmp_path, scheme, format, dtype):
    if format != "native":
        pytest.importorskip("compressed_tensors")
    model, ids = tiny_model("llama", dtype=dtype, layers=1), tokens()
    spec = RotationSpec(ALL if format == "native" else "R1,R2")
    given = {"options": Options(prove=False), "tokens": repeated(), "format": format}
    given["tune"] = replace(QUICK, steps=10)
    result = quantize(model, scheme, spec, method="gptq" if "W" in scheme else "rtn", **given)
    record = result.record()["tuning"]
    assert record["kept"] and record["kl"]["after"] < record["kl"]["before"]
    assert ("clips" in record["numbers"]) == (format == "native" and "A16" not in scheme)
    held_out = predictions(tiny_model("llama", dtype=dtype, layers=1), repeated()[-2:], given["tune"])
    assert _mean_kl(model, held_out) == record["kl"]["after"]  # what was judged is what is returned
    expected = logits(model, ids)
    save(result, tmp_path / "out", format=format)
    assert torch.equal(logits(load(tmp_path / "out"), ids), expected)


def test_codes_stay_and_the_rest_moves():
    scheme = parse_scheme("W4A4KV4")
    plain, moved = (small() for _ in range(2))
    quantize(plain, scheme, RotationSpec(ALL), options=Options(prove=False))
    result = tuned(moved, scheme)
    assert result.notes["tuning"]["kept"]
    assert same(codes(plain, scheme), codes(moved, scheme))
    before, after = everything(plain), everything(moved)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {n for n in before if "embed_tokens" in n or n == "lm_head.weight" or "inv_freq" in n}
    ratios = [ratio for part in result.clips.to_dict().values() for ratio in part.values()]
    assert len(ratios) == 4 + 1 + 1  # inputs of four groups of linears, keys, values
    assert all(0 < ratio < 1 for ratio in ratios)


def test_what_does_not_help_is_undone():
    """Steps that are much too long: KL grows, and nothing is left of them."""
    scheme = parse_scheme("W4A4KV4")
    plain, moved = (small() for _ in range(2))
    quantize(plain, scheme, RotationSpec(ALL), options=Options(prove=False))
    result = tuned(moved, scheme, replace(QUICK, lr=1.0))
    record = result.record()["tuning"]
    assert not record["kept"] and record["kl"]["after"] > record["kl"]["before"]
    assert not result.clips
    assert same(everything(plain), everything(moved))
    assert torch.equal(logits(plain, tokens()), logits(moved, tokens()))


def test_flags_of_parameters_and_modes_are_left_alone():
    model = small().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tuned(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_order_of_samples_comes_from_the_seed_and_checkpointing_changes_nothing():
    ids = tokens(16, 12)
    models = [small() for _ in range(4)]
    ways = [QUICK, QUICK, replace(QUICK, checkpointing=True), replace(QUICK, seed=1)]
    records = [tuned(m, options=way, ids=ids).record()["tuning"] for m, way in zip(models, ways, strict=True)]
    losses = [record["losses"] for record in records]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert same(everything(models[0]), everything(models[1]))
    assert same(everything(models[0]), everything(models[2]))


class Stop(Exception):
    pass


def test_an_interrupted_tuning_resumes_and_loses_nothing_else(tmp_path):
    way = replace(QUICK, save_every=2)
    plain, whole, killed, again = (small() for _ in range(4))
    quantize(plain, "W4A4KV4", RotationSpec(ALL), options=Options(prove=False))
    expected = tuned(whole, options=way)
    stages = []

    def progress(stage, done, total):
        stages.append((stage, done))
        if stage == "tune" and done == 3:
            raise Stop

    def store():
        return BlockStore(Pieces(tmp_path / "pieces", ["these settings"]))

    with pytest.raises(Stop):
        interrupted(killed, way, progress, store())
    assert same(everything(killed), everything(plain))
    stages.clear()
    with pytest.raises(Stop):
        interrupted(small(), way, progress, store())
    assert [done for stage, done in stages if stage == "tune"] == [3]
    result = tuned(again, options=way, store=store())
    assert result.record()["tuning"] == expected.record()["tuning"]
    assert same(everything(again), everything(whole))
    other = tuned(small(), options=replace(way, lr=0.02), store=store())
    assert other.record()["tuning"]["losses"][0] == expected.record()["tuning"]["losses"][0]
    assert other.record()["tuning"]["losses"] != expected.record()["tuning"]["losses"]


def interrupted(model, way, progress, store):
    options = Options(prove=False, progress=progress)
    quantize(model, "W4A4KV4", RotationSpec(ALL), tune=way, tokens=repeated(), store=store, options=options)


def test_held_out_windows_are_not_calibrated_on():
    ids = torch.arange(10).view(10, 1)
    calibrated, held_out = split_held_out(ids, replace(QUICK, windows=3))
    assert calibrated.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert held_out.flatten().tolist() == [7, 8, 9]
    with pytest.raises(CalibrationError, match="at least 11"):
        split_held_out(ids, replace(QUICK, windows=9))


def test_refusals_before_any_work():
    model = small()
    before = copy.deepcopy(everything(model))
    with pytest.raises(LearningError, match="quantizes nothing"):
        tuned(model, "none")
    with pytest.raises(CalibrationError, match="tuning works on calibration tokens"):
        quantize(model, "W4A4", tune=QUICK)
    with pytest.raises(CalibrationError, match="too few"):
        tuned(model, ids=tokens(3))
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"windows": 0}, {"batch": -1}, {"seed": -1}):
        with pytest.raises(LearningError):
            TuneOptions(**wrong)
    assert same(everything(model), before)


def test_tuned_clips_are_not_lost_in_a_format_without_them(tmp_path):
    pytest.importorskip("compressed_tensors")
    model, scheme = small(), parse_scheme("W4A8", activation_symmetric=True)
    given = {"tune": QUICK, "tokens": repeated(), "options": Options(prove=False)}
    result = quantize(model, scheme, RotationSpec("R1,R2"), **given)
    assert result.notes["tuning"]["kept"]
    with pytest.raises(SchemeError, match="tuned"):
        save(result, tmp_path / "out", format="compressed-tensors")


def test_scales_that_are_rounded_themselves_stay():
    model, scheme = tiny_model("llama", dtype=torch.float32), parse_scheme("WMXFP4A16")
    plan = plan_of(model)
    with attach(model, plan, {}, scheme) as attachment:
        assert not any(isinstance(one, Scales) for one in movables(model, plan, scheme, attachment))
