"""Tiny random models of transformers' own classes: non-zero biases, non-unit gains, float64, seeded."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from spinquant.cli import main as cli
from spinquant.demo.model import demo_model
from spinquant.errors import CheckpointError
from spinquant.evaluation.equivalence import Float64Arithmetic

transformers.utils.logging.disable_progress_bar()  # as the command line does

VOCABULARY = 256

# hidden_size != heads * head_dim everywhere, grouped-query heads, sliding and full layers where the class has them.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES, **{**SLIDING, "layer_types": SLIDING["layer_types"][:3]}),
    "qwen3": lambda: Qwen3Config(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "smollm3": lambda: SmolLM3Config(**SIZES, attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 1]),
    "granite": lambda: GraniteConfig(
        **SIZES,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        attention_multiplier=0.1,
    ),
}


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str = "sdpa"):
    """A random model of one of CONFIGS."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype, attn_implementation=attention)
    return random_weights(model, seed=seed)


def random_weights(model, *, seed: int = 0):
    """The model with random weights, non-zero biases and non-unit gains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.4 * noise + (0.0 if parameter_name.endswith("bias") else 1.0))
    return model.eval()


def tokens(batch: int = 2, length: int = 14, *, seed: int = 1) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """Logits in exact float64 arithmetic for float64 models."""
    if model.dtype != torch.float64:
        return model(input_ids=ids, **options).logits
    with Float64Arithmetic():
        return model(input_ids=ids, **options).logits


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes: 256 of them, no merges, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama in float32 with tied embeddings, and its tokenizer."""
    model = tiny_model("llama-tied", dtype=torch.float32)
    path = tmp_path / "model"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def real_folder():
    """SmolLM2-135M-Instruct, downloaded once."""
    try:
        return demo_model()
    except CheckpointError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no real model: {error}")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spinquant", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small_pieces(monkeypatch):
    """Streams cut tiny tensors too, into several slices and bands."""
    monkeypatch.setattr("spinquant.rotations.fuse.SLICE", 600)
    monkeypatch.setattr("spinquant.streaming.pipeline.BAND", 5000)
    monkeypatch.setattr("spinquant.streaming.pipeline.IN_FLIGHT", 20_000)
    monkeypatch.setattr("spinquant.formats.native_packing.PIECE", 500)
