"""An online rotation or quantizer that does not run in a forward pass is an error, whatever keeps it from running."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import FAMILIES, tiny
from models import CACHE, byte_tokenizer, logits, tiny_model, tokens
from spinquant import (
    Calibration,
    CalibrationText,
    LearnOptions,
    LocalOptions,
    OnlineError,
    Options,
    QuantizedCache,
    RotationError,
    RotationSpec,
    attach,
    evaluate,
    fuse_module,
    learn,
    load,
    make_rotations,
    parse_scheme,
    plan_of,
    quantize,
    quantize_folder,
    save,
)
from spinquant.models.cache_names import CACHE_NAMES, cache_parameter
from spinquant.online.attachment import attachment_of
from spinquant.online.queries import PREFIX, text_config
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
        for change in (dropped, renamed):
            with monkeypatch.context() as patch:
                patch.setattr(Cache, "store", Cache.update, raising=False)
                patch.setattr(module, "forward", with_cache(change)(module.forward))
                with pytest.raises(OnlineError, match="keys and values"):
                    logits(model, ids)
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", without_keyword(module.forward))
            with pytest.raises(OnlineError, match=rf"{module.__name__}\.forward takes no KV cache under a known name"):
                attached(tiny(name), FAMILIES[name].allowed)
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


@dataclass(frozen=True)
class Renaming:
    """A KV cache whose method `update` has another name, as an attention module of another release would call it."""

    cache: Any

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update(self, *args, **kwargs):
        return self.cache.store(*args, **kwargs)


def renamed(cache):
    return None if cache is None else Renaming(cache)


def dropped(cache):
    return None


def with_cache(change):
    """The forward of an attention module whose cache is first changed."""

    def changed(forward):
        name, position = cache_parameter(forward)

        @wraps(forward)
        def other(self, *args, **kwargs):
            if position < len(args):
                args = (*args[:position], change(args[position]), *args[position + 1 :])
            return forward(self, *args, **{**kwargs, **({name: change(kwargs[name])} if name in kwargs else {})})

        return other

    return changed


def without_keyword(forward):
    """The forward of an attention module that calls its cache by a name that nobody knows."""

    def other(self, *args, kv_store=None, **kwargs):
        raise AssertionError

    return other


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

    def called(module, args, kwargs):
        kwargs = dict(kwargs)
        cache = kwargs.pop(own, None)
        if not positional:
            return args, {**kwargs, name: cache}
        given = [kwargs.pop(key) for key in ("hidden_states", "position_embeddings", "attention_mask") if key in kwargs]
        return (*args, *given, cache), kwargs

    for layer in model.model.layers:  # as another version of the layer would call it
        layer.self_attn.register_forward_pre_hook(called, with_kwargs=True)
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


def made_anew(module):
    """A module of the same class with the same weights, and without hooks."""
    other = copy.deepcopy(module)
    for inner in other.modules():
        inner._forward_pre_hooks.clear(), inner._forward_hooks.clear()
    return other


@pytest.mark.parametrize("scheme", ["KV8", "A8"])
@pytest.mark.parametrize("name", ["model", "model.layers", "model.layers.1", "model.layers.1.self_attn"])
def test_a_module_that_is_replaced_afterwards_is_refused(name, scheme):
    """Its hooks are gone with it, and with them the checks of what it holds."""
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model, allowed=(), scheme=scheme)
    expected = logits(model, ids)
    undo = replaced(model, name, made_anew)
    with pytest.raises(OnlineError, match=rf"'{name}'.*transformers \d.*those of model\.layers.*attach \(or load\)"):
        logits(model, ids)
    undo()
    assert torch.equal(logits(model, ids), expected)


def test_a_module_that_wraps_another_is_not_refused():
    """As compiled blocks and adapters do; what it leaves out is then missed by the other checks."""
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model)
    expected = logits(model, ids)
    replaced(model, "model.layers.1", Wrapper)
    assert torch.equal(logits(model, ids), expected)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_change_of_the_attention_implementation_is_refused():
    model, ids = tiny_model("llama"), tokens(1, 6)
    attached(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RotationError, match="was changed to 'eager'"):
        logits(model, ids)


def test_threads_share_a_model():
    """A server runs several forward passes at once; each has the results that it has alone."""
    model = tiny_model("llama", dtype=torch.float32)
    quantize(model, "A4KV4", RotationSpec("R1,R3,R4"), options=Options(prove=False))
    rows = [tokens(1, 40, seed=seed) for seed in range(16)]
    expected = [logits(model, row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: logits(model, row), rows))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch, while it traces
def test_a_linear_that_is_compiled_alone_counts():
    model, ids = tiny_model("llama", dtype=torch.float32), tokens()
    quantize(model, "A8", options=Options(prove=False))
    expected = logits(model, ids)
    model.model.layers[1].mlp.up_proj.compile(backend="eager")
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)


# Each thing that online parts rely on, taken away from a class of transformers: what is then named, and how to do it.


def attention_of(model):
    return type(model.model.layers[0].self_attn)


def ignored_keyword(model, patch):
    attention = attention_of(model)
    patch.setattr(attention, "forward", with_cache(dropped)(attention.forward))


def renamed_update(model, patch):
    attention = attention_of(model)
    patch.setattr(Cache, "store", Cache.update, raising=False)
    patch.setattr(attention, "forward", with_cache(renamed)(attention.forward))


def other_interface(model, patch):
    kind = type(ALL_ATTENTION_FUNCTIONS)
    right = kind.get_interface
    patch.setattr(kind, "get_interface", lambda self, name, eager: right(self, name.removeprefix(PREFIX), eager))


def linear_by_its_weight(model, patch):
    mlp = type(model.model.layers[0].mlp)

    def forward(self, x):
        return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    patch.setattr(mlp, "forward", forward)


BROKEN = {
    "the keyword": (ignored_keyword, r"keys and values.*layers\.0\.self_attn"),
    "the cache's update": (renamed_update, r"keys and values.*layers\.0\.self_attn"),
    "the attention interface": (other_interface, r"queries.*layers\.0\.self_attn"),
    "a linear called by its weight": (linear_by_its_weight, r"layers\.0\.mlp\.down_proj"),
}


def refused(part):
    """pytest.raises with what every message has to name: module, site, library, version, and what to do."""
    return pytest.raises(OnlineError, match=rf"{BROKEN[part][1]}.*transformers \d.*torch \d.*use the versions that")


class Stored(QuantizedLayer):
    """A layer of transformers' quantized cache, without the libraries that round: it keeps what it is given."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


