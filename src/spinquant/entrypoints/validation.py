"""Validate a request before any work: resolve config, plan, scheme, format and calibration, and refuse the impossible.

`validate` turns a `Request` into a frozen `Job`, which is passed on and never computed again. An error is raised here
rather than after hours of work.
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
    copied_files,
    folder_of,
    has_pickles_only,
    load_config,
    plan_in,
    read_headers,
    weights_digest,
)
from spinquant.checkpoint.reader import Source, fp8_block
from spinquant.checkpoint.safetensors_io import file_hash
from spinquant.compute.distributed import is_alone
from spinquant.compute.dtypes import named
from spinquant.compute.memory import available_memory
from spinquant.entrypoints.output_folder import model_dtype
from spinquant.entrypoints.request import Request
from spinquant.errors import CalibrationError, CheckpointError, LearningError, RotationError, SchemeError
from spinquant.formats.compressed_config import as_stored, check_plan, check_scheme, quantization_scheme
from spinquant.formats.runtimes import check_runtime, format_for, runtime_of
from spinquant.learning.tuning import TuneOptions
from spinquant.plan import Plan
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.scheme import Scheme, static_parts
from spinquant.rotation_names import MERGEABLE
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.learned import LearnedRotations
from spinquant.streaming.offloaded_model import check_stored, hollow_model, unfillable


def check_format(format: str, scheme: Scheme, spec: RotationSpec, *, clips: bool = False) -> None:
    """Raise SchemeError or RotationError, with an alternative, for what a checkpoint format cannot store.

    clips: whether clip ratios of activations and KV cache are searched or tuned.
    """
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if format == "hf":
        if scheme != Scheme(lm_head=scheme.lm_head):
            raise SchemeError(
                f"format hf is a plain 16-bit checkpoint, which cannot store {scheme}: use --scheme none, or --format "
                "compressed-tensors or native"
            )
        if online:
            raise RotationError(
                f"{', '.join(online)} are online rotations, which a plain checkpoint cannot store. Leave them out, or "
                "write the native format: spinquant quantize MODEL OUT --scheme none --rotations "
                + ",".join(spec.rotations)
            )
    elif format == "compressed-tensors":
        check_scheme(scheme, spec)
        if clips:
            raise SchemeError(
                "runtimes cover the whole range of an activation, so clip ratios that are searched or tuned cannot be "
                "written for compressed-tensors. Leave --clips out (in Python, quantize with that format too), or "
                "write --format native"
            )
        quantization_scheme(scheme)  # raises where the library is missing
        if scheme.weights is None and scheme.kv is None and not online:
            raise SchemeError(
                "nothing is quantized and nothing is rotated online, so there is nothing to store as "
                "compressed-tensors: use --format hf"
            )
    elif format != "native":
        raise SchemeError(f"unknown format {format!r}: expected native, compressed-tensors or hf")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A validated request, with everything that follows from it.

    Attributes:
        request: the request.
        folder: folder of the model, in the hub's cache if it was downloaded.
        config: the model's config, with its family file.
        plan: where the model can be rotated; None for pickled weights, whose tensors are unknown until they are loaded.
        spec: specification of the rotations; that of the learned ones if there are any.
        scheme: what is quantized, as the format stores it; None for rotations alone.
        format: format of the folder.
        calibration: options of calibration; None if nothing is calibrated.
        text: what to calibrate on.
        streamed: whether the model is written tensor by tensor, rather than loaded as a whole.
        adapters: folders of LoRA adapters and draft heads to rotate, by the name of their folder in the output.
        dropped: tensors that are left out.
        settings: everything that determines the bytes of the result, ready for JSON. A run is resumed only with the
            same settings.
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
        """The same job with learned rotations."""
        return replace(self, spec=learned.spec, request=replace(self.request, learned=learned))


def settle_format(format: str | None, runtime: str | None, scheme: Scheme | None, spec: RotationSpec) -> str:
    """The format to write: the given one, else the one that the runtime reads, else native.

    Raises SchemeError for a format that the runtime does not read.
    """
    if runtime is None:
        return format or "native"
    reads = runtime_of(runtime).format
    if format is None:
        return format_for(runtime, scheme or Scheme(), spec)
    if format not in ("hf", reads):
        known = f"format {reads}" if reads else "no format that spinquant writes"
        raise SchemeError(f"{runtime} reads {known}, not {format}: leave --format out")
    return format


def validate(request: Request) -> Job:
    """Turn a request into a job, or raise an error before any work is done.

    Raises:
        SchemeError, RotationError: scheme, format, runtime and rotations do not fit each other or the model.
        CalibrationError: options of calibration do not fit the method.
        ArchitectureError: no table supports the architecture.
        CheckpointError: the model cannot be read; an option needs streaming and the model cannot be streamed; or the
            model has layers for multi-token prediction, which would be lost when it is loaded as a whole.
    """
    spec = request.learned.spec if request.learned else request.spec
    scheme = request.scheme
    format = settle_format(request.format, request.runtime, scheme, spec)
    if format == "compressed-tensors" and scheme is not None:
        scheme = as_stored(scheme)
    if request.runtime is not None:  # before the model is read, which may be on the hub
        check_runtime(request.runtime, scheme or Scheme(), spec)
    calibration = None if scheme is None else check_calibration(request.method, scheme, request.calibration)
    check_tune(request.tune, scheme)
    if calibration is None and request.tune is None and request.calibration_text is not None:
        raise CalibrationError(
            f"a calibration text is given, and method {request.method} without --clips reads none: leave it out"
        )
    check_format(format, scheme or Scheme(), spec, clips=calibration is not None and calibration.clips)
    pickles = request.allow_pickle and has_pickles_only(folder_of(request.model, allow_pickle=True))
    folder = folder_of(request.model, allow_pickle=request.allow_pickle)
    config = load_config(request.model, family=request.family)
    if pickles or fp8_block(config) is None:
        check_unquantized(config, request.model, folder)
    plan, streamed, dropped, largest = None, False, frozenset(), 0
    if not pickles:
        dropped = frozenset(prediction_tensors(config, read_headers(folder))) if request.options.drop_mtp else dropped
        with closing(Source(folder, config, without=dropped)) as source:
            largest = source.largest
            if request.tune is not None:
                numbers = sum(torch.Size(shape).numel() for shape in source.shapes.values())
                check_tuned_in_memory(numbers, request.dtype or model_dtype(config, source), request.device)
            plan = plan_in(folder, config, make_plan(config, source.shapes))
            check_stored(hollow_model(config, torch.float32), source, plan)
            streamed = request.tune is None and (calibration is None or from_disk(config, plan))
    if request.runtime is not None and plan is not None:
        check_runtime(request.runtime, scheme or Scheme(), spec, plan)
    _check_way(request, scheme, format, plan, streamed)
    text = request.calibration_text or CalibrationText(seed=spec.seed)
    adapters = read_adapters(request.also)
    for place in (folder, *adapters.values()):
        copied_files(place)  # a link out of it is refused
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


def from_disk(config: Any, plan: Plan) -> bool:
    """Whether the decoder blocks of a checkpoint can be calibrated one by one from disk."""
    return unfillable(hollow_model(config, torch.float32), plan) is None


def _check_way(request: Request, scheme: Scheme | None, format: str, plan: Plan | None, streamed: bool) -> None:
    """Refuse what is not possible for a model that is loaded as a whole."""
    if streamed:
        return
    why, otherwise = (
        "pickled weights, or a calibration whose blocks cannot be filled from the checkpoint one by one",
        ("convert the weights to safetensors first"),
    )
    if request.tune is not None:
        why, otherwise = "tuning needs the model in memory", "leave --tune out"
    if request.max_shard_size is not None or request.checksums is not None or request.also:
        raise CheckpointError(
            f"this model has to be loaded as a whole ({why}), which does not support --max-shard-size, --checksums and "
            f"--also: leave them out, or {otherwise}"
        )
    if not is_alone():
        raise CheckpointError("this model is loaded as a whole, by one process: rerun the command without torchrun")
    if plan is not None and format == "compressed-tensors":
        check_plan(plan, scheme or Scheme(), request.spec)
    if plan is not None and plan.predictors and not request.options.drop_mtp:
        raise CheckpointError(
            f"{str(request.model)!r} has layers for multi-token prediction ({plan.predictors[0]}, ...), and "
            "transformers loads the model without them, so the result would lack them. Confirm that with --drop-mtp"
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
    """Everything that determines the bytes of the result, ready for JSON."""
    with kernels_for(largest) as compiled:
        kernels = compiled
    learning: dict[str, Any] = {}
    if request.learn is not None:
        files = text_files(request.learn_text.calibration.text, request.learn_text.held_out)
        learning = {"learn": request.learn.to_dict(), "learn_text": asdict(request.learn_text), "learn_files": files}
    calibrating: dict[str, Any] = {}
    if calibration is not None:
        calibrating = {"calibration": calibration.to_dict()}
    if request.tune is not None:
        calibrating["tune"] = request.tune.to_dict()
    if calibrating:
        calibrating |= {"calibration_text": asdict(text), "calibration_files": text_files(text.text)}
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
    """The settings that every run has, ready for JSON: versions, model files, rotations, scheme and family."""
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
    """SHA-256 by name of the texts that are files."""
    return {name: file_hash(Path(name)) for name in names if name and Path(name).is_file()}


def check_tune(tune: TuneOptions | None, scheme: Scheme | None) -> None:
    """Raise LearningError for tuning that would have no effect: nothing is quantized."""
    if tune is not None and (scheme is None or not (scheme.weights or scheme.activations or scheme.kv)):
        raise LearningError(
            f"scheme {scheme or 'none'} quantizes nothing, so there is nothing to tune: leave --tune out, or use a "
            "scheme such as W4A4KV4"
        )


def check_tuned_in_memory(numbers: int, dtype: torch.dtype, device: str) -> None:
    """Raise LearningError for a model that is too large to be tuned in memory; numbers: of its weights."""
    if torch.device(device).type != "cpu":
        return
    needed, there = needed_in_memory(numbers, dtype), available_memory()
    if needed > there:
        raise LearningError(
            f"tuning needs the model in memory: its weights in {named(dtype)} and what is computed with them take "
            f"{needed / 1e9:.1f} GB or more, and {there / 1e9:.1f} GB are available. Leave --tune out, and the "
            "model is streamed"
        )


def needed_in_memory(numbers: int, dtype: torch.dtype) -> int:
    """Bytes that have to be free at least to compute gradients through a model; numbers: of its weights.

    Activations and gradients of a sample take at least as much as one decoder block: a quarter above the weights.
    """
    return numbers * dtype.itemsize * 5 // 4


ASYMMETRY = 0.1  # default of method gptaq; measured, see `quantization/gptq.py`


def check_calibration(method: str, scheme: Scheme, calibration: Calibration | None) -> Calibration | None:
    """The options of calibration that a method needs; None for round-to-nearest (RTN) without calibration.

    Raises SchemeError for an unknown method, and SchemeError or CalibrationError for options that would have no effect.
    """
    if method not in METHODS:
        raise SchemeError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    calibration = calibration or Calibration()
    ranges = {"activations": scheme.activations, "kv": scheme.kv}
    static = static_parts(scheme)
    if calibration.clips and all(ranges[part] is None for part in ranges if part not in static):
        raise SchemeError(
            f"scheme {scheme} has no activations or KV cache with dynamic ranges, so there is no clip ratio to search: "
            "leave clips out"
        )
    if method == "rtn" and (calibration.gptq != GPTQOptions() or calibration.sequential):
        raise CalibrationError(
            "damping, act-order, asymmetry and sequential are options of gptq and gptaq, and the method is rtn: leave "
            "them out"
        )
    if method == "rtn" and not calibration.clips and not static:
        if not calibration.round_inputs:
            raise CalibrationError("exact inputs are an option of calibration, and rtn needs none: leave them out")
        return None
    if method != "rtn" and scheme.weights is None:
        raise SchemeError(f"method {method} quantizes weights; scheme {scheme} keeps them at 16 bits: use method rtn")
    if method == "gptaq" and calibration.gptq.asymmetry is None:
        return replace(calibration, gptq=replace(calibration.gptq, asymmetry=ASYMMETRY))
    if method != "gptaq" and calibration.gptq.asymmetry:
        raise CalibrationError(f"asymmetry is an option of method gptaq, and the method is {method}")
    return calibration
