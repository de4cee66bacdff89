"""A causal LM as a user has it: a class of its own, with its own names, registered with transformers.

`trap` builds in what no rotation survives: `stream` scales the residual stream element by element, `values` what
attention gives, `keys` computes attention without transformers' interface, `alone` without a cache too.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward


class AcmeConfig(PretrainedConfig):
    model_type = "acme"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
    }

    def __init__(self, **kwargs):
        sizes = {"vocab_size": 256, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_dim": 80, "trap": ""}
        for name, size in sizes.items():
            setattr(self, name, kwargs.pop(name, size))
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class Norm(nn.Module):
    """Multiplies by 1 + gain."""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.gain)


class Mixer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.head = config.dim // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.is_causal = True
        self.wq = nn.Linear(config.dim, config.n_heads * self.head)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head)
        self.wo = nn.Linear(config.n_heads * self.head, config.dim)
        if config.trap == "values":
            self.temper = nn.Parameter(torch.ones(config.n_heads * self.head))

    def forward(self, x, positions, mask, past_key_values=None):
        q, k, v = (w(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        angles = positions[:, None, :, None] * 0.5 ** torch.arange(self.head // 2)
        turn = torch.polar(torch.ones_like(angles, dtype=x.dtype), angles.to(x.dtype))
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        if past_key_values is not None and self.config.trap != "alone":
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = "sdpa" if self.config.trap in ("keys", "alone") else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        y, _ = attend(self, q, k, v, mask, scaling=self.head**-0.5, dropout=0.0)
        y = y.flatten(-2)
        return self.wo(y * self.temper if self.config.trap == "values" else y)


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.pre, self.mid = Norm(config.dim), Norm(config.dim)
        self.mixer = Mixer(config, index)
        self.w1, self.w3 = (nn.Linear(config.dim, config.mlp_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.mlp_dim, config.dim, bias=False)
        if config.trap == "stream":
            self.keep = nn.Parameter(torch.ones(config.dim))

    def forward(self, x, positions, mask, past_key_values=None):
        kept = x * self.keep if hasattr(self, "keep") else x
        x = kept + self.mixer(self.pre(x), positions, mask, past_key_values=past_key_values)
        h = self.mid(x)
        return x + self.w2(nn.functional.silu(self.w1(h)) * self.w3(h))


class AcmePreTrainedModel(PreTrainedModel):
    config_class = AcmeConfig
    base_model_prefix = "core"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012


class AcmeModel(AcmePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab_size, config.dim)
        self.stack = nn.ModuleList([Block(config, i) for i in range(config.n_layers)])
        self.last = Norm(config.dim)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.tok(input_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=positions,
        )
        for block in self.stack:
            x = block(x, positions, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.last(x), past_key_values=past_key_values)


class AcmeForCausalLM(AcmePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.core = AcmeModel(config)
        self.out = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.core.tok

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        found = self.core(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.out(found.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)


def register() -> None:
    """Tell transformers of the class, as a user's program does."""
    AutoConfig.register("acme", AcmeConfig, exist_ok=True)
    AutoModelForCausalLM.register(AcmeConfig, AcmeForCausalLM, exist_ok=True)
