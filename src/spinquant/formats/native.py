"""Our own folder format: a Hugging Face folder with `quant_method: spinquant`, for schemes no other format can say.

Importing spinquant registers it with transformers, whose `from_pretrained` then packs nothing into silence: weights
are unpacked, online rotations and quantizers attached. Without the import transformers only warns of an unknown
quant_method and would go on without the online rotations; so the weights of all quantized linears are stored in
shapes that no plain model has (packed words, or one flat axis at 16 bits), which it refuses to load.

On disk, for every linear of the plan: `X.weight` int32 (out, words) with `X.weight_scale` (out, groups), and
`X.weight_zero` where asymmetric; at 16 bits `X.weight` (out * in,). Online rotations: `spinquant_rotations.N.*`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spinquant.errors import CheckpointError
from spinquant.fuse import rotate_axis
from spinquant.module import named_tensor, plan_of
from spinquant.online import attach, attachment_of
from spinquant.plan import Plan
from spinquant.quantization.integer import Packed, dequantize, quantize_on_grid
from spinquant.quantization.rtn import linears_of
from spinquant.quantization.scheme import Clips, Quantizer, Scheme
from spinquant.rotation import Rotation, RotationSpec, online_part
from spinquant.saved_rotations import empty_tensors, restore

METHOD = "spinquant"
FORMAT_VERSION = 2  # 2: clip ratios of single places
BANK = "spinquant_rotations"


class SpinQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder.

    scheme, spec: as `Scheme.to_dict` and `RotationSpec.to_dict` give them. rotations: descriptions of the distinct
    online rotations. spaces: which of them, by index, rotates each online space.
    """

    def __init__(
        self,
        scheme: dict[str, Any],
        spec: dict[str, Any],
        rotations: list[dict[str, Any]],
        spaces: dict[str, int],
        clips: dict[str, dict[str, float]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ):
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"this folder has format version {format_version}, and this spinquant reads up to {FORMAT_VERSION}: "
                "upgrade spinquant"
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.scheme = scheme
        self.spec = spec
        self.rotations = rotations
        self.spaces = spaces
        self.clips = clips or {}


def make_config(
    plan: Plan, rotations: Mapping[str, Rotation], spec: RotationSpec, scheme: Scheme, clips: Clips | None = None
) -> SpinQuantConfig:
    """The config of a model with these rotations; only the online ones are needed to run it."""
    online = online_part(plan, rotations)
    distinct = distinct_rotations(online)
    index = {id(rotation): i for i, rotation in enumerate(distinct)}
    spaces = {space: index[id(rotation)] for space, rotation in online.items()}
    found = clips.to_dict() if clips else None
    return SpinQuantConfig(scheme.to_dict(), spec.to_dict(), [r.describe() for r in distinct], spaces, found)


def distinct_rotations(rotations: Mapping[str, Rotation]) -> list[Rotation]:
    """The rotations without repetitions, in order of first use."""
    return list({id(r): r for r in rotations.values()}.values())


class RotationBank(nn.Module):
    """Holds the tensors of online rotations while transformers loads them."""

    def __init__(self, descriptions: list[dict[str, Any]]):
        super().__init__()
        for i, description in enumerate(descriptions):
            slot = nn.Module()
            for name, tensor in empty_tensors(description).items():
                slot.register_buffer(name, tensor)
            self.add_module(str(i), slot)


class SpinQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves one of our folders."""

    requires_calibration = True
    quantization_config: SpinQuantConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: SpinQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.scheme = Scheme.from_dict(quantization_config.scheme)
        self.rotations: dict[str, Rotation] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.plan = plan_of(model)
        for name in linears_of(self.plan, self.scheme):
            _expect_packed(model.get_submodule(name), self.scheme.weights)
        with torch.device("meta"):
            model.add_module(BANK, RotationBank(self.quantization_config.rotations))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config, bank = self.quantization_config, model.get_submodule(BANK)
        found = [
            restore(description, {k: v.cpu() for k, v in bank.get_submodule(str(i)).named_buffers()})
            for i, description in enumerate(config.rotations)
        ]
        delattr(model, BANK)
        self.rotations = {space: found[i] for space, i in config.spaces.items()}
        for name in linears_of(self.plan, self.scheme):
            _unpack(model.get_submodule(name), self.scheme.weights)
        attach(model, self.plan, self.rotations, self.scheme, Clips.from_dict(config.clips))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with packed weights and the online rotations, for `save_pretrained`."""
        self._check_known(model)
        state = model.state_dict()
        for name in linears_of(self.plan, self.scheme):
            weight = state[f"{name}.weight"]
            if self.scheme.weights is None:
                state[f"{name}.weight"] = weight.flatten()
                continue
            packed = _packed_again(model.get_submodule(name), name, weight, self.scheme.weights)
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = packed.words, packed.scale
            if packed.zero is not None:
                state[f"{name}.weight_zero"] = packed.zero
        for space, i in self.quantization_config.spaces.items():
            for name, tensor in self.rotations[space].tensors().items():
                state[f"{BANK}.{i}.{name}"] = tensor
        return state, {}

    def _check_known(self, model: Any) -> None:
        # What a folder does not say is taken from the table when it is loaded: other online rotations would be dropped.
        known = plan_of(model).onlines
        for online in self.plan.onlines:
            if online.space in self.rotations and online not in known:
                raise CheckpointError(
                    f"{online.module} is rotated at run time by a plan of your own, which this folder format cannot "
                    "say: save it through llm-compressor, or spinquant.detach(model) first"
                )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# Called rather than used as decorators, which have no types.
register_quantization_config(METHOD)(SpinQuantConfig)
register_quantizer(METHOD)(SpinQuantizer)


def mark(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    spec: RotationSpec,
    scheme: Scheme,
    clips: Clips | None = None,
) -> None:
    """Make `save_pretrained` of a model that was rotated and quantized in memory write this format."""
    quantizer = SpinQuantizer(make_config(plan, rotations, spec, scheme, clips), pre_quantized=True)
    quantizer.plan = plan
    quantizer.rotations = online_part(plan, rotations)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config


def unmark(model: Any) -> None:
    """Remove hooks and format from a model whose fused online rotations will be attached again."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.remove()
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


@torch.no_grad()
def detach(model: Any) -> None:
    """Make a rotated or quantized model a plain one: no hooks, no quantizers of activations and cache.

    Online rotations that are fused into weights (R4) are taken back out of them; R1, R2 and rounded weights stay.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SpinQuantizer):
        for axis in quantizer.plan.axes:
            if axis.space in quantizer.rotations:
                weight, rotation = named_tensor(model, axis.tensor), quantizer.rotations[axis.space]
                weight.copy_(rotate_axis(weight, axis.dim, rotation, axis.span, transpose=True))
        for name in linears_of(quantizer.plan, quantizer.scheme):
            linear = model.get_submodule(name)
            for buffer in ("weight_scale", "weight_zero"):
                linear._buffers.pop(buffer, None)
                linear._non_persistent_buffers_set.discard(buffer)
    unmark(model)


