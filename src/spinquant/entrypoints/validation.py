"""What is refused before any work: formats, runtimes and options that do not go together.

Found out now it costs nothing; found out at the end, hours.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from spinquant.architectures import FamilyLike, make_plan
from spinquant.calibration.blockwise import METHODS, Calibration
from spinquant.calibration.data import CalibrationText
from spinquant.checkpoint.atomic import check_free
from spinquant.checkpoint.folder import folder_of, has_pickles_only, load_config, read_headers
from spinquant.checkpoint.reader import Source
from spinquant.compute.distributed import is_alone
from spinquant.errors import CalibrationError, CheckpointError, RotationError, SchemeError
from spinquant.formats.compressed_config import check_scheme, quantization_scheme
from spinquant.formats.runtimes import check_runtime, runtime_of
from spinquant.plan import MERGEABLE
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import Scheme, static_parts
from spinquant.rotations.factory import RotationSpec
from spinquant.streaming.offloaded_model import hollow_model, unfillable


def check_format(format: str, scheme: Scheme, spec: RotationSpec, *, clips: bool = False) -> None:
    """Raise SchemeError or RotationError, saying what would work, for what a format of folders cannot hold.

    clips: clip ratios of activations and cache are searched.
    """
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if format == "hf":
        if scheme != Scheme(lm_head=scheme.lm_head):
            raise SchemeError(
                f"format hf is a plain 16-bit folder, which cannot hold {scheme}: use --scheme none, or --format "
                "compressed-tensors or native"
            )
        if online:
            raise RotationError(
                f"{', '.join(online)} run at run time, which a plain folder cannot say. Leave them out, or write a "
                "folder with online parts: spinquant quantize MODEL OUT --scheme none --rotations "
                + ",".join(spec.rotations)
            )
    elif format == "compressed-tensors":
        check_scheme(scheme, spec)
        if clips:
            raise SchemeError(
                "runtimes cover the whole range of an activation, so searched clip ratios cannot be written for "
                "compressed-tensors. Leave --clips out, or write --format native"
            )
        quantization_scheme(scheme)  # raises where the library is missing
        if scheme.weights is None and scheme.kv is None and not online:
            raise SchemeError(
                "nothing is quantized and nothing rotated online, so compressed-tensors has nothing to say: use "
                "--format hf"
            )
    elif format != "native":
        raise SchemeError(f"unknown format {format!r}: expected native, compressed-tensors or hf")


def check_request(
    model: str | Path,
    out: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    method: str,
    calibration: Calibration | None,
    *,
    calibration_text: CalibrationText | None = None,
    max_shard_size: int | None = None,
    checksums: Path | None = None,
    runtime: str | None = None,
    format: str = "native",
    force: bool = False,
    allow_pickle: bool = False,
    family: FamilyLike | None = None,
) -> tuple[Calibration | None, bool]:
    """What `quantize_folder` refuses before work starts: (the calibration that there will be, whether it is streamed).

    Raises what `quantize_folder` raises for schemes, formats, runtimes and options that do not go together, and
    CheckpointError for an `out` that is not free.
    """
    if runtime is not None:
        check_for(runtime, format, scheme, spec, None if allow_pickle else model, family=family)
    calibrated = check_calibration(method, scheme, calibration)
    if calibrated is None and calibration_text is not None:
        raise CalibrationError(
            f"a calibration text is given, and method {method} without --clips reads none: leave it out"
        )
    check_format(format, scheme, spec, clips=calibrated is not None and calibrated.clips)
    pickles = allow_pickle and has_pickles_only(folder_of(model, allow_pickle=True))
    streamed = not pickles and (calibrated is None or from_disk(model, family))
    if (max_shard_size is not None or checksums is not None) and not streamed:
        raise CheckpointError(
            "pickles are loaded as a whole, and so are models for calibration whose weights cannot be made of the "
            "checkpoint's block by block: leave --max-shard-size and --checksums out"
        )
    if not streamed and not is_alone():
        raise CheckpointError("this model is loaded as a whole, by one process: repeat the command without torchrun")
    check_free(out, force=force, source=model)
    return calibrated, streamed


def from_disk(model: str | Path, family: FamilyLike | None = None) -> bool:
    """Whether the decoder blocks of a folder can be calibrated one by one from disk."""
    config, folder = load_config(model, family=family), folder_of(model)
    with closing(Source(folder, config)) as source:
        plan = make_plan(config, source.shapes)
        return unfillable(hollow_model(config, torch.float32), source, plan) is None


def check_for(
    runtime: str,
    format: str,
    scheme: Scheme,
    spec: RotationSpec,
    model: str | Path | None,
    *,
    family: FamilyLike | None = None,
) -> None:
    """Raise SchemeError or RotationError for what a runtime does not load or run."""
    reads = runtime_of(runtime).format
    if format not in ("hf", reads):
        raise SchemeError(f"{runtime} reads {reads or 'no'} folders of ours, not {format}: leave --format out")
    check_runtime(runtime, scheme, spec)  # before the model is looked at, which may be on the hub
    if model is not None:
        shapes = {name: info.shape for name, info in read_headers(model).items()}
        check_runtime(runtime, scheme, spec, make_plan(load_config(model), shapes, family=family))


ASYMMETRY = 0.25  # of method gptaq where nothing else is said; measured in quantization/gptq.py


def check_calibration(method: str, scheme: Scheme, calibration: Calibration | None) -> Calibration | None:
    """The calibration that a method needs, None for plain rounding.

    Raises SchemeError and CalibrationError for a method that is not known, and for options that would do nothing.
    """
    if method not in METHODS:
        raise SchemeError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    calibration = calibration or Calibration()
    ranges = {"activations": scheme.activations, "kv": scheme.kv}
    static = static_parts(scheme)
    if calibration.clips and all(ranges[part] is None for part in ranges if part not in static):
        raise SchemeError(
            f"scheme {scheme} rounds neither activations nor the KV cache in ranges of their own: there is no clip "
            "ratio to search"
        )
    if method == "rtn" and (calibration.gptq != GPTQOptions() or calibration.sequential):
        raise CalibrationError(
            "damping, act-order, asymmetry and sequential are options of gptq and gptaq, and the method is rtn"
        )
    if method == "rtn" and not calibration.clips and not static:
        if not calibration.round_inputs:
            raise CalibrationError("exact inputs are an option of calibration, and plain rtn is not calibrated")
        return None
    if method != "rtn" and scheme.weights is None:
        raise SchemeError(f"method {method} rounds weights, and scheme {scheme} leaves them at 16 bits: use method rtn")
    if method == "gptaq" and calibration.gptq.asymmetry is None:
        return replace(calibration, gptq=replace(calibration.gptq, asymmetry=ASYMMETRY))
    if method != "gptaq" and calibration.gptq.asymmetry:
        raise CalibrationError(f"asymmetry belongs to method gptaq, and the method is {method}")
    return calibration
