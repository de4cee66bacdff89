"""Probing: with the built-in tables hidden, drafts give the tables' plans; obstacles are named, and move the logits."""

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

# Grouped heads, biases, q/k norms, fused projections in every layout, 1 + w, norms after the block, norms that
# subtract the mean (with scales, biases, or neither), one norm for two readers, positions of all kinds, scalars.
KNOWN = [
    *("llama-tied", "mistral", "qwen2", "qwen3", "granite", "gemma", "phi3", "gemma2", "olmo2"),
    *("olmo", "starcoder2", "cohere2", "phi", "opt", "xglm", "codegen", "gpt_neox", "falcon-grouped", "gpt2"),
    # Experts in every layer or after dense ones, as (out, in) and (in, out), and shared experts with a gate.
    *("qwen2_moe", "gpt_oss"),
]
# Attention in some layers, a delta net, a state space or a convolution in others, or nothing else.
MIXED = ["qwen3_next", "lfm2", "mamba"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_draft_gives_the_plan_of_the_built_in_table(name, monkeypatch):
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
def test_a_draft_describes_layers_of_several_kinds(name):
    """The table's plan, with a remark on the linears that only R1 rotates."""
    config = config_of(name)
    shapes = shapes_of(config)
    found = probe(config)
    assert found.left and found.family is not None
    expected = usable(make_plan(config, shapes))
    for part, value in usable(make_plan(config, shapes, family=found.family)).items():
        assert value == expected[part], part
    if found.family.choices:  # a tensor of one kind of layer is required in each layer of that kind
        kept = {name: shape for name, shape in shapes.items() if not name.endswith("layers.1.self_attn.k_proj.weight")}
        with pytest.raises(ArchitectureError, match=r"layers\.1\.self_attn\.k_proj\.weight.*missing"):
            make_plan(config, kept, family=found.family)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_draft_describes_stacked_and_single_experts(name, tmp_path):
    """One draft describes the module, which stacks them, and the checkpoint, which does not."""
    config = config_of(name)
    stacked = shapes_of(config)
    model_class(config).from_config(config).save_pretrained(tmp_path)
    single = {name: info.shape for name, info in read_headers(tmp_path).items()}
    assert not any("gate_up_proj" in name for name in single)
    found = probe(config, shapes=single)
    if name == "mixtral":  # its checkpoints have other names
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


def test_alternatives_are_grouped_by_the_layers_that_have_them():
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
def test_a_user_defined_class_is_probed_and_its_obstacle_is_named(trap, rotation, named, tmp_path):
    """What can be rotated is found and proved; what cannot is refused by name, with how far the logits moved."""
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
    with attach(model, forced, rotations) as attachment:
        attachment.stop_checking()
        assert not torch.allclose(logits(model, ids), before, atol=1e-3)


def test_r3_is_refused_if_it_has_no_effect():
    """Queries and keys bypass the places where R3 would rotate them: the logits do not move, and R3 is refused."""
    found = probe(acme.AcmeConfig(trap="alone"))
    assert [finding.reason for finding in found.findings if not finding.holds] == [
        "keys do not go through a KV cache, where they could be rotated"
    ]
    assert [refusal.rotation for refusal in found.family.refused] == ["R3"]


def test_other_names_of_config_sizes_are_recognized():
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
def test_what_a_draft_does_not_cover_is_reported(name, reason):
    """The draft covers the rest, or there is none."""
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
def test_a_vision_language_model_is_drafted_without_r1(name):
    """R2 to R4 as in the table; R1 is refused, since no image was tested."""
    config = config_of(name)
    shapes = shapes_of(config)
    found = probe(config)
    plan, table = make_plan(config, shapes, family=found.family), make_plan(config_of(name), shapes)
    assert re.search(r"did not run on text", dict(plan.refused)["R1"])
    expected = replace(table, refused=(("R1", "as the draft"),))
    for part, value in usable(plan).items():
        assert value == usable(expected)[part], part
    assert prove(config_of(name), RotationSpec("R2,R3,R4", "auto"), family=found.family).relative < 1e-12


def test_checkpoint_tensors_that_the_class_lacks_are_reported():
    config = CONFIGS["llama"]()
    shapes = {**shapes_of(config), "model.layers.0.mlp.adapter.weight": (4, 4)}
    assert any("adapter" in text for text in probe(config, shapes=shapes).left)
    assert INSTANCES  # the other families are tried above


def test_an_elementwise_scale_is_neither_a_combination_nor_a_norm():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 7, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    sums, error = combination(a + 0.25 * b, [a, b])
    assert torch.allclose(torch.tensor(sums), torch.tensor([1.0, 0.25])) and error < 1e-12
    scale = torch.linspace(0.5, 1.5, 24, dtype=torch.float64)
    assert combination(a * scale + b, [a, b])[1] > 0.1
    norm = torch.nn.LayerNorm(24, elementwise_affine=False, dtype=torch.float64)
    assert is_normed(norm(a), a, centred=True) and not is_normed(norm(a), a)
    assert is_normed(a / a.norm(dim=-1, keepdim=True), a) and not is_normed(a * scale, a)
