"""Causal LMs of transformers that are not supported, with reasons (also in docs/reference/architectures.md)."""

from collections.abc import Mapping

UNTABLED: Mapping[str, tuple[str, ...]] = {
    "encoders, which register a class for causal LMs too, and decoders of encoder-decoder models: out of scope": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
        *("camembert", "data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "musicgen"),
        *("musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
        *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
        *("xlnet", "xmod"),
    ),
    "another name for a model type that has a table (GPT-2)": ("gpt-sw3",),
    "norms behind the residual sum, or scales on the stream, in classes of their own (R1 is impossible)": (
        *("beam", "gemma3n", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text", "gemma4_unified"),
        *("gemma4_unified_assistant", "gemma4_unified_text", "minimax", "openai-gpt", "zaya"),
    ),
    "a norm whose output is multiplied element by element by a gate made of it, before linears read it (R1 is "
    "impossible)": ("axk2",),
    "a norm that scales embeddings element by element on their way into the residual stream (R1 is impossible), and an "
    "output head of several modules": ("modernbert-decoder",),
    "convolutions of each channel by itself, on what attention and MLP give to the residual stream (R1 is "
    "impossible)": ("inkling2_text", "inkling_text"),
    "experts that hand on the scaled norm as it is (zero_expert_num), so that its scale cannot be fused into readers "
    "(R1 is impossible), and two attentions in a layer": ("longcat_flash",),
    "residual streams side by side, mixed by connections of a kind that no table describes": (
        *("hy_v4", "qwen4_exp_text"),
    ),
    "an attention whose sizes differ from layer to layer (per_layer_config), where a table has one for all": (
        "dots3_note_text",
    ),
    "experts in modules of their own, of attention too, that get their tokens' numbers or their weights as arguments: "
    "quantization has no place for them": ("dbrx", "jetmoe"),
    "an attention in code of its own, and positions that the class computes and adds (to the stream, or to what "
    "attention weighs)": ("cpmant", "ctrl"),
    "no residual stream through decoder layers alone (recurrences, stacks that are gone through again, bytes)": (
        *("blt", "hrm_text", "rwkv", "xlstm"),
    ),
    "models that see or hear, whose towers no table describes": (
        *("dots3_note", "emu3", "fuyu", "got_ocr2", "llama4", "mllama", "moshi", "moss_transcribe_diarize"),
        *("phi4_multimodal", "qwen4_exp"),
    ),
}


def why_untabled(model_type: str) -> str | None:
    """The reason why a model type has no family table; None if none is recorded."""
    return next((reason for reason, names in UNTABLED.items() if model_type in names), None)
