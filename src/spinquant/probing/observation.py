"""Observe a tiny model: trace it and infer the role of each module; formulas of the config that give its sizes.

Also holds `Draft`, the family file that the observations are added to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from spinquant.architectures.family import Named, size_of
from spinquant.errors import ArchitectureError
from spinquant.evaluation.tiny_model import Sizing
from spinquant.models.modules import tensor_shapes
from spinquant.probing.module_roles import LayerRoles, infer_end_roles, infer_layer_roles
from spinquant.probing.tiny_models import random_tokens
from spinquant.probing.trace import TracedCall, cached_layers, trace


@dataclass(frozen=True)
class Observation:
    """The roles found in one tiny model: by layer, and before and after the layers (`ends`).

    pattern: name of a layer with * for its index.
    """

    config: Any
    calls: Mapping[str, TracedCall]
    pattern: str
    layers: tuple[LayerRoles, ...]
    ends: LayerRoles
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.calls[self.pattern.replace("*", "0")].output.shape[-1]

    def position(self, name: str, layer: int) -> float:
        """The position of a module's call among those of its layer, between 0 and 1."""
        inside = [n for n in self.calls if n.startswith(f"{self.pattern.replace('*', str(layer))}.")]
        return inside.index(name) / len(inside)

    def starred(self, name: str) -> str:
        """The name with * for the layer index."""
        prefix = self.pattern.removesuffix("*")
        return re.sub(rf"^{re.escape(prefix)}\d+(?=\.|$)", lambda match: self.pattern, name)


def observe(tiny: Any, sizing: Sizing) -> Observation | str:
    """Trace a tiny model and infer its roles; returns the reason, as text, if it has no list of decoder layers."""
    tokens = random_tokens(tiny)
    config = Named(tiny.config.get_text_config(), sizing.names)
    count = config.num_hidden_layers
    stacks = [name for name, m in tiny.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    calls = trace(tiny, tokens)
    stacks = [name for name in stacks if all(f"{name}.{i}" in calls for i in range(count))]
    if not stacks:
        return f"{type(tiny).__name__} has no list of {count} layers that run in sequence"
    layers = [calls[f"{stacks[0]}.{i}"] for i in range(count)]
    if any(not torch.equal(a.output, b.input) for a, b in pairwise(layers)):
        return f"the output of a layer of {stacks[0]} is not the input of the next"
    if layers[0].output.ndim != 3:
        shape = tuple(layers[0].output.shape)
        return (
            f"layers of {stacks[0]} return hidden states of shape {shape}, expected (batch, tokens, hidden): parallel "
            "residual streams are not supported"
        )
    parts = tuple(
        infer_layer_roles(tiny, layer, [c for n, c in calls.items() if n.startswith(f"{layer.name}.")], tokens[:1])
        for layer in layers
    )
    for part, caches in zip(parts, cached_layers(tiny, tokens, count), strict=True):
        part.attention = part.attention if caches else None
    ends = infer_end_roles(tiny, calls, layers[0], layers[-1])
    return Observation(config, calls, f"{stacks[0]}.*", parts, ends, tensor_shapes(tiny))


@dataclass
class Draft:
    """The content of a family file.

    left: what it does not cover, and why. values: why R2 is expected to fail. silent: modules that do not run on text.
    """

    data: dict[str, Any]
    left: list[str] = field(default_factory=list)
    values: str | None = None
    silent: list[str] = field(default_factory=list)


def formula(sizes: Sequence[tuple[Any, int]], candidates: Sequence[str]) -> str | None:
    """The first candidate that gives the right size for every config, else a config attribute that does, else None."""

    def fits(text: str) -> bool:
        try:
            return all(size_of(config, text) == number for config, number in sizes)
        except (ArchitectureError, AttributeError, TypeError):
            return False

    zero = "0" if all(number == 0 for _, number in sizes) else None
    named = [key for key, value in sizes[0][0].to_dict().items() if type(value) is int and value == sizes[0][1]]
    return zero or next((text for text in [*candidates, *named] if fits(text)), None)


def reading_of(seen: Observation, part: LayerRoles) -> list[str]:
    """The modules that read the stream in a layer, in order of execution."""
    order = {name: i for i, name in enumerate(seen.calls)}
    readers = [reader for norm in part.norms for reader in norm.readers] + part.readers
    return sorted(dict.fromkeys(readers), key=order.__getitem__)
