"""Native checkpoint format: a Hugging Face folder with `quant_method: spinquant`, for any scheme and any rotation.

Importing spinquant registers the format with transformers (`register.py`), whose `from_pretrained` then unpacks
weights and attaches online rotations and quantizers. Without the import transformers only warns of an unknown
quant_method and would load the model without its online rotations; therefore the weights of all quantized linears are
stored in shapes that no plain model has (packed words, or one flat axis at 16 bits), which it refuses to load.

On disk, for every linear of the plan: `X.weight` int32 (out, words) with `X.weight_scale` (out, groups), and
`X.weight_zero` if asymmetric; at 16 bits `X.weight` (out * in,). Experts likewise, under the names of their checkpoint,
one by one or stacked: `X`, (experts, out, words), with `X_scale` and `X_zero`. Always (out, in), whatever layout the
model uses. Online rotations: `spinquant_rotations.N.*`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spinquant.compute.values import validated
from spinquant.errors import CheckpointError, RotationError
from spinquant.formats.native_weights import expect_packed, packed_again, unpack
from spinquant.formats.register import METHOD
from spinquant.formats.resuming import LATENT, unpack_state
from spinquant.formats.training import WeightWatch
from spinquant.models.modules import named_tensor
from spinquant.online.attachment import attachment_of
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.quantization.targets import PARTS, Weight, linear_weights, parts_tied, weights_of
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse import rotate_axis
from spinquant.rotations.fuse_module import plan_of, untie
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import empty_tensors, restore, unshared
from spinquant.rotations.wrappers import online_part

FORMAT_VERSION = 2  # 2 added clip ratios per site
BANK = "spinquant_rotations"
NO_OFFLOADING = (
    "weights of the native format are unpacked when they are loaded, so none can be offloaded. Put the whole model on "
    "one device or on several GPUs (device_map without 'disk', and 'cpu' alone), or write --format compressed-tensors "
    "and serve that with vLLM"
)


class _Stored(BaseModel):
    scheme: dict[str, Any]
    spec: dict[str, Any]
    rotations: list[dict[str, Any]]
    spaces: dict[str, int]
    clips: dict[str, dict[str, float]] | None
    format_version: int


class SpinQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint.

    scheme, spec: from `Scheme.to_dict` and `RotationSpec.to_dict`. rotations: descriptions of the distinct online
    rotations. spaces: the index of each online space's rotation. clips: clip ratios per site.
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
        given = {"scheme": scheme, "spec": spec, "rotations": rotations, "spaces": spaces, "clips": clips}
        given["format_version"] = format_version
        validated(_Stored, given, "the quantization_config of a native folder", CheckpointError)
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"this folder has format version {format_version}, and this version of spinquant reads up to "
                f"{FORMAT_VERSION}: upgrade spinquant"
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.scheme = scheme
        self.spec = spec
        self.rotations = rotations
        self.spaces = spaces
        self.clips = clips or {}


def make_config(
    plan: Plan, rotations: Mapping[str, Transform], spec: RotationSpec, scheme: Scheme, clips: Clips | None = None
) -> SpinQuantConfig:
    """The `quantization_config` of a model; of its rotations only the online ones are stored."""
    online = online_part(plan, rotations)
    distinct = distinct_rotations(online)
    index = {id(rotation): i for i, rotation in enumerate(distinct)}
    spaces = {space: index[id(rotation)] for space, rotation in online.items()}
    found = clips.to_dict() if clips else None
    return SpinQuantConfig(scheme.to_dict(), spec.to_dict(), [r.describe() for r in distinct], spaces, found)


def distinct_rotations(rotations: Mapping[str, Transform]) -> list[Transform]:
    """The distinct rotations, in order of first use."""
    return list({id(r): r for r in rotations.values()}.values())


def _restored(bank: nn.Module, i: int, description: Mapping[str, Any]) -> Transform:
    """An online rotation from the tensors that were loaded. Raises CheckpointError, naming them, if they make none."""
    tensors = {name: tensor.cpu() for name, tensor in bank.get_submodule(str(i)).named_buffers()}
    try:
        return restore(description, tensors)
    except RotationError as error:
        names = ", ".join(f"{BANK}.{i}.{name}" for name in tensors) or f"rotation {i}"
        raise CheckpointError(f"{names} of this folder is missing or damaged: {error}") from None


def _by_space(distinct: list[Transform], config: SpinQuantConfig, plan: Plan) -> dict[str, Transform]:
    """The online rotations by space. Raises CheckpointError if they are not those that the folder's spec asks for."""
    spec = RotationSpec.from_dict(config.spec)
    online = {one.space for one in plan.onlines}
    wanted = {space.name: space for space in plan.spaces if space.name in plan.rotated(spec.rotations) & online}
    odd = sorted(set(wanted) ^ set(config.spaces))
    if odd:
        there = "lacks" if odd[0] in wanted else f"has, beside those of {', '.join(spec.rotations)},"
        raise CheckpointError(f"the quantization_config of this folder {there} a rotation of {odd[0]}")
    found = {}
    for space, i in config.spaces.items():
        order = spec.block_of(wanted[space].rotation) or wanted[space].size
        if not 0 <= i < len(distinct) or distinct[i].order != order:
            raise CheckpointError(f"the rotation of {space} in this folder is not of order {order}, as its spec asks")
        found[space] = distinct[i]
    return found


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
    """The quantizer that transformers calls when it loads or saves a native checkpoint."""

    requires_calibration = True
    quantization_config: SpinQuantConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: SpinQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.scheme = Scheme.from_dict(quantization_config.scheme)
        self.rotations: Mapping[str, Transform] = {}
        self.watch: WeightWatch | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map that offloads; transformers calls this for a given map, and for one that it made."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            offloaded = ("disk", "cpu")["disk" not in devices]
            part = next(name for name, device in device_map.items() if str(device) == offloaded)
            raise CheckpointError(f"the device map puts {part!r} on {offloaded!r}: {NO_OFFLOADING}")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.plan = plan_of(model)
        for rotation, reason in self.plan.refused:
            if rotation in self.quantization_config.spec["rotations"]:
                raise CheckpointError(
                    f"this folder cannot be loaded as {type(model).__name__}: it was rotated by {rotation}, and "
                    f"{reason}. Load it with the class that its config names, or make it again without {rotation}"
                )
        self.kept = {weight.tensor: named_tensor(model, weight.tensor).shape for weight in self._weights()}
        for weight in self._weights():
            expect_packed(model, weight, self.scheme.weights)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"_{LATENT}$"}
        with torch.device("meta"):
            model.add_module(BANK, RotationBank(self.quantization_config.rotations))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config, bank = self.quantization_config, model.get_submodule(BANK)
        found = [_restored(bank, i, description) for i, description in enumerate(config.rotations)]
        delattr(model, BANK)
        self.rotations = _by_space(found, config, self.plan)
        for weight in self._weights():
            unpack(model, weight, self.scheme.weights, self.kept[weight.tensor])
        attach(model, self.plan, self.rotations, self.scheme, Clips.from_dict(config.clips))
        self.watch_weights(model)
        return model

    def watch_weights(self, model: Any) -> None:
        """Round quantized weights while they are trained, and notice adapters that are merged into weights."""
        fused = dict.fromkeys(axis.tensor for axis in self.plan.axes if axis.space in self.rotations)
        self.watch = WeightWatch(model, self.plan, self.scheme, list(fused))
        self.watch.handles.append(model.register_load_state_dict_pre_hook(self._unpack_state))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with packed weights and the online rotations, for `save_pretrained`."""
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers takes the adapter's tensors from it
            return model.state_dict(), {}
        self._check_known(model)
        state = model.state_dict()
        if self.watch is not None:
            self.watch.check(CheckpointError)
        for weight in self._weights():
            tensor = weight.tensor
            if self.scheme.weights is None:
                state[tensor] = state[tensor].flatten()
                continue
            trained = self.watch is not None and self.watch.trains
            matrices = weight.turned(state[tensor])
            packed = packed_again(model, weight, matrices, self.scheme.weights, trained=trained)
            state[tensor] = packed.words
            for part, values in zip(PARTS, packed.tensors()[1:], strict=False):
                state[f"{tensor}_{part}"] = values
            if trained and model.training and matrices.ndim == 2:
                state[f"{tensor}_{LATENT}"] = weight.turned(matrices).contiguous()
        return {**state, **self._rotation_tensors()}, {}

    def _rotation_tensors(self) -> dict[str, Tensor]:
        """The tensors of the online rotations, by their names in the format."""
        spaces = self.quantization_config.spaces.items()
        found = ((i, self.rotations[space].tensors()) for space, i in spaces)
        return unshared({f"{BANK}.{i}.{name}": tensor for i, tensors in found for name, tensor in tensors.items()})

    def _unpack_state(self, model: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Before `load_state_dict`: a checkpoint of a training in this format."""
        scheme, rotations = self.scheme, self._rotation_tensors()
        if unpack_state(state, prefix, model, self._weights(), scheme.weights, rotations) and self.watch is not None:
            self.watch.resume()

    def _weights(self) -> list[Weight]:
        # At 16 bits only linears are flattened: enough for a plain model to refuse the folder.
        return (linear_weights if self.scheme.weights is None else weights_of)(self.plan, self.scheme)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Add conversions for scales and zero points to those that stack the experts of a checkpoint.

        transformers 5.17 does not pass the model.
        """
        if self.scheme.weights is None:
            return weight_conversions
        parts = PARTS[:1] if self.scheme.weights.symmetric else PARTS
        # As in `weights_of`, but for the conversions' patterns, which end as the tensors' names do.
        ends = tuple({tensor.rpartition(".")[2] for e in self.plan.experts for tensor in (*e.first, *e.second)})
        found = []
        for conversion in weight_conversions:
            found.append(conversion)
            if not ends or not all(target.endswith(ends) for target in conversion.target_patterns):
                continue
            for part in parts:
                sources, targets = (
                    [f"{pattern}_{part}" for pattern in patterns]
                    for patterns in (conversion.source_patterns, conversion.target_patterns)
                )
                if isinstance(conversion, WeightConverter):
                    found.append(WeightConverter(sources, targets, list(conversion.operations)))
                elif type(conversion) is WeightRenaming:
                    found.append(WeightRenaming(sources, targets))
        return found

    def convert_grids(self, model: Any) -> None:
        """Make `save_pretrained` unstack scales and zero points of experts wherever it unstacks their weights."""
        if not self.plan.experts or self.scheme.weights is None:
            return
        known = self._conversions = getattr(model, "_weight_conversions", None)
        if known is None:
            # As transformers does when it saves a model that it did not load.
            known = [c for c in get_model_conversion_mapping(model, add_legacy=False) if type(c) is not PrefixChange]
        model._weight_conversions = self.update_weight_conversions(known, model)

    def convert_no_grids(self, model: Any) -> None:
        """Undo `convert_grids`."""
        if hasattr(self, "_conversions"):
            model._weight_conversions = self._conversions

    def _check_known(self, model: Any) -> None:
        # Loading takes the places of online rotations from the built-in table: any others would be lost.
        table = plan_of(model)
        rotated = table.rotated(self.quantization_config.spec["rotations"])
        known = [online for online in table.onlines if online.space in rotated]
        for online in self.plan.onlines:
            if online.space in self.rotations and online not in known:
                raise CheckpointError(
                    f"{online.module} is rotated online by a custom plan, which the native format cannot store: save "
                    "it through llm-compressor, or call spinquant.detach(model) first"
                )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the model, see `formats/training.py`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Its own weights can be trained."""
        return True


