"""Supported architectures: find the family table of a model and make its rotation plan.

A family table is data (`family.py`), and each module of this package lists one group of families. To add a model type:

- add it to the `model_types` of a family with the same tensors, or derive a family (`LLAMA.like(...)`) and list it in
  `FAMILIES` at the end of its module; then add a tiny config of it to tests/families.py;
- or describe it in a TOML family file, which needs no code (`family_file.py`, docs/how-to/own-model.md).

A model type without a table is refused, because a guess could give a model that loads and writes nonsense.
`unsupported.py` gives the reasons.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from spinquant.architectures import delta_latent, hybrid, hyperconnected, layernorm, llama, moe, postnorm, variants
from spinquant.architectures.build import Shapes, build_plan, module_names
from spinquant.architectures.family import Family, holds
from spinquant.architectures.family_file import FamilyFile, family_from, read_family
from spinquant.architectures.family_file_conversion import to_family
from spinquant.architectures.model_classes import CAUSAL, HEADS, class_name, for_class, is_known, settle_class
from spinquant.architectures.mtp import REASON, prediction_tensors
from spinquant.architectures.unsupported import reason_unsupported
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
    *variants.FAMILIES,
    *hyperconnected.FAMILIES,
)


# Attribute of the config that stores a family read from a file, in memory and in saved folders.
RECORDED = "spinquant_family"

FamilyLike = str | Path | FamilyFile


def use_family(config: Any, family: FamilyLike | None) -> None:
    """Describe the architecture of a config by a family file, instead of by a built-in family table.

    The family is stored in the config, in place, so that a saved model loads again without the file.

    Args:
        config: a transformers config. Its `model_type` has to be one of the file's `model_types`.
        family: path of a TOML file, or what `read_family` returned; None changes nothing.

    Raises:
        ArchitectureError: the file cannot be read, is not valid, or is for other model types.

    Example:
        >>> from transformers import LlamaConfig
        >>> from spinquant import FamilyFile, use_family
        >>> config = LlamaConfig()
        >>> use_family(config, FamilyFile(name="my-llama", model_types=["llama"], like="llama"))
        >>> config.spinquant_family["name"]
        'my-llama'
    """
    if family is None:
        return
    origin = "the family" if isinstance(family, FamilyFile) else str(family)
    file = family if isinstance(family, FamilyFile) else read_family(family)
    if config.model_type not in file.model_types:
        raise ArchitectureError(
            f"{origin}: key model_types: expected one of {', '.join(file.model_types)}, and the model has model_type "
            f"{config.model_type!r}. Add it to the file if the family describes this model too"
        )
    to_family(file, FAMILIES)
    setattr(config, RECORDED, file.recorded())


def family_of(config: Any) -> Family | None:
    """The family table for the models of a config, of the class that it names; None if it is not supported."""
    recorded = recorded_family(config)
    if recorded is not None:
        return to_family(family_from(recorded, f"{RECORDED} in the config"), FAMILIES)
    vision = next((vision for vision in VISIONS if config.model_type in vision.model_types), None)
    if vision is not None:
        text = vision.text or family_of(config.get_text_config())
        return text and vision.family(text)
    table = _causal_family(config)
    return table and for_class(table, class_name(config))


def _causal_family(config: Any) -> Family | None:
    """The built-in table of a text-only model's causal LM."""
    for family in FAMILIES:
        if config.model_type in family.model_types and all(holds(condition, config) for condition in family.when):
            return family
    return None


def recorded_family(config: Any) -> dict[str, Any] | None:
    """The family file that is stored in a config, as JSON; None if there is none."""
    return getattr(config, RECORDED, None)


def known_model_types() -> list[str]:
    """Every supported `model_type`, in alphabetical order."""
    return sorted({name for table in (*FAMILIES, *VISIONS) for name in table.model_types})


def make_plan(config: Any, shapes: Shapes, *, family: FamilyLike | None = None) -> Plan:
    """Make the rotation plan of a model from its config and the names and shapes of its tensors; no weights needed.

    R1 is refused for checkpoints with multi-token prediction layers; it is allowed once their tensors are left out.

    Args:
        config: the model's transformers config.
        shapes: shape by tensor name, of a checkpoint or of a module.
        family: a family file (path, or from `read_family`) that is used instead of the built-in tables, see
            `use_family`.

    Returns:
        The plan, whose tensor names are those of `shapes`.

    Raises:
        ArchitectureError: no table supports the `model_type`, the model is neither a causal LM nor a supported
            vision-language model, or the table does not describe a tensor.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import make_plan
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> plan = make_plan(config, {name: tensor.shape for name, tensor in model.state_dict().items()})
        >>> [f"{space.name}: {space.rotation}, size {space.size}" for space in plan.spaces if space.rotation]
        ['residual: R1, size 32', 'layers.0.value: R2, size 16', 'layers.0.query_key: R3, size 16',
         'layers.0.hidden: R4, size 64', 'model.layers.0.self_attn.q_proj.input: online-R1, size 32',
         'model.layers.0.mlp.gate_proj.input: online-R1, size 32']
    """
    use_family(config, family)
    model_type = getattr(config, "model_type", None)
    classes = getattr(config, "architectures", None) or []
    if not model_type:
        raise ArchitectureError(
            "the config names no architecture (model_type is missing): expected the config.json of a transformers "
            "causal LM"
        )
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise ArchitectureError(f"the config has architectures = {classes!r}: expected a list of names of classes")
    multimodal = any(model_type in vision.model_types for vision in VISIONS)
    for name in classes if recorded_family(config) is None else ():
        if not (name.endswith("ForConditionalGeneration") if multimodal else is_known(name)):
            expected = "...ForConditionalGeneration" if multimodal else ", ".join(f"...{e}" for e in (*CAUSAL, *HEADS))
            raise ArchitectureError(
                f"architecture {name!r} is not supported: expected {expected}{'' if multimodal else ' or ...Model'}"
            )
    causal = None if multimodal or recorded_family(config) is not None else _causal_family(config)
    if causal is not None:
        settle_class(config, causal, module_names(causal, shapes))
    table = family_of(config)
    if table is None:  # a guess could give a model that loads and writes nonsense
        inside = f" (language model {config.get_text_config().model_type!r})" if multimodal else ""
        reason = reason_unsupported(model_type)
        because = f" Reason: {reason}." if reason else ""
        raise ArchitectureError(
            f"no family table supports model_type {model_type!r}{inside}.{because} Supported: "
            f"{', '.join(known_model_types())}. `spinquant plan MODEL --probe` finds out what can be rotated and "
            "drafts a family file for --family (docs/how-to/own-model.md)."
        )
    predictors = prediction_tensors(config, shapes)
    plan = build_plan(table, config, {name: shape for name, shape in shapes.items() if name not in set(predictors)})
    if not predictors:
        return plan
    reason = REASON.format(first=predictors[0])
    return replace(plan, predictors=predictors, refused=(*plan.refused, ("R1", reason)))
