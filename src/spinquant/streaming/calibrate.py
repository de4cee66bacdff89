"""Calibrated quantization from disk: a decoder block is loaded, rotated, calibrated, rounded, kept in a store, dropped.

The walk over blocks is that of `quantization/blockwise.py`, on a model that is hollow but for the block at work. What
it finds is in the store, block by block, from which the stream then writes its shards.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import Calibration, quantize_blocks
from spinquant.calibration.hidden_states import HiddenStates, room_by_default
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotations.rotation import Rotation
from spinquant.streaming.offloaded_model import OnDisk, Weights


def calibrate_on_disk(
    config: Any,
    plan: Plan,
    online: Mapping[str, Rotation],
    rotated: Weights,
    scheme: Scheme,
    tokens: Tensor,
    calibration: Calibration,
    store: BlockStore,
    *,
    error_feedback: bool,
    dtype: torch.dtype,
    device: str,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clips:
    """Quantize the blocks (and the head) of a rotated checkpoint into the store; the clip ratios found.

    online: rotations at run time. error_feedback: GPTQ, else round-to-nearest. dtype: of the model's arithmetic.
    memory: bytes that hidden states may take before they go to a file, by default a quarter of what is available.
    """
    home = OnDisk(config, plan, rotated, dtype, calibration.device or device)
    room = room_by_default() if memory is None else memory
    with closing(HiddenStates(room, store.folder.parent)) as hidden:
        return quantize_blocks(
            home.model,
            home.plan,
            online,
            scheme,
            tokens,
            calibration,
            error_feedback=error_feedback,
            store=store,
            home=home,
            hidden=hidden,
            progress=progress,
        )
