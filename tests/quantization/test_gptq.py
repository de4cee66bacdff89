"""Laws of GPTQ and of calibrated quantization block by block."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CONFIGS, logits, tiny_model, tokens
from spinquant import (
    Calibration,
    CalibrationError,
    GPTQOptions,
    Options,
    RotationSpec,
    Scheme,
    SchemeError,
    attach,
    detach,
    fuse_module,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize,
    quantize_folder,
)
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import quantize_blocks
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.calibration.sequential import after_blocks, block_calls, run_block
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.models.capture import captured
from spinquant.models.modules import named_tensor
from spinquant.quantization.clip_search import search_input_clip
from spinquant.quantization.gptq import BLOCK_COLUMNS, Moments, gptq
from spinquant.quantization.integer import decode, dequantize, encode, fake_quantize, grid, quantize_on_grid
from spinquant.quantization.rtn import quantize_weight
from spinquant.quantization.scheme import Clips, Quantizer

FAST = Options(prove=False)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(tokens_, width, seed=0):
    return random(tokens_, width, seed=seed) @ (random(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))


def moments_of(x, exact=None):
    moments = Moments()
    half = len(x) // 2
    moments.add(x[:half], None if exact is None else exact[:half])
    moments.add(x[half:], None if exact is None else exact[half:])
    return moments


def by_definition(weight, x, quantizer, damping):
    """Column by column: round, then the least-squares best of the remaining columns, solved anew each time."""
    square = x.T @ x / len(x)
    square = square + damping * square.diagonal().mean() * torch.eye(len(square), dtype=x.dtype)
    scale, zero = grid(weight, quantizer, weight.dtype)
    work, out = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        out[:, j] = decode(encode(work[:, j : j + 1], scale, zero, quantizer), scale, zero)[:, 0]
        error = out[:, j] - work[:, j]
        rest = square[j + 1 :, j + 1 :]
        if len(rest):
            work[:, j + 1 :] -= error[:, None] * torch.linalg.solve(rest, square[j + 1 :, j])
    return out


@pytest.mark.parametrize("quantizer", [Quantizer(4, symmetric=True), Quantizer(3)])
@pytest.mark.parametrize("columns", [20, BLOCK_COLUMNS + 9])
@pytest.mark.parametrize("panel", [7, 512])
def test_gptq_is_the_greedy_least_squares_solution(quantizer, columns, panel, monkeypatch):
    monkeypatch.setattr("spinquant.quantization.gptq.PANEL", panel)
    weight, x = random(6, columns, seed=3), correlated(400, columns)
    found = dequantize(gptq(weight, moments_of(x), quantizer, GPTQOptions(damping=0.01)))
    torch.testing.assert_close(found, by_definition(weight, x, quantizer, 0.01), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [GPTQOptions(), GPTQOptions(act_order=True)])
@pytest.mark.parametrize("group", [None, 16, 48])
def test_gptq_preserves_outputs_better_than_rtn(group, options):
    weight, x = random(24, 288, seed=3), correlated(2000, 288)
    quantizer = Quantizer(3, symmetric=True, group_size=group, clip="mse")

    def error(packed):
        return ((dequantize(packed) - weight) @ x.T).norm()

    assert error(gptq(weight, moments_of(x), quantizer, options)) < 0.85 * error(quantize_weight(weight, quantizer))


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "mxfp4"])
def test_gptq_preserves_outputs_better_than_rtn_in_floating_formats(kind):
    weight, x = random(24, 288, seed=3), correlated(2000, 288)
    quantizer = parse_scheme(f"W{kind}A16").weights
    found, nearest = gptq(weight, moments_of(x), quantizer), quantize_weight(weight, quantizer)

    def error(packed):
        return ((dequantize(packed) - weight) @ x.T).norm()

    assert error(found) < 0.9 * error(nearest)
    again = quantize_on_grid(dequantize(found), found.scale, found.zero, quantizer)
    assert torch.equal(again.words, found.words)


@pytest.mark.parametrize("group", [None, 48])
def test_rows_do_not_influence_each_other(group):
    weight, x = random(10, 288, seed=3), correlated(1000, 288)
    quantizer = Quantizer(4, symmetric=True, group_size=group, clip="mse")
    whole, part = gptq(weight, moments_of(x), quantizer), gptq(weight[3:5], moments_of(x), quantizer)
    assert torch.equal(whole.words[3:5], part.words) and torch.allclose(whole.scale[3:5], part.scale)


def test_gptq_equals_rtn_for_uncorrelated_inputs():
    x = torch.eye(32, dtype=torch.float64).repeat(4, 1) * 3
    weight, quantizer = random(8, 32, seed=1), Quantizer(4, symmetric=True, clip="mse")
    for options in (GPTQOptions(), GPTQOptions(act_order=True)):
        found = gptq(weight, moments_of(x), quantizer, options)
        assert torch.equal(dequantize(found), dequantize(quantize_weight(weight, quantizer)))


def test_dead_inputs_are_quantized_by_rtn_and_do_not_affect_others():
    weight, x = random(8, 40, seed=1), correlated(500, 40)
    x[:, [3, 17]] = 0
    quantizer = Quantizer(4, symmetric=True)
    found = dequantize(gptq(weight, moments_of(x), quantizer))
    nearest = dequantize(quantize_weight(weight, quantizer))
    assert torch.equal(found[:, [3, 17]], nearest[:, [3, 17]])
    living = [i for i in range(40) if i not in (3, 17)]
    assert not torch.equal(found[:, living], nearest[:, living])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("panel", [6, 512])
def test_asymmetric_target_is_the_other_models_output(panel, act_order, monkeypatch):
    """With fine grids the solution is the least-squares fit of W X~ by Q X, not W."""
    monkeypatch.setattr("spinquant.quantization.gptq.PANEL", panel)
    weight, exact = random(8, 40, seed=1), correlated(3000, 40)
    x = 0.8 * exact + 0.3 * random(3000, 40, seed=9)
    quantizer = Quantizer(8, symmetric=True)
    fitted = torch.linalg.lstsq(x, exact @ weight.T).solution.T
    found = dequantize(gptq(weight, moments_of(x, exact), quantizer, GPTQOptions(0, act_order, 1.0)))
    plain = dequantize(gptq(weight, moments_of(x, exact), quantizer))
    assert (found - fitted).norm() < 0.02 * fitted.norm()
    assert (plain - fitted).norm() > 0.1 * fitted.norm()
    error = ((found @ x.T) - (weight @ exact.T)).norm()
    assert error < 0.97 * ((plain @ x.T) - (weight @ exact.T)).norm()


def most_allocated(run):
    """The most bytes of tensors that there were at once: of torch's own record, whatever the allocator then does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(("exact", "matrices"), [(False, 1.5), (True, 2.0)])
