"""Group the tensors of a model whose layers are of several kinds (attention or recurrence, MLP or experts).

Tensors that occur in the same layers form a group. Groups of which every layer has exactly one are alternatives, the
`choices` of a family file; tensors in no alternative are marked as optional.
"""

import re
from collections.abc import Iterable

Group = frozenset[int]


def groups_of(names: Iterable[str], pattern: str) -> dict[str, Group]:
    """The layers that have each tensor; names have * for the layer index."""
    prefix = re.escape(pattern.removesuffix("*"))
    found: dict[str, set[int]] = {}
    for name in names:
        match = re.match(rf"^{prefix}(\d+)\.", name)
        if match:
            found.setdefault(f"{pattern}.{name[match.end() :]}", set()).add(int(match[1]))
    return {name: frozenset(layers) for name, layers in found.items()}


def choices_of(groups: dict[str, Group], count: int) -> tuple[list[list[list[str]]], set[str]]:
    """Alternatives, each as prefixes of its tensors, and the optional tensors that no choice covers."""
    every = frozenset(range(count))
    partial = sorted({layers for layers in groups.values() if layers != every}, key=lambda g: (min(g), len(g)))
    choices: list[list[list[str]]] = []
    covered: set[Group] = set()
    for i, one in enumerate(partial):
        chosen, rest = [one], every - one
        for group in partial[i + 1 :]:
            if group <= rest and group not in covered:
                chosen.append(group)
                rest -= group
        if not rest and one not in covered:
            choices.append([_prefixes(groups, group) for group in chosen])
            covered |= set(chosen)
    loose = {name for name, layers in groups.items() if layers != every and layers not in covered}
    return choices, loose


def _prefixes(groups: dict[str, Group], group: Group) -> list[str]:
    """The shortest prefixes of a group's tensors that match no other tensor."""
    found: dict[str, None] = {}
    for name in (name for name, layers in groups.items() if layers == group):
        parts = name.split(".")
        start = parts.index("*") + 2
        prefixes = [".".join(parts[:end]) + ("." if end < len(parts) else "") for end in range(start, len(parts) + 1)]
        alone = (p for p in prefixes if all(layers == group for n, layers in groups.items() if n.startswith(p)))
        found[next(alone, name)] = None
    return list(found)
