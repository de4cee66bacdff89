"""Attach online rotations (R3, R4, online R1) and quantizers to a model with forward hooks, and remove them again.

- At the input of a linear: rotate (R4, online R1), then quantize the activation. Linears that read the same activation
  (q, k and v; gate and up) share the result.
- At the input of stacked experts: rotate (online R1), then quantize. Between their two matrix products: rotate (R4),
  then quantize.
- On queries and keys (R3): queries are rotated inside transformers' attention interface, keys once, before they are
  written to the KV cache, where keys and values are also quantized and packed.

Any invertible transform T may take the place of a rotation. Linears and experts read x T, keys become k T and queries
q T^-T, with one T for each key-value head if it has several.

`attach` returns an `Attachment`; its `remove()` (or leaving its `with` block) restores the model. The hooks are on the
modules, so that a decoder block that runs alone, as in calibration, behaves as it does inside the whole model. The
computation at each place is in `sites.py`, queries are reached by `queries.py`, the packed cache is in `kv_cache.py`;
`firing.py` checks after every forward pass that all of them ran.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from spinquant.errors import RotationError
from spinquant.online.attachment import ATTACHMENT, Attachment
from spinquant.online.firing import AttentionCheck, FiringCheck, ModulesCheck, cache_argument
from spinquant.online.queries import QUERIES, rotate_queries
from spinquant.online.sites import (
    GATE,
    InputSite,
    KeyValueSite,
    TreatedActivation,
    TreatedGate,
    check_batched,
    is_gated,
)
from spinquant.plan import OnlineSite, Plan, Space
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, parse_scheme, with_clip
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import compose

CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def attach(
    model: nn.Module,
    plan: Plan,
    rotations: Mapping[str, Transform],
    scheme: Scheme | str | None = None,
    clips: Clips | None = None,
    *,
    around: bool = False,
) -> Attachment:
    """Attach online rotations (R3, R4, online R1) and the quantizers of activations and KV cache.

    `rotate`, `quantize` and `load` call it; call it yourself after `fuse_module`, or to try a scheme on a model.

    Args:
        model: A causal language model of transformers. It is changed in place, until `Attachment.remove`.
        plan: Where the model can be rotated, from `plan_of`.
        rotations: Rotations, or other transforms, by the name of their space, from `make_rotations`. Those of online
            spaces must already be fused into the weights that read them (`fuse_module`). Others are ignored; `{}`
            attaches quantizers alone.
        scheme: What is quantized online, such as "A8KV4". Only its activations and KV cache count here. Default:
            nothing.
        clips: Clip ratios found by calibration; where they name a place, they replace the scheme's clip ratio.
        around: The model is not rotated; every quantizer rotates its input, quantizes it and undoes the rotation, so
            that the model quantizes like a rotated one (`quantization/rotated_rounding.py`). Used in learning. Default:
            False.

    Returns:
        The attachment: a context manager whose `remove` restores the model.

    Raises:
        RotationError: The model has an attachment already, R3 cannot run under its attention implementation, or its
            experts have no place for a hook between their two matrix products.

    Example:
        >>> import spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> plan = spinquant.plan_of(model)
        >>> rotations = spinquant.make_rotations(plan, spinquant.RotationSpec(("R3", "R4"), "auto"))
        >>> spinquant.fuse_module(model, plan, rotations)
        >>> with spinquant.attach(model, plan, rotations, "A8KV4"):
        ...     model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 64])
    """
    if getattr(model, ATTACHMENT, None) is not None:
        raise RotationError(
            "this model already has online rotations or quantizers attached: call remove() on its attachment (or "
            "spinquant.detach(model)) before attaching others"
        )
    scheme = parse_scheme(scheme or "none")
    attachment = Attachment()
    attachment.set(model, ATTACHMENT, attachment)
    attaching = _Attaching(model, plan, rotations, scheme, clips or Clips(), around, attachment)
    try:
        attaching.inputs()
        attaching.experts()
        attaching.attention()
        attaching.checks()
    except BaseException:
        attachment.remove()
        raise
    return attachment


def before_forward(model: nn.Module, action: Callable[[], object]) -> Any:
    """Call `action` before every forward pass of the model; returns the handle that removes the hook."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        action()

    return model.register_forward_pre_hook(hook)


