"""Derive the plan of an adapter's tensors from that of the base model.

Each tensor of the adapter shares axes with a tensor of the model, its counterpart. For y = W x, and the transformed
weight W' = T_out^T W diag(g) T_in^-T, an update B A of W has to become

    A' = A diag(g) T_in^-T        B' = T_out^T B

so A has the input axis of W, with its gain, and B the output axis of W. `fuse.transform` does the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from spinquant.plan import Plan


@dataclass(frozen=True)
class Counterpart:
    """A tensor of the model, and which of its axes an adapter's tensor shares (model's dim: adapter's dim).

    before: shared axes that the adapter reads before the model's online transform, which does not apply to them.
    """

    tensor: str
    dims: Mapping[int, int]
    before: Mapping[int, int] = field(default_factory=dict)


def adapter_plan(plan: Plan, counterparts: Mapping[str, Counterpart]) -> Plan:
    """The plan of an adapter's tensors, under their own names, with the spaces and gains of the base model.

    A counterpart that is the bias of a norm is transformed as a whole, independently of the linears that read the norm.
    """
    online = {one.space for one in plan.onlines}
    shared = {name: {**counterpart.before, **counterpart.dims} for name, counterpart in counterparts.items()}
    axes = tuple(
        replace(axis, tensor=name, dim=shared[name][axis.dim])
        for name, counterpart in counterparts.items()
        for axis in plan.axes_of.get(counterpart.tensor, ())
        if axis.dim in counterpart.dims or (axis.dim in counterpart.before and axis.space not in online)
    )
    gains = []
    for gain in plan.gains:
        dims = dict(gain.readers)
        readers = tuple(
            (name, shared[name][dims[counterpart.tensor]])
            for name, counterpart in counterparts.items()
            if dims.get(counterpart.tensor) in shared[name]
        )
        biases = [name for name, counterpart in counterparts.items() if counterpart.tensor == gain.bias]
        if readers or biases:
            gains.append(replace(gain, readers=readers, bias=biases[0] if biases else None))
    empty = dict.fromkeys(("onlines", "ties", "linears", "experts", "attentions", "blocks", "renamed"), ())
    return replace(plan, axes=axes, gains=tuple(gains), **empty)
