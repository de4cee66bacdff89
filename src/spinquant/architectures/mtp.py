"""Multi-token prediction (MTP) layers, which a checkpoint stores but transformers does not load with the model.

DeepSeek-V3 and GLM-4.5 store them as decoder layers after the last one, Qwen3-Next, ERNIE and MiMo under `mtp`. Such a
layer combines an embedding and the state after the model's last norm, each through its own norm (`enorm`, `hnorm`), by
one linear (`eh_proj`); a decoder layer, a norm and a head follow.

R1 fuses the scale g of the model's last norm into the model's head, so the state is u R instead of u diag(g), with u of
length sqrt(n) for every token. `hnorm` divides by the length of u diag(g), which differs from token to token and is
lost. (g in `eh_proj` would give the direction, but the layer's own state, which the next draft reads, has another
scale.) The other rotations change nothing that the layer reads.
"""

import re
from collections.abc import Iterable
from typing import Any

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp[._]")
# Config attributes for the number of MTP layers.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")

REASON = (
    "the checkpoint has multi-token prediction layers ({first}, ...), whose hnorm divides by the length of the state "
    "after the model's last norm; R1 fuses the scale of that norm into the head, and that length is lost. --drop-mtp "
    "leaves these layers out; speculative decoding then needs another draft model"
)


def prediction_tensors(config: Any, names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of a checkpoint that belong to multi-token prediction layers."""
    names = list(names)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", 0) or 0
    # A layer beyond the config's number is an MTP layer only if it combines two inputs.
    joins = {(m[1], m[2]) for name in names if ".eh_proj." in name and (m := _LAYER.match(name))}
    extra = {place for place in joins if int(place[1]) >= layers}

    def is_one(name: str) -> bool:
        found = _LAYER.match(name)
        return bool(_MTP.search(name)) or (found is not None and (found[1], found[2]) in extra)

    return tuple(name for name in names if is_one(name))
