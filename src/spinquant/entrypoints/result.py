"""Options"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers

from spinquant.calibration.blockwise import Calibration
from spinquant.evaluation.equivalence import Deviation
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Rotation
from spinquant.rotations.serialization import to_save

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a run goes about it, apart from what it computes.

    prove: try the rotations on a small model of the same architecture first. allow_inexact: save even when the
    logits of real tokens moved by more than rounding. precision: dtype of fusing (see `fuse.transform`) and of online
    rotations, by default the wider of the tensor's own and float32. drop_mtp: of a checkpoint, leave out layers for
    multi-token prediction, which R1 cannot take along. memory: bytes that the hidden states of a calibration from disk
    may take before they go to a file, by default a quarter of what is available; and that a block may take which a
    stream loads to compare it, where that is more than it takes anyway.
    progress(stage, done, total): called as the work goes on.
    """

    prove: bool = True
    allow_inexact: bool = False
    precision: torch.dtype | None = None
    drop_mtp: bool = False
    memory: int | None = None
    progress: Stage | None = None

    def stage(self, name: str) -> Callable[[int, int], None]:
        """A progress function for one stage."""

        def report(done: int, total: int) -> None:
            if self.progress:
                self.progress(name, done, total)

        return report


@dataclass(frozen=True)
class Result:
    """A model that was rotated, and quantized where a scheme says so, with all that is needed to repeat it.

    twin and real are how far logits moved by rotating: in the small model, and on real tokens (None: not tried).
    model is None where it was never loaded; seconds then says how long each phase took.
    learned: the rotations, where they were learned, with their scores.
    """

    model: Any
    plan: Plan
    spec: RotationSpec
    rotations: Mapping[str, Rotation]
    scheme: Scheme | None = None
    method: str | None = None
    calibration: Calibration | None = None
    clips: Clips = field(default_factory=Clips)
    twin: Deviation | None = None
    real: Deviation | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] | None = None
    learned: LearnedRotations | None = None

    def record(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON: seeds, scheme, plan, proofs, versions."""
        return {
            "spinquant": version("spinquant"),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "spec": self.spec.to_dict(),
            "scheme": self.scheme.to_dict() if self.scheme else None,
            "method": self.method,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "clips": self.clips.to_dict() if self.clips else None,
            **to_save(self.rotations)[0],
            "proof": {
                "twin": self.twin.to_dict() if self.twin else None,
                "real_tokens": self.real.to_dict() if self.real else None,
            },
            **self.notes,
            "plan": self.plan.to_dict(),
        }
