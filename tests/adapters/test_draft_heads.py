"""Draft heads of a rotated model: rotated EAGLE-3 heads give the same drafts; EAGLE-1 and Medusa heads cannot.

The reference modules below follow the published structure of the heads (SafeAILab/EAGLE, FasterDecoding/Medusa), with
the names that their checkpoints have.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from models import SIZES, random_weights, tiny_model, tokens
from spinquant import RotationSpec, load, rotate_adapter, rotate_folder
from spinquant.adapters import draft_heads as heads
from spinquant.entrypoints.result import Options
from spinquant.errors import CheckpointError, RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic

QUICK = Options(prove=False)
HIDDEN, DRAFT_VOCABULARY = SIZES["hidden_size"], 40


class DraftLayer(nn.Module):
    """A Llama layer that reads one stream (EAGLE-1), or embeddings and states concatenated (two sides, EAGLE-3)."""

    def __init__(self, config, *, sides):
        super().__init__()
        self.sides = sides
        self.self_attn = LlamaAttention(config, 0)
        if sides == 2:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(2 * config.hidden_size, old.out_features, bias=True))
            self.input_layernorm, self.hidden_norm = LlamaRMSNorm(config.hidden_size), LlamaRMSNorm(config.hidden_size)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)
        self.mlp = LlamaMLP(config)

    def forward(self, states, embeddings, positions):
        read = states
        if self.sides == 2:
            read = torch.cat([self.input_layernorm(embeddings), self.hidden_norm(states)], dim=-1)
        states = states + self.self_attn(read, positions, None)[0]
        return states + self.mlp(self.post_attention_layernorm(states))


class Eagle3(nn.Module):
    """Reads the residual stream at three depths; drafts one token, and a second from its own states."""

    def __init__(self, config, *, norm_before_fc=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        if norm_before_fc:
            self.input_norm = LlamaRMSNorm(3 * config.hidden_size)
        self.midlayer = DraftLayer(config, sides=2)
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, DRAFT_VOCABULARY, bias=False)
        self.register_buffer("d2t", torch.arange(DRAFT_VOCABULARY))
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, ids, three, embed=None):
        embeddings = (embed or self.embed_tokens)(ids)
        positions = self.rotary(embeddings, torch.arange(ids.shape[1])[None])
        three = self.input_norm(three) if hasattr(self, "input_norm") else three
        drafts, states = [], self.fc(three)
        for _ in range(2):
            states = self.midlayer(states, embeddings, positions)
            drafts.append(self.lm_head(self.norm(states)))
        return torch.stack(drafts)


class Eagle(nn.Module):
    """Reads embeddings and the states after the model's last norm; its outputs are such states."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config, sides=1)])
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, ids, states, model):
        embeddings = model.get_input_embeddings()(ids)
        positions = self.rotary(embeddings, torch.arange(ids.shape[1])[None])
        drafts = []
        for _ in range(2):
            states = self.layers[0](self.fc(torch.cat([embeddings, states], dim=-1)), embeddings, positions)
            drafts.append(model.lm_head(states))
        return torch.stack(drafts)


