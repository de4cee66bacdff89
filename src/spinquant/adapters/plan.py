"""Derive the plan of an adapter's tensors from that of the base model.

Each tensor of the adapter shares axes with a tensor of the model, its counterpart. For y = W x, and the rotated weight
W' = R_out^T W diag(g) R_in, an update B A of W has to become

    A' = A diag(g) R_in        B' = R_out^T B

so A has the input axis of W, with its gain and scales, and B the output axis of W. `fuse.transform` does the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from spinquant.plan import Plan


@dataclass(frozen=True)
class Counterpart:
    """A tensor of the model, and which of its axes an adapter's tensor shares (model's dim: adapter's dim).

    before: shared axes that the adapter reads before the model's online rotation, so only channel scales apply to them.
    """

    tensor: str
    dims: Mapping[int, int]
    before: Mapping[int, int] = field(default_factory=dict)


def adapter_plan(plan: Plan, counterparts: Mapping[str, Counterpart]) -> Plan:
    """The plan of an adapter's tensors, under their own names, with the spaces and gains of the base model.

    A counterpart that is the bias of a norm is transformed as a whole, independently of the linears that read the norm.
    """
    axes = tuple(
        replace(axis, tensor=name, dim=counterpart.dims[axis.dim])
        for name, counterpart in counterparts.items()
        for axis in plan.axes_of.get(counterpart.tensor, ())
        if axis.dim in counterpart.dims
    )
    gains = []
    for gain in plan.gains:
        dims = dict(gain.readers)
        readers = tuple(
            (name, counterpart.dims[dims[counterpart.tensor]])
            for name, counterpart in counterparts.items()
            if dims.get(counterpart.tensor) in counterpart.dims
        )
        biases = [name for name, counterpart in counterparts.items() if counterpart.tensor == gain.bias]
        if readers or biases:
            gains.append(replace(gain, readers=readers, bias=biases[0] if biases else None))
    scalings = []
    for scaling in plan.scalings:
        writers = tuple(
            (name, counterpart.dims[dim], span)
            for tensor, dim, span in scaling.writers
            for name, counterpart in counterparts.items()
            if counterpart.tensor == tensor and dim in counterpart.dims
        )
        readers = tuple(
            (name, {**counterpart.dims, **counterpart.before}[dim])
            for tensor, dim in scaling.readers
            for name, counterpart in counterparts.items()
            if counterpart.tensor == tensor and dim in (*counterpart.dims, *counterpart.before)
        )
        if writers or readers:
            scalings.append(replace(scaling, writers=writers, readers=readers))
    empty = dict.fromkeys(("onlines", "ties", "linears", "experts", "attentions", "blocks", "renamed"), ())
    return replace(plan, axes=axes, gains=tuple(gains), scalings=tuple(scalings), **empty)
