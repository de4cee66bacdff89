"""Vision-language models: the family table of the language model, and the projector that writes image features.

Image features take the place of token embeddings, so the linear that computes them writes to the residual space like
the embedding. The vision tower before it is not rotated. The language model uses the table of its text config, with
another prefix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spinquant.architectures.family import AxisSpace, Family
from spinquant.architectures.hybrid import QWEN3_5, QWEN3_5_MOE
from spinquant.architectures.llama import LLAMA

_WRITER = ("residual", None)


@dataclass(frozen=True)
class Vision:
    """What one family of vision-language models adds to its language model.

    writers: tensors that write image features to the residual space. inside: the other tensors of vision tower and
    projector, as regular expressions. language: name of the language model's module. text: table of the language model;
    None for the one that `family_of` finds for its config. stored: as in `Family`.
    """

    model_types: tuple[str, ...]
    writers: Mapping[str, tuple[AxisSpace, ...]]
    inside: tuple[str, ...]
    language: str = "language_model"
    text: Family | None = None
    stored: tuple[tuple[str, str], ...] = ()

    def family(self, text: Family) -> Family:
        """The table of a model with this language model."""
        part = f"model.{self.language}."
        found = text.like(
            f"{self.model_types[0]} ({text.name})",
            *self.model_types,
            rename={"model.": part, r"model\.": rf"model\.{self.language}\."},
            tensors=self.writers,
        )
        refused = tuple(replace(r, reason=r.reason.replace("model.layers", f"{part}layers")) for r in text.refused)
        stored = (*self.stored, *found.stored)
        return replace(found, ignored=(*found.ignored, *self.inside), refused=refused, stored=stored)


_PROJECTOR = "model.multi_modal_projector"
_LLAVA_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
LLAVA = Vision(
    ("llava", "mistral3"),
    {f"{_PROJECTOR}.linear_2.weight": _WRITER, f"{_PROJECTOR}.linear_2.bias?": ("residual",)},
    (r"model\.vision_tower\..*", r"model\.multi_modal_projector\.(linear_1|norm|patch_merger)\..*"),
    stored=_LLAVA_NAMES,
)
GEMMA3 = Vision(
    ("gemma3",),
    {f"{_PROJECTOR}.mm_input_projection_weight": (None, "residual")},
    (r"model\.vision_tower\..*", r"model\.multi_modal_projector\.mm_soft_emb_norm\.weight"),
    stored=_LLAVA_NAMES,
)
SMOLVLM = Vision(
    ("smolvlm", "idefics3"),
    {"model.connector.modality_projection.proj.weight": _WRITER},
    (r"model\.vision_model\..*",),
    language="text_model",
)

_QWEN_NAMES = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model|visual)", "model.language_model."))
QWEN2_VL = Vision(
    ("qwen2_vl", "qwen2_5_vl"),
    {"model.visual.merger.mlp.2.weight": _WRITER, "model.visual.merger.mlp.2.bias": ("residual",)},
    (r"model\.visual\.(patch_embed|blocks|merger\.ln_q|merger\.mlp\.0)\..*",),
    text=replace(LLAMA, filled=1),
    stored=_QWEN_NAMES,
)
_QWEN3_INSIDE = r"model\.visual\.(patch_embed|pos_embed|blocks|merger\.norm|merger\.linear_fc1)\..*"
_QWEN3_WRITERS: dict[str, tuple[AxisSpace, ...]] = {
    "model.visual.merger.linear_fc2.weight": _WRITER,
    "model.visual.merger.linear_fc2.bias": ("residual",),
}
QWEN3_5_VL = Vision(("qwen3_5",), _QWEN3_WRITERS, (_QWEN3_INSIDE,), text=QWEN3_5, stored=_QWEN_NAMES)
QWEN3_5_MOE_VL = replace(QWEN3_5_VL, model_types=("qwen3_5_moe",), text=QWEN3_5_MOE)
# Features from several depths of the tower (three, so far) are added to the residual stream after the first layers.
_DEEP = [f"model.visual.deepstack_merger_list.{depth}.linear_fc2" for depth in range(8)]
QWEN3_VL = Vision(
    ("qwen3_vl",),
    {
        **_QWEN3_WRITERS,
        **{f"{name}.weight?": _WRITER for name in _DEEP},
        **{f"{name}.bias?": ("residual",) for name in _DEEP},
    },
    (_QWEN3_INSIDE, r"model\.visual\.deepstack_merger_list\.\d+\.(norm|linear_fc1)\..*"),
    text=LLAMA,
    stored=_QWEN_NAMES,
)

VISIONS = (LLAVA, GEMMA3, SMOLVLM, QWEN2_VL, QWEN3_5_VL, QWEN3_5_MOE_VL, QWEN3_VL)
