"""Quantization targets: the weights that a scheme covers, each viewed as matrices (.., out, in).

A linear stores (out, in), a Conv1D (in, out), and experts are stacked along the first axis in either orientation. All
rounding is along the last axis of the view, so no other code has to know the layout. A checkpoint may store the
experts of a module one by one; each is then a target of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spinquant.errors import SchemeError
from spinquant.models.modules import module_and_attribute, named_tensor
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed, dequantize
from spinquant.quantization.scheme import Scheme

PARTS = ("scale", "zero")  # suffixes of the buffers that are registered beside a quantized weight


@dataclass(frozen=True)
class Weight:
    """A tensor by its dotted name, and whether its last two axes are (in, out)."""

    tensor: str
    transposed: bool = False

    def matrices(self, model: nn.Module) -> Tensor:
        """A view of the tensor, (.., out, in); writing to it changes the model."""
        return self.turned(named_tensor(model, self.tensor).detach())

    def turned(self, tensor: Tensor) -> Tensor:
        """A view from the stored layout to (.., out, in), or back."""
        return tensor.mT if self.transposed else tensor

    def turned_dim(self, dim: int, ndim: int) -> int:
        """The axis of the (.., out, in) view that an axis of the tensor becomes."""
        return 2 * ndim - 3 - dim if self.transposed and dim >= ndim - 2 else dim

    def put(self, model: nn.Module, packed: Packed) -> None:
        """Write quantized numbers into the model, with their scale and zero point as buffers (`X_scale`, `X_zero`)."""
        matrices = self.matrices(model)
        if matrices.ndim == 2:
            matrices.copy_(dequantize(packed))
        for i, matrix in enumerate(matrices if matrices.ndim > 2 else ()):  # one by one: a stack is most of a block
            matrix.copy_(dequantize(packed.with_tensors(*(tensor[i] for tensor in packed.tensors()))))
        self.keep_grid(model, packed.scale, packed.zero)

    def keep_grid(self, model: nn.Module, scale: Tensor, zero: Tensor | None) -> None:
        """Register scale and zero point beside the weight, as buffers that are not part of the state dict."""
        self.forget_grid(model)
        owner, name = module_and_attribute(model, self.tensor)
        for part, tensor in zip(PARTS, (scale, zero), strict=True):
            if tensor is not None:
                owner.register_buffer(f"{name}_{part}", tensor, persistent=False)

    def grid(self, model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """(scale, zero point) of the weight, None for each that is missing."""
        owner, name = module_and_attribute(model, self.tensor)
        scale, zero = (owner._buffers.get(f"{name}_{part}") for part in PARTS)
        return scale, zero

    def forget_grid(self, model: nn.Module) -> None:
        """Remove the scale and zero point buffers; the weight stays."""
        owner, name = module_and_attribute(model, self.tensor)
        for part in PARTS:
            owner._buffers.pop(f"{name}_{part}", None)
            owner._non_persistent_buffers_set.discard(f"{name}_{part}")


def weights_of(plan: Plan, scheme: Scheme) -> list[Weight]:
    """The weights that a scheme covers, with the plan's names: linears in order of execution, then experts."""
    return list(_weights(plan, scheme))


def _weights(plan: Plan, scheme: Scheme) -> Iterator[Weight]:
    yield from linear_weights(plan, scheme)
    for experts in plan.experts:
        for tensor in (*experts.first, *experts.second):
            yield Weight(tensor, experts.transposed)


def parts_tied(plan: Plan, scheme: Scheme) -> bool:
    """Whether a scheme makes tied tensors untied, because each is quantized separately.

    With weights at 16 bits the native format stores flat weights, and transformers does not tie those: it would pad
    their biases.
    """
    covered = linear_weights(plan, scheme) if scheme.weights is None else weights_of(plan, scheme)
    return not plan.tied.keys().isdisjoint(weight.tensor for weight in covered)


def linear_weights(plan: Plan, scheme: Scheme) -> list[Weight]:
    """The weights of linear modules that a scheme covers, without experts; the head's if the scheme covers it."""
    found = [Weight(plan.weight_of(name), plan.transposed) for group in plan.linears for name in group]
    if not scheme.lm_head or not plan.head:  # a part of a plan may be without the head
        return found
    return [*found, Weight(plan.weight_of(plan.head.removesuffix(".weight")))]


def linears_of(plan: Plan, scheme: Scheme) -> list[str]:
    """Names of the linear modules that a scheme covers, in order of execution; experts are not among them."""
    names = [name for group in plan.linears for name in group]
    return [*names, *plan.heads] if scheme.lm_head else names


def check_fits(plan: Plan, shapes: Mapping[str, Sequence[int]], scheme: Scheme) -> None:
    """Check that a scheme fits a model before any work is done.

    Args:
        plan: the plan of the model.
        shapes: shapes of all tensors, by the plan's names.
        scheme: the scheme.

    Raises:
        SchemeError: inputs of a linear cannot be quantized, there is no head to quantize, or a group size does not
            divide the inputs of a weight.
    """
    if scheme.lm_head and not plan.heads:
        raise SchemeError(
            f"scheme {scheme} quantizes the output head, and this class of {plan.family} has none: leave the head out"
        )
    if scheme.activations is not None and plan.uncalled:
        raise SchemeError(
            f"scheme {scheme} quantizes the inputs of linears, but {plan.family}, as configured, multiplies by the "
            f"weight of {plan.uncalled[0]} without calling the module, so its input cannot be quantized. Leave "
            "activations at 16 bits, or change the config"
        )
    # Checked here, an error costs nothing; found while rounding, it would cost the time to rotate the model.
    for label, quantizer in (("weight", scheme.weights), ("activation", scheme.activations)):
        if quantizer is None or quantizer.group_size is None:
            continue
        for weight in weights_of(plan, scheme):
            length = shapes[weight.tensor][-2 if weight.transposed else -1] if weight.tensor in shapes else 0
            if length % quantizer.group_size:
                raise SchemeError(
                    f"{label} group size {quantizer.group_size} does not divide the {length} inputs of "
                    f"{weight.tensor.removesuffix('.weight')}: choose a group size that divides "
                    "every linear's inputs, or none"
                )
