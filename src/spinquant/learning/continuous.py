"""What of a quantized model is continuous and costs nothing to change: scales, norms, biases and clip ratios.

The codes of weights stay. A weight is W = (code - zero) * scale, so with scale = s exp(theta) the derivative of the
loss is the sum of dL/dW * W over the numbers of a scale. A norm's weight or a bias is moved by theta times its root
mean square, a clip ratio is c exp(theta), at most 1. All theta are zero at first, which gives the numbers of the start,
bit for bit.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spinquant.models.modules import named_tensor
from spinquant.online.attachment import Attachment
from spinquant.online.sites import InputSite, KeyValueSite
from spinquant.plan import Plan
from spinquant.quantization.integer import quantize_on_grid
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.quantization.targets import Weight, weights_of

Kind = Literal["scales", "norms", "biases", "clips"]
KINDS = get_args(Kind)


class Scales:
    """The scales of one quantized weight."""

    kind: Kind = "scales"

    def __init__(self, model: nn.Module, weight: Weight, quantizer: Quantizer):
        self.name, self._model, self._weight = weight.tensor, model, weight
        scale, zero = weight.grid(model)
        assert scale is not None
        self._packed = quantize_on_grid(weight.matrices(model), scale, zero, quantizer)
        self.theta = torch.zeros_like(scale, dtype=_wide(scale))

    @torch.no_grad()
    def write(self) -> None:
        """Write the weight that the moved scales give, and the scales beside it."""
        words, scale, *zero = self._packed.tensors()
        moved = (scale.to(self.theta.dtype) * self.theta.exp()).to(scale.dtype)
        self._weight.put(self._model, self._packed.with_tensors(words, moved, *zero))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, gradients of the weight are reduced to those of theta as soon as they are there."""
        parameter = named_tensor(self._model, self.name)
        parameter.requires_grad_(True)
        handle = parameter.register_post_accumulate_grad_hook(self._reduce)
        try:
            yield
        finally:
            handle.remove()
            parameter.requires_grad_(False)

    @torch.no_grad()
    def _reduce(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, weight = self._weight.turned(parameter.grad), self._weight.turned(parameter)
        products = (gradient * weight).unflatten(-1, (self.theta.shape[-1], -1))
        _add(self.theta, products.sum(-1, dtype=self.theta.dtype))
        parameter.grad = None


class Vector:
    """The weight of a norm, or a bias. offset: the model multiplies by offset + weight."""

    def __init__(self, model: nn.Module, name: str, kind: Kind, offset: float = 0.0):
        self.name, self.kind = name, kind
        self._parameter = named_tensor(model, name)
        self._start = self._parameter.detach().clone()
        self.theta = torch.zeros_like(self._start, dtype=_wide(self._start))
        self.unit = float((self._start.to(self.theta.dtype) + offset).square().mean().sqrt())

    @torch.no_grad()
    def write(self) -> None:
        """Write the moved vector."""
        self._parameter.copy_(self._start.to(self.theta.dtype) + self.unit * self.theta)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, gradients of the vector become those of theta."""
        self._parameter.requires_grad_(True)
        handle = self._parameter.register_post_accumulate_grad_hook(self._reduce)
        try:
            yield
        finally:
            handle.remove()
            self._parameter.requires_grad_(False)

    @torch.no_grad()
    def _reduce(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        _add(self.theta, parameter.grad.to(self.theta.dtype) * self.unit)
        parameter.grad = None


class Ratio:
    """The clip ratio of one quantizer. part: "inputs", "keys" or "values", of the module named `place`."""

    kind: Kind = "clips"

    def __init__(self, place: str, part: str, site: InputSite | KeyValueSite, quantizer: Quantizer, model: nn.Module):
        self.name, self.place, self.part, self._site = f"{place}.{part}", place, part, site
        assert isinstance(quantizer.clip, float | int)
        self._start = float(quantizer.clip)
        parameter = next(model.parameters())
        self.theta = torch.zeros((), dtype=_wide(parameter), device=parameter.device)
        self._ratio = torch.full_like(self.theta, self._start)

    @property
    def value(self) -> float:
        """The current clip ratio."""
        return float(self._ratio) if float(self.theta) else self._start

    @torch.no_grad()
    def write(self) -> None:
        """Set the ratio that is computed with."""
        self.theta.clamp_(max=-math.log(self._start))
        self._ratio.copy_((self._start * self.theta.exp()).clamp(max=1))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, the quantizer reads the ratio, whose gradients become those of theta."""
        self._ratio.requires_grad_(True)
        handle = self._ratio.register_post_accumulate_grad_hook(self._reduce)
        self._set(self._ratio)
        try:
            yield
        finally:
            self._set(None)
            handle.remove()
            self._ratio.requires_grad_(False)

    def _set(self, ratio: Tensor | None) -> None:
        if isinstance(self._site, InputSite):
            self._site.ratio = ratio
        else:
            keys, values = self._site.ratios
            self._site.ratios = (ratio, values) if self.part == "keys" else (keys, ratio)

    @torch.no_grad()
    def _reduce(self, ratio: Tensor) -> None:
        assert ratio.grad is not None
        _add(self.theta, ratio.grad * ratio)
        ratio.grad = None


Movable = Scales | Vector | Ratio  # by `name` and `kind`; theta is float32 or float64, and zero at first


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add(theta: Tensor, gradient: Tensor) -> None:
    theta.grad = gradient if theta.grad is None else theta.grad.add_(gradient)


def movables(
    model: Any, plan: Plan, scheme: Scheme, attachment: Attachment, *, kinds: tuple[Kind, ...] = KINDS
) -> list[Movable]:
    """Everything in a quantized model that can be tuned.

    Scales of floating-point formats that are themselves rounded (NVFP4, MXFP4), static ranges, and vectors that are
    zero, whose size says nothing about a step, stay.

    Args:
        model: The model, quantized.
        plan: Its plan.
        scheme: What is quantized.
        attachment: Its quantizers of activations and KV cache.
        kinds: What is listed.
    """
    found: list[Movable] = []
    if scheme.weights is not None and scheme.weights.kind in ("int", "fp8"):
        found += [Scales(model, weight, scheme.weights) for weight in weights_of(plan, scheme)]
    offsets = {gain.norm: gain.offset for gain in plan.gains}
    vectors = [Vector(model, name, "norms", offsets.get(name, 0.0)) for name in norm_vectors(model)]
    biases = dict.fromkeys(f"{name}.bias" for group in (*plan.linears, plan.heads) for name in group)
    parameters = dict(model.named_parameters())
    vectors += [Vector(model, name, "biases") for name in biases if name in parameters]
    found += [vector for vector in vectors if vector.unit > 0]
    for name, site in attachment.inputs.items():
        if site.quantizer is not None and site.quantizer.kind == "int":
            found.append(Ratio(name, "inputs", site, site.quantizer, model))
    for name, site in attachment.keys_values.items():
        for part, quantizer in (("keys", site.keys), ("values", site.values)):
            if quantizer is not None and quantizer.kind == "int":
                found.append(Ratio(name, part, site, quantizer, model))
    return [one for one in found if one.kind in kinds]


def norm_vectors(model: nn.Module) -> list[str]:
    """Names of the weights and biases of norms: modules whose only parameters are vectors of these names."""
    found = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not any(module.children()) and set(own) <= {"weight", "bias"}:
            if all(parameter.ndim == 1 for parameter in own.values()):
                found += [f"{path}.{name}" for name in own]
    return found


def tuned_clips(found: list[Movable], clips: Clips) -> Clips:
    """Clip ratios with those that were tuned."""
    parts: dict[str, Mapping[str, float]] = {}
    for part in ("inputs", "keys", "values"):
        own = {one.place: one.value for one in found if isinstance(one, Ratio) and one.part == part}
        parts[part] = {**getattr(clips, part), **own}
    return Clips(**parts)
