"""Describe schemes and online rotations for compressed-tensors: `quantization_config` and `transform_config`.

Both are built from the library's own classes, which validate them. A scheme that the format cannot store is refused by
`check_scheme`, which needs neither the library nor a model, so that it can be called before any work.

A transform is an unnormalized matrix W with W W^T = n I, applied as x W / sqrt(n) to an online space; its inverse, the
transpose, is fused into the weight that reads the space. The format has no words for other transforms that runtimes
read: they divide by sqrt(n) and transpose whatever the type is, and rotate queries and keys alike.

    R4, online R1   `input` of linears (online) and `weight_input`, inverse (fused already, stored for the record)
    R3              attention: `q_attn` and `k_cache`
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from spinquant.errors import RotationError, SchemeError
from spinquant.plan import Plan
from spinquant.quantization.floating import LARGEST, tensor_factor
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, parse_scheme, static_parts
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.rotation import Hadamard, Transform, is_orthogonal
from spinquant.rotations.wrappers import online_part

INSTALL = "compressed-tensors is not installed: pip install 'spinquant[compressed-tensors]'"
# The quantization_status of folders with online rotations, in place of "compressed": transformers would silently skip
# the rotations, so this makes it refuse the folder and show this text. vLLM does not read it.
REFUSAL = "online rotations: serve it with vLLM"
DECODERS = ("language_model", "text_model")  # the text decoder of a vision-language model, here and in runtimes
AGAIN = 'Calibrate it by quantizing for this format: spinquant.quantize(..., tokens=..., format="compressed-tensors")'


def check_scheme(scheme: Scheme, spec: RotationSpec) -> None:
    """Raise SchemeError or RotationError, with a remedy, for what compressed-tensors cannot store."""
    weights, activations = scheme.weights, scheme.activations
    if scheme.kv is not None and scheme.kv.kind != "fp8":
        raise SchemeError(
            f"{scheme}: compressed-tensors supports only a KV cache of FP8 with a static scale per attention. Use "
            "KVFP8, leave KV out, or use --format native"
        )
    if scheme.kv is not None and not scheme.kv.static:
        raise SchemeError(
            f"{scheme}: compressed-tensors needs a static scale per attention of an FP8 KV cache. {AGAIN}"
        )
    if activations is not None and weights is None:
        raise SchemeError(
            f"{scheme}: compressed-tensors quantizes activations only together with weights: add W8, for example"
        )
    if activations is None:
        pass
    elif activations.kind == "int" and activations.group_size is not None:
        raise SchemeError(
            f"{scheme}: compressed-tensors quantizes integer activations per token: leave out their group size"
        )
    elif activations.kind == "nvfp4" and not activations.static:
        raise SchemeError(
            f"{scheme}: compressed-tensors needs a static global scale per linear for NVFP4 activations. {AGAIN}"
        )
    elif activations.kind == "fp8" and activations.static:
        raise SchemeError(
            f"{scheme}: FP8 activations are stored with a dynamic scale per token: make them dynamic, not static"
        )
    elif weights is not None and activations.kind != weights.kind:
        raise SchemeError(
            f"{scheme}: weights ({weights.kind}) and activations ({activations.kind}) must have one number format"
        )
    if activations is not None and activations.clip != 1.0:
        raise SchemeError(
            f"{scheme}: runtimes quantize the whole range of an activation, so clip ratio {activations.clip} cannot be "
            "stored. Leave --activation-clip at 1, or use --format native"
        )
    if weights is not None and weights.kind == "fp8" and weights.group_size is not None:
        raise SchemeError(
            f"{scheme}: fp8 weights have a scale per output channel in compressed-tensors: leave out the group size"
        )
    if "R3" in spec.rotations and spec.type_of("R3") != "hadamard":
        raise RotationError(
            "compressed-tensors can store R3 only as a plain Hadamard transform, since runtimes load no matrix for it: "
            "use --type R3=hadamard, or leave R3 out"
        )


def check_plan(plan: Plan, scheme: Scheme, spec: RotationSpec) -> None:
    """Raise SchemeError or RotationError for a model that compressed-tensors cannot store."""
    inside = [online for online in plan.onlines if online.module in {experts.module for experts in plan.experts}]
    for online in inside:
        if (rotation := plan.space[online.space].rotation) in spec.rotations:
            raise _no_place(rotation, online.module)
    if scheme.weights is None:
        return
    if plan.experts:
        raise SchemeError(
            f"{plan.experts[0].module} has stacked experts, and compressed-tensors quantizes linears only: use "
            "--format native, or --format hf with --scheme none"
        )
    if plan.transposed:
        raise SchemeError(
            f"{plan.linears[0][0]} stores its weight as (in, out), and compressed-tensors quantizes linears only: use "
            "--format native, or --format hf with --scheme none"
        )


def scheme_for(words: str | Scheme, format: str, *, activation_symmetric: bool | None = None, **options: Any) -> Scheme:
    """The scheme that words such as W8A8KVFP8 mean in a folder format; a Scheme gets only the ranges that it requires.

    In compressed-tensors activations are symmetric unless it is said otherwise, and ranges are static where runtimes
    require it. options: those of `parse_scheme`, whose errors are raised.
    """
    compressed = format == "compressed-tensors"
    symmetric = compressed if activation_symmetric is None else activation_symmetric
    scheme = parse_scheme(words, activation_symmetric=symmetric, **options)
    return as_stored(scheme) if compressed else scheme


def as_stored(scheme: Scheme) -> Scheme:
    """The scheme with the static ranges that compressed-tensors requires: of NVFP4 activations and an FP8 KV cache."""
    activations, kv = scheme.activations, scheme.kv
    if activations is not None and activations.kind == "nvfp4":
        activations = replace(activations, static=True)
    if kv is not None and kv.kind == "fp8":
        kv = replace(kv, static=True)
    return replace(scheme, activations=activations, kv=kv)


def format_of(scheme: Scheme) -> str:
    """The compression format (`format`) of a scheme's weights."""
    if scheme.weights is None:
        return "dense"
    if scheme.weights.kind != "int":
        return {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}[
            scheme.weights.kind
        ]
    # Integer kernels read one code per byte; weight-only formats are packed.
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def quantization_scheme(scheme: Scheme) -> Any:
    """The library's QuantizationScheme of the linears. Raises SchemeError if the library is not installed."""
    try:
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        raise SchemeError(INSTALL) from None
    return QuantizationScheme(
        targets=["Linear"],
        weights=_arguments(scheme.weights, dynamic=False),
        input_activations=_arguments(scheme.activations, dynamic=True),
        format=format_of(scheme),  # pyright: ignore[reportArgumentType] - pydantic converts the name
    )


