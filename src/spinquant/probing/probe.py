"""Probe an unknown architecture: find by experiment which rotations leave its function unchanged, and draft its family.

1. Two tiny models of its class, in float64 with random weights, are made (`tiny_models.py`) and run.
2. The role of each module is inferred from its activations (`observation.py`, `module_roles.py`).
3. The roles become the draft of a family file (`draft_family.py`).
4. Each statement of the draft is tested by itself, and refused if it fails (`verify_draft.py`).
5. The draft is compared with the checkpoint's tensors (`checkpoint_experts.py`).

The draft is never used on its own: a user accepts it with --family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spinquant.architectures import FAMILIES
from spinquant.architectures.build import build_plan
from spinquant.architectures.family import Named
from spinquant.architectures.family_file import FamilyFile
from spinquant.architectures.family_file_conversion import to_family
from spinquant.errors import ArchitectureError
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.models.modules import model_class, tensor_shapes
from spinquant.probing.checkpoint_experts import with_single_experts
from spinquant.probing.draft_family import draft, same_attention
from spinquant.probing.observation import Observation, observe
from spinquant.probing.tiny_models import two_tiny_models
from spinquant.probing.trace import silent_parts
from spinquant.probing.verify_draft import Finding, verify_draft


@dataclass(frozen=True)
class Probe:
    """Result of probing an architecture: a draft of a family file, and the tests that support it.

    Attributes:
        model_type: Of the config.
        family: The draft; None if too little was found for one.
        findings: The tested statements, each with the relative error of the logits and, if it failed, the reason.
        left: What the draft does not cover, and why.

    Example:
        >>> import spinquant
        >>> found = spinquant.Probe("acme", family=None, findings=(), left=("it has no list of layers",))
        >>> print(spinquant.draft_text(found))
        # Draft of a family file for model_type 'acme', found by probing.
        ...
        # Not covered:
        #   - it has no list of layers
        ...
    """

    model_type: str
    family: FamilyFile | None
    findings: tuple[Finding, ...]
    left: tuple[str, ...] = ()


def probe(config: Any, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Probe:
    """Find by experiment which rotations are possible in an architecture, without a built-in table.

    Of a multimodal model, the language model is probed on text; R1 is then refused, because image and audio features
    are written to the residual stream too, and are not tested.

    Args:
        config: A transformers config, whose model class transformers can find.
        shapes: Shapes of a checkpoint's tensors by name (`read_headers`), which the draft has to cover too.
            Default: those of the model class.

    Returns:
        The draft of a family file, the result of every test, and what the draft does not cover.

    Raises:
        ArchitectureError: No tiny model of the class can be made or run.

    Example:
        >>> import spinquant
        >>> from transformers import LlamaConfig
        >>> found = spinquant.probe(LlamaConfig())
        >>> found.family is not None, all(finding.holds for finding in found.findings)
        (True, True)
    """
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):
        tiny_models, sizing = two_tiny_models(config)
        seen = [observe(tiny, sizing) for tiny in tiny_models]
        for one in seen:
            if isinstance(one, str):
                return Probe(config.model_type, None, (), (one,))
        looks = [one for one in seen if isinstance(one, Observation)]
        why = next((reason for one in looks if (reason := same_attention(one))), None)
        if why is not None:
            return Probe(config.model_type, None, (), (why,))
        with torch.device("meta"):
            original = tensor_shapes(model_class(config).from_config(config))
        text = Named(config.get_text_config(), sizing.names)
        drafted = draft(config.model_type, looks, (text, original), sizing)
        drafted.silent = silent_parts(tiny_models[0], looks[0].calls) if config.get_text_config() is not config else []
        found = Probe(config.model_type, *verify_draft(tiny_models[0], looks[0], drafted))
    return found if found.family is None else _against(found, config, shapes or original)


def _against(found: Probe, config: Any, shapes: Mapping[str, Sequence[int]]) -> Probe:
    """Check the draft against the checkpoint's tensors; extend it to single experts, or report what is not covered."""
    assert found.family is not None
    error = _error_of(found.family, config, shapes)
    if error is None:
        return found
    single = with_single_experts(found.family, config, shapes)
    if single is not None and (error := _error_of(single, config, shapes)) is None:
        return replace(found, family=single)
    return replace(found, left=(*found.left, f"the checkpoint's tensors are not those of the class: {error}"))


def _error_of(family: FamilyFile, config: Any, shapes: Mapping[str, Sequence[int]]) -> ArchitectureError | None:
    """The error that making a plan of these tensors raises; None if it succeeds."""
    try:
        build_plan(to_family(family, FAMILIES), config, shapes)
    except ArchitectureError as error:
        return error
    return None
