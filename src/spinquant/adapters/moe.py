"""Updates of stacked experts: peft's `target_parameters`.

peft adds sum_r B[:, r, e] A[e, r, :] to expert e of a parameter, so A, (experts x rank, in), has the input axis of an
expert and B, (out, rank x experts), its output axis. The update is added to the parameter itself, so that what is
rotated at run time inside the experts (R4) is read by the update too. Wrappers of two parameters of one module are
nested, and their names say nothing of which is which: their shapes do.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from spinquant.adapters.base_model import Target
from spinquant.adapters.plan import Counterpart
from spinquant.errors import RotationError


class _Expert(NamedTuple):
    """A tensor that holds an expert's weight, as (out, in) or (in, out), and its sizes as peft sees them."""

    tensor: str
    outputs: int
    inputs: int
    shape: tuple[int, int]


def stacked_counterpart(name: str, module: str, tensors: Mapping[str, Tensor], target: Target) -> Counterpart:
    """The counterpart of an update's A or B, for experts that the checkpoint holds stacked or one by one.

    module: the experts'. Raises RotationError where no parameter of theirs has the update's shape, or two have.
    """
    which = "A" if ".lora_A." in name else "B"
    first = name.replace(f".lora_{which}.", ".lora_A.")
    second = name.replace(f".lora_{which}.", ".lora_B.")
    shape = (tensors[second].shape[0], tensors[first].shape[1])
    found = [expert for expert in _experts(module, target) if expert.shape == shape]
    if len(found) != 1:
        raise RotationError(
            f"tensor {name!r} of the adapter updates experts by (out, in) = {shape}, and {len(found)} parameters of "
            f"{module!r} have that shape: the adapter is of another model, or cannot be told apart"
        )
    return Counterpart(found[0].tensor, {found[0].inputs: 1} if which == "A" else {found[0].outputs: 0})


def _experts(module: str, target: Target) -> list[_Expert]:
    """The weights of a layer's experts, whose spaces are those of every one of them."""
    # A module's name by that of a tensor of it.
    name = target.module_name(f"{module}.down_proj").rpartition(".")[0]
    experts = next((experts for experts in target.plan.experts if experts.module == name), None)
    if experts is None:
        raise RotationError(f"the adapter updates experts of {module!r}, and the model has none of that name")
    found = []
    for tensors in (experts.first, experts.second):
        shape = target.source.tensors[tensors[0]].entry.shape
        outputs, inputs = len(shape) - 2, len(shape) - 1
        if experts.transposed:
            outputs, inputs = inputs, outputs
        # Gate and up are one parameter of the module, and may be two tensors of a checkpoint.
        parts = len(tensors) // len(experts.second)
        found.append(_Expert(tensors[0], outputs, inputs, (parts * shape[outputs], shape[inputs])))
    return found