def _arguments(quantizer: Quantizer | None, *, dynamic: bool) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    if quantizer is None:
        return None
    group = quantizer.group_size
    whole = "token" if dynamic else "channel"
    local = "local" if quantizer.static else dynamic  # a scale per group of each token, a factor per tensor
    options: dict[str, Any] = {
        "num_bits": quantizer.bits,
        "type": "int" if quantizer.kind == "int" else "float",
        "symmetric": quantizer.symmetric,
        "dynamic": local,
        "group_size": group,
        "strategy": whole if group is None else "tensor_group" if quantizer.kind == "nvfp4" else "group",
        "observer": None,
    }
    if quantizer.kind == "nvfp4":
        options["scale_dtype"] = torch.float8_e4m3fn
    if quantizer.kind == "mxfp4":
        options["scale_dtype"] = torch.uint8
    return QuantizationArgs(**options)


def _cache_arguments() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    options: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": None}
    return QuantizationArgs(**options, symmetric=True, dynamic=False)


def stored_ranges(plan: Plan, scheme: Scheme, clips: Clips) -> dict[str, torch.Tensor]:
    """Tensors of static ranges, float32 (1,): k_scale and v_scale of attentions, input_global_scale of linears.

    A scale is a peak divided by the largest FP8 number; scales are multiplied by the global scale before they are
    stored in FP8, hence the inverse of `floating.tensor_factor`.
    """
    found: dict[str, torch.Tensor] = {}
    if "kv" in static_parts(scheme):
        for letter, peaks in (("k", clips.keys), ("v", clips.values)):
            found |= {f"{a}.{letter}_scale": torch.tensor([peaks[a] / LARGEST["fp8"]]) for a in plan.attentions}
    if "activations" in static_parts(scheme):
        for group in (*plan.linears, *([plan.heads] if scheme.lm_head else [])):
            factor = tensor_factor(torch.tensor([clips.inputs[group[0]] / LARGEST["nvfp4"]]))
            found |= {f"{name}.input_global_scale": (1 / factor).reshape(1) for name in group}
    return found


