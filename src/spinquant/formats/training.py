"""Train the weights of a rotated or quantized model, and notice when an adapter was merged into them.

Weights that are rotated only are trained as they are: online rotations are linear, so gradients pass them. Quantized
weights are trained through their rounding with the straight-through estimator: a linear computes with w_q, the numbers
of its grid nearest to w, and the gradient of w_q is applied to w. The grids (scales, zero points) stay, so what is
saved is exactly what was computed with. From the first forward pass in training mode on, the weights are rounded in
every pass.

Adapters (peft) leave the weights alone. `merge_and_unload` does not: it adds B A to a weight whose numbers then leave
their grid, and under R4 to a weight that reads rotated inputs, which B A does not. peft asks nobody, so the first row
of every such weight is compared with a copy in the first forward pass after adapters came or went, and on saving.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.errors import OnlineError, RotationError, SpinquantError
from spinquant.models.modules import module_and_attribute
from spinquant.plan import Plan
from spinquant.quantization.integer import dequantize, quantize_on_grid
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import PARTS, Weight, weights_of


class WeightWatch:
    """Forward pre-hook of a model that rounds quantized weights in training, and finds merged adapters.

    Attributes:
        trains: Whether quantized weights are trained, and rounded in every forward pass.
        handles: Of all hooks that `remove` removes.
    """

    def __init__(self, model: nn.Module, plan: Plan, scheme: Scheme, rotated: Sequence[str]):
        """rotated: Tensors that an online rotation is fused into."""
        self.trains = False
        self._uncalled = plan.uncalled
        quantized = weights_of(plan, scheme) if scheme.weights is not None else []
        others = [Weight(tensor) for tensor in rotated if tensor not in {weight.tensor for weight in quantized}]
        self._quantized = [_Quantized(model, weight, scheme.weights) for weight in quantized if scheme.weights]
        self._rows = [_Row(model, weight, "quantized") for weight in quantized]
        self._rows += [_Row(model, weight, "rotated online (R4 or online R1)") for weight in others]
        watched = {id(row.parameter) for row in self._rows}
        self._other = next((p for p in model.parameters() if id(p) not in watched), None)
        self._seen = self._adapters(model)
        self.handles: list[Any] = [model.register_forward_pre_hook(self.begin)]

    def remove(self) -> None:
        """Remove the hooks."""
        while self.handles:
            self.handles.pop().remove()

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model. Raises RotationError if an adapter was merged into a weight."""
        if torch.compiler.is_compiling():
            return
        if model.training and torch.is_grad_enabled():
            if not self.trains and any(weight.parameter.requires_grad for weight in self._quantized):
                self._train()
        if torch.is_grad_enabled():
            for row in self._rows:
                row.note_training(model.training)
        found = self._adapters(model)
        if found != self._seen:
            self._seen = found
            self.check()

    def check(self, error: type[SpinquantError] = RotationError) -> None:
        """Raise an error, naming the tensor, if a weight was changed otherwise than by training it."""
        for row in self._rows:
            row.note_training(training=False)
            if not row.trained and row.is_changed():
                raise error(changed_message(row.tensor, row.why))

    def resume(self) -> None:
        """Go on with a training: the weights have got the unrounded numbers of another run."""
        for row in self._rows:
            row.trained = True
        if not self.trains:
            self._train()

    def _adapters(self, model: nn.Module) -> tuple[bool, bool]:
        """What peft changes in a model: it freezes all weights and leaves its configs until it is unloaded."""
        return "peft_config" in vars(model), self._other is not None and self._other.requires_grad

    def _train(self) -> None:
        if self._uncalled:
            raise OnlineError(
                f"the quantized weights of {self._uncalled[0]} cannot be trained: the class multiplies by them without "
                "calling the module. Freeze them (requires_grad_(False)), or train adapters (peft)"
            )
        self.trains = True
        for weight in self._quantized:
            self.handles.append(weight.owner.register_forward_pre_hook(weight.round))
            self.handles.append(weight.owner.register_forward_hook(weight.restore, always_call=True))


def changed_message(tensor: str, why: str) -> str:
    """The error for a weight that was changed behind the library's back."""
    return (
        f"{tensor} is {why}, and was changed afterwards, as merge_and_unload of peft does: the sum is not on the "
        "quantization grid, or (R4, online R1) mixes rotated and unrotated inputs. Keep the adapter beside the model "
        "(unload(), and PeftModel.from_pretrained to load both), or merge it into the original model and rotate and "
        "quantize that. If it was the dtype that was changed (.to(torch.bfloat16)), load with it: spinquant.load(..., "
        "dtype=...)"
    )


class _Row:
    """The first row of a weight, to notice that the weight was changed."""

    def __init__(self, model: nn.Module, weight: Weight, why: str):
        owner, name = module_and_attribute(model, weight.tensor)
        self.tensor, self.why, self.trained = weight.tensor, why, False
        self._weight, self._owner, self._name = weight, owner, name
        self._kept = self._now().clone()

    @property
    def parameter(self) -> Tensor:
        return getattr(self._owner, self._name)

    def note_training(self, training: bool) -> None:
        """Note whether the weight is trained: then changes are no surprise. training: the model is in that mode."""
        parameter = self.parameter
        self.trained = self.trained or parameter.grad is not None or (training and parameter.requires_grad)

    def _now(self) -> Tensor:
        row = self._weight.turned(self.parameter.detach())
        while row.ndim > 1:
            row = row[0]
        return row

    def is_changed(self) -> bool:
        found = self._now()
        # A model that was cast is another one, but no adapter was merged into it.
        return found.dtype == self._kept.dtype and not torch.equal(found, self._kept.to(found.device))


class _Quantized:
    """Hooks of a module that compute with one of its weights rounded to its grid."""

    def __init__(self, model: nn.Module, weight: Weight, quantizer: Quantizer):
        self.owner, self.name = module_and_attribute(model, weight.tensor)
        self._weight, self._quantizer = weight, quantizer
        self._kept: Tensor | None = None

    @property
    def parameter(self) -> Tensor:
        return getattr(self.owner, self.name)

    def round(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: the module reads rounded numbers instead of its weight."""
        latent = module._parameters[self.name]
        assert latent is not None
        scale, zero = (module._buffers.get(f"{self.name}_{part}") for part in PARTS)
        assert scale is not None
        self._kept = latent
        module._parameters[self.name] = _Rounded.apply(latent, scale, zero, self._weight, self._quantizer)  # pyright: ignore

    def restore(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: undo `round`."""
        if self._kept is not None:
            module._parameters[self.name] = self._kept  # pyright: ignore[reportArgumentType]
        self._kept = None


class _Rounded(torch.autograd.Function):
    """A weight rounded to its grid; the gradient passes straight through."""

    @staticmethod
    def forward(
        ctx, latent: Tensor, scale: Tensor, zero: Tensor | None, weight: Weight, quantizer: Quantizer
    ) -> Tensor:
        matrices = weight.turned(latent)
        return weight.turned(dequantize(quantize_on_grid(matrices, scale, zero, quantizer))).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, None, None, None
