"""An online rotation or quantizer that does not run in a forward pass is an error, whatever keeps it from running."""

import copy
from functools import wraps

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import FAMILIES, tiny
from models import logits, tiny_model, tokens
from spinquant import (
    OnlineError,
    RotationError,
    RotationSpec,
    attach,
    fuse_module,
    make_rotations,
    parse_scheme,
    plan_of,
)
from spinquant.models.cache_names import CACHE_NAMES, cache_parameter
from spinquant.online.hooks import PREFIX, attachment_of, text_config
from spinquant.online.sites import GATE


class WithoutCall(nn.Module):
    """A linear that is used without a call of its module, so that its hooks do not run."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear.forward(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.linear, name)


def attached(model, allowed=("R3", "R4"), scheme="A8KV8"):
    """A model with every online rotation that it allows, and quantizers."""
    plan = plan_of(model)
    scheme = parse_scheme(scheme if plan.attentions else scheme.replace("KV8", ""))
    if plan.uncalled:
        scheme = parse_scheme("KV8" if plan.attentions else "none")
    rotations = make_rotations(plan, RotationSpec([r for r in ("R3", "R4") if r in allowed], "auto"))
    fuse_module(model, plan, rotations)
    attach(model, plan, rotations, scheme)
    return plan


def replaced(model, name, make):
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    before = getattr(module, attribute)
    setattr(module, attribute, make(before))
    return lambda: setattr(module, attribute, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family_fires(name, monkeypatch):
    """And where one is kept from firing, by each thing that it relies on, the forward pass fails and names it."""
    model, ids = tiny(name), tokens(1, 6)
    if name == "aria_text" and FAMILIES[name].refused:  # before transformers 5.18
        with pytest.raises(RotationError, match="AriaExperts has neither"):
            attached(model, FAMILIES[name].allowed)
        return
    plan = attached(model, FAMILIES[name].allowed)
    attachment = attachment_of(model)
    logits(model, ids)
    tried = 0
    for group in plan.linears:
        if group[0] not in attachment.inputs or tried >= 6:
            continue
        tried += 1
        undo = replaced(model, group[-1], WithoutCall)
        with pytest.raises(OnlineError, match=rf"{group[-1]}.*transformers \d"):
            logits(model, ids)
        undo()
    for module in {type(model.get_submodule(name)) for name in plan.attentions if attachment.keys_values}:
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", without_cache(module.forward))
            with pytest.raises(OnlineError, match="keys and values"):
                logits(model, ids)
    if any(site.rotation is not None for site in attachment.keys_values.values()):
        with monkeypatch.context() as patch:
            kind = type(ALL_ATTENTION_FUNCTIONS)
            right, base = kind.get_interface, text_config(model)._attn_implementation.removeprefix(PREFIX)
            patch.setattr(kind, "get_interface", lambda self, name, eager: right(self, base, eager))
            with pytest.raises(OnlineError, match="queries"):
                logits(model, ids)
    for experts in plan.experts:
        module = model.get_submodule(experts.module)
        if GATE in vars(module):
            shadow = vars(module).pop(GATE)
            with pytest.raises(OnlineError, match=experts.second[0]):
                logits(model, ids)
            setattr(module, GATE, shadow)
            break
    logits(model, ids)


def without_cache(forward):
    """The forward of an attention module that does not use the cache that it is given."""
    name, position = cache_parameter(forward)

    @wraps(forward)
    def changed(self, *args, **kwargs):
        if position < len(args):
            args = (*args[:position], None, *args[position + 1 :])
        return forward(self, *args, **{**kwargs, **({name: None} if name in kwargs else {})})

    return changed


def test_an_attention_whose_cache_has_another_name_is_refused(monkeypatch):
    model = tiny_model("llama")
    attention = type(model.model.layers[0].self_attn)

    def forward(self, hidden_states, kv_store=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(attention, "forward", forward)
    plan = plan_of(model)
    with pytest.raises(OnlineError, match=r"layers\.0\.self_attn.*takes no KV cache under a known name"):
        attach(model, plan, {}, parse_scheme("KV4"))
    assert attachment_of(model) is None, "nothing stays attached"


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_found_under_every_name_and_in_every_place(monkeypatch, name, positional):
    """Two-bit keys and values move the logits, and equal those of a model without another name."""
    model, ids = tiny_model("llama"), tokens()
    plan = plan_of(model)
    exact = logits(model, ids)
    with attach(model, plan, {}, parse_scheme("KV2")):
        expected = logits(model, ids)
    assert (expected - exact).norm() > 0.1 * exact.norm()
    attention = type(model.model.layers[0].self_attn)
    own, original = cache_parameter(attention.forward)[0], attention.forward
    source = f"def forward(self, hidden_states, position_embeddings, attention_mask=None, {name}=None, **kwargs):\n"
    source += f"    kwargs[{own!r}] = {name}\n"
    source += "    return original(self, hidden_states, position_embeddings, attention_mask, **kwargs)"
    namespace = {"original": original}
    exec(source, namespace)
    monkeypatch.setattr(attention, "forward", namespace["forward"])

    def renamed(module, args, kwargs):
        kwargs = dict(kwargs)
        cache = kwargs.pop(own, None)
        if not positional:
            return args, {**kwargs, name: cache}
        given = [kwargs.pop(key) for key in ("hidden_states", "position_embeddings", "attention_mask") if key in kwargs]
        return (*args, *given, cache), kwargs

    for layer in model.model.layers:  # as another version of the layer would call it
        layer.self_attn.register_forward_pre_hook(renamed, with_kwargs=True)
    with attach(model, plan, {}, parse_scheme("KV2")):
        assert torch.equal(logits(model, ids), expected)


def test_it_is_checked_in_every_pass_and_under_every_cache():
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model)
    logits(model, ids)
    undo = replaced(model, "model.layers.2.mlp.down_proj", WithoutCall)
    name = cache_parameter(type(model).forward)[0]
    for options in ({}, {"use_cache": False}, {name: StaticCache(config=model.config, max_cache_len=16)}):
        with pytest.raises(OnlineError, match=r"layers\.2\.mlp\.down_proj"):
            logits(model, ids, **options)
    with pytest.raises(OnlineError, match=r"layers\.2\.mlp\.down_proj"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    undo()
    model.generate(ids, max_new_tokens=2, do_sample=False)


def test_copies_of_a_model_are_checked_by_themselves():
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model)
    other = copy.deepcopy(model)
    replaced(other, "model.layers.0.self_attn.q_proj", WithoutCall)
    with pytest.raises(OnlineError, match="q_proj"):
        logits(other, ids)
    logits(model, ids)
    attachment_of(other).remove()
    logits(other, ids)


def test_a_block_alone_is_checked_too():
    """As calibration runs it."""
    model = tiny_model("llama")
    attached(model)
    replaced(model, "model.layers.1.mlp.up_proj", WithoutCall)
    block, seen = model.model.layers[1], {}
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with pytest.raises(OnlineError, match="up_proj"):
        logits(model, tokens(1, 6))
    handle.remove()
    with pytest.raises(OnlineError, match="up_proj"):
        block(*seen["args"], **seen["kwargs"])


def test_a_change_of_the_attention_implementation_is_refused():
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RotationError, match="was changed to 'eager'"):
        logits(model, ids)