def test_peak_memory_is_one_float64_matrix_beside_the_moments(exact, matrices, monkeypatch):
    """Of n inputs, in units of n x n in float64; the moments are float32, half of one each."""
    n, panel = 512, 16
    monkeypatch.setattr("spinquant.quantization.gptq.PANEL", panel)
    x, weight = random(64, n).float(), random(4, n).float()

    def run():
        moments = Moments()
        moments.add(x, x if exact else None)
        gptq(weight, moments, Quantizer(4), GPTQOptions(act_order=True, asymmetry=0.5))

    assert matrices <= most_allocated(run) / (8 * n * n) < matrices + 4 * panel / n


def test_unusable_moments_are_refused():
    weight, quantizer = random(4, 40), Quantizer(4)
    with pytest.raises(CalibrationError, match="singular"):
        gptq(weight, moments_of(random(8, 40)), quantizer, GPTQOptions(damping=0))
    with pytest.raises(CalibrationError, match="not finite"):
        gptq(weight, moments_of(random(80, 40) / 0), quantizer)
    with pytest.raises(CalibrationError, match="no calibration token"):
        gptq(weight, Moments(), quantizer)
    for bad in ({"damping": -1.0}, {"asymmetry": 2.0}):
        with pytest.raises(CalibrationError):
            GPTQOptions(**bad)