class NoStream(nullcontext):
    """Stands for the streams of a GPU, which transformers asks for to offload a KV cache."""

    def wait_stream(self, other):
        pass


def offloaded(config):
    cache = DynamicCache(config=config, offloading=True)
    cache.prefetch_stream = NoStream()
    return {CACHE: cache}


# By the class of model, whose layers have a sliding window or not.
CACHES = {
    "none": ("llama", lambda config: {"use_cache": False}),
    "dynamic": ("llama", lambda config: {CACHE: DynamicCache(config=config)}),
    "lazy": ("llama", lambda config: {CACHE: DynamicCache()}),
    "sliding": ("mistral", lambda config: {CACHE: DynamicCache(config=config)}),
    "static": ("llama", lambda config: {CACHE: StaticCache(config=config, max_cache_len=16)}),
    "static sliding": ("mistral", lambda config: {CACHE: StaticCache(config=config, max_cache_len=16)}),
    "quantized": ("llama", lambda config: {CACHE: Cache(layers=[Stored() for _ in range(config.num_hidden_layers)])}),
    "packed": ("llama", lambda config: {CACHE: QuantizedCache(config, parse_scheme("KV8").kv)}),
    "offloaded": ("llama", offloaded),
}


@pytest.mark.parametrize("kind", CACHES)
def test_generation_is_checked_with_every_kind_of_cache(kind, monkeypatch):
    """Whole, it generates what it generates without a cache; without any of the parts it is refused."""
    name, cache = CACHES[kind]
    model, ids = tiny_model(name), tokens(1, 6)
    attached(model)
    options = {"max_new_tokens": 3, "do_sample": False}
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **cache(model.config), **options), expected)
    for part, (remove, _) in BROKEN.items():
        with monkeypatch.context() as patch:
            remove(model, patch)
            with refused(part):
                model.generate(ids, **cache(model.config), **options)


