"""Which family explains a model, and the plan that follows.

One file per group of families; a family is a table (see `table.py`). A model that no table knows is refused by name:
guessing would give a model that loads and talks nonsense.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from spinquant.architectures import delta_latent, hybrid, hyperconnected, layernorm, llama, moe, postnorm
from spinquant.architectures import variants as relatives
from spinquant.architectures.build import Shapes, build_plan, module_names
from spinquant.architectures.family import Family, holds
from spinquant.architectures.family_file import FamilyFile, family_from, read_family, to_family
from spinquant.architectures.mtp import REASON, prediction_tensors
from spinquant.architectures.unsupported import why_untabled
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
    *delta_latent.FAMILIES,
    *relatives.FAMILIES,
    *hyperconnected.FAMILIES,
)


# A family that came from a file travels with the config, in memory and in folders.
RECORDED = "spinquant_family"

FamilyLike = str | Path | FamilyFile


def use_family(config: Any, family: FamilyLike | None) -> None:
    """Let a family file, by its path or as read, explain the models of a config, in place of our tables.

    The config keeps it, so that what is made of the model and saved can be loaded without the file. None changes
    nothing. Raises ArchitectureError for a file that cannot be read or is for other models.
    """
    if family is None:
        return
    origin = "the family" if isinstance(family, FamilyFile) else str(family)
    file = family if isinstance(family, FamilyFile) else read_family(family)
    if config.model_type not in file.model_types:
        raise ArchitectureError(
            f"{origin}: key model_types: {', '.join(file.model_types)} expected, and the model's is "
            f"{config.model_type!r}. Add it to the file if the family explains this model too"
        )
    to_family(file, FAMILIES)
    setattr(config, RECORDED, file.recorded())


def family_of(config: Any) -> Family | None:
    """The table that explains the models of a config, None when there is none."""
    recorded = recorded_family(config)
    if recorded is not None:
        return to_family(family_from(recorded, f"{RECORDED} in the config"), FAMILIES)
    vision = next((vision for vision in VISIONS if config.model_type in vision.model_types), None)
    if vision is not None:
        text = vision.text or family_of(config.get_text_config())
        return text and vision.family(text)
    for family in FAMILIES:
        if config.model_type in family.model_types and all(holds(condition, config) for condition in family.when):
            return family
    return None


def recorded_family(config: Any) -> dict[str, Any] | None:
    """What a config keeps of the family file that explains it, None where a table of ours does."""
    return getattr(config, RECORDED, None)


def known_model_types() -> list[str]:
    """Every model_type that some table explains, in alphabetical order."""
    return sorted({name for table in (*FAMILIES, *VISIONS) for name in table.model_types})


def make_plan(config: Any, shapes: Shapes, *, family: FamilyLike | None = None) -> Plan:
    """The plan of a model, from its config and the names and shapes of its tensors (a checkpoint's or a module's).

    Beside layers for multi-token prediction R1 is refused; without their tensors it is not.
    family: a family file in place of our tables, see `use_family`. Raises ArchitectureError when no table knows the
    model_type, when the model is not a causal LM (or a vision-language model whose language part is one), or when a
    tensor is not explained.
    """
    use_family(config, family)
    model_type = getattr(config, "model_type", None)
    classes = getattr(config, "architectures", None) or []
    if not model_type:
        raise ArchitectureError(
            "the config names no architecture (model_type is missing): expected the config.json of a transformers "
            "causal LM"
        )
    sees = any(model_type in vision.model_types for vision in VISIONS)
    for name in classes if recorded_family(config) is None else ():
        if not name.endswith("ForConditionalGeneration" if sees else ("ForCausalLM", "LMHeadModel")):
            raise ArchitectureError(f"architecture {name!r} is not a causal LM: expected a ...ForCausalLM class")
    table = family_of(config)
    if table is None:  # a guess would be a model that loads and talks nonsense
        inside = f" (language part {config.get_text_config().model_type!r})" if sees else ""
        reason = why_untabled(model_type)
        looked = f" Its kind: {reason}." if reason else ""
        raise ArchitectureError(
            f"no table explains model_type {model_type!r}{inside}.{looked} Known: {', '.join(known_model_types())}. "
            "`spinquant plan MODEL --probe` tries out what can be rotated and drafts a family file, which "
            "--family takes (docs/families.md)."
        )
    predictors = prediction_tensors(config, shapes)
    plan = build_plan(table, config, {name: shape for name, shape in shapes.items() if name not in set(predictors)})
    if not predictors:
        return plan
    reason = REASON.format(first=predictors[0])
    return replace(plan, predictors=predictors, refused=(*plan.refused, ("R1", reason)))
