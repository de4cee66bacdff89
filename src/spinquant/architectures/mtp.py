"""Layers for multi-token prediction, which lie in a checkpoint beside the model that transformers makes of it.

DeepSeek-V3 and GLM-4.5 keep them as decoder layers behind the last one, Qwen3-Next, ERNIE and MiMo under `mtp`. Such a
layer joins an embedding and the state behind the model's last norm, each through a norm of its own (`enorm`, `hnorm`),
by one linear (`eh_proj`); a decoder layer, a norm and a head follow.

R1 moves the scale g of the model's last norm into the model's head, so that the state is u R where it was u diag(g), u
of length sqrt(n) for every token. `hnorm` divided by the length of u diag(g), which is another for every token and is
lost. (g in `eh_proj` would give the direction, but the layer's own state, which the next draft reads, has another
scale.) The other rotations touch nothing that the layer reads.
"""

import re
from collections.abc import Iterable
from typing import Any

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp[._]")
# What configs say of how many there are.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")

REASON = (
    "the checkpoint holds layers for multi-token prediction ({first}, ...), whose hnorm divides by the length of the "
    "state behind the model's last norm; R1 moves the scale of that norm into the head, and that length is lost. Drop "
    "them with --drop-mtp, for a model that drafts by other means"
)


def prediction_tensors(config: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of a checkpoint's tensors that belong to layers for multi-token prediction."""
    names = list(names)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", 0) or 0
    # A layer too many is no such layer unless it joins two inputs.
    joins = {(m[1], m[2]) for name in names if ".eh_proj." in name and (m := _LAYER.match(name))}
    behind = {place for place in joins if int(place[1]) >= layers}

    def is_one(name: str) -> bool:
        found = _LAYER.match(name)
        return bool(_MTP.search(name)) or (found is not None and (found[1], found[2]) in behind)

    return tuple(name for name in names if is_one(name))
