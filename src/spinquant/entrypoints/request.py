"""Request"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.adapters.folder import adapter_digests
from spinquant.architectures import FamilyLike, recorded_family
from spinquant.calibration.block_store import BlockStore
from spinquant.checkpoint.folder import (
    weights_digest,
)
from spinquant.compute.hashing import digest
from spinquant.entrypoints.result import Options
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.streaming.calibrate import Calibrating


@dataclass(frozen=True)
class Request:
    """What a stream is asked to do.

    max_shard_size: bytes; None for the shards of the source. text: of the real tokens on which the result is compared
    with the source, as in `load_text`; None for no comparison. scheme: what is quantized; None for rotations alone.
    learned: rotations in place of those that the spec makes, which then describes them. calibrating: how, where weights
    are not just rounded to nearest. format: native or compressed-tensors, of what is no plain folder. checksums: a list
    of SHA-256 that the files of the source have to have. also: folders of adapters and heads that ride along, by name.
    family: a file that explains the model where no table does.
    """

    spec: RotationSpec
    dtype: torch.dtype | None = None
    device: str = "cpu"
    max_shard_size: int | None = None
    text: str | None = "auto"
    scheme: Scheme | None = None
    options: Options = field(default_factory=Options)
    learned: LearnedRotations | None = None
    calibrating: Calibrating | None = None
    format: str = "native"
    checksums: Path | None = None
    also: Mapping[str, Path] = field(default_factory=dict)
    family: FamilyLike | None = None

    def settings(self, model: str | Path, folder: Path, config: Any, *, compiled: bool) -> dict[str, Any]:
        """Everything that decides the bytes of the result, as JSON. compiled: with kernels of the transform."""
        return {
            "spinquant": version("spinquant"),
            "torch": torch.__version__,
            "kernels": compiled,
            "model": str(model),
            "files": weights_digest(folder),
            **self.spec.to_dict(),
            "dtype": str(self.dtype),
            "precision": str(self.options.precision),
            "device": self.device,
            "max_shard_size": self.max_shard_size,
            "text": self.text,
            "scheme": None if self.scheme is None else self.scheme.to_dict(),
            "learned": None if self.learned is None else self.learned.digest(),
            "calibrating": None if self.calibrating is None else asdict(self.calibrating),
            "format": self.format,
            "drop_mtp": self.options.drop_mtp,
            "also": adapter_digests(self.also),
            "family": recorded_family(config),
        }


def store_folder(out: str | Path) -> Path:
    """Where a calibration for `out` is kept until it is written."""
    return Path(out).parent / f".{Path(out).name}.calibration"


def store_for(
    out: str | Path, model: str | Path, request: Request, tokens: Tensor, dtype: torch.dtype, config: Any
) -> BlockStore:
    """Where finished blocks of a calibration are kept until `out` is written, under a name of all that decides them."""
    how = request.calibrating
    assert how is not None
    settings = [version("spinquant"), request.scheme, request.spec, how.method, how.calibration]
    settings += [request.options.precision, dtype, digest(tokens), weights_digest(model)]
    settings += [request.learned.digest() if request.learned else None, recorded_family(config)]
    return BlockStore(store_folder(out), json.dumps([repr(s) for s in settings]))
