"""Options and result of rotating and quantizing a model, and the JSON record (record.json) of a result."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers

from spinquant.calibration.blockwise import Calibration
from spinquant.evaluation.equivalence import Deviation
from spinquant.evaluation.scheme_proof import SchemeProof
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import to_save

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """Options of rotating and quantizing that do not choose rotations or a scheme: checks, precision, memory, progress.

    Attributes:
        prove: First check the rotations on a tiny model of the same architecture (see `spinquant.prove`), and that
            quantizers of activations and KV cache round what they should. Default: True.
        allow_inexact: Accept a model whose logits on real tokens moved by more than rounding. Default: False, raise
            ProofError.
        precision: Dtype in which weights are fused and online rotations are computed. Default: the wider of float32
            and the tensor's own dtype.
        drop_mtp: Leave out the layers for multi-token prediction of a checkpoint, which R1 cannot rotate. Default:
            False.
        memory: Bytes. Hidden states of a calibration from disk that take more are kept in a file (default: a quarter
            of the available memory), and a decoder block that takes more is not loaded to compare logits (default:
            twice the largest tensor in float32, plus 256 MiB; a smaller number does not lower it). A model that takes
            more while rotations are learned is read from disk block by block, or refused (default: what is free).
        progress: Called with (stage, done, total) as work proceeds. Default: none.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> stages = []
        >>> options = spinquant.Options(prove=False, progress=lambda stage, done, total: stages.append(stage))
        >>> result = spinquant.rotate(model, options=options)
        >>> sorted(set(stages)), result.twin
        (['rotate'], None)
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
    """A rotated, and possibly quantized, model with everything that is needed to repeat the run.

    Attributes:
        model: The model; None if it was written to a folder without being loaded.
        plan: Where the model can be rotated.
        spec: Which rotations were applied, of which type, block size and seed.
        rotations: The rotations by the name of their space.
        scheme: What was quantized; None for rotations alone.
        method: How weights were quantized: `rtn`, `gptq` or `gptaq`; None for rotations alone.
        calibration: Options of the calibration; None if nothing was calibrated.
        clips: Clip ratios and static ranges found by calibration.
        twin: How far the logits of a tiny model of the same architecture moved; None if that was not measured.
        quantizers: How quantizers of activations and KV cache compare, on a tiny model, with a computation without
            hooks; None if that was not measured.
        real: How far the logits of this model moved on real tokens, before quantization; None if that was not measured.
        notes: Further entries of the record, such as the source and the calibration text.
        seconds: Duration of each phase of a streamed run; None for a model in memory.
        learned: The learned rotations with their scores; None if the rotations were not learned.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> result = spinquant.quantize(model, "W4A8KV4", spinquant.RotationSpec())
        >>> str(result.scheme), result.method, sorted(result.rotations)
        ('W4A8KV4', 'rtn', ['layers.0.value', 'layers.1.value', 'residual'])
        >>> result.twin.relative < 1e-9
        True
    """

    model: Any
    plan: Plan
    spec: RotationSpec
    rotations: Mapping[str, Transform]
    scheme: Scheme | None = None
    method: str | None = None
    calibration: Calibration | None = None
    clips: Clips = field(default_factory=Clips)
    twin: Deviation | None = None
    quantizers: SchemeProof | None = None
    real: Deviation | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] | None = None
    learned: LearnedRotations | None = None

    def record(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON: seeds, scheme, plan, deviations of logits, versions."""
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
                "quantizers": self.quantizers.to_dict() if self.quantizers else None,
                "real_tokens": self.real.to_dict() if self.real else None,
            },
            **self.notes,
            "plan": self.plan.to_dict(),
        }
