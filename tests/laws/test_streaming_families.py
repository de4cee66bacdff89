"""Every family, streamed from folder to folder: the result loads with the logits of the source.

The model is never in memory: tensors are streamed, and real tokens are run through both checkpoints block by block, so
that the run compares its own result.
"""

import re
from pathlib import Path

import pytest
import torch

from families import FAMILIES
from models import byte_tokenizer, logits, random_weights, tokens
from spinquant import Options, ProofError, RotationSpec, Scheme, load, quantize_folder, rotate_folder
from spinquant.entrypoints.result import Result
from spinquant.evaluation.tiny_model import exact_experts
from spinquant.models.modules import model_class
from spinquant.rotation_names import MERGEABLE
from spinquant.rotations import fuse

UNPROVED = Options(prove=False)  # test_families.py runs the proof for every family
# One family of each kind, and a tensor to fuse wrongly.
KINDS = {
    "arcee": "model.layers.1.self_attn.v_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    "deepseek_v3": "model.layers.0.self_attn.kv_b_proj.weight",
    "bamba": "model.layers.0.mamba.in_proj.weight",
    "zamba2": "model.layers.2.shared_transformer.feed_forward.gate_up_proj.weight",
    "llava": "language_model.model.layers.1.mlp.down_proj.weight",
}
# Classes with parts (routers, recurrences, positions) that are float32 once they are loaded.
NARROW = ("ernie4_5_moe", "hunyuan_v1_moe", "zamba", "olmo_hybrid", "gptj", "codegen")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A quick brown fox jumps over the lazy dog. " * 4)
    return str(path)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr("spinquant.entrypoints.stream_run.SAMPLE_TOKENS", 32)


def saved(path: Path, name: str) -> torch.Tensor:
    """Save a tiny random model, in float64 throughout, and its tokenizer; returns its logits of random tokens."""
    config = FAMILIES[name].config()
    model = in_float64(random_weights(model_class(config).from_config(config, dtype=torch.float64)))
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return logits(model, tokens(1, 12))


def in_float64(model):
    exact_experts(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # packed weights are not
            parameter.data = parameter.data.double()
    return model


def assert_unmoved(name: str, out: Path, before: torch.Tensor, result: Result) -> None:
    """The loaded result has the logits of the source, and so the run reports for real tokens."""
    assert result.real is not None and 0 < result.real.relative < 1e-9
    after = logits(in_float64(load(out)), tokens(1, 12))
    assert (after - before).norm() / before.norm() < (1e-6 if name in NARROW else 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_native_folder_with_every_rotation_has_the_same_logits(name, tmp_path, text):
    """Every rotation that the family allows, in native format: R3 and R4 run online."""
    before, spec = saved(tmp_path / "model", name), RotationSpec(FAMILIES[name].allowed, "auto", randomize=True)
    result = quantize_folder(tmp_path / "model", tmp_path / "out", Scheme(), spec, text=text, options=UNPROVED)
    assert_unmoved(name, tmp_path / "out", before, result)


def mergeable(name: str) -> RotationSpec:
    return RotationSpec(tuple(rotation for rotation in FAMILIES[name].allowed if rotation in MERGEABLE), "auto")


@pytest.mark.parametrize("name", [*KINDS, "phi", "olmo_hybrid", "qwen3_vl"])
def test_a_plain_folder_has_the_same_logits(name, tmp_path, text):
    """As `spinquant rotate` writes it; transformers loads it without spinquant installed."""
    before, spec = saved(tmp_path / "model", name), mergeable(name)
    result = rotate_folder(tmp_path / "model", tmp_path / "out", spec, text=text, options=UNPROVED)
    assert_unmoved(name, tmp_path / "out", before, result)


def damage(monkeypatch, tensor: str) -> list[str]:
    """Make streaming fuse one tensor wrongly: 0.01 is added to one of its rows. Returns the damaged tensors."""
    right, found = fuse.fuse_in_place, []

    def wrong(name: str, rows: torch.Tensor, *args, **kwargs) -> None:
        right(name, rows, *args, **kwargs)
        if name == tensor:
            rows[0] += 0.01
            found.append(name)

    monkeypatch.setattr(fuse, "fuse_in_place", wrong)
    return found


@pytest.mark.parametrize(("name", "tensor"), KINDS.items())
def test_a_wrongly_fused_tensor_is_found_and_the_folder_refused(name, tensor, tmp_path, text, monkeypatch):
    """The comparison reads the written folder and names a module of the layer; nothing is left under the final name."""
    saved(tmp_path / "model", name)
    damaged = damage(monkeypatch, tensor)
    with pytest.raises(ProofError, match=r"logits moved .* first module that deviates is") as refused:
        rotate_folder(tmp_path / "model", tmp_path / "out", mergeable(name), text=text, options=UNPROVED)
    assert damaged == [tensor]
    layer = re.search(r"\.(?:layers|h)\.\d+\.", tensor)
    assert layer and layer[0] in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_bfloat16_model_may_have_a_float32_residual_stream(tmp_path, text):
    """As in Mamba, up to the head."""
    config = FAMILIES["mamba"].config()
    random_weights(model_class(config).from_config(config, dtype=torch.bfloat16)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = rotate_folder(tmp_path / "model", tmp_path / "out", mergeable("mamba"), text=text, options=UNPROVED)
    assert result.real is not None and 0 < result.real.relative < 0.1
