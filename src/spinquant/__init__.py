"""spinquant: rotate language models so that they survive 4-bit weights, activations and KV cache.

Public names are imported at their first use (PEP 562), so that `import spinquant` takes milliseconds and neither torch
nor transformers. Importing it registers `quant_method: spinquant` with transformers (at once where transformers is
imported already, else when it is), so that `AutoModelForCausalLM.from_pretrained` loads the folders written here with
their online rotations and quantizers attached.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spinquant.formats.register import register_with_transformers
from spinquant.models.tested_versions import warn_untested

if TYPE_CHECKING:  # what type checkers and editors see; a test holds it against the table below
    from spinquant.adapters.folder import rotate_adapter
    from spinquant.architectures import make_plan, use_family
    from spinquant.architectures.family_file import FamilyFile, read_family
    from spinquant.calibration.blockwise import Calibration
    from spinquant.calibration.data import CalibrationText, calibration_tokens, load_text, token_windows
    from spinquant.checkpoint.folder import load_tokenizer, read_headers
    from spinquant.entrypoints.folders import quantize_folder, rotate_folder
    from spinquant.entrypoints.in_memory import quantize, rotate, save
    from spinquant.entrypoints.learn import learn_folder, read_learned
    from spinquant.entrypoints.result import Options, Result
    from spinquant.errors import (
        ArchitectureError,
        CalibrationError,
        CheckpointError,
        HadamardOrderError,
        LearningError,
        OnlineError,
        ProofError,
        RotationError,
        SchemeError,
        SpinquantError,
        TextError,
    )
    from spinquant.evaluation.equivalence import prove
    from spinquant.evaluation.metrics import Comparison, Evaluation, compare_models, evaluate
    from spinquant.formats.load import load_model as load
    from spinquant.formats.native import detach
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions
    from spinquant.learning.learn import learn
    from spinquant.learning.options import LearnOptions
    from spinquant.learning.tuning import TuneOptions
    from spinquant.modifiers.mappings import NormMapping, SpinQuantMapping
    from spinquant.modifiers.modifier import SpinQuantModifier
    from spinquant.online.attachment import Attachment
    from spinquant.online.hooks import attach
    from spinquant.online.kv_cache import QuantizedCache
    from spinquant.plan import Plan
    from spinquant.probing.draft_text import draft_text
    from spinquant.probing.probe import Probe, probe
    from spinquant.quantization.gptq import GPTQOptions, Moments, gptq
    from spinquant.quantization.scheme import Clips, Quantizer, Scheme, parse_scheme
    from spinquant.rotations.factory import RotationSpec, make_rotations
    from spinquant.rotations.fuse_module import fuse_module, plan_of
    from spinquant.rotations.hadamard import hadamard_matrix, hadamard_transform
    from spinquant.rotations.learned import LearnedRotations
    from spinquant.rotations.matrices import Diagonal, KroneckerMatrix, Matrix
    from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, Rotation, Transform
    from spinquant.rotations.transforms import Composed

    __version__: str

__all__ = [
    "ArchitectureError",
    "Attachment",
    "Calibration",
    "CalibrationError",
    "CalibrationText",
    "CheckpointError",
    "Clips",
    "Comparison",
    "Composed",
    "Diagonal",
    "EndToEndOptions",
    "Evaluation",
    "FamilyFile",
    "GPTQOptions",
    "Hadamard",
    "HadamardOrderError",
    "Kronecker",
    "KroneckerMatrix",
    "LearnOptions",
    "LearnedRotations",
    "LearningError",
    "LocalOptions",
    "Matrix",
    "Moments",
    "NormMapping",
    "OnlineError",
    "Options",
    "Orthogonal",
    "Plan",
    "Probe",
    "ProofError",
    "QuantizedCache",
    "Quantizer",
    "Result",
    "Rotation",
    "RotationError",
    "RotationSpec",
    "Scheme",
    "SchemeError",
    "SpinQuantMapping",
    "SpinQuantModifier",
    "SpinquantError",
    "TextError",
    "Transform",
    "TuneOptions",
    "__version__",
    "attach",
    "calibration_tokens",
    "compare_models",
    "detach",
    "draft_text",
    "evaluate",
    "fuse_module",
    "gptq",
    "hadamard_matrix",
    "hadamard_transform",
    "learn",
    "learn_folder",
    "load",
    "load_text",
    "load_tokenizer",
    "make_plan",
    "make_rotations",
    "parse_scheme",
    "plan_of",
    "probe",
    "prove",
    "quantize",
    "quantize_folder",
    "read_family",
    "read_headers",
    "read_learned",
    "rotate",
    "rotate_adapter",
    "rotate_folder",
    "save",
    "token_windows",
    "use_family",
]

# Where each public name lives. `load` is called load_model there.
_MODULES = {
    "ArchitectureError": "errors",
    "Attachment": "online.attachment",
    "Calibration": "calibration.blockwise",
    "CalibrationError": "errors",
    "CalibrationText": "calibration.data",
    "CheckpointError": "errors",
    "Clips": "quantization.scheme",
    "Comparison": "evaluation.metrics",
    "Composed": "rotations.transforms",
    "Diagonal": "rotations.matrices",
    "EndToEndOptions": "learning.end_to_end",
    "Evaluation": "evaluation.metrics",
    "FamilyFile": "architectures.family_file",
    "GPTQOptions": "quantization.gptq",
    "Hadamard": "rotations.rotation",
    "HadamardOrderError": "errors",
    "Kronecker": "rotations.rotation",
    "KroneckerMatrix": "rotations.matrices",
    "LearnOptions": "learning.options",
    "LearnedRotations": "rotations.learned",
    "LearningError": "errors",
    "LocalOptions": "learning.layerwise",
    "Matrix": "rotations.matrices",
    "Moments": "quantization.gptq",
    "NormMapping": "modifiers.mappings",
    "Options": "entrypoints.result",
    "Orthogonal": "rotations.rotation",
    "Plan": "plan",
    "Probe": "probing.probe",
    "ProofError": "errors",
    "QuantizedCache": "online.kv_cache",
    "Quantizer": "quantization.scheme",
    "Result": "entrypoints.result",
    "Rotation": "rotations.rotation",
    "OnlineError": "errors",
    "RotationError": "errors",
    "RotationSpec": "rotations.factory",
    "Scheme": "quantization.scheme",
    "SchemeError": "errors",
    "SpinQuantMapping": "modifiers.mappings",
    "SpinQuantModifier": "modifiers.modifier",
    "SpinquantError": "errors",
    "TextError": "errors",
    "Transform": "rotations.rotation",
    "TuneOptions": "learning.tuning",
    "attach": "online.hooks",
    "calibration_tokens": "calibration.data",
    "compare_models": "evaluation.metrics",
    "detach": "formats.native",
    "draft_text": "probing.draft_text",
    "evaluate": "evaluation.metrics",
    "fuse_module": "rotations.fuse_module",
    "gptq": "quantization.gptq",
    "hadamard_matrix": "rotations.hadamard",
    "hadamard_transform": "rotations.hadamard",
    "learn": "learning.learn",
    "learn_folder": "entrypoints.learn",
    "load": "formats.load",
    "load_text": "calibration.data",
    "load_tokenizer": "checkpoint.folder",
    "make_plan": "architectures",
    "make_rotations": "rotations.factory",
    "parse_scheme": "quantization.scheme",
    "plan_of": "rotations.fuse_module",
    "probe": "probing.probe",
    "prove": "evaluation.equivalence",
    "quantize": "entrypoints.in_memory",
    "quantize_folder": "entrypoints.folders",
    "read_family": "architectures.family_file",
    "read_headers": "checkpoint.folder",
    "read_learned": "entrypoints.learn",
    "rotate": "entrypoints.in_memory",
    "rotate_adapter": "adapters.folder",
    "rotate_folder": "entrypoints.folders",
    "save": "entrypoints.in_memory",
    "token_windows": "calibration.data",
    "use_family": "architectures",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("spinquant")
    elif name in _MODULES:
        warn_untested()
        module = import_module(f"spinquant.{_MODULES[name]}")
        value = getattr(module, "load_model" if name == "load" else name)
    else:
        raise AttributeError(f"module 'spinquant' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


__path__.append(f"{__path__[0]}/moved")  # import paths of earlier versions, such as spinquant.llmcompressor

register_with_transformers()
