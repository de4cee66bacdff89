"""Forward hooks that transform and quantize one activation, or the keys and values of one attention.

What reads an activation x T holds T^-T. Keys get T and queries T^-T, so that their products stay what they are; both
are R for a rotation.

`hooks.py` attaches them to a model and removes them again.
"""

import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from spinquant.errors import RotationError
from spinquant.online.kv_cache import pack_layer
from spinquant.quantization.integer import fake_quantize
from spinquant.quantization.rotated_rounding import Turn, round_rotated
from spinquant.quantization.scheme import Quantizer
from spinquant.rotations.rotation import Transform, dual
from spinquant.rotations.transforms import apply_to_heads

EXPERTS = ("grouped_mm", "batched_mm")
GATE = "_apply_gate"


def _rounded(x: Tensor, rotation: Transform | None, quantizer: Quantizer, *, heads: bool = False) -> Tensor:
    return round_rotated(x, () if rotation is None else (Turn(rotation, heads=heads),), quantizer)


class _Pass:
    """What a site knows of the forward pass in progress."""

    def __init__(self) -> None:
        self.calls = 0
        self.stored = self.queried = self.trains = False
        self.forget()

    def forget(self) -> None:
        """Free the activation that linears share."""
        self.source: weakref.ref[Tensor] | None = None
        self.version = -1
        self.setting: tuple[bool, bool, Quantizer | None] | None = None
        self.result: Tensor | None = None
        self.read_by: set[int] = set()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of a model is in no forward pass


class _Site:
    """The state of a site in its forward pass, by thread: a server runs several passes at once.

    What torch.compile and torch.export trace has a state of its own, since they know no threads; a part of a model may
    be compiled alone, so both count.
    """

    def __init__(self) -> None:
        # By number: an attribute of `threading.local` takes longer to read, and a hook reads several per linear.
        self._threads: dict[int, _Pass] = {}
        self._traced = _Pass()

    @property
    def now(self) -> _Pass:
        """The state of this thread, or of what is traced."""
        return self._traced if torch.compiler.is_compiling() else self._in_thread()

    def _in_thread(self) -> _Pass:
        number = threading.get_ident()
        found = self._threads.get(number)
        if found is None:
            found = self._threads[number] = _Pass()
        return found

    def passes(self) -> tuple[_Pass, ...]:
        """The states that the pass in progress may change."""
        return (self._traced,) if torch.compiler.is_compiling() else (self._in_thread(), self._traced)

    @property
    def calls(self) -> int:
        """Number of linears that read the activation since the block around them was entered (`firing.py`)."""
        return sum(one.calls for one in self.passes())

    @calls.setter
    def calls(self, value: int) -> None:
        for one in self.passes():
            one.calls = value

    @property
    def stored(self) -> bool:
        """Whether keys and values passed since the attention module was entered."""
        return any(one.stored for one in self.passes())

    @property
    def queried(self) -> bool:
        """Whether queries were rotated since the attention module was entered."""
        return any(one.queried for one in self.passes())


