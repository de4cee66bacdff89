"""Online parts: what has to happen while the model runs, attached by hooks and removed without a trace.

- At the input of a linear: rotate (R4), then round to the activation grid. Linears that read the same activation
  (q, k and v; gate and up) share the work.
- In front of stacked experts: round. Between their two products: rotate (R4), then round.
- On queries and keys (R3): queries are rotated inside transformers' attention interface, keys once, on their way
  into the KV cache, where keys and values are also rounded and packed.

Attaching returns an `Attachment`; its `remove()` (or leaving its `with` block) restores the model. The hooks sit on
the modules, so that a part of the model run alone, as calibration does, behaves as it does inside the whole. What
happens at each place is in `sites.py`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from spinquant.errors import RotationError
from spinquant.online.sites import (
    GATE,
    InputSite,
    KeyValueSite,
    TreatedActivation,
    TreatedGate,
    check_batched,
    is_gated,
)
from spinquant.plan import Plan, Space
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, with_clip
from spinquant.rotations.rotation import Rotation

PREFIX = "spinquant_"
ATTENTIONS = ("sdpa", "eager", "flex_attention")
QUERY_ROTATION = "_spinquant_query_rotation"
ATTACHMENT = "_spinquant_attachment"


class Attachment:
    """Everything that `attach` put on a model, and the way to take it off again.

    inputs: the sites by the first of the linears that read the activation, or of the tensors of experts. keys_values:
    by attention module.
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
        _attach_experts(model, plan, rotations, scheme, clips, attachment, around)
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


def _attach_experts(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    scheme: Scheme,
    clips: Clips,
    attachment: Attachment,
    around: bool,
) -> None:
    for experts in plan.experts:
        outside, inside = (_rotation_of(space, rotations) for space in plan.read_by_experts(experts))
        # In front of the first products nothing has to be rotated at run time.
        for name, rotation in ((experts.first[0], outside if around else None), (experts.second[0], inside)):
            if scheme.activations is None and (around or rotation is None):
                continue
            quantizer = with_clip(scheme.activations, clips.inputs.get(name))
            site = attachment.inputs[name] = InputSite(rotation, quantizer, readers=1, around=around)
            module: Any = model.get_submodule(experts.module)
            if name == experts.first[0]:
                attachment.hook(module.register_forward_pre_hook(site))
            elif is_gated(module, experts.module):
                attachment.cover(module, GATE, TreatedGate(module, site))
                attachment.hook(module.register_forward_pre_hook(check_batched))
            else:
                attachment.hook(module.act_fn.register_forward_hook(TreatedActivation(site)))


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
