"""Which family explains a model, and the plan that follows.

One file per group of families; a family is a table (see `table.py`). A model that no table knows is refused by name:
guessing would give a model that loads and talks nonsense.
"""

from dataclasses import replace
from typing import Any

from spinquant.architectures import hybrid, layernorm, llama, moe, postnorm
from spinquant.architectures.build import Shapes, build_plan, module_names
from spinquant.architectures.prediction import REASON, prediction_tensors
from spinquant.architectures.table import Family, holds
from spinquant.architectures.vision import VISIONS
from spinquant.errors import ArchitectureError
from spinquant.plan import Plan

__all__ = ["FAMILIES", "family_of", "known_model_types", "make_plan", "module_names", "prediction_tensors"]

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *postnorm.FAMILIES,
    *layernorm.FAMILIES,
    *moe.FAMILIES,
    *hybrid.FAMILIES,
)


def family_of(config: Any) -> Family | None:
    """The table that explains the models of a config, None when there is none."""
    vision = next((vision for vision in VISIONS if config.model_type in vision.model_types), None)
    if vision is not None:
        text = vision.text or family_of(config.get_text_config())
        return text and vision.family(text)
    for family in FAMILIES:
        if config.model_type in family.model_types and all(holds(condition, config) for condition in family.when):
            return family
    return None


def known_model_types() -> list[str]:
    """Every model_type that some table explains, in alphabetical order."""
    return sorted({name for table in (*FAMILIES, *VISIONS) for name in table.model_types})


def make_plan(config: Any, shapes: Shapes) -> Plan:
    """The plan of a model, from its config and the names and shapes of its tensors (a checkpoint's or a module's).

    Beside layers for multi-token prediction R1 is refused; without their tensors it is not.
    Raises ArchitectureError when no table knows the model_type, when the model is not a causal LM (or a
    vision-language model whose language part is one), or when a tensor is not explained.
    """
    model_type = getattr(config, "model_type", None)
    classes = getattr(config, "architectures", None) or []
    if not model_type:
        raise ArchitectureError(
            "the config names no architecture (model_type is missing): expected the config.json of a transformers "
            "causal LM"
        )
    sees = any(model_type in vision.model_types for vision in VISIONS)
    for name in classes:
        if not name.endswith("ForConditionalGeneration" if sees else ("ForCausalLM", "LMHeadModel")):
            raise ArchitectureError(f"architecture {name!r} is not a causal LM: expected a ...ForCausalLM class")
    family = family_of(config)
    if family is None:
        inside = f" (language part {config.get_text_config().model_type!r})" if sees else ""
        raise ArchitectureError(
            f"no table explains model_type {model_type!r}{inside}. Known: {', '.join(known_model_types())}."
        )
    predictors = prediction_tensors(config, shapes)
    plan = build_plan(family, config, {name: shape for name, shape in shapes.items() if name not in set(predictors)})
    if not predictors:
        return plan
    reason = REASON.format(first=predictors[0])
    return replace(plan, predictors=predictors, refused=(*plan.refused, ("R1", reason)))
