"""Multi-token prediction (MTP) layers: R1 is refused, other rotations keep them, --drop-mtp drops them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding
from typer.testing import CliRunner

from families import FAMILIES
from models import logits, random_weights, tokens
from spinquant import RotationSpec, load, make_plan, rotate_folder
from spinquant.calibration.data import CalibrationText
from spinquant.checkpoint.folder import read_headers
from spinquant.cli.main import app
from spinquant.entrypoints.folders import quantize_folder
from spinquant.entrypoints.result import Options
from spinquant.errors import ArchitectureError, CheckpointError, RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.modules import model_class
from spinquant.quantization.scheme import parse_scheme

QUICK, DROP = Options(prove=False), Options(prove=False, drop_mtp=True)
PREFIX = "model.layers.2."  # after the last layer


class Predictor(nn.Module):
    """A layer as DeepSeek-V3 and GLM-4.5 have it, with the names in their checkpoints."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.enorm, self.hnorm = Glm4MoeRMSNorm(size), Glm4MoeRMSNorm(size)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = Glm4MoeDecoderLayer(config, 0)
        self.shared_head = nn.ModuleDict(
            {"norm": Glm4MoeRMSNorm(size), "head": nn.Linear(size, config.vocab_size, bias=False)}
        )
        self.rotary = Glm4MoeRotaryEmbedding(config)

    def forward(self, embeddings, states):
        positions = torch.arange(states.shape[1])[None]
        read = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(states)], dim=-1))
        read = self.block(read, position_embeddings=self.rotary(read, positions), position_ids=positions)
        return self.shared_head["head"](self.shared_head["norm"](read))


def prepared(module):
    return random_weights(module.double(), seed=4)


@pytest.fixture
def source(tmp_path):
    """A tiny GLM-4.5 in two shards, the second with its MTP layer; and that layer as a module."""
    config = FAMILIES["glm4_moe"].config()
    config.num_nextn_predict_layers = 1
    model = random_weights(model_class(config).from_config(config, dtype=torch.float64))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config._attn_implementation = "eager"
    predictor = prepared(Predictor(config))
    held = {n: t for n, t in predictor.state_dict().items() if "rotary" not in n}
    held = {PREFIX + n.removeprefix("block."): t.clone() for n, t in held.items()}
    held[f"{PREFIX}embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": whole, "model-00002-of-00002.safetensors": held}
    for file, tensors in parts.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, tensors in parts.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, predictor


def states_of(model, ids):
    with Float64Arithmetic(), torch.no_grad():
        return model.get_input_embeddings()(ids), model.model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def drafts(predictor, model, ids):
    with Float64Arithmetic():
        return predictor(*states_of(model, ids))


