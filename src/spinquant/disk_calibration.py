"""Calibrated quantization from disk: a decoder block is loaded, rotated, calibrated, rounded, kept in a store, dropped.

The walk over blocks is that of `quantization/blockwise.py`, on a model that is hollow but for the block at work. What
it finds is in the store, block by block, from which the stream then writes its shards.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import Calibration, Method, quantize_blocks
from spinquant.calibration.data import CalibrationText, calibration_tokens, check_length
from spinquant.calibration.hidden_states import HiddenStates, room_by_default
from spinquant.checkpoint.folder import load_config, load_model, load_tokenizer
from spinquant.disk_model import OnDisk, Weights
from spinquant.errors import CheckpointError
from spinquant.pipeline import Options
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotation import Rotation


@dataclass(frozen=True)
class Calibrating:
    """How the weights of a stream are calibrated, and on which text."""

    method: Method
    calibration: Calibration
    text: CalibrationText = field(default_factory=CalibrationText)


def tokens_for(
    model: str | Path,
    text: CalibrationText,
    *,
    dtype: torch.dtype | str,
    family: FamilyLike | None,
    progress: Callable[[int, int], None],
) -> tuple[str, Tensor]:
    """(name, tokens) of a calibration text. To generate it, the model is in memory as a whole meanwhile."""
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError:
        tokenizer = None
    check_length(load_config(model, family=family), text)
    generated = text.text == "generated" or (tokenizer is None and text.text == "auto")
    loaded = load_model(model, dtype=dtype, family=family) if generated else None
    return calibration_tokens(loaded, tokenizer, text, progress=progress)


def calibrate_on_disk(
    config: Any,
    plan: Plan,
    online: Mapping[str, Rotation],
    rotated: Weights,
    scheme: Scheme,
    tokens: Tensor,
    calibrating: Calibrating,
    store: BlockStore,
    *,
    dtype: torch.dtype,
    device: str,
    options: Options,
) -> Clips:
    """Quantize the blocks (and the head) of a rotated checkpoint into the store; the clip ratios found.

    online: rotations at run time. dtype: of the model's arithmetic.
    """
    home = OnDisk(config, plan, rotated, dtype, calibrating.calibration.device or device)
    room = room_by_default() if options.memory is None else options.memory
    with closing(HiddenStates(room, store.folder.parent)) as hidden:
        return quantize_blocks(
            home.model,
            home.plan,
            online,
            scheme,
            tokens,
            calibrating.calibration,
            error_feedback=calibrating.method != "rtn",
            store=store,
            home=home,
            hidden=hidden,
            progress=options.stage("calibrate"),
        )
