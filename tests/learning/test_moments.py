"""Moments of quantizers: those of one pass equal those of rows and gradients that autograd gives."""

from functools import partial

import pytest
import torch

from models import random_weights, tiny_model, tokens
from spinquant import Diagonal, RotationSpec, make_rotations, parse_scheme, plan_of
from spinquant.evaluation.metrics import drawn
from spinquant.learning.closed_form import expected_cost
from spinquant.learning.fake_quant import fuse_gains, learning_scheme
from spinquant.learning.free_transforms import free_spaces
from spinquant.learning.moments import FOLDS, collect_moments, sites_of
from spinquant.quantization.clip_search import relative_error
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.transforms import compose

SPEC = RotationSpec("R1,R2,R3,R4", "auto")


def prepared():
    model = random_weights(tiny_model("llama"))
    plan = plan_of(model)
    rotations = make_rotations(plan, SPEC)
    fuse_gains(model, plan, rotations)
    return model, plan, rotations


def rows_of(model, names, ids):
    """(rows, gradients) of the inputs of linears, by fold and linear."""
    generator, found = torch.Generator().manual_seed(0), {}
    for i, row in enumerate(ids.split(1)):
        seen = {}

        def keep(name, module, args, seen=seen):
            seen[name] = args[0]

        hooks = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
        out = model(input_ids=row, use_cache=False).logits[0]
        own = drawn(out.detach().softmax(-1), generator)
        gradients = torch.autograd.grad(-out.log_softmax(-1).gather(-1, own).sum(), list(seen.values()))
        for (name, x), g in zip(seen.items(), gradients, strict=True):
            found[i % FOLDS, name] = x.detach()[0], g[0]
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("name", ["layers.1.hidden.channels", "layers.1.value"])
def test_moments_equal_the_sums_over_rows(name):
    model, plan, rotations = prepared()
    scheme, ids = learning_scheme(parse_scheme("A4"), weights=False), tokens(2, 12)
    sites = sites_of(plan, [name], scheme, rotations)
    assert [site.name.rpartition(".")[2] for site in sites] == ["down_proj" if "hidden" in name else "o_proj"]
    moments = collect_moments(model, plan, sites, scheme, ids, generator=torch.Generator().manual_seed(0))
    rows = rows_of(model, [sites[0].name], ids)
    space = plan.space[name]
    for fold in range(FOLDS):
        x, g = rows[fold, sites[0].name]
        energy, slope = x.square().sum(-1), g.square().sum(-1)
        (found,) = moments[name][fold]
        if space.allows == "diagonal":
            assert torch.allclose(found.x.flatten(), slope @ x.square(), rtol=1e-4)
            assert torch.allclose(found.g.flatten(), energy @ g.square(), rtol=1e-4)
            continue
        group = x.shape[-1] // space.heads // space.size
        for head in range(space.heads):
            parts = [slice((head * group + i) * space.size, (head * group + i + 1) * space.size) for i in range(group)]
            expected = sum((x[:, part] * slope[:, None]).T @ x[:, part] for part in parts)
            assert torch.allclose(found.x[0, head], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_scales_of_a_norm_have_the_moments_of_rotated_rows():
    model, plan, rotations = prepared()
    name = "model.layers.0.input_layernorm"
    scheme, ids = learning_scheme(parse_scheme("A4"), weights=False), tokens(2, 12)
    collect = partial(collect_moments, model, plan, scheme=scheme, tokens=ids)
    (site,) = sites_of(plan, [name], scheme, rotations)
    found = collect([site], generator=torch.Generator().manual_seed(0))[name][0][0]
    x, g = rows_of(model, [site.name], ids)[0, site.name]
    turned = rotations["residual"].apply(x)
    assert torch.allclose(found.x.flatten(), g.square().sum(-1) @ turned.square(), rtol=1e-4)


def test_rounding_weights_adds_to_the_moments_of_gradients():
    """Of the linears that read the activation, and, for values, of the linear that writes them."""
    model, plan, rotations = prepared()
    ids, names = tokens(2, 12), ["layers.0.hidden.channels", "layers.0.value"]

    def collect(name):
        scheme = parse_scheme(name)
        sites = sites_of(plan, names, scheme, rotations)
        return collect_moments(model, plan, sites, scheme, ids, generator=torch.Generator().manual_seed(0))

    before, after = collect("A4KV4"), collect("W4A4KV4")
    for name, added in zip(names, (1, 2), strict=True):
        plain, more = before[name][0], after[name][0]
        assert len(more) == len(plain) + added
        assert all(any(torch.equal(one.x, other.x) for other in more) for one in plain)


def test_expected_cost_is_that_of_rounding():
    """The expected cost of the inputs of down_proj, at a transform, is near the one measured to second order."""
    model, plan, rotations = prepared()
    scheme, ids = learning_scheme(parse_scheme("A4"), weights=False), tokens(2, 48)
    name = "layers.0.hidden.channels"
    (site,) = sites_of(plan, [name], scheme, rotations)
    moments = collect_moments(model, plan, [site], scheme, ids, generator=torch.Generator().manual_seed(0))
    rows = rows_of(model, [site.name], ids)
    for scale in (torch.ones(80).double(), torch.linspace(0.5, 2, 80).double()):
        t = compose(Diagonal(scale), rotations["layers.0.hidden"])
        expected = sum(expected_cost(moments[name][fold], scale.square().view(-1, 1, 1)) for fold in range(FOLDS))
        measured = 0.0
        for fold in range(FOLDS):
            x, g = rows[fold, site.name]
            z = t.apply(x)
            error = fake_quantize(z, site.quantizer) - z
            slopes = t.dual().apply(g)
            measured += float((error.square().sum(-1) * slopes.square().sum(-1)).sum()) / 80
        assert expected == pytest.approx(measured, rel=0.35)


def test_relative_error_of_a_quantizer():
    finer = [relative_error(64, Quantizer(bits)) for bits in (3, 4, 8)]
    assert finer == sorted(finer, reverse=True) and 0.005 < finer[1] < 0.02
    plain, clipped = (relative_error(64, Quantizer(4, symmetric=True, clip=clip)) for clip in (1.0, "mse"))
    assert clipped <= plain


def test_spaces_that_are_not_quantized_have_no_moments():
    _, plan, rotations = prepared()
    assert set(free_spaces(plan, rotations, parse_scheme("KV4"))) == {"values", "keys"}
    assert set(free_spaces(plan, rotations, parse_scheme("A4"))) == {"scales", "values", "norms"}
    assert "keys" not in free_spaces(plan, {"residual": rotations["residual"]}, parse_scheme("W4A4KV4"))
