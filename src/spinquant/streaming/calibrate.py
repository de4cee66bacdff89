"""Calibrate and quantize a checkpoint from disk (GPTQ, RTN, clip search), with one decoder block in memory at a time.

Each block is loaded, rotated, calibrated, quantized, saved in a block store and dropped. The pass over the blocks is
that of `calibration/blockwise.py`, on a model whose other weights are on the meta device. Streaming then writes the
shards from the store.
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
from spinquant.rotations.rotation import Transform
from spinquant.streaming.offloaded_model import OnDisk, Weights


def calibrate_on_disk(
    config: Any,
    plan: Plan,
    online: Mapping[str, Transform],
    rotated: Weights,
    scheme: Scheme,
    tokens: Tensor,
    calibration: Calibration,
    store: BlockStore,
    *,
    error_feedback: bool,
    dtype: torch.dtype,
    stored: torch.dtype,
    device: str,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Clips:
    """Quantize the blocks (and the head) of a rotated checkpoint into the store; returns the clip ratios found.

    Args:
        config: config of the model.
        plan: plan of the checkpoint.
        online: rotations that run online, by space.
        rotated: the rotated checkpoint.
        scheme: what is quantized.
        tokens: calibration tokens, int64, (samples, length).
        calibration: options.
        store: receives the packed weights of every block.
        error_feedback: GPTQ, else round-to-nearest (RTN).
        dtype: dtype of the model's arithmetic.
        stored: dtype of the checkpoint that is written, and so of the scales.
        device: where blocks are calibrated, unless the options name another device.
        memory: bytes of hidden states to keep in memory before they spill to a file; by default a quarter of what is
            available.
        progress: called with (blocks done, blocks in all).

    Raises:
        CalibrationError: as `quantize_blocks`.
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
            stored=stored,
            store=store,
            home=home,
            hidden=hidden,
            progress=progress,
        )
