"""Attach online rotations as compressed-tensors transforms, for models in llm-compressor's recipes."""

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
from spinquant.formats.compressed_config import is_sylvester
from spinquant.formats.compressed_tensors import unnormalised
from spinquant.formats.native import distinct_rotations
from spinquant.modifiers.transform_config import TransformConfig as Groups
from spinquant.modifiers.transform_config import TransformScheme as Scheme
from spinquant.plan import Plan
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Rotation


def check_in_place(model: nn.Module) -> None:
    """Raise RotationError for offloaded weights, which are stored on one device and used on another."""
    for name, module in model.named_modules():
        kept: Any = module._parameters
        if isinstance(kept, OffloadCache) and torch.device(kept.onload_device) != torch.device(kept.offload_device):
            raise RotationError(
                f"the weights of {name} are offloaded to {kept.offload_device}, and learning rotations needs them in "
                "place: use a model that fits the device, without offloading"
            )


def install_compressed(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    group_of: Mapping[str, str],
    config: Groups,
    precision: torch.dtype,
) -> None:
    """Fuse rotations into a model and attach the online ones as transforms of compressed-tensors.

    group_of: the config's group of each space; its precision is that of the transform. Offloaded weights are fused
    where they are stored. The model's `transform_config` then describes the rotations, as its saved folder will.
    """
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
    group: str, scheme: Scheme, rotations: Mapping[str, Rotation]
) -> Iterator[tuple[str, TransformScheme, list[str]]]:
    """A group as it has to be saved for readers of the folder: name, scheme, modules that it rotates online.

    A reader generates the matrix of type hadamard itself (Sylvester's); it loads others from the folder, and divides
    them by sqrt(n) for type random-hadamard alone, so every other online matrix is saved under that type. A group has
    one matrix: if layers have their own, every matrix is a group.
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
            # The saved matrix is the one that is applied, so its inverse is the one in the weight.
            args.inverse = args.location == "weight_input"
        if len(distinct) > 1:
            part.apply = [args for args in part.apply if args.location != "weight_output"]
            for args in part.apply:
                args.targets, args.ignore = modules, []
        yield group if len(distinct) == 1 else f"{group}_{i}", part, modules


class _Factory(HadamardFactory):
    """compressed-tensors' factory with this library's matrices: modules that share a rotation share a parameter."""

    def __init__(self, name: str, scheme: TransformScheme, rotations: Mapping[nn.Module, Rotation]):
        super().__init__(name, scheme)
        self.rotations = rotations
        self.parameters: dict[tuple[int, Any], nn.Parameter] = {}

    def create_transform(self, module: nn.Module, args: TransformArgs) -> HadamardTransform:
        rotation, device = self.rotations[module], get_offloaded_device(module)
        if (id(rotation), device) not in self.parameters:
            weight = unnormalised(rotation).to(device, self.scheme.precision).contiguous()
            self.parameters[id(rotation), device] = nn.Parameter(weight, requires_grad=False)
        args = args.model_copy(update={"inverse": False})  # the matrix is the applied one
        return HadamardTransform(self.parameters[id(rotation), device], None, self.scheme, args, type(module))