@pytest.mark.parametrize("name", CONFIGS)
def test_running_block_by_block_equals_the_model(name):
    model, ids = tiny_model(name), tokens()
    plan = plan_of(model)
    before = logits(model, ids)
    with Float64Arithmetic():
        calls = block_calls(model, plan.blocks, ids)
        found = []
        for state in calls.hidden:
            for block in plan.blocks:
                state = run_block(model.get_submodule(block), state, calls.arguments[block][0])
            found.append(model.lm_head(after_blocks(model, plan.blocks, state)))
    scaling = getattr(model.config, "logits_scaling", 1.0)
    assert torch.allclose(torch.cat(found) / scaling, before, atol=1e-9)
    assert torch.equal(logits(model, ids), before)


def rotated(name="llama", rotations="R1,R2,R3,R4"):
    model = tiny_model(name)
    plan = plan_of(model)
    made = make_rotations(plan, RotationSpec(rotations))
    fuse_module(model, plan, made)
    return model, plan, made


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("asymmetry", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_each_linear_is_calibrated_on_inputs_from_the_quantized_model(name, asymmetry, sequential):
    """Compares one linear of the second block with `gptq` on inputs captured by hand."""
    scheme = parse_scheme("W3A6KV6")
    options = GPTQOptions(asymmetry=asymmetry)
    model, plan, made = rotated(name)
    ids = tokens(6, 20)
    target = "model.layers.1.mlp.down_proj"
    original = model.get_submodule(target).weight.detach().clone()
    with attach(model, plan, made), captured(model, [target], inputs=True) as seen:
        exact = [seen[target] for row in ids.split(1) if logits(model, row) is not None]
    with Float64Arithmetic():
        quantize_blocks(model, plan, made, scheme, ids, Calibration(options, sequential=sequential))
    # Earlier blocks are quantized; in the second block, the linears before down_proj only if sequential.
    if not sequential:
        whole, _, _ = rotated(name)
        for linear in (n for group in plan.linears for n in group if n.startswith("model.layers.1.")):
            model.get_submodule(linear).weight.data = whole.get_submodule(linear).weight.data
    with attach(model, plan, made, scheme), captured(model, [target], inputs=True) as seen:
        inputs = [seen[target] for row in ids.split(1) if logits(model, row) is not None]
    moments = Moments()
    for x, x_exact in zip(inputs, exact, strict=True):
        moments.add(x, x_exact if asymmetry else None)
    expected = dequantize(gptq(original, moments, scheme.weights, options))
    redone, plan, made = rotated(name)
    with Float64Arithmetic():
        quantize_blocks(redone, plan, made, scheme, ids, Calibration(options, sequential=sequential))
    assert (redone.get_submodule(target).weight - expected).abs().max() < 1e-9


def kl(reference, other):
    return torch.nn.functional.kl_div(
        other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrated_models_are_closer_to_the_original(name):
    ids, scheme = tokens(24, 24), parse_scheme("W3A6KV6")
    reference = logits(tiny_model(name), ids)
    errors = {}
    for method in ("rtn", "gptq", "gptaq"):
        model = tiny_model(name)
        given = None if method == "rtn" else ids
        quantize(model, scheme, RotationSpec("R1,R2,R3,R4"), method=method, tokens=given, options=FAST)
        errors[method] = float((logits(model, ids) - reference).square().sum())
    assert errors["gptaq"] < errors["gptq"] < 0.95 * errors["rtn"]


def test_clip_search_finds_the_best_ratio_and_attaches_it():
    x, weight, quantizer = random(500, 32), random(8, 32, seed=2), Quantizer(3)
    x[0] *= 30
    x[:, 0] *= 4
    ratio = search_input_clip([(x, weight)], quantizer)
    assert ratio == search_input_clip([(x, torch.cat([weight] * 8))], quantizer), "tall and wide weights agree"

    def error(c):
        return ((fake_quantize(x, replace(quantizer, clip=c)) - x) @ weight.T).norm()

    assert ratio < 1
    assert torch.isclose(error(ratio), min(error(1 - i / 40) for i in range(17)))
    model, ids, scheme = tiny_model("llama"), tokens(6, 24), parse_scheme("W8A4KV3")
    calibration = Calibration(clips=True)
    result = quantize(model, scheme, RotationSpec("R1,R3"), tokens=ids, calibration=calibration, options=FAST)
    assert len(result.clips.inputs) == 3 * 4 and len(result.clips.keys) == len(result.clips.values) == 3
    assert all(0 < c <= 1 for part in result.clips.to_dict().values() for c in part.values())
    assert min(result.clips.inputs.values()) < 1
    clipped = logits(model, ids)
    assert torch.equal(logits(model, ids, use_cache=True), clipped)
    detach(model)
    with attach(model, result.plan, result.rotations, replace(scheme, weights=None)):
        assert not torch.equal(logits(model, ids), clipped)
    with attach(model, result.plan, result.rotations, replace(scheme, weights=None), result.clips):
        assert torch.allclose(logits(model, ids), clipped)


def test_an_interrupted_calibration_resumes_after_the_finished_blocks(tmp_path):
    ids, scheme = tokens(6, 20), parse_scheme("W4A4KV4")
    calibration = Calibration(GPTQOptions(asymmetry=0.5), clips=True)
    whole, plan, made = rotated()
    clips = quantize_blocks(whole, plan, made, scheme, ids, calibration)
    expected = {name: parameter.clone() for name, parameter in whole.named_parameters()}

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 2:
            raise Killed

    model, plan, made = rotated()
    with pytest.raises(Killed):
        store = BlockStore(Pieces(tmp_path / "store", ["a"]))
        quantize_blocks(model, plan, made, scheme, ids, calibration, store=store, progress=kill)
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2
    model, plan, made = rotated()
    store = BlockStore(Pieces(tmp_path / "store", ["a"]))
    assert store.load(plan.blocks[1]) is not None and store.load(plan.blocks[2]) is None
    found = quantize_blocks(model, plan, made, scheme, ids, calibration, store=store)
    assert found.to_dict() == clips.to_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    # Finished blocks are loaded, not calibrated again: a changed block in the store is found in the model.
    packed, kept = store.load(plan.blocks[0]) or pytest.fail("block 0 was not kept")
    linear, weight = next(iter(packed.items()))
    store.save(plan.blocks[0], {**packed, linear: replace(weight, words=weight.words.flip(0))}, kept)
    model, plan, made = rotated()
    quantize_blocks(model, plan, made, scheme, ids, calibration, store=store)
    assert not torch.equal(named_tensor(model, linear), expected[linear])
    BlockStore(Pieces(tmp_path / "store", ["b"]))
    assert not (tmp_path / "store").exists()


def test_a_folder_resumes_only_for_the_same_weights_and_settings(folder, tmp_path):
    """Other settings, tokens or weights start anew; the same ones resume."""
    options = Options(prove=False)
    fast = {"method": "gptq", "calibration_text": CalibrationText("manual", 4, 16), "text": "manual"}
    store, spec = tmp_path / ".out.run" / "calibration", RotationSpec("R1")

    def run(kill_after=None, **changes):
        seen = []

        def progress(stage, done, total):
            if stage == "calibrate":
                seen.append(store.exists() and len(list(store.glob("*.safetensors"))))
                if done == kill_after:
                    raise KeyboardInterrupt

        chosen = replace(options, progress=progress)
        scheme = parse_scheme("W4A16", weight_clip=changes.pop("clip", "mse"))
        quantize_folder(folder, tmp_path / "out", scheme, spec, **{**fast, **changes}, force=True, options=chosen)
        return seen

    def killed(**changes):
        with pytest.raises(KeyboardInterrupt):
            run(kill_after=2, **changes)
        return len(list(store.glob("*.safetensors")))

    assert killed() == 2
    assert run()[0] == 2 and not store.exists(), "resumes, and leaves no state"
    for change in ({"clip": 0.9}, {"calibration_text": CalibrationText("manual", 5, 16)}, {"method": "gptaq"}):
        killed()
        assert run(**change)[0] == 1, change
    killed()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert run()[0] == 1


def test_activations_that_are_not_finite_are_named():
    model, plan, made = rotated()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.(up_proj|down_proj)"):
        quantize_blocks(model, plan, made, Scheme(kv=Quantizer(4)), tokens(), Calibration())
    assert not any(module._forward_pre_hooks for module in model.modules()), "nothing stays attached"


def test_the_head_is_calibrated_where_the_scheme_covers_it():
    ids = tokens(24, 24)
    reference = logits(tiny_model("qwen3"), ids)
    errors = {}
    for method in ("rtn", "gptq"):
        model = tiny_model("qwen3")
        scheme = parse_scheme("W3A16", lm_head=True)
        quantize(model, scheme, RotationSpec("R1"), method=method, tokens=ids, options=FAST)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        errors[method] = float((logits(model, ids) - reference).square().sum())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_missing_inputs_of_calibration_are_refused_before_any_work():
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="tokens"):
        quantize(model, "W4A16", method="gptq", options=FAST)
    with pytest.raises(SchemeError, match="16 bits"):
        quantize(model, "KV4", method="gptq", tokens=tokens(), options=FAST)
    with pytest.raises(SchemeError, match="clip"):
        quantize(model, "W4A16", tokens=tokens(), calibration=Calibration(clips=True), options=FAST)
    with pytest.raises(CalibrationError, match="asymmetry"):
        options = Calibration(GPTQOptions(asymmetry=1.0))
        quantize(model, "W4A16", method="gptq", tokens=tokens(), calibration=options, options=FAST)
    idle = (
        Calibration(GPTQOptions(damping=0.1)),
        Calibration(GPTQOptions(act_order=True)),
        Calibration(sequential=True),
        Calibration(round_inputs=False),
    )
    for calibration in idle:
        with pytest.raises(CalibrationError, match="rtn"):
            quantize(model, "W4A4", tokens=tokens(), calibration=calibration, options=FAST)
    assert torch.equal(logits(model, tokens()), logits(tiny_model("llama"), tokens()))


def test_generated_text_is_reproducible_and_likely_under_the_model():
    model = tiny_model("llama")
    source = CalibrationText("generated", samples=20, length=9, seed=4)
    done = []
    name, found = calibration_tokens(model, None, source, progress=lambda *n: done.append(n))
    assert name == "generated" and found.shape == (20, 9) and done[-1] == (20, 20)
    assert torch.equal(found, calibration_tokens(model, None, replace(source, text="auto"))[1])
    assert not torch.equal(found, calibration_tokens(model, None, replace(source, seed=5))[1])
    # Text sampled from the model is more likely under it than random tokens.
    likely = [
        logits(model, t).log_softmax(-1)[:, :-1].gather(-1, t[:, 1:, None]).mean() for t in (found, tokens(20, 9))
    ]
    assert likely[0] > likely[1] + 0.2


def test_clips_survive_json():
    clips = Clips({"a": 0.9}, {"b": 0.8}, {"b": 0.7})
    assert Clips.from_dict(clips.to_dict()) == clips and clips and not Clips()