class Medusa(nn.Module):
    """One head: a residual block, and a head for tokens."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, states):
        return self.head(states + nn.functional.silu(self.linear(states)))


def config():
    found = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    found._attn_implementation = "eager"
    return found


def made(head):
    return random_weights(head.double(), seed=7)


@torch.no_grad()
def running(function, *arguments, **named):
    with Float64Arithmetic():
        return function(*arguments, **named)


def states_of(model, ids):
    """The residual stream before three blocks, concatenated, and the states after the last norm."""
    with Float64Arithmetic(), torch.no_grad():
        found = model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return torch.cat(found.hidden_states[:3], dim=-1), found.last_hidden_state


def saved(head, folder, *, without=(), **about):
    """Save a draft head as a checkpoint."""
    folder.mkdir()
    tensors = {n: t.clone() for n, t in head.state_dict().items() if not n.startswith(("rotary", *without))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **about}))
    return folder


def rotated(folder, head):
    """The head with the weights of a folder."""
    head.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return head


@pytest.fixture(params=["llama", "llama-tied"])
def model(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("norm_before_fc", [False, True])
def test_a_rotated_eagle3_head_gives_the_same_drafts(model, norm_before_fc, tmp_path):
    """With its own embeddings, and with those of the model; two tokens ahead."""
    ids, head = tokens(), made(Eagle3(config(), norm_before_fc=norm_before_fc))
    original = load(model)
    head.embed_tokens.weight.data.copy_(original.get_input_embeddings().weight.double())
    three = states_of(original, ids)[0]
    expected = running(head, ids, three)
    source = saved(head, tmp_path / "head")
    rotate_folder(model, tmp_path / "out", RotationSpec("R1,R2", "auto"), also=[source], text=None, options=QUICK)
    found = load(tmp_path / "out")
    again = rotated(tmp_path / "out/adapters/head", made(Eagle3(config(), norm_before_fc=norm_before_fc)))
    after = states_of(found, ids)[0]
    assert not torch.allclose(after, three, atol=1e-2)
    assert torch.allclose(running(again, ids, after), expected, atol=1e-9)
    shared = running(again, ids, after, embed=found.get_input_embeddings())
    assert torch.allclose(shared, expected, atol=1e-9)
    assert not torch.allclose(running(head, ids, after), expected, atol=1e-2)  # unrotated it drafts something else
    rotate_adapter(tmp_path / "out", source, tmp_path / "later")
    late, along = (load_file(p / "model.safetensors") for p in (tmp_path / "later", tmp_path / "out/adapters/head"))
    assert all(torch.equal(late[name], along[name]) for name in along)
    with pytest.raises(RotationError, match="has been rotated already"):
        rotate_adapter(tmp_path / "out", tmp_path / "later", tmp_path / "twice")


@pytest.mark.parametrize("lost", ["embedding norm", "embedding half"])
def test_an_eagle3_head_is_wrong_without_any_part_of_its_plan(model, lost, tmp_path, monkeypatch):
    """Each part of the plan, left out, breaks the law above."""
    ids, head, whole = tokens(), made(Eagle3(config())), heads.eagle3_plan

    def broken(*arguments):
        plan, gains = whole(*arguments)
        if lost == "embedding norm":
            return replace(plan, gains=()), gains
        return replace(plan, axes=tuple(axis for axis in plan.axes if axis.span is None)), gains

    monkeypatch.setattr(heads, "eagle3_plan", broken)
    expected = running(head, ids, states_of(load(model), ids)[0])
    source = saved(head, tmp_path / "head")
    rotate_folder(model, tmp_path / "out", RotationSpec("R1", "auto"), also=[source], text=None, options=QUICK)
    again = rotated(tmp_path / "out/adapters/head", made(Eagle3(config())))
    after = states_of(load(tmp_path / "out"), ids)[0]
    assert not torch.allclose(running(again, ids, after), expected, atol=1e-3)


def test_unsupported_eagle3_heads_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    head = made(Eagle3(config()))
    headless = saved(head, tmp_path / "headless", without=("lm_head",))
    with pytest.raises(RotationError, match="no lm_head of its own"):
        rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), also=[headless], text=None)
    late = saved(head, tmp_path / "late", eagle_config={"use_aux_hidden_state": False})
    with pytest.raises(RotationError, match="use_aux_hidden_state"):
        rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), also=[late], text=None)
    head.register_buffer("fc_norm_0", torch.ones(HIDDEN))
    strange = saved(head, tmp_path / "strange")
    with pytest.raises(RotationError, match=r"'fc_norm_0'.*unknown"):
        rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), also=[strange], text=None)
    with pytest.raises(CheckpointError, match="neither a LoRA adapter"):
        (tmp_path / "empty").mkdir()
        rotate_folder(tmp_path / "model", tmp_path / "out", RotationSpec("R1"), also=[tmp_path / "empty"], text=None)
    assert not (tmp_path / "out").exists()


def test_eagle1_heads_cannot_be_rotated_by_r1(tmp_path):
    """With everything folded in that can be, drafts still move, because the head's norm divides by another length.

    If all elements of the scale of the model's last norm are equal, it is exact.
    """
    ids, head = tokens(), made(Eagle(config()))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    source = saved(head, tmp_path / "head")
    with pytest.raises(RotationError, match=r"R1 is impossible.*EAGLE-1.*diag\(1/g\) R"):
        rotate_folder(tmp_path / "model", tmp_path / "no", RotationSpec("R1"), also=[source], text=None, options=QUICK)
    # Without R1, nothing that it reads changes.
    rotate_folder(tmp_path / "model", tmp_path / "r2", RotationSpec("R2"), also=[source], text=None, options=QUICK)
    original = load(tmp_path / "model")
    expected = running(head, ids, states_of(original, ids)[1], original)
    again, found = rotated(tmp_path / "r2/adapters/head", made(Eagle(config()))), load(tmp_path / "r2")
    assert torch.allclose(running(again, ids, states_of(found, ids)[1], found), expected, atol=1e-9)
    original.model.norm.weight.data.fill_(1.5)
    original.save_pretrained(tmp_path / "uniform")
    uniform, uneven = (off_by(tmp_path / name, head, ids) for name in ("uniform", "model"))
    assert uniform < 1e-6 and uneven > 1e-2  # the norm's epsilon has no scale


def off_by(folder, head, ids):
    """How far drafts move if an EAGLE-1 head is rotated as far as possible: o diag(1/g) R in and out."""
    original = load(folder)
    result = rotate_folder(folder, f"{folder}-rotated", RotationSpec("R1", "auto"), text=None, options=QUICK)
    found, space = load(f"{folder}-rotated"), result.rotations["residual"]
    gain = original.model.norm.weight.detach()
    # After its norm a vector is o / ||o / g||: the same up to a factor, which is at best equal for all tokens.
    behind = gain / gain.square().mean().sqrt()
    forced = made(Eagle(config()))
    forced.load_state_dict(head.state_dict())
    layer = forced.layers[0]
    with torch.no_grad():
        fc = forced.fc.weight.view(HIDDEN, 2, HIDDEN).clone()
        fc = torch.stack([space.apply(fc[:, 0]), space.apply(fc[:, 1] * gain)], dim=1).flatten(1)
        forced.fc.weight.copy_(space.apply(fc / gain[:, None], dim=0))
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight.copy_(space.apply(linear.weight * gain))
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.copy_(space.apply(linear.weight * layer.post_attention_layernorm.weight * behind))
        layer.post_attention_layernorm.weight.fill_(1)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(space.apply(linear.weight / gain[:, None], dim=0))
    expected = running(head, ids, states_of(original, ids)[1], original)
    moved = running(forced, ids, states_of(found, ids)[1], found) - expected
    return (moved.norm() / expected.norm()).item()


def test_medusa_heads_cannot_be_rotated_by_r1(tmp_path):
    """What its block adds is no linear function of what a rotated one could add: even the best output head is off."""
    ids, head = tokens(16, 32), made(Medusa(config()))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "head").mkdir()
    names = {
        "0.0.linear.weight": head.linear.weight,
        "0.0.linear.bias": head.linear.bias,
        "0.1.weight": head.head.weight,
    }
    save_file({n: p.detach().clone() for n, p in names.items()}, tmp_path / "head/model.safetensors")
    (tmp_path / "head/config.json").write_text(json.dumps({"medusa_num_heads": 1}))
    also, target = [tmp_path / "head"], tmp_path / "model"
    with pytest.raises(RotationError, match=r"R1 is impossible.*Medusa.*SiLU"):
        rotate_folder(target, tmp_path / "no", RotationSpec("R1"), also=also, text=None, options=QUICK)
    done = rotate_folder(target, tmp_path / "r2", RotationSpec("R2"), also=also, text=None, options=QUICK)
    assert done.notes["adapters"]["head"] == {"kind": "medusa", "source": str(also[0]), "tensors": 3, "rotated": 0}
    result = rotate_folder(target, tmp_path / "out", RotationSpec("R1", "auto"), text=None, options=QUICK)
    space, original = result.rotations["residual"], load(target)
    before, after = (states_of(model, ids)[1].flatten(0, 1) for model in (original, load(tmp_path / "out")))
    expected = running(head, before)
    with torch.no_grad():
        # W is exact for the input of SiLU; then the best of all output heads, by least squares.
        weight = space.apply(head.linear.weight * original.model.norm.weight)
        inside = after @ weight.T + head.linear.bias
        assert torch.allclose(inside, running(head.linear, before), atol=1e-9)
        block = after + nn.functional.silu(inside)
        best = torch.linalg.lstsq(block, expected).solution
        assert (block @ best - expected).norm() / expected.norm() > 1e-2
