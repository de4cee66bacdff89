"""The weights that a scheme covers, each as matrices (.., out, in), however a model keeps them.

A linear keeps (out, in), a Conv1D (in, out), and experts are stacked, one matrix behind the other, either way round.
Numbers are rounded along the last axis of the matrices, so that nothing else has to know. A checkpoint may have the
experts of a module one by one: then each of them is a weight of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spinquant.errors import SchemeError
from spinquant.models.modules import module_and_attribute, named_tensor
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed, dequantize
from spinquant.quantization.scheme import Scheme

PARTS = ("scale", "zero")  # what lies beside a rounded weight, under the weight's name and this ending


@dataclass(frozen=True)
class Weight:
    """A tensor by its dotted name, and whether its last two axes are (in, out)."""

    tensor: str
    transposed: bool = False

    def matrices(self, model: nn.Module) -> Tensor:
        """A view of the tensor, (.., out, in); writing to it changes the model."""
        return self.turned(named_tensor(model, self.tensor).detach())

    def turned(self, tensor: Tensor) -> Tensor:
        """From the way it is kept to (.., out, in), or back: a view."""
        return tensor.mT if self.transposed else tensor

    def turned_dim(self, dim: int, ndim: int) -> int:
        """Where an axis of the tensor is in its matrices."""
        return 2 * ndim - 3 - dim if self.transposed and dim >= ndim - 2 else dim

    def put(self, model: nn.Module, packed: Packed) -> None:
        """Put quantized numbers into the model, with the grid that they lie on (`X_scale`, `X_zero`) as buffers."""
        matrices = self.matrices(model)
        if matrices.ndim == 2:
            matrices.copy_(dequantize(packed))
        for i, matrix in enumerate(matrices if matrices.ndim > 2 else ()):  # a stack is most of a block
            matrix.copy_(dequantize(packed.with_tensors(*(tensor[i] for tensor in packed.tensors()))))
        self.keep_grid(model, packed.scale, packed.zero)

    def keep_grid(self, model: nn.Module, scale: Tensor, zero: Tensor | None) -> None:
        """Put the grid beside the weight, as buffers that are not part of the state dict."""
        self.forget_grid(model)
        owner, name = module_and_attribute(model, self.tensor)
        for part, tensor in zip(PARTS, (scale, zero), strict=True):
            if tensor is not None:
                owner.register_buffer(f"{name}_{part}", tensor, persistent=False)

    def grid(self, model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """(scale, zero point), None where there is none."""
        owner, name = module_and_attribute(model, self.tensor)
        scale, zero = (owner._buffers.get(f"{name}_{part}") for part in PARTS)
        return scale, zero

    def forget_grid(self, model: nn.Module) -> None:
        """Take the grid away; the numbers stay."""
        owner, name = module_and_attribute(model, self.tensor)
        for part in PARTS:
            owner._buffers.pop(f"{name}_{part}", None)
            owner._non_persistent_buffers_set.discard(f"{name}_{part}")


def weights_of(plan: Plan, scheme: Scheme) -> list[Weight]:
    """The weights that a scheme covers, by the names of the plan: linears in order of execution, then experts."""
    return list(_weights(plan, scheme))


def _weights(plan: Plan, scheme: Scheme) -> Iterator[Weight]:
    yield from linear_weights(plan, scheme)
    for experts in plan.experts:
        for tensor in (*experts.first, *experts.second):
            yield Weight(tensor, experts.transposed)


def parts_tied(plan: Plan, scheme: Scheme) -> bool:
    """Whether tensors that share memory cannot under a scheme: each is rounded by itself.

    At 16 bits our own format has flat weights, and transformers ties none: it would pad their biases.
    """
    covered = linear_weights(plan, scheme) if scheme.weights is None else weights_of(plan, scheme)
    return not plan.tied.keys().isdisjoint(weight.tensor for weight in covered)


def linear_weights(plan: Plan, scheme: Scheme) -> list[Weight]:
    """The weights of linears alone, with the head's where the scheme covers it."""
    found = [Weight(plan.weight_of(name), plan.transposed) for group in plan.linears for name in group]
    return [*found, Weight(plan.head)] if scheme.lm_head else found


def linears_of(plan: Plan, scheme: Scheme) -> list[str]:
    """Names of the linear modules that a scheme covers, in order of execution; experts are not among them."""
    names = [name for group in plan.linears for name in group]
    return [*names, plan.head.removesuffix(".weight")] if scheme.lm_head else names


def check_fits(plan: Plan, shapes: Mapping[str, Sequence[int]], scheme: Scheme) -> None:
    """Raise SchemeError for inputs that cannot be rounded, and when a group size does not divide the input of a weight.

    shapes: of all tensors, by the names of the plan.
    """
    if scheme.activations is not None and plan.uncalled:
        raise SchemeError(
            f"scheme {scheme} rounds the inputs of linears, and {plan.family}, as configured, multiplies by the weight "
            f"of {plan.uncalled[0]} without calling it: nothing can be done to its input. Leave activations at 16 "
            "bits, or change the config"
        )
    # Found out now, this costs nothing; found out by the rounding, it costs a rotated model.
    for label, quantizer in (("weight", scheme.weights), ("activation", scheme.activations)):
        if quantizer is None or quantizer.group_size is None:
            continue
        for weight in weights_of(plan, scheme):
            length = shapes[weight.tensor][-2 if weight.transposed else -1] if weight.tensor in shapes else 0
            if length % quantizer.group_size:
                raise SchemeError(
                    f"{label} group size {quantizer.group_size} does not divide the {length} inputs of "
                    f"{weight.tensor.removesuffix('.weight')}: choose a group that divides "
                    "every linear's input, or none"
                )