def quantization_config(
    plan: Plan, rotations: Mapping[str, Transform], scheme: Scheme, *, ignore: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json. ignore: linears that stay at 16 bits."""
    described = quantization_scheme(scheme)
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    transforms = compressed_transform_config(plan, rotations)
    if scheme.weights is None:
        described.targets = []  # an empty group: without a group, transformers would not read the status below
    made = QuantizationConfig(
        config_groups={"group_0": described},
        format=format_of(scheme),
        quantization_status="compressed",  # pyright: ignore[reportArgumentType]
        ignore=list(ignore),
        kv_cache_scheme=_cache_arguments() if scheme.kv is not None else None,
    ).model_dump(mode="json")
    if transforms["config_groups"]:
        made["quantization_status"] = REFUSAL
        made["transform_config"] = transforms
    return {**made, "version": __version__}


def compressed_transform_config(plan: Plan, rotations: Mapping[str, Transform]) -> dict[str, Any]:
    """The `transform_config` of the online rotations; its `config_groups` are empty if there are none."""
    from compressed_tensors.transform import TransformConfig

    groups, rotations = {}, online_part(plan, rotations)
    for group, modules in transform_groups(plan, rotations).items():
        space = next(o.space for o in plan.onlines if o.module == modules[0])
        rotation, size = rotations[space], plan.space[space].size
        targets = _targets(modules, plan)
        name = plan.space[space].rotation
        sites = [("q_attn", False), ("k_cache", False)] if name == "R3" else [("input", False), ("weight_input", True)]
        groups[group] = {
            "type": "hadamard" if is_sylvester(rotation) else "random-hadamard",
            "apply": [{"targets": targets, "location": site, "inverse": inverse} for site, inverse in sites],
            "head_dim": rotation.order if name == "R3" or rotation.order != size else None,
        }
    return TransformConfig(config_groups=groups).model_dump(mode="json")


def transform_groups(plan: Plan, rotations: Mapping[str, Transform]) -> dict[str, list[str]]:
    """Modules by transform group, whose rotation they share: R4, or R4_0, R4_1, ... for several rotations.

    Raises RotationError for what the format cannot store: transforms in stacked experts, and those that are no
    rotations.
    """
    shared: dict[str, dict[int, list[str]]] = {}
    check_rotations(plan, rotations)
    rotations = online_part(plan, rotations)
    for online in plan.onlines:
        if online.space in rotations:
            if online.site in ("experts", "experts_input"):
                raise _no_place(plan.space[online.space].rotation, online.module)
            by_rotation = shared.setdefault(plan.space[online.space].rotation, {})
            by_rotation.setdefault(id(rotations[online.space]), []).append(online.module)
    return {
        name if len(found) == 1 else f"{name}_{i}": modules
        for name, found in shared.items()
        for i, modules in enumerate(found.values())
    }


def check_rotations(plan: Plan, rotations: Mapping[str, Transform]) -> None:
    """Raise RotationError for a transform that runs online and is no rotation."""
    for space, transform in online_part(plan, rotations).items():
        if not is_orthogonal(transform):
            raise RotationError(
                f"the online transform of {space} ({transform.describe()['kind']}, of order {transform.order}) is no "
                f"rotation, and compressed-tensors stores online transforms whose inverse is their transpose: use "
                f"rotations for {plan.space[space].rotation}, or --format native"
            )


def _no_place(rotation: str, experts: str) -> RotationError:
    return RotationError(
        f"{rotation} runs in the stacked experts of {experts}, where compressed-tensors supports no transform: leave "
        f"{rotation} out, or use --format native"
    )


def is_sylvester(rotation: Transform) -> bool:
    """Whether a rotation is the library's type `hadamard`: Sylvester's Hadamard matrix, without signs."""
    return isinstance(rotation, Hadamard) and rotation.signs is None and rotation.order & (rotation.order - 1) == 0


def _targets(modules: Sequence[str], plan: Plan) -> list[str]:
    # Patterns of suffixes if they match exactly these modules: runtimes change the prefix of module names. They keep
    # the part that tells the decoder from the vision tower beside it, whose modules have the same suffixes.
    others = [*plan.attentions, *(name for linears in plan.linears for name in linears)]
    suffixes = dict.fromkeys(".".join(m.split(".")[-1 if m.endswith("attn") else -2 :]) for m in modules)
    decoder = next((f"{part}[.].*" for part in plan.blocks[0].split(".") if part in DECODERS), "")
    if {other for other in others if other.endswith(tuple(suffixes))} == set(modules):
        return [f"re:.*{decoder}{suffix.replace('.', '[.]')}$" for suffix in suffixes]
    return list(modules)
