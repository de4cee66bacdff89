"""Exceptions raised for problems that the caller can fix.

Each is a ValueError whose message names the object, the expectation, the value found and the remedy. The command line
prints the message alone; any other exception is a bug and keeps its traceback.
"""


class SpinquantError(ValueError):
    """Base class of every error that this package raises on purpose."""


class HadamardOrderError(SpinquantError):
    """No Hadamard matrix of this order exists, or none can be constructed here."""


class RotationError(SpinquantError):
    """A rotation is unknown, does not fit its space, or is impossible for the architecture."""


class ArchitectureError(SpinquantError):
    """The architecture is not supported, or a tensor is not explained by its family table."""


class OnlineError(SpinquantError):
    """An online rotation or quantizer cannot be attached to a model, or did not run in a forward pass."""


class SchemeError(SpinquantError):
    """A quantization scheme cannot be parsed, or does not fit the tensors that it is applied to."""


class CheckpointError(SpinquantError):
    """A model folder is missing, incomplete or corrupted, or holds values that are not finite."""


class SourceChangedError(CheckpointError):
    """The source checkpoint changed since the run that is being resumed read it."""


class ProofError(SpinquantError):
    """Rotating changed the outputs of the model, or quantizers round something else than they should."""


class TextError(SpinquantError):
    """A text cannot be read, or has too few tokens."""


class CalibrationError(SpinquantError):
    """Calibration data, or the activations that a model computes on it, cannot be used."""


class LearningError(SpinquantError):
    """Rotations cannot be learned with these options, or training diverged."""


class ProcessError(SpinquantError):
    """Another process of a distributed job ended or failed before its work was done."""
