"""A checkpoint that does not fit its config is refused for the reason that is one, with the way out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import logits, tokens
from spinquant import ArchitectureError, CheckpointError, Options, RotationSpec, load, rotate_folder

SPEC, UNPROVED = RotationSpec("R1,R2"), Options(prove=False)


def changed(folder, tensors=None, **config):
    """Change the tensors and the config of a folder."""
    path, stored = folder / "config.json", load_file(folder / "model.safetensors")
    if tensors is not None:
        tensors(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def saved_again(folder, out):
    """As the message says."""
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out)
    return out


def rotated(folder, out):
    return rotate_folder(folder, out, SPEC, text=None, options=UNPROVED)


def test_layers_that_the_config_cuts_off(folder, tmp_path):
    changed(folder, num_hidden_layers=2)
    reason = r"'model\.layers\.2\..*num_hidden_layers: 2.*layers 0 to 2.*num_hidden_layers to 3.*save_pretrained"
    with pytest.raises(ArchitectureError, match=reason):
        rotated(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=reason):
        load(folder)
    short = saved_again(folder, tmp_path / "short")
    rotated(short, tmp_path / "out")
    assert torch.allclose(logits(load(tmp_path / "out"), tokens()), logits(load(short), tokens()), atol=1e-3)


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.attn.v_scale"])
def test_a_stray_scale_of_the_cache(name, folder, tmp_path):
    changed(folder, lambda stored: stored.update({f"model.layers.1.{name}": torch.ones(1)}))
    with pytest.raises(ArchitectureError, match=rf"{name}' is a scale of a quantized KV cache.*save_pretrained"):
        rotated(folder, tmp_path / "out")
    rotated(saved_again(folder, tmp_path / "without"), tmp_path / "out")


@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "qweight"])
def test_part_of_a_quantized_weight(name, folder, tmp_path):
    def quantized(stored):
        stored[f"model.layers.1.mlp.up_proj.{name}"] = torch.ones(1)
        if name == "qweight":
            del stored["model.layers.1.mlp.up_proj.weight"]

    changed(folder, quantized)
    with pytest.raises(ArchitectureError, match=rf"up_proj\.{name}' is part of a quantized weight.*16-bit model"):
        rotated(folder, tmp_path / "out")


def test_a_missing_head(folder, tmp_path):
    changed(folder, tie_word_embeddings=False)
    reason = r"'lm_head\.weight' is missing.*tie_word_embeddings: false.*set tie_word_embeddings to true"
    with pytest.raises(ArchitectureError, match=reason):
        rotated(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=reason):
        load(folder)
    changed(folder, tie_word_embeddings=True)
    rotated(folder, tmp_path / "out")


def test_weight_files_without_an_index(tmp_path, folder):
    model = load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"weight files \(model-00001-of.*no index.*Download model"):
        rotated(tmp_path / "shards", tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"one weight file, weights\.safetensors.*rename it to model"):
        rotated(folder, tmp_path / "out")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        rotated(folder, tmp_path / "out")
