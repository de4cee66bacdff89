"""Probing: with the tables hidden, what is found is what they say; what is in the way is named, and does break."""

import re
from dataclasses import replace

import pytest
import torch

import acme
from families import FAMILIES as INSTANCES
from families import config_of, shapes_of, usable
from models import CONFIGS, logits, random_weights, tokens
from spinquant import (
    RotationSpec,
    attach,
    draft_text,
    fuse_module,
    make_plan,
    make_rotations,
    plan_of,
    probe,
    prove,
    read_family,
    read_headers,
)
from spinquant.errors import ArchitectureError, RotationError
from spinquant.evaluation.equivalence import Float64Arithmetic, greedy_logits
from spinquant.models.modules import model_class
from spinquant.probing.layer_kinds import choices_of, groups_of
from spinquant.probing.module_roles import combination, is_normed

acme.register()

# Grouped heads, biases, q/k norms, fused projections in every layout, 1 + w, norms behind the block, norms that
# subtract the mean (with scales, biases, or neither), one norm for two readers, positions of all kinds, scalars.
KNOWN = [
    *("llama-tied", "mistral", "qwen2", "qwen3", "granite", "gemma", "phi3", "gemma2", "olmo2"),
    *("olmo", "starcoder2", "cohere2", "phi", "opt", "xglm", "codegen", "gpt_neox", "falcon-grouped", "gpt2"),
    # Experts in every layer or after dense ones, as (out, in) and (in, out), beside shared ones that a gate weighs.
    *("qwen2_moe", "gpt_oss"),
]
# Attention in some layers, a delta net, a state space or a convolution in others, or nothing else.
MIXED = ["qwen3_next", "lfm2", "mamba"]


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_found_is_what_the_table_says(name, monkeypatch):
    config = config_of(name)
    shapes = shapes_of(config)
    expected = usable(make_plan(config, shapes))
    monkeypatch.setattr("spinquant.architectures.FAMILIES", ())
    with pytest.raises(ArchitectureError, match="no family table supports"):
        make_plan(config, shapes)
    found = probe(config)
    assert not found.left and found.family is not None
    plan = make_plan(config, shapes, family=found.family)
    for part, value in usable(plan).items():
        assert value == expected[part], part


@pytest.mark.parametrize("name", MIXED)
def test_layers_of_several_kinds(name):
    """What the table says, with a word on the linears that R1 alone reaches."""
    config = config_of(name)
    shapes = shapes_of(config)
    found = probe(config)
    assert found.left and found.family is not None
    expected = usable(make_plan(config, shapes))
    for part, value in usable(make_plan(config, shapes, family=found.family)).items():
        assert value == expected[part], part
    if found.family.choices:  # what one kind of layer has is missed in a layer of that kind
        kept = {name: shape for name, shape in shapes.items() if not name.endswith("layers.1.self_attn.k_proj.weight")}
        with pytest.raises(ArchitectureError, match=r"layers\.1\.self_attn\.k_proj\.weight.*missing"):
            make_plan(config, kept, family=found.family)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_checkpoint_are_found_one_by_one(name, tmp_path):
    """One draft explains the module, which stacks them, and the checkpoint, which does not."""
    config = config_of(name)
    stacked = shapes_of(config)
    model_class(config).from_config(config).save_pretrained(tmp_path)
    single = {name: info.shape for name, info in read_headers(tmp_path).items()}
    assert not any("gate_up_proj" in name for name in single)
    found = probe(config, shapes=single)
    if name == "mixtral":  # its checkpoints have names of their own
        assert any("not those of the class" in text for text in found.left)
        return
    assert not found.left
    for shapes in (stacked, single):
        expected = usable(make_plan(config_of(name), shapes))
        plan = usable(make_plan(config_of(name), shapes, family=found.family))
        assert {part: plan[part] for part in plan} == {part: expected[part] for part in plan}
    lost = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(ArchitectureError, match=re.escape(lost)):
        make_plan(config, {n: s for n, s in single.items() if n != lost}, family=found.family)


def test_alternatives_are_told_by_the_layers_that_have_them():
    names = ["l.0.a.x", "l.0.a.y", "l.1.b.x", "l.2.a.x", "l.2.a.y", "l.0.n", "l.1.n", "l.2.n", "l.2.c.x"]
    choices, loose = choices_of(groups_of(names, "l.*"), 3)
    assert choices == [[["l.*.a."], ["l.*.b."]]]
    assert loose == {"l.*.c.x"}


