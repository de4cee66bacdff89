"""Resolve modifier arguments into a plan and rotations, and verify them on a tiny model. Does not modify the model.

The plan comes from the built-in table, from a table restricted by mappings, or, for an unknown architecture, from
complete mappings. The rotations come from a spec or from a transform config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spinquant.errors import ArchitectureError
from spinquant.evaluation.equivalence import Deviation, prove
from spinquant.evaluation.tiny_model import TINY_BLOCK, tiny_spec
from spinquant.formats.native import check_fresh
from spinquant.models.modules import check_changeable, config_of
from spinquant.modifiers.mapping_plan import check_against_table, plan_from_mappings
from spinquant.modifiers.mappings import (
    NormMapping,
    SpinQuantMapping,
    complete_mapping,
    complete_norms,
    infer_mapping,
    infer_norm_mappings,
)
from spinquant.modifiers.transform_config import TransformConfig, transform_config, translate
from spinquant.online.queries import ATTENTIONS, check_implementation
from spinquant.plan import Plan
from spinquant.rotation_names import ROTATION_NAMES
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.rotation import Transform
from spinquant.rotations.wrappers import InPrecision


@dataclass(frozen=True)
class ModifierRequest:
    """The arguments of a modifier.

    Attributes:
        spec: Which rotations, of which type and block size.
        learnable: Whether the rotations are trained.
        precision: Dtype of online rotations.
        mappings: The modules of every role. Default: inferred.
        norm_mappings: The linears that read each norm. Default: inferred.
        config: Transform config that replaces `spec`, `learnable` and `precision`. Default: made from them.
        attentions: Attention implementations under which R3 can run.
    """

    spec: RotationSpec
    learnable: bool
    precision: torch.dtype
    mappings: SpinQuantMapping | None = None
    norm_mappings: Sequence[NormMapping] | None = None
    config: TransformConfig | None = None
    attentions: Sequence[str] = ATTENTIONS


@dataclass(frozen=True)
class Resolved:
    """Resolved and verified arguments of a modifier.

    Attributes:
        plan: Where the model is rotated.
        rotations: The rotations by space.
        config: The groups of transforms.
        group_of: The group of each space's rotation.
        mappings: The complete mapping.
        norm_mappings: The complete norm mappings.
        deviation: Deviation of the tiny model's logits, None if nothing is rotated.
    """

    plan: Plan
    rotations: Mapping[str, Transform]
    config: TransformConfig
    group_of: Mapping[str, str]
    mappings: SpinQuantMapping
    norm_mappings: list[NormMapping]
    deviation: Deviation | None

    def online(self) -> dict[str, Transform]:
        """The rotations in the precision of their groups, as applied online; shared rotations stay shared."""
        made: dict[tuple[int, torch.dtype], Transform] = {}
        found: dict[str, Transform] = {}
        for space, rotation in self.rotations.items():
            dtype = self.config.config_groups[self.group_of[space]].precision
            found[space] = made.setdefault((id(rotation), dtype), InPrecision(rotation, dtype))
        return found

    def learned(self) -> dict[str, str]:
        """The spaces whose rotation is trained, with its name: the group, or the space if the group has several."""
        found: dict[str, str] = {}
        for group, scheme in self.config.config_groups.items():
            spaces = [space for space in self.group_of if self.group_of[space] == group and scheme.requires_grad]
            shared = len({id(self.rotations[space]) for space in spaces}) == 1
            # Module names must not contain dots.
            found.update({space: (group if shared else space).replace(".", "_") for space in spaces})
        return found


def resolve(model: Any, wanted: ModifierRequest) -> Resolved:
    """Resolve a plan and rotations for a model, and verify them on a tiny model; the model is not changed.

    Args:
        model: A causal language model of transformers.
        wanted: The arguments of the modifier.

    Returns:
        The resolved arguments.

    Raises:
        ArchitectureError: The architecture is unknown, and the mappings are not complete.
        RotationError: Mappings or config do not fit the model.
        ProofError: They would change the model's function.
    """
    check_fresh(model)
    table, reason = _table_of(model)
    if table is not None and wanted.mappings is None and wanted.norm_mappings is None:
        mapping, norms, base = infer_mapping(table), infer_norm_mappings(table), table
    else:
        mapping = complete_mapping(wanted.mappings, table, reason)
        norms = complete_norms(model, wanted.norm_mappings, table, reason)
        base = plan_from_mappings(model, mapping, norms)
        base = base if table is None else check_against_table(base, table)
    spec = wanted.spec
    config = wanted.config or transform_config(
        mapping,
        spec.rotations,
        type=spec.transform_type,
        randomize=spec.randomize,
        requires_grad=wanted.learnable,
        precision=wanted.precision,
        head_dim=spec.block_size,
    )
    check_changeable(model, base)
    plan, rotations, group_of = _rotations(model, base, wanted.config, spec)
    if any(online.site == "query_key" and online.space in rotations for online in plan.onlines):
        check_implementation(model.config._attn_implementation, wanted.attentions)

    def planner(tiny: Any) -> tuple[Plan, Mapping[str, Transform]]:
        small = wanted.config and _small(wanted.config)
        return _rotations(tiny, plan_from_mappings(tiny, mapping, norms), small, tiny_spec(spec))[:2]

    touched = {plan.space[space].rotation for space in rotations}
    proved = RotationSpec(tuple(name for name in ROTATION_NAMES if name in touched), "auto", seed=spec.seed)
    if table is not None:  # the mappings have been checked against the table, which is what has to be verified
        deviation = prove(config_of(model), proved) if proved.rotations else None
    else:
        deviation = prove(config_of(model), proved, planner=planner) if rotations else None
    return Resolved(plan, rotations, config, group_of, mapping, norms, deviation)


def _rotations(
    model: Any, base: Plan, config: TransformConfig | None, spec: RotationSpec
) -> tuple[Plan, Mapping[str, Transform], Mapping[str, str]]:
    """The plan, the rotations by space, and the group of each."""
    if config is not None:
        translation = translate(model, base, config, seed=spec.seed)
        return translation.plan, translation.rotations, translation.group_of
    rotations = make_rotations(base, spec)
    return base, rotations, {space: base.space[space].rotation for space in rotations}


def _table_of(model: Any) -> tuple[Plan | None, str]:
    try:
        return plan_of(model), ""
    except ArchitectureError as error:
        return None, str(error)


def _small(config: TransformConfig) -> TransformConfig:
    """The config for the tiny model, which keeps the head size; its other sizes are multiples of TINY_BLOCK."""
    small = config.model_copy(deep=True)
    for scheme in small.config_groups.values():
        heads = any(args.location in ("q_attn", "k_cache") for args in scheme.apply)
        if scheme.head_dim is not None and not heads:
            scheme.head_dim = min(scheme.head_dim, TINY_BLOCK)
    return small
