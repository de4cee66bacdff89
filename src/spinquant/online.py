"""Online parts: what has to happen while the model runs, attached by hooks and removed without a trace.

- At the input of a linear: rotate (R4), then round to the activation grid. Linears that read the same activation
  (q, k and v; gate and up) share the work.
- Inside stacked experts, before their second product: rotate (R4). transformers' batched implementations call a method
  of the module between the two products, which is covered on that module alone.
- On queries and keys (R3): queries are rotated inside transformers' attention interface, keys once, on their way
  into the KV cache, where keys and values are also rounded and packed.

Attaching returns an `Attachment`; its `remove()` (or leaving its `with` block) restores the model. The hooks sit on
the modules, so that a part of the model run alone, as calibration does, behaves as it does inside the whole.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from spinquant.cache import pack_layer
from spinquant.errors import RotationError
from spinquant.plan import Plan, Space
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.rotated import Turn, round_rotated
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, with_clip
from spinquant.rotation import Rotation

PREFIX = "spinquant_"
ATTENTIONS = ("sdpa", "eager", "flex_attention")
EXPERTS = ("grouped_mm", "batched_mm")
GATE = "_apply_gate"
QUERY_ROTATION = "_spinquant_query_rotation"
ATTACHMENT = "_spinquant_attachment"


class Attachment:
    """Everything that `attach` put on a model, and the way to take it off again.

    inputs: the sites by the first of the linears that read the activation. keys_values: by attention module.
    Changes are kept as data, not as closures, so that a deep copy of the model has an attachment of its own.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, InputSite] = {}
        self.keys_values: dict[str, KeyValueSite] = {}
        self._handles: list[Any] = []
        self._attributes: list[tuple[Any, str, bool, Any]] = []

    def hook(self, handle: Any) -> None:
        """Remember a hook's handle."""
        self._handles.append(handle)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and remember what it was."""
        self._attributes.append((owner, name, hasattr(owner, name), getattr(owner, name, None)))
        setattr(owner, name, value)

    def cover(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object that its class has, until `remove` takes it away again."""
        self._attributes.append((owner, name, False, None))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Restore the model as it was before `attach`. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._attributes:
            owner, name, existed, value = self._attributes.pop()
            if existed:
                setattr(owner, name, value)
            else:
                delattr(owner, name)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within the block nothing is rounded; rotations stay."""
        sites: list[InputSite | KeyValueSite] = [*self.inputs.values(), *self.keys_values.values()]
        for site in sites:
            site.rounds = False
        try:
            yield
        finally:
            for site in sites:
                site.rounds = True

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def attach(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    scheme: Scheme | None = None,
    clips: Clips | None = None,
    *,
    around: bool = False,
) -> Attachment:
    """Rotate and round at run time what the plan and the scheme ask for.

    `rotations` by space name; those of online spaces must already be fused into the weights that read them. `clips`
    take the place of the scheme's clip ratios where they name one.
    around: the model is not rotated at all, and rounds what a rotated one would round: see `quantization/rotated.py`.
    Raises RotationError when online parts are attached already.
    """
    if getattr(model, ATTACHMENT, None) is not None:
        raise RotationError("this model already has online parts: remove() them before attaching others")
    scheme, clips = scheme or Scheme(), clips or Clips()
    attachment = Attachment()
    attachment.set(model, ATTACHMENT, attachment)
    try:
        _attach_inputs(model, plan, rotations, scheme, clips, attachment, around)
        if not around:
            _attach_experts(model, plan, rotations, attachment)
        _attach_attention(model, plan, rotations, scheme.kv, clips, attachment, around)
    except BaseException:
        attachment.remove()
        raise
    return attachment


def before_forward(model: nn.Module, action: Callable[[], object]) -> Any:
    """Call `action` before every forward pass of the model; returns the handle that ends it."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        action()

    return model.register_forward_pre_hook(hook)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment on a model, None where there is none."""
    return getattr(model, ATTACHMENT, None)


def _attach_inputs(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    scheme: Scheme,
    clips: Clips,
    attachment: Attachment,
    around: bool,
) -> None:
    online = {online.module: plan.space[online.space] for online in plan.onlines if online.site == "input"}
    head = (plan.head.removesuffix(".weight"),)
    # The head is no linear of the plan: what it reads is rounded where the scheme says so, rotated where the plan does.
    for group in (*plan.linears, head):
        rotation = _rotation_of(plan.read_by(group[0]) if around else online.get(group[0]), rotations)
        activations = scheme.activations if group != head or scheme.lm_head else None
        if activations is None and (around or rotation is None):
            continue
        quantizer = with_clip(activations, clips.inputs.get(group[0]))
        site = attachment.inputs[group[0]] = InputSite(rotation, quantizer, readers=len(group), around=around)
        for name in group:
            attachment.hook(model.get_submodule(name).register_forward_pre_hook(site))


def _rotation_of(space: Space | None, rotations: Mapping[str, Rotation]) -> Rotation | None:
    return None if space is None else rotations.get(space.name)


def _rounded(x: Tensor, rotation: Rotation | None, quantizer: Quantizer) -> Tensor:
    return round_rotated(x, () if rotation is None else (Turn(rotation),), quantizer)


class InputSite:
    """Rotates and rounds one activation, once for all the linears that read it. `rounds` switches rounding.

    around: what is rounded is rotated before and rotated back after.
    """

    def __init__(self, rotation: Rotation | None, quantizer: Quantizer | None, *, readers: int, around: bool = False):
        self.around = around
        self.rotation = rotation
        self.quantizer = quantizer
        self.rounds = True
        self.readers = readers
        self._forget()

    def _forget(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1
        self._setting: tuple[bool, bool, Quantizer | None] | None = None
        self._result: Tensor | None = None
        self._read_by: set[int] = set()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        version = -1 if x.is_inference() else x._version  # inference tensors do not count their changes
        known = (
            self._source is not None
            and self._source() is x
            and version == self._version
            and (torch.is_grad_enabled(), self.rounds, self.quantizer) == self._setting
            and id(module) not in self._read_by  # a second read is a new pass, maybe after a change in place
        )
        if not known:
            self._forget()
            quantizer = self.quantizer if self.rounds else None
            self._result = self._compute(x, quantizer)
            self._source, self._version = weakref.ref(x), version
            self._setting = (torch.is_grad_enabled(), self.rounds, self.quantizer)
        result = self._result
        self._read_by.add(id(module))
        if len(self._read_by) >= self.readers:
            self._forget()  # the activation is not kept alive past its last reader
        return (result, *args[1:])

    def _compute(self, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        if self.around:
            return x if quantizer is None else _rounded(x, self.rotation, quantizer)
        result = x if self.rotation is None else self.rotation.apply(x)
        return result if quantizer is None else fake_quantize(result, quantizer)


def _attach_experts(model: nn.Module, plan: Plan, rotations: Mapping[str, Rotation], attachment: Attachment) -> None:
    for online in plan.onlines:
        if online.site == "experts" and online.space in rotations:
            experts: Any = model.get_submodule(online.module)
            if not hasattr(experts, GATE):
                raise RotationError(
                    f"R4 cannot run inside {online.module!r}: {type(experts).__name__} has no {GATE}, as transformers' "
                    "experts have. Leave R4 out."
                )
            attachment.cover(experts, GATE, RotatedGate(experts, rotations[online.space]))
            attachment.hook(experts.register_forward_pre_hook(_check_experts))


class RotatedGate:
    """Takes the place of a stack of experts' activation: what it gives is rotated on its way to the second product."""

    def __init__(self, experts: nn.Module, rotation: Rotation):
        self.experts = experts
        self.rotation = rotation

    def __call__(self, gate_up: Tensor) -> Tensor:
        return self.rotation.apply(getattr(type(self.experts), GATE)(self.experts, gate_up))