# What runs a model with online parts: prepared while nothing is broken, and then run.


def traced(trace):
    def prepare(model, place):
        model = tiny_model("llama", layers=1)
        attached(model, scheme="none")  # tracing quantizers takes most of the time, and hooks are hooks
        return lambda: trace(model, tokens(1, 6))

    return prepare


@torch.no_grad()
def compiled(model, ids):
    torch._dynamo.reset()
    model.model.layers[0].compile(backend="eager")
    model(ids, use_cache=False)


def exported(model, ids):
    torch.export.export(model, (ids,), {"use_cache": False})


def calibrated(model, place):
    plain, options = tiny_model("llama"), Options(prove=False)
    return lambda: quantize(
        plain, SCHEME, ONLINE, method="gptq", tokens=tokens(2, 8), calibration=Calibration(), options=options
    )


def calibrated_from_disk(model, place):
    plain = tiny_model("llama", dtype=torch.float32)
    plain.save_pretrained(place / "plain")
    byte_tokenizer().save_pretrained(place / "plain")
    (place / "text").write_text("a quick brown fox " * 40)
    text = CalibrationText(str(place / "text"), 2, 8)
    given = {"method": "gptq", "calibration_text": text, "text": None, "options": Options(prove=False)}
    return lambda: quantize_folder(place / "plain", place / "out", SCHEME, ONLINE, **given)


def learned(method):
    def prepare(model, place):
        plain = tiny_model("llama", dtype=torch.float32)
        options = LearnOptions(method=method, baselines=1, local=LocalOptions(steps=1, rows=8, batch=8))
        return lambda: learn(plain, parse_scheme("A8KV8"), ONLINE, tokens(2, 8), tokens(2, 8), options)

    return prepare


def read(reader):
    def prepare(model, place):
        save(
            quantize(tiny_model("llama", dtype=torch.float32), SCHEME, ONLINE, options=Options(prove=False)),
            place / "n",
        )
        return lambda: reader(place / "n")(tokens(1, 6))

    return prepare


SCHEME, ONLINE = parse_scheme("W4A8KV8"), RotationSpec(("R3", "R4"), "auto")
MOMENTS = {
    "a forward pass": lambda model, place: lambda: logits(model, tokens(1, 6)),
    "evaluating": lambda model, place: lambda: evaluate(model, tokens()),
    "proving": lambda model, place: lambda: quantize(tiny_model("llama"), SCHEME, ONLINE),
    "compiling": traced(compiled),
    "exporting": traced(exported),
    "calibrating": calibrated,
    "calibrating from disk": calibrated_from_disk,
    "learning locally": learned("local"),
    "learning end to end": learned("end-to-end"),
    "load": read(load),
    "from_pretrained": read(AutoModelForCausalLM.from_pretrained),
}

# Learning undoes R3 after rounding and rotates no queries. Tracing takes seconds, and finds what an eager pass finds.
NOT_TRIED = {
    "learning locally": ["the attention interface"],
    "learning end to end": ["the attention interface"],
    "exporting": ["the cache's update", "the attention interface"],
    "compiling": ["the keyword", "the cache's update", "the attention interface"],
}


# torch warns of itself: it instantiates every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("moment", MOMENTS)
def test_whatever_runs_a_model_is_checked(moment, tmp_path, monkeypatch):
    model = tiny_model("llama")
    attached(model)
    run = MOMENTS[moment](model, tmp_path)
    for part, (remove, _) in BROKEN.items():
        if part in NOT_TRIED.get(moment, ()):
            continue
        with monkeypatch.context() as patch:
            remove(model, patch)
            with refused(part):
                run()