def mark(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    spec: RotationSpec,
    scheme: Scheme,
    clips: Clips | None = None,
) -> None:
    """Make `save_pretrained` of a model that was rotated or quantized in memory write the native format."""
    if parts_tied(plan, scheme):
        untie(model, plan)
    quantizer = SpinQuantizer(make_config(plan, rotations, spec, scheme, clips), pre_quantized=True)
    quantizer.plan = plan
    quantizer.rotations = online_part(plan, rotations)
    quantizer.convert_grids(model)
    quantizer.watch_weights(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config


def unmark(model: Any) -> None:
    """Remove the attachment and the native format from a model; R4 and online R1 stay fused: attach them again."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.remove()
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        if isinstance(quantizer, SpinQuantizer):
            quantizer.convert_no_grids(model)
            if quantizer.watch is not None:
                quantizer.watch.remove()
        quantizer.remove_quantization_config(model)


@torch.no_grad()
def detach(model: Any) -> None:
    """Turn a rotated or quantized model into a plain one: remove its hooks and quantizers, in place.

    R4 and online R1 are taken back out of the weights. R1, R2 and quantized weights stay, so the model computes
    the same function without quantized activations and KV cache. `save_pretrained` then writes a plain checkpoint.

    Args:
        model: A model from `rotate`, `quantize` or `load`; a plain model is left as it is.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> result = spinquant.rotate(model, spinquant.RotationSpec(("R1", "R2", "R3", "R4"), "auto"))
        >>> spinquant.detach(model)
        >>> hasattr(model.config, "quantization_config")
        False
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SpinQuantizer):
        for axis in quantizer.plan.axes:
            if axis.space in quantizer.rotations:
                # The weights read x T, so they hold W T^-T, which T^T undoes.
                weight, rotation = named_tensor(model, axis.tensor), quantizer.rotations[axis.space]
                weight.copy_(rotate_axis(weight, axis.dim, rotation, axis.span, transpose=True))
        for weight in weights_of(quantizer.plan, quantizer.scheme):
            weight.forget_grid(model)
    unmark(model)


def is_marked(model: Any) -> bool:
    """Whether a model has online rotations or quantizers of this library attached, or is quantized."""
    return attachment_of(model) is not None or getattr(model, "hf_quantizer", None) is not None


def check_fresh(model: Any) -> None:
    """Raise RotationError for a model that is rotated online or quantized already."""
    if is_marked(model):
        raise RotationError(
            "this model is rotated or quantized already, and its online rotations would be lost. Load the original, or "
            "make it plain first with spinquant.detach(model)"
        )
