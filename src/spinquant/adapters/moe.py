"""Rotate LoRA updates of stacked experts (peft's `target_parameters`).

peft adds sum_r B[:, r, e] A[e, r, :] to expert e of a parameter, so A, (experts x rank, in), has the input axis of an
expert and B, (out, rank x experts), its output axis. The update is added to the parameter itself, so it reads the same
online-rotated input (R4, online R1) inside the experts. peft nests its wrappers of two parameters of one module under
names that do not identify the parameter, so the shapes do.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from spinquant.adapters.base_model import BaseModel
from spinquant.adapters.plan import Counterpart
from spinquant.errors import RotationError


class _Expert(NamedTuple):
    """A tensor with an expert's weight, its output and input dimensions, and its shape (out, in) in peft."""

    tensor: str
    outputs: int
    inputs: int
    shape: tuple[int, int]


def stacked_counterpart(name: str, module: str, tensors: Mapping[str, Tensor], base: BaseModel) -> Counterpart:
    """The counterpart of an update's A or B, for experts stored stacked or one by one.

    module: the experts'. Raises RotationError unless exactly one of their parameters has the update's shape.
    """
    which = "A" if ".lora_A." in name else "B"
    first = name.replace(f".lora_{which}.", ".lora_A.")
    second = name.replace(f".lora_{which}.", ".lora_B.")
    if any(one not in tensors or tensors[one].ndim != 2 for one in (first, second)):
        raise RotationError(f"the adapter has {name!r} without an A and B, each of two axes: it is incomplete")
    shape = (tensors[second].shape[0], tensors[first].shape[1])
    found = [expert for expert in _experts(module, base) if expert.shape == shape]
    if len(found) != 1:
        raise RotationError(
            f"tensor {name!r} of the adapter updates experts by (out, in) = {shape}, and {len(found)} parameters of "
            f"{module!r} have that shape: the adapter belongs to another model, or is ambiguous"
        )
    return Counterpart(found[0].tensor, {found[0].inputs: 1} if which == "A" else {found[0].outputs: 0})


def _experts(module: str, base: BaseModel) -> list[_Expert]:
    """The two weights of a layer's experts, of one expert if they are stored one by one: all share their spaces."""
    # The module's name, from the name of one of its tensors.
    name = base.module_name(f"{module}.down_proj").rpartition(".")[0]
    experts = next((experts for experts in base.plan.experts if experts.module == name), None)
    if experts is None:
        raise RotationError(f"the adapter updates experts of {module!r}, and the model has none of that name")
    found = []
    for tensors in (experts.first, experts.second):
        shape = base.source.tensors[tensors[0]].entry.shape
        outputs, inputs = len(shape) - 2, len(shape) - 1
        if experts.transposed:
            outputs, inputs = inputs, outputs
        # Gate and up are one parameter of the module, but may be two tensors of the checkpoint.
        parts = len(tensors) // len(experts.second)
        found.append(_Expert(tensors[0], outputs, inputs, (parts * shape[outputs], shape[inputs])))
    return found
