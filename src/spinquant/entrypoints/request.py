"""All arguments of `rotate_folder`, `quantize_folder` and the command line as one frozen value (`Request`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spinquant.architectures import FamilyLike
from spinquant.calibration.blockwise import Calibration, Method
from spinquant.calibration.data import CalibrationText
from spinquant.compute.values import check_integer
from spinquant.entrypoints.result import Options
from spinquant.errors import TextError
from spinquant.learning.options import LearnOptions, Watch
from spinquant.learning.tuning import TuneOptions
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations


@dataclass(frozen=True)
class LearnText:
    """Text to learn rotations from, and to score candidates on.

    Attributes:
        calibration: samples to learn from.
        held_out: another text to score candidates on. Default: the last windows of the same text, which are then not
            learned from.
        windows: number of windows to score candidates on.
    """

    calibration: CalibrationText = field(default_factory=CalibrationText)
    held_out: str | None = None
    windows: int = 8

    def __post_init__(self):
        check_integer(self.windows, "windows (--windows)", TextError)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to rotate, and with a scheme to quantize, a folder or hub id into another folder.

    `validate` fills in what is left open and refuses what is not possible.

    Attributes:
        model: a folder, or the id of a model on the hub.
        out: the folder to write.
        spec: rotations, their types, block sizes and seed; not used with `learned`.
        scheme: what is quantized; None for rotations alone.
        format: format of the folder; None for the one that `runtime` reads, or native without a runtime.
        method: how weights are quantized.
        calibration: options of calibration, if the method or a clip search needs it.
        calibration_text: what to calibrate on; refused if nothing is calibrated.
        learned: rotations to use instead of random ones.
        learn: learn rotations first, with these options.
        learn_text: text to learn from and to score candidates on.
        tune: tune the quantized model towards the 16-bit one, with these options; the model is then loaded as a whole.
        dtype: dtype of what is not quantized, and of the computation; None for the source's.
        device: device to compute on.
        text: source of the real tokens on which logits are compared, see `load_text`; None for no comparison.
        max_shard_size: bytes; None for the shards of the source.
        checksums: a file of SHA-256 checksums, as sha256sum writes it, which the source's files must have.
        also: folders of LoRA adapters and draft heads to rotate with the model.
        runtime: refuse what this runtime does not run.
        family: a family file, for models without a built-in table.
        force: replace `out` if it exists.
        command: the command line, for the model card; it has no other effect.
        allow_pickle: accept pickled weights, which can run code when they are loaded.
        options: checks, precision, memory and progress.
        watch: progress callbacks of learning.
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
    tune: TuneOptions | None = None
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
