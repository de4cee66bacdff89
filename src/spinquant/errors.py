"""Errors that a user can act on.

Every one is a ValueError that names the object, what was expected, what was found and what to do. The
command line prints the message alone; anything that is not a `SpinquantError` is a defect and keeps its
traceback.
"""


class SpinquantError(ValueError):
    """Base of every error that this package raises on purpose."""


class HadamardOrderError(SpinquantError):
    """No Hadamard matrix of this order exists, or none that we can construct."""


class RotationError(SpinquantError):
    """A rotation is unknown, does not fit its space, or is ruled out by the architecture."""


class ArchitectureError(SpinquantError):
    """No table explains this architecture, or a tensor of it."""


class SchemeError(SpinquantError):
    """A quantization scheme cannot be read, or does not fit the tensors it is for."""


class CheckpointError(SpinquantError):
    """A model folder is missing, incomplete, corrupted, or holds values that are not finite."""


class SourceChangedError(CheckpointError):
    """The source of a run that goes on is no longer what was read."""


class ProofError(SpinquantError):
    """Rotating changed the function of the model."""


class TextError(SpinquantError):
    """A text cannot be read, or is too short."""


class CalibrationError(SpinquantError):
    """Calibration text, or what a model computes on it, that cannot be used."""


class LearningError(SpinquantError):
    """Rotations cannot be learned as asked, or their learning went astray."""


class ProcessError(SpinquantError):
    """Another process of the job ended, or failed, before its work was done."""
