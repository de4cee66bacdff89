"""Validate a request before any work: settle config, plan, scheme and format once, and refuse the rest.

`validate` turns a `Request` into a frozen `Job`, which is passed on. Found out now an error costs nothing; found out at
the end, hours.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spinquant.adapters.folder import adapter_digests, read_adapters
from spinquant.architectures import make_plan, prediction_tensors, recorded_family
from spinquant.calibration.blockwise import METHODS, Calibration
from spinquant.calibration.data import CalibrationText
from spinquant.checkpoint.folder import (
    check_unquantized,
    folder_of,
    has_pickles_only,
    load_config,
    read_headers,
    weights_digest,
)
from spinquant.checkpoint.reader import Source, fp8_block
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.compute.distributed import is_alone
from spinquant.entrypoints.request import Request
from spinquant.errors import CalibrationError, CheckpointError, RotationError, SchemeError
from spinquant.formats.compressed_config import as_stored, check_plan, check_scheme, quantization_scheme
from spinquant.formats.runtimes import check_runtime, format_for, runtime_of
from spinquant.plan import MERGEABLE, Plan
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import Scheme, static_parts
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.learned import LearnedRotations
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that can be carried out, with everything that follows from it; nothing of it is decided again.

    Attributes:
        request: what was asked for.
        folder: of the model, downloaded where it was on the hub.
        config: the model's, which knows its family file.
        plan: what each rotation touches; None for pickles, which are known only when they are loaded.
        spec: of the rotations; theirs where learned ones were given.
        scheme: what is quantized, as the format stores it; None for rotations alone.
        format: of the folder.
        calibration: how weights are calibrated; None where nothing is.
        text: what they are calibrated on.
        streamed: written tensor by tensor; else the model is loaded as a whole.
        adapters: folders of LoRA adapters and draft heads to rotate, by the name that they get.
        dropped: tensors that are left out.
        settings: all that decides the bytes of the result, as JSON. A run is resumed by the same settings only.
    """

    request: Request
    folder: Path
    config: Any
    plan: Plan | None
    spec: RotationSpec
    scheme: Scheme | None
    format: str
    calibration: Calibration | None
    text: CalibrationText
    streamed: bool
    adapters: Mapping[str, Path]
    dropped: frozenset[str]
    settings: Mapping[str, Any]

    def with_learned(self, learned: LearnedRotations) -> "Job":
        """The same job with the rotations that its learning has found."""
        return replace(self, spec=learned.spec, request=replace(self.request, learned=learned))


def settle_format(format: str | None, runtime: str | None, scheme: Scheme | None, spec: RotationSpec) -> str:
    """The format of the folder that is written: as asked for, else what the runtime reads, else our own.

    Raises SchemeError for a format that the runtime does not read.
    """
    if runtime is None:
        return format or "native"
    reads = runtime_of(runtime).format
    if format is None:
        return format_for(runtime, scheme or Scheme(), spec)
    if format not in ("hf", reads):
        raise SchemeError(f"{runtime} reads {reads or 'no'} folders of ours, not {format}: leave --format out")
    return format


def validate(request: Request) -> Job:
    """Settle a request, and refuse what cannot be done before any work is.

    Raises:
        SchemeError, RotationError: schemes, formats, runtimes and rotations that do not go together.
        CalibrationError: a calibration that does not fit the method.
        ArchitectureError: a model that no table explains.
        CheckpointError: a model that cannot be read; options that need a stream where there is none; a model with
            layers for multi-token prediction that loading as a whole would lose.
    """
    spec = request.learned.spec if request.learned else request.spec
    scheme = request.scheme
    format = settle_format(request.format, request.runtime, scheme, spec)
    if format == "compressed-tensors" and scheme is not None:
        scheme = as_stored(scheme)
    if request.runtime is not None:  # before the model is looked at, which may be on the hub
        check_runtime(request.runtime, scheme or Scheme(), spec)
    calibration = None if scheme is None else check_calibration(request.method, scheme, request.calibration)
    if calibration is None and request.calibration_text is not None:
        raise CalibrationError(
            f"a calibration text is given, and method {request.method} without --clips reads none: leave it out"
        )
    check_format(format, scheme or Scheme(), spec, clips=calibration is not None and calibration.clips)
    pickles = request.allow_pickle and has_pickles_only(folder_of(request.model, allow_pickle=True))
    folder = folder_of(request.model, allow_pickle=request.allow_pickle)
    config = load_config(request.model, family=request.family)
    if pickles or fp8_block(config) is None:
        check_unquantized(config, request.model)
    plan, streamed, dropped, largest = None, False, frozenset(), 0
    if not pickles:
        dropped = frozenset(prediction_tensors(config, read_headers(folder))) if request.options.drop_mtp else dropped
        with closing(Source(folder, config, without=dropped)) as source:
            largest = source.largest
            plan = make_plan(config, source.shapes)
            streamed = calibration is None or from_disk(config, source, plan)
    if request.runtime is not None and plan is not None:
        check_runtime(request.runtime, scheme or Scheme(), spec, plan)
    _check_way(request, scheme, format, plan, streamed)
    text = request.calibration_text or CalibrationText(seed=spec.seed)
    adapters = read_adapters(request.also)
    settings = _settings(request, folder, config, spec, scheme, format, largest, adapters, calibration, text)
    return Job(
        request=request,
        folder=folder,
        config=config,
        plan=plan,
        spec=spec,
        scheme=scheme,
        format=format,
        calibration=calibration,
        text=text,
        streamed=streamed,
        adapters=adapters,
        dropped=dropped,
        settings=settings,
    )