def opened(folder):
    model = load(folder)
    exact_experts(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def test_r1_is_refused_and_other_rotations_leave_mtp_layers_unchanged(source, tmp_path):
    folder, predictor = source
    with pytest.raises(RotationError, match=r"R1 is impossible.*model\.layers\.2\..*hnorm.*--drop-mtp"):
        rotate_folder(folder, tmp_path / "no", RotationSpec("R1,R2"), text=None, options=QUICK)
    assert not (tmp_path / "no").exists()
    rotate_folder(folder, tmp_path / "out", RotationSpec("R2"), options=QUICK)
    file = "model-00002-of-00002.safetensors"
    before, after = load_file(folder / file), load_file(tmp_path / "out" / file)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    ids = tokens()
    assert torch.allclose(
        drafts(predictor, opened(tmp_path / "out"), ids), drafts(predictor, opened(folder), ids), atol=1e-9
    )


def test_r1_changes_drafts_unless_the_last_norm_is_uniform(source, tmp_path):
    """Even with all scales folded into eh_proj, and the average length as a factor, R1 changes the drafts.

    If all elements of the last norm's scale are equal, it does not.
    """
    folder, predictor = source
    ids, uneven = tokens(), off_by(folder, predictor, tmp_path / "uneven", tokens())
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.3)
    save_file(tensors, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert off_by(folder, predictor, tmp_path / "even", ids) < 1e-5 < 1e-2 < uneven  # the norm's epsilon has no scale


def off_by(folder, predictor, out, ids):
    result = rotate_folder(folder, out, RotationSpec("R1", "auto"), text=None, options=DROP)
    space, original = result.rotations["residual"], opened(folder)
    expected = drafts(predictor, original, ids)
    gain = original.model.norm.weight.detach()
    forced = copy.deepcopy(predictor)
    with torch.no_grad():
        embedding, state = forced.eh_proj.weight.chunk(2, dim=1)
        state = state * forced.hnorm.weight * gain / gain.square().mean().sqrt()
        halves = [space.apply(embedding * forced.enorm.weight), space.apply(state)]
        forced.eh_proj.weight.copy_(torch.cat(halves, dim=1))
        forced.enorm.weight.fill_(1)
        forced.hnorm.weight.fill_(1)
    return ((drafts(forced, opened(out), ids) - expected).norm() / expected.norm()).item()


def test_drop_mtp_removes_the_layers_and_keeps_the_logits(source, tmp_path):
    folder, _ = source
    expected = logits(opened(folder), tokens())
    arguments = ["rotate", str(folder), str(tmp_path / "out"), "--type", "auto", "--no-proof", "--drop-mtp"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert torch.allclose(logits(opened(tmp_path / "out"), tokens()), expected, atol=1e-9)
    assert not any(name.startswith(PREFIX) for name in read_headers(tmp_path / "out"))
    assert not (tmp_path / "out/model-00002-of-00002.safetensors").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0
    # A run with other settings does not resume this one.
    with pytest.raises(CheckpointError, match="exists"):
        rotate_folder(folder, tmp_path / "out", RotationSpec("R2", "auto"), options=QUICK)


def test_calibration_from_disk_keeps_mtp_layers(source, tmp_path):
    folder, _ = source
    given = {"method": "gptq", "calibration_text": CalibrationText(samples=2, length=8)}
    quantize_folder(folder, tmp_path / "out", parse_scheme("W4"), RotationSpec("R2"), dtype=torch.float32, **given)
    found = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    for name, tensor in load_file(folder / "model-00002-of-00002.safetensors").items():
        assert torch.equal(found[name], tensor.float()), name


def test_calibration_in_memory_is_refused_because_it_would_lose_mtp_layers(source, tmp_path, monkeypatch):
    folder, _ = source
    # As for a class whose weights have another form than the checkpoint's.
    monkeypatch.setattr("spinquant.entrypoints.validation.from_disk", lambda *_: False)
    text = CalibrationText(samples=1, length=8)
    with pytest.raises(CheckpointError, match=r"loads the model without them.*--drop-mtp"):
        quantize_folder(
            folder, tmp_path / "out", parse_scheme("W4"), RotationSpec("R2"), method="gptq", calibration_text=text
        )


def test_an_extra_layer_without_eh_proj_is_not_an_mtp_layer(source):
    """The config then has too few layers, and the tensor is refused as usual."""
    folder, _ = source
    shapes = {name: info.shape for name, info in read_headers(folder).items()}
    config = FAMILIES["glm4_moe"].config()
    assert make_plan(config, shapes).predictors
    without = {name: shape for name, shape in shapes.items() if "eh_proj" not in name}
    with pytest.raises(ArchitectureError, match=r"model\.layers\.2\..*num_hidden_layers: 2"):
        make_plan(config, without)


@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.mtp_block.0.", "model.mtp_layers.0.", "mtp."])
def test_mtp_layers_are_recognized_by_other_names(prefix, source):
    folder, _ = source
    shapes = {name: info.shape for name, info in read_headers(folder).items() if not name.startswith(PREFIX)}
    plan = make_plan(FAMILIES["glm4_moe"].config(), {**shapes, f"{prefix}weight": (48, 96)})
    assert plan.predictors == (f"{prefix}weight",) and "R1" in dict(plan.refused)
