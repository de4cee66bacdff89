"""Run online rotations as transforms of compressed-tensors, for models in recipes of llm-compressor."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from compressed_tensors import TRANSFORM_CONFIG_NAME  # pyright: ignore[reportMissingImports]
from compressed_tensors.offload import (  # pyright: ignore[reportMissingImports]
    OffloadCache,
    disable_onloading,
    get_offloaded_device,
)
from compressed_tensors.transform import (  # pyright: ignore[reportMissingImports]
    HadamardFactory,
    HadamardTransform,
    TransformArgs,
    TransformConfig,
    TransformScheme,
    apply_transform_config,
)
from torch import nn

from spinquant.errors import RotationError
from spinquant.formats.compressed_config import check_rotations, is_sylvester
from spinquant.formats.compressed_tensors import unnormalised
from spinquant.formats.native import distinct_rotations
from spinquant.modifiers.transform_config import TransformConfig as Groups
from spinquant.modifiers.transform_config import TransformScheme as Scheme
from spinquant.plan import Plan
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Transform


def check_in_place(model: nn.Module) -> None:
    """Raise RotationError for a model with offloaded weights: stored on one device and used on another."""
    for name, module in model.named_modules():
        stored: Any = module._parameters
        if not isinstance(stored, OffloadCache):
            continue
        if torch.device(stored.onload_device) != torch.device(stored.offload_device):
            raise RotationError(
                f"the weights of {name} are offloaded to {stored.offload_device}, and learning rotations needs all "
                "weights on the device: use a model that fits it, without offloading"
            )


def install_compressed(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Transform],
    group_of: Mapping[str, str],
    config: Groups,
    precision: torch.dtype,
) -> None:
    """Fuse rotations into a model, and attach the online ones as transforms of compressed-tensors.

    The model's `transform_config` then describes the rotations, and is saved with it. Offloaded weights are fused where
    they are stored.

    Args:
        model: A causal language model of transformers, changed in place.
        plan: Where it can be rotated.
        rotations: Rotations by space.
        group_of: The group of each space in the config.
        config: The groups; the precision of a group is that of its online transform.
        precision: Dtype of fusing.

    Raises:
        RotationError: An online transform is no rotation.
    """
    check_rotations(plan, rotations)
    with disable_onloading():
        fuse_module(model, plan, rotations, precision=precision)
    saved = TransformConfig(config_groups={})
    for group, scheme in config.config_groups.items():
        here = {o.module: rotations[o.space] for o in plan.onlines if group_of.get(o.space) == group}
        for name, part, modules in _saved_groups(group, scheme, here):
            saved.config_groups[name] = part
            online = part.model_copy(update={"apply": [args for args in part.apply if args.is_online()]})
            rotated = {model.get_submodule(module): here[module] for module in modules}
            _Factory(name, online, rotated).apply_to_model(model, use_tqdm=False)
    before = getattr(model, TRANSFORM_CONFIG_NAME, None)
    # Without groups this only declares shared matrices as tied weights, for save_pretrained.
    apply_transform_config(model, TransformConfig(config_groups={}))
    if before is not None:
        before.merge(saved)
    setattr(model, TRANSFORM_CONFIG_NAME, saved if before is None else before)


def _saved_groups(
    group: str, scheme: Scheme, rotations: Mapping[str, Transform]
) -> Iterator[tuple[str, TransformScheme, list[str]]]:
    """A group as readers of the saved folder need it: (name, scheme, modules that it rotates online).

    A reader generates the matrix of type hadamard itself (Sylvester's). It loads all others from the folder, and
    divides them by sqrt(n) only for type random-hadamard, so every other online matrix is saved under that type. A
    group has one matrix: if layers have rotations of their own, each is saved as a group.
    """
    whole = TransformScheme.model_validate({**scheme.model_dump(), "requires_grad": False})
    distinct = distinct_rotations(rotations)
    if not distinct:
        yield group, whole, []
    for i, rotation in enumerate(distinct):
        modules = [name for name, own in rotations.items() if own is rotation]
        part = whole.model_copy(deep=True)
        if not is_sylvester(rotation):
            part.type, part.randomize = "random-hadamard", False
        for args in part.apply:
            # The saved matrix is the one that is applied online, so the inverse is the one in the weight.
            args.inverse = args.location == "weight_input"
        if len(distinct) > 1:
            part.apply = [args for args in part.apply if args.location != "weight_output"]
            for args in part.apply:
                args.targets, args.ignore = modules, []
        yield group if len(distinct) == 1 else f"{group}_{i}", part, modules


class _Factory(HadamardFactory):
    """Factory of compressed-tensors' transforms with our matrices: modules that share a rotation share a parameter."""

    def __init__(self, name: str, scheme: TransformScheme, rotations: Mapping[nn.Module, Transform]):
        super().__init__(name, scheme)
        self.rotations = rotations
        self.parameters: dict[tuple[int, Any], nn.Parameter] = {}

    def create_transform(self, module: nn.Module, args: TransformArgs) -> HadamardTransform:
        rotation, device = self.rotations[module], get_offloaded_device(module)
        if (id(rotation), device) not in self.parameters:
            weight = unnormalised(rotation).to(device, self.scheme.precision).contiguous()
            self.parameters[id(rotation), device] = nn.Parameter(weight, requires_grad=False)
        args = args.model_copy(update={"inverse": False})  # the parameter is the matrix that is applied
        return HadamardTransform(self.parameters[id(rotation), device], None, self.scheme, args, type(module))
