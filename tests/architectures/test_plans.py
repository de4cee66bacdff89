"""Plans: module and checkpoint give the same one; unknown, missing and misshapen tensors are refused by name."""

import pytest
import torch
from transformers import AutoConfig, CTRLConfig, LlamaConfig

from models import CONFIGS, tiny_model
from spinquant import make_plan, plan_of
from spinquant.errors import ArchitectureError, RotationError
from spinquant.models.modules import tensor_shapes
from spinquant.plan import Plan, Space
from spinquant.rotation_names import parse_rotation_names, run_online


@pytest.mark.parametrize("name", CONFIGS)
def test_module_and_checkpoint_give_the_same_plan(name, tmp_path):
    """A checkpoint leaves a tied head out; the plan must not depend on that."""
    from spinquant import read_headers

    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    shapes = {n: info.shape for n, info in read_headers(tmp_path).items()}
    assert make_plan(AutoConfig.from_pretrained(tmp_path), shapes) == plan_of(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_a_layer_is_in_the_plan(name):
    model = tiny_model(name)
    plan = plan_of(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    planned = {n for group in plan.linears for n in group} | {"lm_head"}
    assert linears == planned
    weights = {n for n, p in model.named_parameters() if p.ndim == 2}
    assert weights <= set(plan.axes_of) | {plan.head}


def test_axes_fit_their_spaces():
    plan = plan_of(tiny_model("llama"))
    shapes = tensor_shapes(tiny_model("llama"))
    for axis in plan.axes:
        assert shapes[axis.tensor][axis.dim] % plan.space[axis.space].size == 0


def test_an_unknown_tensor_is_refused_by_name():
    model = tiny_model("llama")
    shapes = {**tensor_shapes(model), "model.layers.1.mlp.adapter.weight": (48, 48)}
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.adapter\.weight"):
        make_plan(model.config, shapes)


def test_a_missing_tensor_is_refused_by_name():
    model = tiny_model("llama")
    shapes = tensor_shapes(model)
    del shapes["model.layers.2.self_attn.o_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"layers\.2\.self_attn\.o_proj\.weight"):
        make_plan(model.config, shapes)


def test_a_missing_head_that_is_not_tied_is_refused():
    model = tiny_model("llama")
    shapes = tensor_shapes(model)
    del shapes["lm_head.weight"]
    with pytest.raises(ArchitectureError, match="lm_head"):
        make_plan(model.config, shapes)


def test_a_wrong_shape_is_refused_by_name():
    model = tiny_model("llama")
    shapes = {**tensor_shapes(model), "model.layers.0.self_attn.v_proj.weight": (33, 48)}
    with pytest.raises(ArchitectureError, match=r"v_proj\.weight.*33"):
        make_plan(model.config, shapes)


def test_unknown_architectures_are_refused_by_name():
    with pytest.raises(ArchitectureError, match="ctrl"):
        make_plan(CTRLConfig(), {})
    with pytest.raises(ArchitectureError, match="no architecture"):
        make_plan(object(), {})
    config = LlamaConfig(architectures=["LlamaForMultipleChoice"])
    with pytest.raises(ArchitectureError, match="LlamaForMultipleChoice"):
        make_plan(config, {})


def test_a_refused_rotation_raises_its_reason_and_the_others_work():
    space = Space("residual", "R1", 4), Space("layers.0.value", "R2", 2)
    plan = Plan("toy", space, (), (), (), (), (), (), (), "head", refused=(("R1", "a norm follows the block"),))
    with pytest.raises(RotationError, match="a norm follows the block"):
        plan.rotated(["R1"])
    assert plan.rotated(["R2"]) == {"layers.0.value"}
    with pytest.raises(RotationError, match="R4"):
        plan.rotated(["R4"])


def test_rotation_names_are_parsed():
    assert parse_rotation_names("r2, R1") == ("R1", "R2")
    assert parse_rotation_names({"R4"}) == ("R4",)
    assert parse_rotation_names("none") == parse_rotation_names("") == ()
    with pytest.raises(RotationError, match="R7"):
        parse_rotation_names("R1,R7")


def test_r1_runs_online_where_it_is_asked_to():
    assert run_online("R1,R2,R4", "r1") == run_online(("R4", "R2", "R1"), ("R1",)) == ("R2", "R4", "online-R1")
    assert run_online("R1,R2", "none") == ("R1", "R2")
    for online, why in (("R3", "runs online anyway"), ("R2", "no online form"), ("R7", "unknown"), ("R1", "are R2")):
        with pytest.raises(RotationError, match=why):
            run_online("R2", online)


def test_linears_that_share_an_input_share_its_space():
    """Those that read the residual stream, and no others; the head keeps its input."""
    plan = plan_of(tiny_model("llama"))
    spaces = {space.name for space in plan.spaces_of("online-R1")}
    for group in plan.linears:
        read = [{space.name for space in plan.spaces_read_by(name)} & spaces for name in group]
        assert read == [{f"{group[0]}.input"} if group[0].endswith(("q_proj", "gate_proj")) else set()] * len(group)
    assert not {space.name for space in plan.spaces_read_by(plan.heads[0])} & spaces
