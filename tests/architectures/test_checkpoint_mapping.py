"""Checkpoint mapping: a model filled from its checkpoint equals the one that transformers loads, in every layout."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import assert_same, from_disk, quantize_to_fp8, weights
from families import FAMILIES
from models import byte_tokenizer, logits, random_weights, tokens
from spinquant import (
    CheckpointError,
    Options,
    ProofError,
    RotationSpec,
    load,
    parse_scheme,
    quantize,
    quantize_folder,
    read_headers,
    rotate_folder,
)
from spinquant.architectures import FAMILIES as TABLES
from spinquant.architectures import make_plan
from spinquant.architectures.checkpoint_mapping import form_of
from spinquant.calibration.data import CalibrationText
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.models.modules import model_class
from spinquant.streaming.offloaded_model import OnDisk, check_stored, form_in, hollow_model
from spinquant.streaming.pipeline import Rotated

# MoE families, and families whose checkpoints have other names than their modules.
OTHERWISE = {model_type for table in TABLES if table.experts or table.stored for model_type in table.model_types}
NAMES = [name for name, one in FAMILIES.items() if one.config().get_text_config().model_type in OTHERWISE]
NAMES += ["llava", "opt", "gpt2"]
TEXT = CalibrationText("manual", 4, 16)
UNPROVED = Options(prove=False)


def saved(path: Path, config, dtype=torch.float32, **options) -> Path:
    """A tiny random model of a config, and its tokenizer."""
    random_weights(model_class(config).from_config(config, dtype=dtype)).save_pretrained(path, **options)
    byte_tokenizer().save_pretrained(path)
    return path


def filled(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a hollow model, each while its part is loaded; of the embedding all rows."""
    config = load_config(folder)
    found: dict[str, torch.Tensor] = {}
    with closing(Source(folder, config)) as source:
        home = OnDisk(config, make_plan(config, source.shapes), source, dtype)

        def keep() -> None:
            state = home.model.state_dict()
            found.update({name: tensor.clone() for name, tensor in state.items() if not tensor.is_meta})

        with home.outside(torch.arange(config.get_text_config().vocab_size)):
            keep()
        for block in home.plan.blocks:
            with home.block(block):
                keep()
        with home.head():
            keep()
        assert all(tensor.is_meta for name, tensor in home.model.named_parameters())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_filled_model_equals_what_transformers_loads(name, tmp_path):
    folder = saved(tmp_path, FAMILIES[name].config(), max_shard_size="60KB")
    assert from_disk(folder)
    for dtype in (torch.float32, torch.bfloat16):  # in half types some tensors stay float32
        expected = load(folder, dtype=dtype).state_dict()
        found = filled(folder, dtype)
        assert set(found) == set(expected)
        for tensor, values in expected.items():
            assert found[tensor].dtype == values.dtype, tensor
            assert torch.equal(found[tensor], values), tensor


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "gpt_neox", "lfm2_moe", "olmo_hybrid"])
def test_pieces_cover_every_tensor_exactly_once(name, tmp_path):
    """The pieces of a tensor neither overlap nor leave a gap, and every checkpoint tensor is a piece."""
    config = FAMILIES[name].config()
    folder = saved(tmp_path, config)
    with closing(Source(folder, load_config(folder))) as source:
        model = hollow_model(source_config := load_config(folder), torch.float32)
        form = form_in(model, source, make_plan(source_config, source.shapes))
        assert set(form.of_stored) == set(source.tensors)
        for tensor, pieces in form.pieces.items():
            covered = torch.zeros(model.state_dict()[tensor].shape, dtype=torch.int)
            for piece in pieces:
                covered[... if piece.is_all else piece.place] += 1
            assert (covered == 1).all(), tensor