def _check_experts(module: nn.Module, args: tuple[Any, ...]) -> None:
    config: Any = module.config
    found = config._experts_implementation
    if found not in EXPERTS:
        # A loop over experts does not call the method: the second product would read what is not rotated.
        raise RotationError(
            f"R4 cannot run inside experts under implementation {found!r}: call model.set_experts_implementation("
            f"'grouped_mm') (supported: {', '.join(EXPERTS)}), or leave R4 out"
        )


def _attach_attention(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    quantizer: Quantizer | None,
    clips: Clips,
    attachment: Attachment,
    around: bool,
) -> None:
    spaces = {online.module: plan.space[online.space] for online in plan.onlines if online.site == "query_key"}
    found = {name: _rotation_of(spaces.get(name), rotations) for name in plan.attentions}
    rotated = {} if around else {name: rotation for name, rotation in found.items() if rotation is not None}
    implementation = _rotate_queries(model, rotated, attachment) if rotated else None
    if not rotated and quantizer is None:
        return
    for name in plan.attentions:
        keys, values = (with_clip(quantizer, ratios.get(name)) for ratios in (clips.keys, clips.values))
        both = (found[name], _rotation_of(plan.values_of(name), rotations)) if around else None
        site = KeyValueSite(rotated.get(name), keys, values, implementation, around=both)
        attachment.keys_values[name] = site
        attachment.hook(model.get_submodule(name).register_forward_pre_hook(site, with_kwargs=True))