def from_disk(config: Any, source: Source, plan: Plan) -> bool:
    """Whether the decoder blocks of a checkpoint can be calibrated one by one from disk."""
    return unfillable(hollow_model(config, torch.float32), source, plan) is None


def _check_way(request: Request, scheme: Scheme | None, format: str, plan: Plan | None, streamed: bool) -> None:
    """Refuse what the way that a model takes, streamed or loaded as a whole, cannot do."""
    if streamed:
        return
    if request.max_shard_size is not None or request.checksums is not None or request.also:
        raise CheckpointError(
            "pickles are loaded as a whole, and so are models for calibration whose weights cannot be made of the "
            "checkpoint's block by block: leave --max-shard-size, --checksums and --also out, or convert them first"
        )
    if not is_alone():
        raise CheckpointError("this model is loaded as a whole, by one process: rerun the command without torchrun")
    if plan is not None and format == "compressed-tensors":
        check_plan(plan, scheme or Scheme(), request.spec)
    if plan is not None and plan.predictors and not request.options.drop_mtp:
        raise CheckpointError(
            f"{str(request.model)!r} holds layers for multi-token prediction ({plan.predictors[0]}, ...), and "
            "transformers loads the model without them: they would be missing from the result. Say so with --drop-mtp"
        )


def _settings(
    request: Request,
    folder: Path,
    config: Any,
    spec: RotationSpec,
    scheme: Scheme | None,
    format: str,
    largest: int,
    adapters: Mapping[str, Path],
    calibration: Calibration | None,
    text: CalibrationText,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as JSON."""
    with kernels_for(largest) as compiled:
        kernels = compiled
    learning: dict[str, Any] = {}
    if request.learn is not None:
        files = text_files(request.learn_text.calibration.text, request.learn_text.held_out)
        learning = {"learn": request.learn.to_dict(), "learn_text": asdict(request.learn_text), "learn_files": files}
    calibrating: dict[str, Any] = {}
    if calibration is not None:
        calibrating = {"calibration": calibration.to_dict(), "calibration_text": asdict(text)}
        calibrating["calibration_files"] = text_files(text.text)
    return {
        **run_identity(request.model, folder, spec, scheme, config),
        "kernels": kernels,
        "dtype": str(request.dtype),
        "precision": str(request.options.precision),
        "device": request.device,
        "max_shard_size": request.max_shard_size,
        "text": request.text,
        "method": request.method if scheme is not None else None,
        "learned": None if request.learned is None else request.learned.digest(),
        "format": format,
        "drop_mtp": request.options.drop_mtp,
        "also": adapter_digests(adapters),
        **calibrating,
        **learning,
    }


def run_identity(
    model: str | Path, folder: Path, spec: RotationSpec, scheme: Scheme | None, config: Any
) -> dict[str, Any]:
    """What identifies every run on a model, as JSON: versions, the model's files, rotations, scheme and family."""
    return {
        "spinquant": version("spinquant"),
        "torch": torch.__version__,
        "model": str(model),
        "files": weights_digest(folder),
        **spec.to_dict(),
        "scheme": None if scheme is None else scheme.to_dict(),
        "family": recorded_family(config),
    }


def text_files(*names: str | None) -> dict[str, str]:
    """SHA-256 of those of the texts that are files."""
    return {name: file_hash(Path(name)) for name in names if name and Path(name).is_file()}


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
