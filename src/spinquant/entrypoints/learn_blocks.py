"""Decide whether `learn` reads a model from disk block by block, and open its checkpoint for that."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.architectures import FamilyLike, make_plan, prediction_tensors, recorded_family
from spinquant.checkpoint.atomic import write_file
from spinquant.checkpoint.folder import (
    TOKENIZERS,
    check_unquantized,
    folder_of,
    has_pickles_only,
    load_config,
    plan_in,
    read_headers,
    weights_digest,
)
from spinquant.checkpoint.reader import Source, fp8_block, read_gains
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.compute.dtypes import Arithmetic
from spinquant.compute.hashing import digest
from spinquant.compute.memory import available_memory
from spinquant.entrypoints.arithmetic import arithmetic_by_block, arithmetic_of, stored_in
from spinquant.entrypoints.output_folder import dtype_of, model_dtype
from spinquant.entrypoints.request import LearnText
from spinquant.entrypoints.stream_run import unquantized
from spinquant.entrypoints.validation import needed_in_memory
from spinquant.errors import CheckpointError
from spinquant.formats.load import load_model
from spinquant.learning.fake_quant import gains_alone
from spinquant.learning.options import LearnOptions
from spinquant.learning.walk import check_walkable
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.quantization.targets import check_fits
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fast_transform import kernels_for
from spinquant.streaming.offloaded_model import OnDisk, check_stored, hollow_model, unfillable
from spinquant.streaming.pipeline import Rotated
from spinquant.streaming.shards import Change

FROM = "learned-from"  # file of a run: whether it learns from memory or disk


def fits_in_memory(
    model: str | Path, dtype: torch.dtype, device: str, memory: int | None, *, allow_pickle: bool = False
) -> bool:
    """Whether gradients can be computed through a model that is loaded as a whole.

    Args:
        model: a folder or hub id.
        dtype: dtype that it would compute in.
        device: device that it would be loaded to.
        memory: bytes that it may take; None for what is free on the device.
        allow_pickle: accept pickled weights.
    """
    there = memory if memory is not None else _free(device)
    return there is None or needed_in_memory(stored_in(model, allow_pickle)[1], dtype) <= there


def started_from(store: Path) -> str | None:
    """Whether the run that is saved in a folder learns from "memory" or "disk"; None for a new run."""
    path = store.parent / FROM
    return path.read_text("utf-8") if path.is_file() else None


def note_start(store: Path, where: str) -> None:
    """Keep with a run whether it learns from "memory" or "disk"."""
    store.parent.mkdir(parents=True, exist_ok=True)
    write_file(store.parent / FROM, where.encode())


def _free(device: str) -> int | None:
    """Bytes that are free on a device; None where that is not known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if kind == "cpu" else None


@dataclass(frozen=True)
class Blocks:
    """An open checkpoint with the gains of its norms fused, whose blocks are loaded one at a time.

    Attributes:
        model: the folder or hub id.
        scheme: what is learned for.
        spec: which rotations.
        home: its model, with the weights on disk.
        computed: the dtype that it computes in.
        family: a family file.
    """

    model: str | Path
    scheme: Scheme
    spec: RotationSpec
    home: OnDisk
    computed: Arithmetic
    family: FamilyLike | None = None

    def reads(self, text: LearnText) -> Any:
        """The model that settles the length of samples; loaded as a whole if it has to generate the text itself."""
        sources = {text.calibration.text, text.held_out or text.calibration.text}
        has_tokenizer = any((folder_of(self.model) / file).is_file() for file in TOKENIZERS)
        if "generated" not in sources and (has_tokenizer or "auto" not in sources):
            return self.home.model
        (computed,) = arithmetic_of(self.model, device="cpu")
        return load_model(self.model, dtype=computed.dtype, family=self.family)

    def pieces(self, store: Path, options: LearnOptions, tokens: Tensor, held_out: Tensor) -> Pieces:
        """Where a run with these options and tokens is saved, and resumed from."""
        about = [weights_digest(self.model), str(self.computed.dtype), recorded_family(self.home.model.config)]
        return Pieces(store, ["disk", *about, self.scheme, self.spec, options, digest(tokens), digest(held_out)])


@contextmanager
def opened_blocks(
    model: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    *,
    device: str,
    dtype: torch.dtype | str = "auto",
    family: FamilyLike | None = None,
) -> Iterator[Blocks]:
    """Within the block, a checkpoint is open to be learned from block by block.

    Args:
        model: a folder or hub id.
        scheme: what is learned for.
        spec: which rotations; the gains of the norms of their spaces are fused.
        device: where blocks are loaded to.
        dtype: dtype to compute in; "auto" for the choice of `compute/dtypes.py`.
        family: a family file.

    Raises:
        CheckpointError: the weights are pickled, quantized, incomplete, or not those of the config.
        ArchitectureError: the architecture is unknown, or its blocks pass more than hidden states.
        SchemeError: the scheme does not fit the model.
    """
    folder = folder_of(model, allow_pickle=True)
    if has_pickles_only(folder):
        raise CheckpointError(
            f"{str(model)!r} does not fit in memory, and has pickled weights, which cannot be read block by block: "
            "convert them to safetensors first"
        )
    config = load_config(model, family=family)
    if fp8_block(config) is None:
        check_unquantized(config, model, folder)
    dropped = frozenset(prediction_tensors(config, read_headers(folder)))  # transformers loads models without them
    with closing(Source(folder, config, without=dropped)) as source, kernels_for(source.largest):
        plan = plan_in(folder, config, make_plan(config, source.shapes))
        hollow = hollow_model(unquantized(config), torch.float32)
        check_stored(hollow, source, plan)
        reason = unfillable(hollow, plan)
        if reason is not None:
            raise CheckpointError(f"{str(model)!r} does not fit in memory, and {reason}: learn where it fits")
        check_fits(plan, source.shapes, scheme)
        check_walkable(unquantized(config))
        wanted = dtype if isinstance(dtype, torch.dtype) else None
        stored = model_dtype(config, source)
        computed = arithmetic_by_block("learning", source, plan, stored, device, wanted)
        rotated = _with_gains_fused(source, config, plan, spec, computed.dtype)
        home = OnDisk(unquantized(config), plan, rotated, computed.dtype, device)
        yield Blocks(model, scheme, spec, home, computed, family)


def _with_gains_fused(source: Source, config: Any, plan: Plan, spec: RotationSpec, dtype: torch.dtype) -> Rotated:
    gains = gains_alone(plan, plan.rotated(spec.rotations))
    change = Change(plan, gains, read_gains(source, plan), dtype=dtype, fp8_dtype=dtype_of(config))
    untied = [(tie.tensor, tie.source) for tie in plan.ties] if plan.unties(gains) else []
    return Rotated(source, change, untied)