def is_marked(model: Any) -> bool:
    """Whether a model is rotated online or quantized by this library."""
    return attachment_of(model) is not None or getattr(model, "hf_quantizer", None) is not None


def _expect_packed(linear: nn.Module, quantizer: Quantizer | None) -> None:
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    rows, columns = weight.shape
    if quantizer is None:
        placeholder = torch.empty(rows * columns, dtype=weight.dtype, device="meta")
    else:
        words = -(-columns // (32 // quantizer.bits))
        placeholder = torch.empty(rows, words, dtype=torch.int32, device="meta")
        groups = columns // (quantizer.group_size or columns)
        scale = torch.empty(rows, groups, dtype=weight.dtype, device="meta")
        linear.register_buffer("weight_scale", scale)
        if not quantizer.symmetric:
            linear.register_buffer("weight_zero", torch.empty_like(scale, dtype=torch.uint8))
    linear.weight = nn.Parameter(placeholder, requires_grad=False)


def _unpack(linear: nn.Module, quantizer: Quantizer | None) -> None:
    shape = (linear.out_features, linear.in_features)
    stored: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    if quantizer is None:
        linear.weight = nn.Parameter(stored.detach().view(shape), requires_grad=False)  # pyright: ignore
        return
    zero = linear._buffers.get("weight_zero")
    scale = linear._buffers["weight_scale"]
    assert scale is not None
    packed = Packed(stored.detach(), scale, zero, shape[1], quantizer)  # pyright: ignore
    linear.weight = nn.Parameter(dequantize(packed), requires_grad=False)
    for name in ("weight_scale", "weight_zero"):
        if name in linear._buffers:
            linear.register_buffer(name, linear._buffers.pop(name), persistent=False)


def _packed_again(linear: nn.Module, name: str, weight: Tensor, quantizer: Quantizer) -> Packed:
    scale = linear._buffers.get("weight_scale")
    if scale is None:
        raise CheckpointError(f"{name} was not quantized: its grid (weight_scale) is missing")
    packed = quantize_on_grid(weight, scale, linear._buffers.get("weight_zero"), quantizer)
    if not torch.equal(dequantize(packed), weight):
        raise CheckpointError(f"{name}.weight no longer lies on its grid: it was changed after it was quantized")
    return packed