@pytest.mark.parametrize(
    ("trap", "rotation", "named"),
    [
        ("", None, ""),
        ("stream", "R1", r"core\.stack\.\*\.keep"),
        ("values", "R2", r"core\.stack\.\*\.mixer\.wo"),
        ("keys", "R3", "attention interface"),
    ],
)
def test_a_class_of_the_users_own(trap, rotation, named, tmp_path):
    """What can be rotated is found and proved; the trap is refused by name, with how far the logits moved."""
    config = acme.AcmeConfig(trap=trap)
    found = probe(config)
    failed = [finding for finding in found.findings if not finding.holds]
    assert len(failed) == (rotation is not None)
    assert all(finding.moved > 1e-3 for finding in failed)
    (tmp_path / "draft.toml").write_text(draft_text(found))
    family = read_family(tmp_path / "draft.toml")
    assert family == found.family
    model, ids = random_weights(acme.AcmeForCausalLM(config).double()), tokens()
    plan = plan_of(model, family=family)
    assert [name for name, _ in plan.refused] == [rotation] * len(failed)
    allowed = [name for name in ("R1", "R2", "R3", "R4") if name != rotation]
    assert prove(config, RotationSpec(allowed, "auto", randomize=True), family=family).relative < 1e-12
    before = logits(model, ids)
    with Float64Arithmetic():
        generated = greedy_logits(model, ids)
    rotations = make_rotations(plan, RotationSpec(allowed, "auto"))
    fuse_module(model, plan, rotations)
    with attach(model, plan, rotations), Float64Arithmetic():
        assert torch.allclose(logits(model, ids), before, atol=1e-9)
        assert torch.allclose(greedy_logits(model, ids), generated, atol=1e-9)
    if rotation is None:
        return
    with pytest.raises(RotationError, match=f"{rotation} is impossible for acme: .*{named}"):
        make_rotations(plan, RotationSpec(rotation))
    model = random_weights(acme.AcmeForCausalLM(config).double())
    forced = replace(plan, refused=())
    rotations = make_rotations(forced, RotationSpec(rotation, "auto"))
    fuse_module(model, forced, rotations)
    with attach(model, forced, rotations):
        assert not torch.allclose(logits(model, ids), before, atol=1e-3)


def test_what_changes_nothing_because_it_does_nothing_is_no_proof():
    """Neither queries nor keys pass where R3 would rotate them: the logits stay, and R3 is refused all the same."""
    found = probe(acme.AcmeConfig(trap="alone"))
    assert [finding.reason for finding in found.findings if not finding.holds] == [
        "keys do not go through a KV cache, where they could be rotated"
    ]
    assert [refusal.rotation for refusal in found.family.refused] == ["R3"]


def test_sizes_that_the_config_calls_otherwise_are_found():
    assert probe(acme.AcmeConfig()).family.config == {"intermediate_size": "mlp_dim"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4_text", r"R1: the residual stream can be rotated: model\.layers\.\* does not add multiples"),
        ("deepseek_v3", "no known layout fits|no row of"),
        ("mamba", "no attention"),
        ("deepseek_v4", "parallel residual streams"),
    ],
)
def test_what_is_not_understood_is_said(name, reason):
    """A draft of the rest, or none; never a plan with a hole in it."""
    found = probe(config_of(name))
    text = re.sub(r"\s*\n#\s+", " ", draft_text(found))
    assert re.search(reason, text)
    if found.family is None:
        assert "There is no draft" in text
        return
    config = config_of(name)
    plan = make_plan(config, shapes_of(config), family=found.family)
    rest = {space.rotation for space in plan.spaces} - {rotation for rotation, _ in plan.refused}
    assert rest and prove(config, RotationSpec(tuple(rest), "auto")).relative < 1e-12


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_of_what_sees_the_language_part_is_found(name):
    """R2 to R4 as the table has them; R1 is refused, since no image was tried."""
    config = config_of(name)
    shapes = shapes_of(config)
    found = probe(config)
    plan, table = make_plan(config, shapes, family=found.family), make_plan(config_of(name), shapes)
    assert re.search(r"did not run on text", dict(plan.refused)["R1"])
    expected = replace(table, refused=(("R1", "as the draft"),))
    for part, value in usable(plan).items():
        assert value == usable(expected)[part], part
    assert prove(config_of(name), RotationSpec("R2,R3,R4", "auto"), family=found.family).relative < 1e-12


def test_a_checkpoint_that_is_not_of_the_class_is_told_apart():
    config = CONFIGS["llama"]()
    shapes = {**shapes_of(config), "model.layers.0.mlp.adapter.weight": (4, 4)}
    assert any("adapter" in text for text in probe(config, shapes=shapes).left)
    assert INSTANCES  # the other families are tried above


def test_sums_and_norms_are_told_from_anything_else():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 7, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    sums, error = combination(a + 0.25 * b, [a, b])
    assert torch.allclose(torch.tensor(sums), torch.tensor([1.0, 0.25])) and error < 1e-12
    scale = torch.linspace(0.5, 1.5, 24, dtype=torch.float64)
    assert combination(a * scale + b, [a, b])[1] > 0.1
    norm = torch.nn.LayerNorm(24, elementwise_affine=False, dtype=torch.float64)
    assert is_normed(norm(a), a, centred=True) and not is_normed(norm(a), a)
    assert is_normed(a / a.norm(dim=-1, keepdim=True), a) and not is_normed(a * scale, a)