def test_a_checkpoint_that_lacks_a_piece_is_refused(tmp_path):
    config = FAMILIES["qwen3_moe"].config()
    folder = saved(tmp_path, config)
    assert from_disk(folder)
    with closing(Source(folder, load_config(folder))) as source:
        model, plan = hollow_model(config, torch.float32), make_plan(config, source.shapes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        part, stack = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"
        for wrong in (None, (24, 47), (23, 48), (24, 48, 1)):
            stored = {name: shape for name, shape in source.shapes.items() if name != part}
            stored |= {} if wrong is None else {part: wrong}
            form = form_of(config, plan, shapes, stored)
            assert form.missing == [stack] and form.pieces[stack] == ()
        del source.tensors[part]
        with pytest.raises(CheckpointError, match=f"has no tensor '{stack}'"):
            check_stored(model, source, plan)


DAMAGED = {
    "mixtral": "block_sparse_moe.experts.2.w3",
    "deepseek_v3": "mlp.experts.1.down_proj",
    "granitemoe": "block_sparse_moe.output_linear",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_expert_is_found_on_real_tokens_and_named(name, tmp_path, monkeypatch):
    """By a calibration, by RTN quantization and by a rotation alone; experts included."""
    folder = saved(tmp_path / "model", FAMILIES[name].config())
    spec = RotationSpec("R1,R2,R4")
    given = {"text": "manual", "options": UNPROVED}
    calibrated = {**given, "method": "gptq", "calibration_text": TEXT}
    for i, options in enumerate((given, calibrated)):
        result = quantize_folder(folder, tmp_path / f"{i}", parse_scheme("W4A16"), spec, **options)
        assert result.real is not None and result.real.relative < 1e-4
    result = rotate_folder(folder, tmp_path / "rotated", RotationSpec("R1,R2"), **given)
    assert result.real is not None and result.real.relative < 1e-4
    before = sorted(path.name for path in tmp_path.iterdir())
    whole, damaged = Rotated.whole, f"model.layers.1.{DAMAGED[name]}.weight"
    assert damaged in weights(folder)
    monkeypatch.setattr(Rotated, "whole", lambda self, name: whole(self, name) * (1.3 if name == damaged else 1))
    for options in (given, calibrated):
        with pytest.raises(ProofError, match=r"first module that deviates is 'model\.layers\.1\.\w+\.experts'"):
            quantize_folder(folder, tmp_path / "bad", parse_scheme("W4A4"), spec, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_block_larger_than_the_memory_is_compared_if_more_memory_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("spinquant.entrypoints.stream_run.BLOCK_SHARE", 0)
    monkeypatch.setattr("spinquant.entrypoints.stream_run.BLOCK_FREE", 1000)
    folder, spec = saved(tmp_path / "model", FAMILIES["mixtral"].config()), RotationSpec("R1,R2")
    without = rotate_folder(folder, tmp_path / "without", spec, text="manual", options=UNPROVED)
    assert without.real is None and "--memory 0.1GB" in without.notes["real_tokens"]
    room = Options(prove=False, memory=10**8)
    assert rotate_folder(folder, tmp_path / "with", spec, text="manual", options=room).real is not None
    given = {"method": "gptq", "calibration_text": TEXT, "text": "manual", "options": UNPROVED}
    assert quantize_folder(folder, tmp_path / "out", parse_scheme("W4A16"), spec, **given).real is not None


def test_experts_in_fp8_blocks_are_calibrated_on_their_dequantized_values(tmp_path):
    folder = saved(tmp_path / "model", FAMILIES["deepseek_v3"].config(), torch.bfloat16)
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    exact = quantize_to_fp8(folder)
    kept = {name: tensor.dtype for name, tensor in weights(plain).items()}
    save_file({k: t.to(kept[k]) for k, t in exact.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    given = {"method": "gptq", "calibration_text": TEXT, "text": None, "options": UNPROVED}
    for origin in (folder, plain):
        quantize_folder(origin, tmp_path / f"{origin.name}-out", parse_scheme("W4A8"), RotationSpec(()), **given)
    assert_same(tmp_path / "model-out", tmp_path / "plain-out")
    configs = [json.loads((tmp_path / f"{n}-out" / "config.json").read_text()) for n in ("model", "plain")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", ["llava", "gpt_neox"])
def test_a_head_of_another_name_is_quantized_too(name, tmp_path):
    config = FAMILIES[name].config()
    folder, scheme = saved(tmp_path / "model", config), parse_scheme("W4", lm_head=True)
    stored = set(read_headers(folder))
    assert "lm_head.weight" not in stored
    quantize_folder(folder, tmp_path / "out", scheme, RotationSpec("R2"), text=None, options=UNPROVED)
    heads = {key for key in read_headers(tmp_path / "out") if key.endswith("_scale")} - {f"{n}_scale" for n in stored}
    assert not heads and stored <= set(read_headers(tmp_path / "out"))
    result = quantize(load(folder), scheme, RotationSpec("R2"), options=UNPROVED)
    assert torch.equal(logits(load(tmp_path / "out"), tokens()), logits(result.model, tokens()))
