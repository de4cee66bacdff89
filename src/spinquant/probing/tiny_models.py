"""Make two tiny random models of an unknown class, in float64; finds the config's own names of the usual sizes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spinquant.architectures.family import Named
from spinquant.errors import ArchitectureError
from spinquant.evaluation.equivalence import greedy_logits
from spinquant.evaluation.tiny_model import Sizing, make_tiny_model, tiny_config
from spinquant.models.modules import model_class
from spinquant.probing.trace import run

HEAD = 16  # head size of tiny models, unless the class needs more
LARGEST = 50_000_000  # parameters of a tiny model; if it has more, the config's size fields were not recognized
# Other names of the usual size fields.
SYNONYMS = {
    "hidden_size": ("d_model", "n_embd", "dim", "embed_dim", "model_dim", "width"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers", "depth"),
    "num_attention_heads": ("n_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "kv_heads"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "mlp_dim", "d_ff", "dff", "ff_dim", "hidden_dim"),
    "head_dim": ("d_head", "head_size", "kv_channels"),
    "vocab_size": ("n_vocab", "vocabulary_size", "padded_vocab_size"),
}


def two_tiny_models(config: Any) -> tuple[list[Any], Sizing]:
    """Two tiny models of different sizes that run and generate, and the sizing of the first.

    Raises ArchitectureError if none of the sizes that are tried gives a model that runs.
    """
    config_of_text = config.get_text_config()
    names = _names(config_of_text)
    narrow = {"kv_heads": 4, "group": 2, "hidden": 64, "intermediate": 112}
    known = getattr(Named(config_of_text, names), "head_dim", None) is not None
    either = (False, True) if known else (True, False)
    errors = []
    for heads, head_dim, filled in ((h, d, f) for h in (1, 4) for d in (HEAD, None) for f in either):
        sizing = Sizing(filled, heads, names, head_dim=head_dim)
        try:
            return [_running(config, one) for one in (sizing, replace(sizing, **narrow))], sizing
        except Exception as error:  # the code of an unknown class may raise any exception
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise ArchitectureError(
        f"no tiny model of model_type {config.model_type!r} could be made and run, so it cannot be probed: {errors[0]}"
    )


def _running(config: Any, sizing: Sizing) -> Any:
    with torch.device("meta"):
        hollow = model_class(config).from_config(tiny_config(config, sizing))
    size = sum(p.numel() for p in hollow.parameters())
    if size > LARGEST:
        raise ArchitectureError(
            f"with tiny sizes it has {size} parameters: the config uses unknown names for its size fields"
        )
    tiny = make_tiny_model(config, sizing=sizing)
    if not run(tiny, random_tokens(tiny)).isfinite().all():
        raise ArchitectureError("its logits are not finite")
    greedy_logits(tiny, random_tokens(tiny))
    return tiny


def _names(config: Any) -> dict[str, str]:
    """The config's own names of the usual size fields, from SYNONYMS."""
    found = {}
    for name, others in SYNONYMS.items():
        if getattr(config, name, None) is None:
            other = next((o for o in others if type(getattr(config, o, None)) is int), None)
            if other is not None and not (name == "intermediate_size" and other in ("ffn_dim", "ffn_hidden_size")):
                found[name] = other
    return found


def random_tokens(tiny: Any) -> Tensor:
    """The tokens on which a tiny model is traced and tested, (2, 9)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = tiny.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary - 1, (2, 9), generator=generator)
