"""What `rotate_folder`, `quantize_folder` and the command line ask for: one frozen value, built by keyword."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spinquant.architectures import FamilyLike
from spinquant.calibration.blockwise import Calibration, Method
from spinquant.calibration.data import CalibrationText
from spinquant.entrypoints.result import Options
from spinquant.errors import TextError
from spinquant.learning.options import LearnOptions, Watch
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations


@dataclass(frozen=True)
class LearnText:
    """What rotations are learned from, and scored on.

    Attributes:
        calibration: samples to learn from.
        held_out: another text to score candidates on; None takes the last windows of the same text away from learning.
        windows: how many windows candidates are scored on.
    """

    calibration: CalibrationText = field(default_factory=CalibrationText)
    held_out: str | None = None
    windows: int = 8

    def __post_init__(self):
        if self.windows < 1:
            raise TextError(f"windows is {self.windows}: expected a number from 1 on (--windows)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A folder or hub id to rotate, and to quantize where there is a scheme, into another folder.

    `validate` settles what is left open here, once, and refuses what cannot be done.

    Attributes:
        model: a folder, or the id of a model on the hub.
        out: the folder to write.
        spec: rotations, their types, block sizes and seed; not used where `learned` is given.
        scheme: what is quantized; None for rotations alone.
        format: of the folder; None for what `runtime` reads, and our own format without a runtime.
        method: how weights are rounded.
        calibration: how, where method or clips need calibration.
        calibration_text: what to calibrate on; refused where nothing is calibrated.
        learned: rotations in the place of random ones.
        learn: learn rotations first, with these options.
        learn_text: what they are learned from.
        dtype: of what is not quantized, and of the arithmetic; None for the source's.
        device: to work on.
        text: of the real tokens on which logits are compared, see `load_text`; None for no comparison.
        max_shard_size: bytes; None for the shards of the source.
        checksums: a list of SHA-256 that the files of the source have to have, as sha256sum writes it.
        also: folders of LoRA adapters and draft heads that are rotated with the model.
        runtime: refuse what it does not run.
        family: a file that explains the model where no table does.
        force: replace `out`.
        command: the command line that asked for it, for the model card; it decides nothing.
        allow_pickle: load pickle weights, which can run code.
        options: how the run goes about it.
        watch: what learning reports to.
    """

    model: str | Path
    out: str | Path
    spec: RotationSpec
    scheme: Scheme | None = None
    format: str | None = None
    method: Method = "rtn"
    calibration: Calibration | None = None
    calibration_text: CalibrationText | None = None
    learned: LearnedRotations | None = None
    learn: LearnOptions | None = None
    learn_text: LearnText = field(default_factory=LearnText)
    dtype: torch.dtype | None = None
    device: str = "cpu"
    text: str | None = "auto"
    max_shard_size: int | None = None
    checksums: Path | None = None
    also: Sequence[str | Path] = ()
    runtime: str | None = None
    family: FamilyLike | None = None
    force: bool = False
    command: str | None = None
    allow_pickle: bool = False
    options: Options = field(default_factory=Options)
    watch: Watch = field(default_factory=Watch)
