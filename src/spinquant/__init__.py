"""spinquant: rotate language models so that they survive 4-bit weights, activations and KV cache.

Importing it registers `quant_method: spinquant` with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads the folders written here with their online rotations and quantizers attached.
"""

from importlib.metadata import version

from spinquant.adapters.folder import rotate_adapter
from spinquant.architectures import make_plan, use_family
from spinquant.architectures.family_file import FamilyFile, read_family
from spinquant.calibration.blockwise import Calibration
from spinquant.calibration.data import CalibrationText, calibration_tokens, load_text, token_windows
from spinquant.checkpoint.folder import load_tokenizer, read_headers
from spinquant.entrypoints.folders import quantize_folder, rotate_folder, save
from spinquant.entrypoints.in_memory import quantize, rotate
from spinquant.entrypoints.learn import learn_folder, read_learned
from spinquant.entrypoints.result import Options, Result
from spinquant.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    HadamardOrderError,
    LearningError,
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
from spinquant.modifiers.mappings import NormMapping, SpinQuantMapping
from spinquant.modifiers.modifier import SpinQuantModifier
from spinquant.online.hooks import Attachment, attach
from spinquant.online.kv_cache import QuantizedCache
from spinquant.plan import Plan
from spinquant.probing.draft import draft_text
from spinquant.probing.probe import Probe, probe
from spinquant.quantization.gptq import GPTQOptions, Moments, gptq
from spinquant.quantization.scheme import Clips, Quantizer, Scheme, parse_scheme
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import fuse_module, plan_of
from spinquant.rotations.hadamard import hadamard_matrix, hadamard_transform
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Hadamard, Kronecker, Orthogonal, Rotation

__version__ = version("spinquant")

__all__ = [
    "ArchitectureError",
    "Attachment",
    "Calibration",
    "CalibrationError",
    "CalibrationText",
    "CheckpointError",
    "Clips",
    "Comparison",
    "EndToEndOptions",
    "Evaluation",
    "FamilyFile",
    "GPTQOptions",
    "Hadamard",
    "HadamardOrderError",
    "Kronecker",
    "LearnOptions",
    "LearnedRotations",
    "LearningError",
    "LocalOptions",
    "Moments",
    "NormMapping",
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