@dataclass(frozen=True)
class _Attaching:
    """One call of `attach`: its arguments, and the attachment that collects the hooks."""

    model: nn.Module
    plan: Plan
    rotations: Mapping[str, Transform]
    scheme: Scheme
    clips: Clips
    around: bool
    attachment: Attachment

    def inputs(self) -> None:
        """Rotate and quantize the inputs of linears."""
        spaces = self._spaces_at("input")
        heads = (self.plan.heads,) if self.plan.heads else ()
        # The head is not among the plan's linears: the scheme decides if its input is quantized, the plan if rotated.
        for group in (*self.plan.linears, *heads):
            around = self._chain(self.plan.spaces_read_by(group[0])) if self.around else None
            rotation = around if self.around else self._rotation_of(spaces.get(group[0]))
            quantizer = self.scheme.activations if group not in heads or self.scheme.lm_head else None
            site = self._input_site(group[0], rotation, quantizer, readers=len(group))
            if site is None:
                continue
            for name in group:
                self.attachment.hook(self.model.get_submodule(name).register_forward_pre_hook(site))

    def experts(self) -> None:
        """Quantize the inputs of stacked experts; rotate and quantize between their two matrix products."""
        entered = self._spaces_at("experts_input")
        for experts in self.plan.experts:
            outside, inside = self.plan.read_by_experts(experts)
            module: Any = self.model.get_submodule(experts.module)
            rotation = self._chain(outside) if self.around else self._rotation_of(entered.get(experts.module))
            if (first := self._input_site(experts.first[0], rotation, self.scheme.activations)) is not None:
                self.attachment.hook(module.register_forward_pre_hook(first))
            second = self._input_site(experts.second[0], self._rotation_of(inside), self.scheme.activations)
            if second is None:
                continue
            if is_gated(module, experts.module):
                self.attachment.cover(module, GATE, TreatedGate(module, second))
                self.attachment.hook(module.register_forward_pre_hook(check_batched))
            else:
                self.attachment.hook(module.act_fn.register_forward_hook(TreatedActivation(second)))

    def attention(self) -> None:
        """Rotate queries and keys (R3), and quantize keys and values in the KV cache."""
        plan, attachment = self.plan, self.attachment
        spaces = self._spaces_at("query_key")
        found = {name: self._rotation_of(spaces.get(name)) for name in plan.attentions}
        rotated = {} if self.around else {name: rotation for name, rotation in found.items() if rotation is not None}
        implementation = rotate_queries(self.model, attachment) if rotated else None
        if not rotated and self.scheme.kv is None:
            return
        for name in CONTINUOUS:
            if hasattr(self.model, name):
                attachment.cover(self.model, name, refuse_continuous)
        for name in plan.attentions:
            module = self.model.get_submodule(name)
            ratios = (self.clips.keys.get(name), self.clips.values.get(name))
            keys, values = (with_clip(self.scheme.kv, ratio) for ratio in ratios)
            both = (found[name], self._rotation_of(plan.values_of(name))) if self.around else None
            parameter = cache_argument(module, name)
            site = KeyValueSite(rotated.get(name), keys, values, implementation, parameter, around=both)
            attachment.keys_values[name] = site
            attachment.hook(module.register_forward_pre_hook(site, with_kwargs=True))
            attachment.check(module.register_forward_hook(AttentionCheck(name, site).finish))
            if site.rotation is not None:
                attachment.set(module, QUERIES, site)

    def checks(self) -> None:
        """Have every site of an activation checked after each pass of the decoder block, or of the model, around it.

        Modules that may have been replaced are looked for before each pass of the model, and of the decoder inside it,
        which peft calls past the model's hooks.
        """
        readers = {group[0]: group for group in self.plan.linears}
        inside: dict[str, dict[str, InputSite]] = {}
        for name, site in self.attachment.inputs.items():
            block = next((block for block in self.plan.blocks if name.startswith(f"{block}.")), "")
            inside.setdefault(block, {})[name] = site
        for block, sites in inside.items():
            check = FiringCheck(block, sites, {name: readers.get(name, (name,)) for name in sites})
            module = self.model.get_submodule(block)
            self.attachment.check(module.register_forward_pre_hook(check.begin))
            self.attachment.check(module.register_forward_hook(check.finish))
        sites = [*self.attachment.inputs, *self.attachment.keys_values]
        experts = [experts.module for experts in self.plan.experts]
        names = [name for name in (*self.plan.blocks, *self.plan.attentions, *experts) if _holds(name, sites)]
        if names:
            present = ModulesCheck.of(self.model, names, sites)
            decoders = {block.rpartition(".")[0].rpartition(".")[0] for block in self.plan.blocks}
            for decoder in {"", *decoders}:
                module = self.model.get_submodule(decoder)
                self.attachment.check(module.register_forward_pre_hook(present.begin))

    def _chain(self, spaces: Sequence[Space]) -> Transform | None:
        """The product of the transforms of spaces that an activation belongs to, one after another."""
        found = [self.rotations[space.name] for space in spaces if space.name in self.rotations]
        return reduce(compose, found) if found else None

    def _spaces_at(self, site: OnlineSite) -> dict[str, Space]:
        """Spaces by the name of the module at which they are transformed."""
        return {one.module: self.plan.space[one.space] for one in self.plan.onlines if one.site == site}

    def _rotation_of(self, space: Space | None) -> Transform | None:
        return None if space is None else self.rotations.get(space.name)

    def _input_site(
        self, name: str, rotation: Transform | None, quantizer: Quantizer | None, *, readers: int = 1
    ) -> InputSite | None:
        """The site of an activation, registered under its name; None if there is nothing to do at it."""
        if quantizer is None and (self.around or rotation is None):
            return None
        quantizer = with_clip(quantizer, self.clips.inputs.get(name))
        site = InputSite(rotation, quantizer, readers=readers, around=self.around)
        self.attachment.inputs[name] = site
        return site


def _holds(name: str, sites: Sequence[str]) -> bool:
    return any(site == name or site.startswith(f"{name}.") for site in sites)


def refuse_continuous(*args: Any, **kwargs: Any) -> None:
    """Raise RotationError: stands for the methods of a model that generate with continuous batching."""
    # Its paged cache is written inside the attention function, past the rotation and quantizer of keys and values.
    raise RotationError(
        "continuous batching (generate_batch) has a paged KV cache, whose keys and values can be neither rotated (R3) "
        "nor quantized. Call generate with a padded batch, leave R3 out and the KV cache at 16 bits, or serve the "
        "model with a runtime that runs it (`spinquant plan MODEL --runtime NAME`)"
    )