def check_implementation(found: str, supported: Sequence[str] = ATTENTIONS) -> None:
    """Raise RotationError for an attention implementation under which R3 cannot run."""
    if found not in supported:
        # Flash attention looks its kernel up by the implementation's name, which is ours while R3 is attached.
        raise RotationError(
            f"R3 cannot run under attention implementation {found!r}: load the model with attn_implementation='sdpa' "
            f"(supported: {', '.join(supported)}), or leave R3 out"
        )


def text_config(model: Any) -> Any:
    """The config of what attends to tokens: the model's own, or its language part's."""
    return model.config.get_text_config()


def _rotate_queries(model: nn.Module, rotated: Mapping[str, Rotation], attachment: Attachment) -> str:
    config: Any = text_config(model)  # what sees attends in its own way
    base = config._attn_implementation
    check_implementation(base)
    implementation = PREFIX + base
    AttentionInterface.register(implementation, _attention_with_rotated_queries(base))
    AttentionMaskInterface.register(implementation, AttentionMaskInterface()[base])
    attachment.set(config, "_attn_implementation", implementation)
    for name, rotation in rotated.items():
        attachment.set(model.get_submodule(name), QUERY_ROTATION, rotation)
    return implementation


def _attention_with_rotated_queries(base: str) -> Callable[..., Any]:
    interface = AttentionInterface()

    def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Every model file has an eager function of its own, which the interface does not list.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = interface.get_interface(base, eager)  # pyright: ignore[reportArgumentType]
        rotation = getattr(module, QUERY_ROTATION, None)
        return function(module, query if rotation is None else rotation.apply(query), *args, **kwargs)

    return attention


class KeyValueSite:
    """Pre-hook of an attention module: stands between it and its cache.

    `rounds` switches rounding; `watch`, when set, is shown keys and values before they are rounded. around: rotations
    of keys and of values in which they are rounded, and rotated back after; None where nothing of the kind is done.
    """

    def __init__(
        self,
        rotation: Rotation | None,
        keys: Quantizer | None,
        values: Quantizer | None,
        implementation: str | None,
        *,
        around: tuple[Rotation | None, Rotation | None] | None = None,
    ):
        self.around = around
        self.rotation = rotation
        self.keys = keys
        self.values = values
        self.rounds = True
        self.watch: Callable[[Tensor, Tensor], object] | None = None
        self.implementation = implementation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        config: Any = getattr(module, "config", None)
        if self.rotation is not None and config._attn_implementation != self.implementation:
            # Keys would be rotated and queries not: nonsense without an error.
            raise RotationError(
                f"the attention implementation was changed to {config._attn_implementation!r} while R3 is attached: "
                "remove() the online parts, change it, and attach them again"
            )
        name = "layer_past" if "layer_past" in kwargs else "past_key_values"  # GPT-NeoX and its time say the former
        return args, {**kwargs, name: _RotatingCache(kwargs.get(name), self)}


class _RotatingCache:
    """What an attention module sees as its cache: rotates keys, rounds keys and values, then stores them."""

    def __init__(self, cache: Cache | None, site: KeyValueSite):
        self._cache = cache
        self._site = site

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache, site = self._cache, self._site
        if site.rotation is not None:
            keys = site.rotation.apply(keys)
        if site.watch is not None:
            site.watch(keys, values)
        if site.keys is not None and site.values is not None and site.rounds:
            if site.around is not None:
                keys, values = _rounded(keys, site.around[0], site.keys), _rounded(values, site.around[1], site.values)
            elif cache is None or not pack_layer(cache, layer_idx, site.keys, site.values):
                keys, values = fake_quantize(keys, site.keys), fake_quantize(values, site.values)
        return (keys, values) if cache is None else cache.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
