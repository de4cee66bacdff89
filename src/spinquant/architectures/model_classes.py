"""Classes of a family other than its causal LM: with another head on the residual stream, or with none.

A family table describes `...ForCausalLM`. Sequence classification, reward models, token classification and question
answering put another linear in the head's place; it reads the last norm like the head, so R1 is fused into it in the
same way. Most classes for question answering call the body `transformer`, whatever the causal LM calls it. The body
alone (`...Model`, which embedding models are) stores its tensors without the causal LM's prefix and returns the
output of the last norm, diag(g) x. Nothing after it could take R back out, so R1 is refused; R2, R3 and R4 change
nothing outside a layer.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from spinquant.architectures.family import AxisSpace, Family, Norm, Refusal, mapped

CAUSAL = ("ForCausalLM", "LMHeadModel")
# Names that transformers' classes give to their head, by the end of the class's name.
HEADS = {
    "ForSequenceClassification": ("score",),
    "ForTokenClassification": ("score", "classifier"),
    "ForQuestionAnswering": ("qa_outputs",),
}
NO_HEAD = (
    "the model class {name} has no output head: it returns the output of its last norm, and a scale per channel is not "
    "the same scale in rotated channels, so R1 would change what it returns. R2, R3, R4 and online R1 leave it as it is"
)


def class_name(config: Any) -> str:
    """The name of a model's class by its config, "" if the config does not name it."""
    names = getattr(config, "architectures", None) or [""]
    return str(names[0])


def is_body(name: str) -> bool:
    """Whether a class is that of a model without its head, such as `Qwen3Model`."""
    other = re.search(r"For[A-Z]", name) is not None  # with a head, such as `Qwen2ForRewardModel`
    return name.endswith("Model") and not other and not name.endswith(("LMHeadModel", "HeadsModel"))


def head_of_class(name: str) -> str | None:
    """The end of a class's name, of those in `HEADS`; None for a causal LM, a body or any other class."""
    return next((end for end in HEADS if name.endswith(end)), None)


def is_known(name: str) -> bool:
    """Whether a table covers a class of a text-only model."""
    return name.endswith(CAUSAL) or is_body(name) or head_of_class(name) is not None


def is_causal(config: Any) -> bool:
    """Whether a model predicts tokens: it is neither a body alone nor has another head."""
    name = class_name(config)
    return not is_body(name) and head_of_class(name) is None


def for_class(family: Family, name: str) -> Family:
    """The table of a class of the family: the causal LM's, or one with another head or none."""
    end = head_of_class(name)
    prefix = f"{family.block.partition('.')[0]}."
    if end is not None:
        found = _with_heads(family, HEADS[end])
        own = _body_prefix(name) if end == "ForQuestionAnswering" else prefix
        return found if own in ("", prefix) else _renamed(found, prefix, own)
    if not is_body(name):
        return family
    found = _renamed(_with_heads(family, ()), prefix, "")
    refused = (*found.refused, Refusal("R1", NO_HEAD.format(name=name)))
    return replace(found, refused=refused)


def _body_prefix(name: str) -> str:
    """The prefix of the body's tensors in a class of transformers, "" if it has no such class."""
    import transformers

    found = getattr(getattr(transformers, name, None), "base_model_prefix", "")
    return f"{found}." if found else ""


def _renamed(family: Family, prefix: str, own: str) -> Family:
    """A table with another prefix, or none, in the place of the causal LM's."""
    parts = ("tensors", "gains", "onlines", "linears", "attention", "block", "embedding", "choices", "shared")
    renamed = {
        part: mapped(getattr(family, part), lambda text: own + text[len(prefix) :] if text.startswith(prefix) else text)
        for part in (*parts, "scaled", "uncalled")
    }
    return replace(family, prefix=prefix, own_prefix=own, **renamed)


def _with_heads(family: Family, heads: tuple[str, ...]) -> Family:
    """A table with one of these linears in the place of the head."""
    usual = family.head.removesuffix(".weight")

    def readers(norm: tuple[str, ...] | Norm) -> tuple[str, ...] | Norm:
        if isinstance(norm, Norm):
            return replace(norm, readers=readers(norm.readers))
        return tuple(other for reader in norm for other in (heads if reader == usual else (reader,)))

    tensors: dict[str, tuple[AxisSpace, ...]] = {
        key: spaces for key, spaces in family.tensors.items() if not key.startswith(f"{usual}.")
    }
    for head in heads:
        tensors |= {f"{head}.weight?": (None, "residual"), f"{head}.bias?": (None,)}
    gains = {norm: readers(found) for norm, found in family.gains.items()}
    return replace(family, head="", heads_instead=tuple(f"{h}.weight" for h in heads), tensors=tensors, gains=gains)


def settle_class(config: Any, family: Family, names: Iterable[str]) -> None:
    """Set `architectures` of a config to the body's class if a checkpoint holds the body of a causal LM alone.

    Embedding models are often saved so: their tensors lack the prefix, and the config still names `...ForCausalLM`.

    Args:
        config: changed in place.
        family: table of the causal LM.
        names: names of the checkpoint's tensors, as in the module.
    """
    name = class_name(config)
    prefix = f"{family.block.partition('.')[0]}."
    if not name.endswith("ForCausalLM") or not family.embedding.startswith(prefix):
        return
    found = set(names)
    if family.embedding not in found and family.embedding.removeprefix(prefix) in found:
        config.architectures = [f"{name.removesuffix('ForCausalLM')}Model"]
