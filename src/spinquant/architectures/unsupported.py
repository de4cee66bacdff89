"""Why a model type is refused: causal LMs of transformers without a family table, by reason.

docs/reference/architectures.md lists them too. To support one, see the docstring of this package.
"""

from collections.abc import Mapping

UNSUPPORTED: Mapping[str, tuple[str, ...]] = {
    "an encoder, which transformers registers as a causal LM too, or a decoder of an encoder-decoder model: out of "
    "scope": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
        *("camembert", "data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "musicgen"),
        *("musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
        *("xlnet", "xmod"),
    ),
    "another name of a supported model type (GPT-2)": ("gpt-sw3",),
    "norms after the residual sum, or elementwise scales of the residual stream, in a model class with its own layout "
    "(R1 is impossible)": (
        *("beam", "gemma3n", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text", "gemma4_unified"),
        *("gemma4_unified_assistant", "gemma4_unified_text", "minimax", "openai-gpt", "zaya"),
    ),
    "a norm whose output is multiplied elementwise by a gate computed from it, before linears read it (R1 is "
    "impossible)": ("axk2",),
    "a norm that scales the embeddings elementwise before the first layer (R1 is impossible), and an output head of "
    "several modules": ("modernbert-decoder",),
    "depthwise convolutions on the outputs of attention and MLP before they are added to the residual stream (R1 is "
    "impossible)": ("inkling2_text", "inkling_text"),
    "identity experts, which return the scaled norm unchanged (zero_expert_num), so its scale cannot be fused into "
    "linears (R1 is impossible), and two attention modules per layer": ("longcat_flash",),
    "parallel residual streams, mixed by connections that no family table describes": (*("hy_v4", "qwen4_exp_text"),),
    "attention sizes that differ between layers (per_layer_config), where a family table has one for all layers": (
        "dots3_note_text",
    ),
    "experts (of the attention too) in modules that take token counts or weight matrices as arguments, which "
    "quantization does not support": ("dbrx", "jetmoe"),
    "attention computed in the model's own code, and positions that the model class computes and adds (to the residual "
    "stream, or to the attention scores)": ("cpmant", "ctrl"),
    "no single residual stream through the decoder layers (recurrent models, layers that run repeatedly, byte-level "
    "models)": (*("blt", "hrm_text", "rwkv", "xlstm"),),
    "a vision or audio model, whose encoders no family table describes": (
        *("dots3_note", "emu3", "fuyu", "got_ocr2", "llama4", "mllama", "moshi", "moss_transcribe_diarize"),
        *("phi4_multimodal", "qwen4_exp"),
    ),
}


def reason_unsupported(model_type: str) -> str | None:
    """The reason why a model type has no family table; None if none is recorded."""
    return next((reason for reason, names in UNSUPPORTED.items() if model_type in names), None)
