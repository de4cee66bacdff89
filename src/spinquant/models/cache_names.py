"""Names under which transformers passes the KV cache: `past_key_values` up to 5.23, `cache` from 5.24 on.

A keyword that a class does not know is ignored or renamed with a warning, so the name is read from its signature.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

# In order of preference; `layer_past` is that of the attention modules of GPT-NeoX and other old models.
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")


def cache_parameter(forward: Callable[..., Any]) -> tuple[str, int] | None:
    """Name and position, after self, of the parameter of a class's forward that takes the KV cache; None without one.

    >>> from transformers import LlamaForCausalLM
    >>> cache_parameter(LlamaForCausalLM.forward)[0] in CACHE_NAMES
    True
    """
    parameters = list(signature(forward).parameters)[1:]
    return next(((name, parameters.index(name)) for name in CACHE_NAMES if name in parameters), None)


def cache_of(output: Any) -> Any:
    """The KV cache in the output of a model; None without one."""
    found = (getattr(output, name, None) for name in CACHE_NAMES[:2])
    return next((cache for cache in found if cache is not None), None)
