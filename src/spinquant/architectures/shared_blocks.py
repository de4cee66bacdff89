"""Shared (weight-tied) decoder blocks: modules of several layers with the same weights.

transformers ties them with `tie_word_embeddings`, which also ties embedding and head. A module then has a shared
tensor under every layer's name, a checkpoint only under the first layer's. R1 has to untie them, because the gain of
the last norm is fused into the head; every layer then has its own tensor, in memory and on disk.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spinquant.architectures.family import Shared, size_of


def owners(shared: Shared | None, config: Any, names: Iterable[str]) -> dict[int, int]:
    """For each layer with a shared module, the first layer that has the same one (possibly itself)."""
    if shared is None:
        return {}
    present, count = set(names), size_of(config, shared.blocks)
    layers = [i for i in range(config.num_hidden_layers) if shared.marker.replace("{i}", str(i)) in present]
    return {layer: layers[place % count] for place, layer in enumerate(layers)}


def with_shared_blocks(
    shared: Shared | None, config: Any, shapes: Mapping[str, Sequence[int]], *, tied: bool
) -> tuple[dict[str, Sequence[int]], dict[str, str]]:
    """Add shared tensors under every layer's name.

    Returns:
        All shapes by name, and the name of the source by the name of each tied tensor.
    """
    found, ties = dict(shapes), {}
    if shared is None or not tied:
        return found, ties
    for layer, owner in owners(shared, config, shapes).items():
        if layer == owner:
            continue
        prefix, own = (f"{shared.module.replace('{i}', str(i))}." for i in (layer, owner))
        for name, shape in sorted(shapes.items()):
            if name.startswith(own):
                copy = prefix + name.removeprefix(own)
                found.setdefault(copy, shape)
                ties[copy] = name
    return found, ties
