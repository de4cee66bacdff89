"""Tiny random models of transformers' own classes: non-zero biases, non-unit gains, float64, seeded."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.models.cache_names import cache_parameter
from spinquant.plan import CHANNELS
from spinquant.rotations.matrices import Diagonal, KroneckerMatrix, Matrix
from spinquant.rotations.rotation import Transform, matrix

VOCABULARY = 256
CACHE = (cache_parameter(LlamaForCausalLM.forward) or ("", 0))[0]  # how this transformers calls the KV cache


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


def tiny_model(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    layers: int | None = None,
):
    """A random model of one of CONFIGS."""
    config = CONFIGS[name]()
    if layers is not None:
        config.num_hidden_layers, config.layer_types = layers, None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
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


def aligned(model):
    """The model with every weight where torch allocates one.

    Weights of a safetensors file stay where the file has them. Products of the same numbers have other last bits there,
    on some processors.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """Logits in exact float64 arithmetic for float64 models, bit for bit the same for the same weights."""
    aligned(model)
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


def close(found, expected):
    return torch.allclose(found, expected, atol=1e-9, rtol=1e-9)


def scaled(plan, rotations, seed=0):
    """The rotations, with scales between 1/4 and 4 for the factor of every product."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(rotations)
    for space in plan.spaces:
        if space.name.endswith(CHANNELS):
            logs = torch.rand(space.size, generator=generator, dtype=torch.float64)
            found[space.name] = Diagonal(4 ** (2 * logs - 1))
    return found


def well_conditioned(*shape: int, seed: int = 0) -> torch.Tensor:
    """A random matrix (.., n, n), float64, with singular values from 1/2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    return one * torch.logspace(-1, 1, shape[-1], 2, dtype=torch.float64) @ other


def online_transforms(plan, *, heads: int = 0, seed: int = 0) -> dict[str, Transform]:
    """A transform that is no rotation for every online space: R3 a matrix (per head if `heads`), R4 a Kronecker one."""
    made: dict[str, Transform] = {}
    for i, space in enumerate(plan.spaces):
        if space.rotation == "R3":
            shape = (heads, space.size, space.size) if heads else (space.size, space.size)
            made[space.name] = Matrix(well_conditioned(*shape, seed=seed + i))
        elif space.rotation == "R4":
            sides = 4, space.size // 4
            made[space.name] = KroneckerMatrix(tuple(well_conditioned(n, n, seed=seed + i) for n in sides))
    return made


@torch.no_grad()
def fuse_duals(model, plan, transforms) -> None:
    """Multiply the weights that read an online space by the dual of its transform, with dense matrices."""
    for axis in plan.axes:
        if axis.space in transforms:
            weight = model.get_parameter(axis.tensor)
            inverse = torch.linalg.inv(matrix(transforms[axis.space])).to(weight.dtype)
            weight.copy_(torch.tensordot(weight, inverse, ([axis.dim], [1])).movedim(-1, axis.dim))
