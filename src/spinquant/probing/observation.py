"""Observations of a tiny model, the draft of a family file, and formulas of sizes that fit all tiny models."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinquant.architectures.family import size_of
from spinquant.errors import ArchitectureError
from spinquant.probing.explain import LayerPart
from spinquant.probing.trace import TracedCall


@dataclass(frozen=True)
class Observation:
    """The roles found in one tiny model: by layer, and at its ends. pattern: name of a layer with * for its index."""

    config: Any
    calls: Mapping[str, TracedCall]
    pattern: str
    layers: tuple[LayerPart, ...]
    ends: LayerPart
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.calls[self.pattern.replace("*", "0")].output.shape[-1]

    def position(self, name: str, layer: int) -> float:
        """When a module is called within its layer, between 0 and 1."""
        inside = [n for n in self.calls if n.startswith(f"{self.pattern.replace('*', str(layer))}.")]
        return inside.index(name) / len(inside)

    def starred(self, name: str) -> str:
        """The name with * for the layer index."""
        prefix = self.pattern.removesuffix("*")
        return re.sub(rf"^{re.escape(prefix)}\d+(?=\.|$)", lambda match: self.pattern, name)


@dataclass
class Draft:
    """The content of a family file. left: what it cannot express, and why. silent: modules that do not run on text."""

    data: dict[str, Any]
    left: list[str] = field(default_factory=list)
    values: str | None = None
    silent: list[str] = field(default_factory=list)


def formula(sizes: Sequence[tuple[Any, int]], candidates: Sequence[str]) -> str | None:
    """The first formula that gives the right size for every config; else an attribute that does; else None."""

    def fits(text: str) -> bool:
        try:
            return all(size_of(config, text) == number for config, number in sizes)
        except (ArchitectureError, AttributeError, TypeError):
            return False

    zero = "0" if all(number == 0 for _, number in sizes) else None
    named = [key for key, value in sizes[0][0].to_dict().items() if type(value) is int and value == sizes[0][1]]
    return zero or next((text for text in [*candidates, *named] if fits(text)), None)


def reading_of(seen: Observation, part: LayerPart) -> list[str]:
    """The modules that read the stream in a layer, in order of execution."""
    order = {name: i for i, name in enumerate(seen.calls)}
    readers = [reader for norm in part.norms for reader in norm.readers] + part.readers
    return sorted(dict.fromkeys(readers), key=order.__getitem__)
