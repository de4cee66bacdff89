"""The transforms and clip ratios of one decoder block, learned as in FlatQuant; see `flatquant.py`."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import spinquant
from spinquant.models.capture import device_of
from spinquant.models.modules import named_tensor
from spinquant.online.sites import KeyValueSite
from spinquant.plan import Plan, Space
from spinquant.quantization.integer import decode, encode, extremes, grid_of_range, group_of
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.quantization.targets import weights_of
from spinquant.rotation_names import ONLINE_R1
from spinquant.rotations.factory import generator_for, random_orthogonal
from spinquant.rotations.fuse import transform
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import LARGEST_CONDITION, LARGEST_RATIO, Diagonal, KroneckerMatrix, Matrix

CLIP = 4.0  # what a clip ratio is the sigmoid of, at the start


@dataclass(frozen=True)
class FlatOptions:
    """Options of FlatQuant. alpha: of the first scales, max|w|^(1 - alpha) / max|x|^alpha."""

    epochs: int = 15
    batch: int = 4
    lr: float = 5e-3
    alpha: float = 0.3
    seed: int = 0


class _Rounding(torch.autograd.Function):
    """Round to a grid; gradients of x are zero where it is clipped, those of the scale go through its rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, quantizer: Quantizer) -> Tensor:
        y = decode(encode(x, scale, zero, quantizer), scale, zero)
        low, high = (bound * scale for bound in (-zero - 0.5, quantizer.top - zero + 0.5))
        inside = (x >= low) & (x <= high)
        ctx.save_for_backward(inside, torch.where(inside, y - x, y).div_(scale))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inside, slope = ctx.saved_tensors
        return grads[0] * inside, (grads[0] * slope).sum(-1, keepdim=True), None, None