class InputSite(_Site):
    """Forward pre-hook that rotates and quantizes one activation, once for all linears that read it.

    Attributes:
        rotation: Transform that is applied before quantizing, None without one.
        quantizer: The quantizer, None without one.
        readers: Number of linears that read the activation.
        around: Transform before quantizing and back after it; for a model that is not transformed.
        rounds: Whether the quantizer is on.
        watch: Observer, called with the activation before it is quantized.
        ratio: Clip ratio that is being tuned, instead of the quantizer's; None at other times.
        now: Of each thread: the activation that linears share, and how many read it.
    """

    def __init__(self, rotation: Transform | None, quantizer: Quantizer | None, *, readers: int, around: bool = False):
        super().__init__()
        self.around = around
        self.rotation = rotation
        self.quantizer = quantizer
        self.rounds = True
        self.watch: Callable[[Tensor], object] | None = None
        self.ratio: Tensor | None = None
        self.readers = readers

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, now = args[0], self.now
        now.calls += 1
        if torch.compiler.is_compiling():  # the compiler shares equal results by itself
            return (self._treated(x, self.quantizer if self.rounds else None), *args[1:])
        version = -1 if x.is_inference() else x._version  # inference tensors have no version counter
        known = (
            now.source is not None
            and now.source() is x
            and version == now.version
            and (torch.is_grad_enabled(), self.rounds, self.quantizer) == now.setting
            and id(module) not in now.read_by  # a module's second read is a new pass, perhaps after an in-place change
        )
        if not known:
            now.forget()
            quantizer = self.quantizer if self.rounds else None
            now.result = self._treated(x, quantizer)
            now.source, now.version = weakref.ref(x), version
            now.setting = (torch.is_grad_enabled(), self.rounds, self.quantizer)
        result = now.result
        now.read_by.add(id(module))
        if len(now.read_by) >= self.readers:
            now.forget()  # free the activation after its last reader
        return (result, *args[1:])

    def treat(self, x: Tensor) -> Tensor:
        """The activation as the linears receive it: rotated, and quantized while the quantizer is on."""
        self.now.calls += 1
        return self._treated(x, self.quantizer if self.rounds else None)

    def _treated(self, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        result = x if self.around or self.rotation is None else self.rotation.apply(x)
        if self.watch is not None:
            self.watch(result)
        if self.around:
            return x if quantizer is None else _rounded(x, self.rotation, quantizer)
        return result if quantizer is None else fake_quantize(result, quantizer, self.ratio)


class TreatedGate:
    """Replaces the gated activation of stacked experts by one whose output is rotated and quantized.

    transformers' batched implementations call a method of the module (`_apply_gate`) between the two matrix products;
    it is shadowed on that module only.
    """

    def __init__(self, experts: nn.Module, site: InputSite):
        self.experts = experts
        self.site = site

    def __call__(self, gate_up: Tensor) -> Tensor:
        return self.site.treat(getattr(type(self.experts), GATE)(self.experts, gate_up))


class TreatedActivation:
    """Forward hook on the activation function of experts without a gate: rotates and quantizes its output."""

    def __init__(self, site: InputSite):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.site.treat(output)


def is_gated(experts: nn.Module, name: str) -> bool:
    """Whether experts have a gate. Raises RotationError if nothing can be hooked between their two matrix products."""
    if getattr(experts, "has_gate", True):
        known = hasattr(experts, GATE)
    else:
        known = isinstance(getattr(experts, "act_fn", None), nn.Module)
    if not known:
        raise RotationError(
            f"cannot rotate (R4) or quantize activations inside {name!r}: {type(experts).__name__} has neither the "
            f"method {GATE} of transformers' experts nor a module act_fn. Leave out R4, and keep activations at 16 "
            "bits"
        )
    return getattr(experts, "has_gate", True)


def activated(experts: Any, made: Tensor) -> Tensor:
    """Input of the experts' second matrix product from the output of the first: rotated and quantized if attached."""
    return getattr(experts, GATE)(made) if getattr(experts, "has_gate", True) else experts.act_fn(made)


def check_batched(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: raise RotationError for experts that run in a loop, one after the other."""
    config: Any = module.config
    found = config._experts_implementation
    if found not in EXPERTS:
        # A loop over experts does not call the method: the second matrix product would read an unrotated activation.
        raise RotationError(
            f"R4 and quantized activations cannot run inside experts under implementation {found!r}: call "
            f"model.set_experts_implementation('grouped_mm') (supported: {', '.join(EXPERTS)}), or leave R4 out"
        )


class KeyValueSite(_Site):
    """Forward pre-hook of an attention module that replaces its KV cache by one that rotates and quantizes.

    Attributes:
        rotation: R3, applied to keys; its dual is applied to queries. None without one.
        keys: Quantizer of keys, None without one.
        values: Quantizer of values, None without one.
        implementation: Name of the attention implementation that rotates queries, None without R3.
        around: Transforms of keys and of values, applied before quantizing and undone after it; None if the model
            itself is transformed.
        parameter: Name and position of the parameter of the module's forward that takes the KV cache.
        rounds: Whether the quantizers are on.
        watch: Observer, called with keys and values before they are quantized.
        ratios: Clip ratios of keys and of values that are being tuned, instead of the quantizers'; each None at other
            times.
        now: Of each thread: whether keys and values passed since the module was entered, whether queries were rotated,
            and whether gradients are needed (`trains`), so that keys and values are rounded without being packed.
    """

    def __init__(
        self,
        rotation: Transform | None,
        keys: Quantizer | None,
        values: Quantizer | None,
        implementation: str | None,
        parameter: tuple[str, int],
        *,
        around: tuple[Transform | None, Transform | None] | None = None,
    ):
        super().__init__()
        self.around = around
        self.rotation = rotation
        self._queries = None if rotation is None else dual(rotation)  # before anything is traced
        self.keys = keys
        self.values = values
        self.rounds = True
        self.watch: Callable[[Tensor, Tensor], object] | None = None
        self.ratios: tuple[Tensor | None, Tensor | None] = None, None
        self.implementation = implementation
        self.parameter = parameter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        for one in self.passes():
            one.stored = one.queried = False
            one.trains = module.training and torch.is_grad_enabled()
        config: Any = getattr(module, "config", None)
        if self.rotation is not None and config._attn_implementation != self.implementation:
            # Keys would be rotated and queries would not: wrong results without an error.
            raise RotationError(
                f"the attention implementation was changed to {config._attn_implementation!r} while R3 is attached: "
                "remove() the attachment, change the implementation, and attach again"
            )
        name, position = self.parameter
        if position < len(args):
            cache = _RotatingCache(args[position], self, config)
            return (*args[:position], cache, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: _RotatingCache(kwargs.get(name), self, config)}

    def rotate_queries(self, queries: Tensor) -> Tensor:
        """The dual of R3, of the queries (batch, heads, tokens, size), inside the attention interface."""
        assert self._queries is not None
        self.now.queried = True
        return apply_to_heads(self._queries, queries)


class _RotatingCache:
    """Proxy of a KV cache that rotates keys and quantizes keys and values before they are stored.

    Without a cache nothing is stored; whatever else the attention module reads from its cache (the length, the keys of
    an indexer) then comes from an empty cache that lasts for the call.
    """

    def __init__(self, cache: Cache | None, site: KeyValueSite, config: Any):
        self._cache = cache
        self._site = site
        self._config = config

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache, site = self._cache, self._site
        site.now.stored = True
        if site.rotation is not None:
            keys = apply_to_heads(site.rotation, keys)
        if site.watch is not None:
            site.watch(keys, values)
        if site.keys is not None and site.values is not None and site.rounds:
            if site.around is not None:
                keys = _rounded(keys, site.around[0], site.keys, heads=True)
                values = _rounded(values, site.around[1], site.values, heads=True)
            # Packed integers have no gradient.
            elif cache is None or site.now.trains or not pack_layer(cache, layer_idx, site.keys, site.values):
                for_keys, for_values = site.ratios
                keys = fake_quantize(keys, site.keys, for_keys)
                values = fake_quantize(values, site.values, for_values)
        return (keys, values) if cache is None else cache.update(keys, values, layer_idx, *args, **kwargs)

    @cached_property
    def _cache_or_empty(self) -> Cache:
        return DynamicCache(config=self._config) if self._cache is None else self._cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache_or_empty, name)
