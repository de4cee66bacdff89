"""Build the plan of a model from its family table, its config, and the names and shapes of its tensors.

A tensor that the table does not describe is an error that names it. Tensor names may be those of a module or of a
checkpoint, which can differ: a module stacks experts that a checkpoint stores one by one. A table lists both. The plan
uses the tensor names that it was given, and always the module's names for modules.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from spinquant.architectures.family import Family, Named
from spinquant.architectures.foreign import foreign_among, missing_head
from spinquant.architectures.model_table import ModelTable, Shapes
from spinquant.architectures.shared_blocks import with_shared_blocks
from spinquant.architectures.spaces import layout_of
from spinquant.compute.patterns import check_name
from spinquant.errors import ArchitectureError
from spinquant.plan import Plan, Tie

PATIENCE = 30.0  # seconds


def build_plan(family: Family, config: Any, shapes: Shapes) -> Plan:
    """Build the plan of a model.

    Args:
        family: the table of its architecture.
        config: its transformers config.
        shapes: shape by tensor name, of a module or a checkpoint.

    Raises:
        ArchitectureError: a tensor is unknown or missing, or has another shape than the config implies.
    """
    stored = module_names(family, shapes)
    shapes = {name: shapes[origin] for name, origin in stored.items()}
    tie = bool(getattr(config, "tie_word_embeddings", False))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = Named(text, family.names)
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise ArchitectureError(
            f"{family.name}: the config has {layers} layers and the checkpoint {len(shapes)} tensors; "
            "the checkpoint is incomplete"
        )
    if family.head and family.head not in shapes and not tie:
        raise ArchitectureError(f"{family.name}: {foreign_among(shapes) or missing_head(family.head)}")
    if family.head:
        # A module has a tied head under both names, a checkpoint under one: the plan is the same for both.
        shapes = {**shapes, family.head: shapes.get(family.head, shapes.get(family.embedding, ()))}
    head = family.head or next((name for name in family.heads_instead if name in shapes), "")
    if family.heads_instead and not head:
        raise ArchitectureError(
            f"{family.name}: the head of {config.architectures[0]} is missing (expected "
            f"{' or '.join(map(repr, family.heads_instead))}); the checkpoint is incomplete, or that of another class"
        )
    shapes, shared = with_shared_blocks(family.shared, named, shapes, tied=tie)
    tied = {**({family.head: family.embedding} if family.head else {}), **shared} if tie else {}
    table = ModelTable(family, named, shapes)
    gains = table.gains()
    layout = layout_of(table, gains)

    def origin(name: str) -> str:
        return stored.get(name, name)

    return Plan(
        family=family.name,
        spaces=layout.spaces,
        axes=tuple(replace(axis, tensor=origin(axis.tensor)) for axis in layout.axes),
        gains=tuple(
            replace(
                gain,
                norm=origin(gain.norm),
                readers=tuple((origin(name), dim) for name, dim in gain.readers),
                bias=gain.bias and origin(gain.bias),
            )
            for gain in gains
        ),
        onlines=layout.onlines,
        ties=tuple(Tie(origin(name), origin(source)) for name, source in tied.items()),
        linears=table.linears(),
        attentions=tuple(name for name in table.each_layer(family.attention) if table.has(name)),
        blocks=tuple(table.each_layer(family.block)),
        head=head,
        experts=tuple(
            replace(stack, first=tuple(map(origin, stack.first)), second=tuple(map(origin, stack.second)))
            for stack in table.experts()
        ),
        transposed=family.transposed,
        renamed=tuple(
            (weight, origin(weight))
            for weight in (*(f"{name}.weight" for group in table.linears() for name in group), family.head)
            if origin(weight) != weight
        ),
        uncalled=table.uncalled(),
        biased=tuple(name for group in table.linears() for name in group if f"{name}.bias" in shapes),
        refused=tuple((r.rotation, r.reason) for r in family.refused if r.applies(table.config)),
    )


def module_names(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Map names in the module to names in the checkpoint, for the tensors of a checkpoint.

    Raises ArchitectureError for patterns of a family file that cannot be applied, or take more than `PATIENCE`.
    """
    start, found = time.monotonic(), {}
    for name in names:
        found[_in_module(name, family)] = name
        if time.monotonic() - start > PATIENCE:
            raise ArchitectureError(
                f"the patterns in `stored` of {family.name!r} take too long to match: simplify them"
            )
    return found


def _in_module(name: str, family: Family) -> str:
    name = family.causal_name(name)  # patterns are those of the causal LM
    for pattern, replacement in family.stored:
        check_name(name, family.name, ArchitectureError)
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, IndexError) as error:
            raise ArchitectureError(
                f"{family.name}: cannot replace {pattern!r} by {replacement!r} in {name!r}: {error}"
            ) from None
    return family.own_name(name)