def rounded(x: Tensor, quantizer: Quantizer, clip: Tensor) -> Tensor:
    """x rounded to a grid over its range, clipped by sigmoid(clip[0]) at the lower and sigmoid(clip[1]) at the upper
    end; clip is (2,), or (2, .., groups, 1)."""
    rows = x.unflatten(-1, (-1, group_of(x.shape[-1], quantizer)))
    ratios = clip.sigmoid()
    low, high = extremes(rows)
    scale, zero = grid_of_range(low * ratios[0], high * ratios[1], quantizer, x.dtype, 1.0)
    return _Rounding.apply(rows, scale, zero, quantizer).view(x.shape)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class Learning:
    """A `Transform` that is being learned. now: the current numbers by (space, dual): scales (n,), or the factors."""

    space: str
    order: int
    now: dict[tuple[str, bool], tuple[Tensor, ...]]
    inverse: bool = False

    def apply(self, x: Tensor, *, transpose: bool = False, dim: int = -1, out: Tensor | None = None) -> Tensor:
        """As `Transform.apply`, with gradients for the current numbers."""
        assert out is None
        parts = self.now[self.space, self.inverse]
        rows = x.movedim(dim, -1)
        if parts[0].ndim == 1:
            return (rows.unflatten(-1, (-1, self.order)) * parts[0]).flatten(-2).movedim(-1, dim)
        last = parts[-1].mT if transpose else parts[-1]
        y = rows.unflatten(-1, (-1, self.order // len(last), len(last))) @ last
        if len(parts) > 1:
            y = (parts[0] if transpose else parts[0].mT) @ y
        return y.flatten(-3).movedim(-1, dim)

    def dual(self) -> "Learning":
        """T^-T, of the same numbers."""
        return Learning(self.space, self.order, self.now, not self.inverse)

    def tensors(self) -> dict[str, Tensor]:
        """The current numbers."""
        return {str(i): part for i, part in enumerate(self.now[self.space, self.inverse])}

    def describe(self) -> dict[str, Any]:
        """Its order."""
        return {"kind": "learning", "order": self.order}


@dataclass(frozen=True)
class _Treated:
    """What an input site applies: its transform, if it has one, then a quantizer with learned clip ratios."""

    transform: Transform | None
    quantizer: Quantizer
    clip: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return rounded(x if self.transform is None else self.transform.apply(x), self.quantizer, self.clip)


class _Cache:
    """Proxy of the KV cache of `online/sites.py` that rounds keys, which it transforms, and values."""

    def __init__(self, cache: Any, quantizer: Quantizer, clips: Tensor):
        self._cache, self._how = cache, (quantizer, clips)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        quantizer, clips = self._how
        keys, values = self._cache.update(*args, **kwargs)
        return rounded(keys, quantizer, clips[0]), rounded(values, quantizer, clips[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def flat_rotations(plan: Plan, scheme: Scheme) -> tuple[str, ...]:
    """Names of the rotations whose spaces FlatQuant transforms. Raises SystemExit for a model or scheme without it."""
    quantizers = [one for one in (scheme.weights, scheme.activations, scheme.kv) if one is not None]
    if plan.experts or scheme.lm_head or any(one.kind != "int" for one in quantizers):
        raise SystemExit("FlatQuant is for models without experts and for integers, with the head at 16 bits")
    names = [name for name in ("R2", "R3", "R4", ONLINE_R1) if plan.spaces_of(name) and name not in dict(plan.refused)]
    found = tuple(name for name in names if name != "R3" or scheme.kv is not None)
    fixed = [space.name for name in found for space in plan.spaces_of(name) if space.allows != "any"]
    if fixed:
        raise SystemExit(f"FlatQuant puts any matrix into {fixed[0]}, and this model allows a rotation alone there")
    return found


def spaces_in(plan: Plan, block: str, names: tuple[str, ...]) -> list[Space]:
    """The spaces of some rotations inside a decoder block, and those of scales that only its linears read."""
    linears = {plan.weight_of(name) for group in plan.linears for name in group}
    places = [(axis.space, axis.tensor) for axis in plan.axes] + [(one.space, one.module) for one in plan.onlines]
    outside = {space for space, place in places if not place.startswith(f"{block}.")}
    outside |= {axis.space for axis in plan.axes if axis.reads and axis.tensor not in linears}
    own = {space for space, _ in places} - outside
    scaled = [space for space in plan.spaces if space.name in own and space.allows == "diagonal"]
    return [*scaled, *(space for space in plan.spaces if space.name in own and space.rotation in names)]


def sides(order: int) -> tuple[int, int]:
    """The two factors of an order that are nearest to each other."""
    low = max(factor for factor in range(1, math.isqrt(order) + 1) if order % factor == 0)
    return low, order // low


def products(turns: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """U diag(d) V^T and its dual, (k, n, n), from 2 k parameters of Cayley transforms and (k, n)."""
    lower = turns.tril(-1)
    half = (lower - lower.mT) / 2
    one = torch.eye(turns.shape[-1], dtype=turns.dtype, device=turns.device)
    # I - A/2 is never singular, and looking for errors would wait for the GPU.
    u, v = torch.linalg.solve_ex(one - half, one + half).result.chunk(2)
    return (u * middle.unsqueeze(-2)) @ v.mT, (u / middle.unsqueeze(-2)) @ v.mT


class BlockLearner:
    """The transforms and clip ratios of one decoder block, and its outputs with them.

    peaks: largest magnitudes of each channel at the input of linears, by the first linear that reads it.
    """

    def __init__(
        self, model: Any, plan: Plan, name: str, scheme: Scheme, peaks: Mapping[str, Tensor], options: FlatOptions
    ):
        self.model, self.plan, self.name, self.scheme = model, plan, name, scheme
        self.block = model.get_submodule(name)
        spaces = spaces_in(plan, name, flat_rotations(plan, scheme))
        like: dict[str, Any] = {"dtype": next(self.block.parameters()).dtype, "device": device_of(self.block)}
        self.scales = {s.name: self._first_scale(s, peaks, options.alpha) for s in spaces if s.allows == "diagonal"}
        self.factors: list[tuple[str, int, int]] = []  # space, order and place among the matrices of that order
        drawn: dict[int, list[list[Tensor]]] = {}
        for space in (space for space in spaces if space.rotation):
            for i, order in enumerate((space.size,) if space.rotation in ("R2", "R3") else sides(space.size)):
                labels = [f"{space.name}/{i}/{side}" for side in "UV"]
                pair = [random_orthogonal(order, generator_for(options.seed, label)) for label in labels]
                drawn.setdefault(order, []).append(pair)
                self.factors.append((space.name, order, len(drawn[order]) - 1))
        self.turns = {
            order: torch.stack([pair[side] for side in (0, 1) for pair in pairs]).to(**like).requires_grad_()
            for order, pairs in drawn.items()
        }
        self.middles = {n: torch.ones(len(pairs), n, **like, requires_grad=True) for n, pairs in drawn.items()}
        self.now: dict[tuple[str, bool], tuple[Tensor, ...]] = {}
        self.transforms = {space.name: Learning(space.name, space.size, self.now) for space in spaces}
        self.weights = {w.tensor: w for w in weights_of(plan, scheme) if w.tensor.startswith(f"{name}.")}
        if scheme.weights is None:
            self.weights = {}
        self.clips: dict[str, Tensor] = {}
        for tensor, weight in self.weights.items():
            matrix, quantizer = weight.matrices(model), scheme.weights
            assert quantizer is not None
            shape = (2, len(matrix), matrix.shape[-1] // group_of(matrix.shape[-1], quantizer), 1)
            self.clips[tensor] = torch.full(shape, CLIP, **like)
        if scheme.activations is not None:
            self.clips |= {group[0]: torch.full((2,), CLIP, **like) for group in self._groups()}
        if scheme.kv is not None:
            self.clips |= {attention: torch.full((2, 2), CLIP, **like) for attention in self._attentions()}
        for clip in self.clips.values():
            clip.requires_grad_()

    def _groups(self) -> list[tuple[str, ...]]:
        return [group for group in self.plan.linears if group[0].startswith(f"{self.name}.")]

    def _attentions(self) -> list[str]:
        return [name for name in self.plan.attentions if name.startswith(f"{self.name}.")]

    def _first_scale(self, space: Space, peaks: Mapping[str, Tensor], alpha: float) -> Tensor:
        reading = {axis.tensor: axis.dim for axis in self.plan.axes if axis.space == space.name and axis.reads}
        first = next(group[0] for group in self._groups() if self.plan.weight_of(group[0]) in reading)
        largest = [named_tensor(self.model, name).detach().abs().amax(1 - dim) for name, dim in reading.items()]
        w, x = torch.stack(largest).amax(0), peaks[first]
        return (w.pow(1 - alpha) / x.clamp(min=1e-5).pow(alpha)).clamp(min=1e-5).requires_grad_()

    def update(self) -> None:
        """Compute the current transforms from the parameters, with gradients."""
        made = {order: products(turns, self.middles[order]) for order, turns in self.turns.items()}
        self.now.clear()
        for name, scale in self.scales.items():
            self.now[name, False], self.now[name, True] = (scale,), (1 / scale,)
        for name, order, place in self.factors:
            for side in (False, True):
                self.now[name, side] = (*self.now.get((name, side), ()), made[order][side][place])

    def tensors(self) -> dict[str, Tensor]:
        """The transformed weights, biases and norms of the block, by their names in it; weights are rounded."""
        found = {}
        for name, parameter in self.block.named_parameters():
            whole = f"{self.name}.{name}"
            tensor = transform(whole, parameter.detach(), self.plan, {}, self.transforms)
            if whole in self.weights:
                turned, quantizer = self.weights[whole].turned, self.scheme.weights
                assert quantizer is not None
                tensor = turned(rounded(turned(tensor), quantizer, self.clips[whole]))
            found[name] = tensor
        return found

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the decoder block transforms and rounds activations, keys and values."""
        handles = []
        with spinquant.attach(self.model, self.plan, self.transforms, self.scheme) as attachment, attachment.exact():
            for first in (group[0] for group in self._groups() if self.scheme.activations is not None):
                site: Any = attachment.inputs[first]
                site.rotation = _Treated(site.rotation, self.scheme.activations, self.clips[first])
            for attention in self._attentions() if self.scheme.kv is not None else ():
                how = self._rounding_cache(attachment.keys_values[attention], self.clips[attention])
                module = self.model.get_submodule(attention)
                handles.append(module.register_forward_pre_hook(how, with_kwargs=True))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _rounding_cache(self, site: KeyValueSite, clips: Tensor) -> Callable[..., Any]:
        name, position = site.parameter
        quantizer = self.scheme.kv
        assert quantizer is not None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if position < len(args):
                return (*args[:position], _Cache(args[position], quantizer, clips), *args[position + 1 :]), kwargs
            return args, {**kwargs, name: _Cache(kwargs[name], quantizer, clips)}

        return hook

    def output(self, states: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The block's output, (batch, length, width), with gradients; call `update` before, within `attached`."""
        found = torch.func.functional_call(self.block, self.tensors(), (states,), dict(arguments))
        return found[0] if isinstance(found, tuple) else found

    @torch.no_grad()
    def error(self, inputs: Tensor, outputs: Tensor, arguments: Mapping[str, Any], batch: int) -> Tensor:
        """Mean squared error of the block's outputs, a scalar."""
        self.update()
        pairs = zip(inputs.split(batch), outputs.split(batch), strict=True)
        return sum(((self.output(x, arguments) - y).square().sum() for x, y in pairs), inputs.new_zeros(())) / (
            outputs.numel()
        )

    def learn(self, inputs: Tensor, outputs: Tensor, arguments: Mapping[str, Any], options: FlatOptions) -> Tensor:
        """Make all steps; the mean loss of each epoch, (epochs,), on the device."""
        matrices = [*self.turns.values(), *self.middles.values(), *self.scales.values()]
        groups = [{"params": matrices, "lr": options.lr}, {"params": [*self.clips.values()], "lr": 10 * options.lr}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        count = max(1, len(inputs) // options.batch)
        total = options.epochs * count
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=1e-3 * options.lr)
        losses = torch.zeros(total, device=inputs.device)
        for step in range(total):
            first = step % count * options.batch
            x, y = inputs[first : first + options.batch], outputs[first : first + options.batch]
            self.update()
            loss = nn.functional.mse_loss(self.output(x, arguments), y)
            losses[step] = loss.detach()
            optimizer.zero_grad()
            (loss / loss.detach()).backward()
            optimizer.step()
            decay.step()
        return losses.view(options.epochs, count).mean(1)

    @torch.no_grad()
    def found(self) -> dict[str, Transform]:
        """The transforms as values of the library, by space; condition numbers are bounded as it demands."""
        made: dict[str, list[Tensor]] = {}
        factors = [name for name, *_ in self.factors]
        for name, order, place in self.factors:
            turns, middle = (tensors[order].detach().double().cpu() for tensors in (self.turns, self.middles))
            middle = _bounded(middle, LARGEST_CONDITION ** (1 / factors.count(name)))
            made.setdefault(name, []).append(products(turns, middle)[0][place])
        whole = {name: Matrix(f[0]) if len(f) == 1 else KroneckerMatrix(tuple(f)) for name, f in made.items()}
        scales = {name: scale.detach().double().cpu() for name, scale in self.scales.items()}
        return {**{name: Diagonal(_bounded(scale, LARGEST_RATIO)) for name, scale in scales.items()}, **whole}


def _bounded(numbers: Tensor, ratio: float) -> Tensor:
    """Numbers whose magnitudes differ by at most a ratio along the last axis: the smallest are raised."""
    least = numbers.abs().amax(-1, keepdim=True) / (ratio / 1.01)
    return torch.where(numbers < 0, -1.0, 1.0) * numbers.abs().maximum(least)
