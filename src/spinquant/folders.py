"""From a folder or hub id to a new folder, which appears complete or not at all."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from spinquant.along.folder import read_along
from spinquant.architectures import FamilyLike, make_plan, recorded_family
from spinquant.architectures.prediction import COUNTS
from spinquant.calibrate import CalibrationText, calibration_tokens
from spinquant.checkpoint import (
    BESIDE,
    RECORD,
    ROTATIONS,
    atomic_folder,
    check_finite,
    check_free,
    check_unquantized,
    folder_of,
    has_pickles_only,
    load_config,
    load_model,
    load_tokenizer,
    read_headers,
)
from spinquant.disk_calibration import Calibrating, store_for, why_not
from spinquant.errors import CalibrationError, CheckpointError, RotationError, SchemeError
from spinquant.formats.compressed_config import check_plan, check_scheme, quantization_scheme
from spinquant.formats.compressed_tensors import write_compressed
from spinquant.formats.native import is_marked
from spinquant.formats.runtimes import check_runtime, runtime_of
from spinquant.learning.learn import LearnedRotations
from spinquant.pipeline import Method, Options, Result, check_calibration, quantize, rotate
from spinquant.plan import MERGEABLE, Plan
from spinquant.processes import is_alone
from spinquant.quantization.blockwise import Calibration
from spinquant.quantization.scheme import Scheme
from spinquant.rotation import RotationSpec, online_part
from spinquant.saved_rotations import to_save
from spinquant.source import Source
from spinquant.stream_run import Request, sample_tokens
from spinquant.streamed_folders import stream_folder

Format = Literal["native", "compressed-tensors", "hf"]


def save(
    result: Result, out: str | Path, tokenizer: Any = None, *, force: bool = False, format: Format = "native"
) -> None:
    """Write a model, its tokenizer, and beside them the rotations and the record of how it came about.

    The folder appears complete or not at all. A model without online parts and quantization is a plain Hugging Face
    folder; any other is in our own format (see `formats/native.py`), or in that of compressed-tensors. Raises
    CheckpointError when `out` exists and `force` is off, the disk is full, a weight is not finite, or the online parts
    were removed from the model; SchemeError and RotationError for what the format cannot hold.
    """
    searched = result.calibration is not None and result.calibration.clips
    check_format(format, result.scheme or Scheme(), result.spec, clips=searched)
    online = online_part(result.plan, result.rotations)
    if format == "compressed-tensors":
        check_plan(result.plan, result.scheme or Scheme(), result.spec)
    if online and not is_marked(result.model):
        raise CheckpointError(
            "the online rotations were removed from this model: what is left is not what the result describes. Save "
            "the model with its own save_pretrained, or rotate it again"
        )
    check_finite(result.model, "the model to be saved")
    with atomic_folder(out, force=force) as folder:
        if format == "compressed-tensors":
            write_compressed(result.model, result.plan, online, result.scheme or Scheme(), result.clips, folder)
        else:
            result.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _, tensors = to_save(result.rotations)
        # In a folder of their own: runtimes load every safetensors file that lies beside the weights.
        (folder / BESIDE).mkdir()
        save_file(tensors, folder / BESIDE / ROTATIONS)
        record = json.dumps(result.record(), indent=1, default=dict)
        (folder / BESIDE / RECORD).write_text(record + "\n", encoding="utf-8")


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


def rotate_folder(
    model: str | Path,
    out: str | Path,
    spec: RotationSpec,
    *,
    learned: LearnedRotations | None = None,
    dtype: torch.dtype | None = None,
    text: str | None = "auto",
    force: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    max_shard_size: int | None = None,
    also: Sequence[str | Path] = (),
    checksums: Path | None = None,
    options: Options | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate a folder or hub id into a plain folder that transformers loads with nothing of ours installed.

    The model is never loaded: tensors are rotated one by one (see `stream.py`), and a run that was stopped goes on
    when it is repeated. Pickle weights alone, where they are allowed, are loaded as a whole; the result then has the
    model.

    learned: rotations to use in place of random ones; the spec is then theirs. dtype: of the weights written, by
    default as in the source. text: of the real tokens on which logits are compared; None for no comparison.
    max_shard_size: bytes, by default the shards of the source. checksums: a list as sha256sum writes it,
    which the files of the source have to fulfil. also: folders of adapters (peft's LoRA) and draft heads
    (EAGLE-3) of the model, which are rotated with it, into `adapters/NAME` of `out`. family: a file that explains the
    model where no table does, see `use_family`. Raises RotationError for rotations that need work at run time (R3, R4):
    a plain folder cannot hold them; and for what cannot ride along.
    """
    spec, rotations = (learned.spec, learned.rotations) if learned else (spec, None)
    check_format("hf", Scheme(), spec)
    options = options or Options()
    if not (allow_pickle and has_pickles_only(folder_of(model, allow_pickle=True))):
        request = Request(
            spec,
            dtype,
            device,
            max_shard_size,
            text,
            options=options,
            learned=learned,
            checksums=checksums,
            also=read_along(also),
            family=family,
        )
        return stream_folder(model, out, request, force=force)
    if max_shard_size is not None or checksums is not None or also:
        raise CheckpointError(
            "pickle weights are not streamed: leave --max-shard-size, --checksums and --also out, or convert them first"
        )
    check_free(out, force=force, source=model)
    loaded, tokenizer, sample, notes = _open(
        model, dtype, text or "auto", allow_pickle, device, options.drop_mtp, family
    )
    result = rotate(loaded, spec, rotations=rotations, sample=None if text is None else sample, options=options)
    if dtype is not None:
        _cast(loaded, dtype)
    save(replace(result, notes={**notes, **_learned_note(learned)}), out, tokenizer, force=force)
    return result


def quantize_folder(
    model: str | Path,
    out: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    *,
    learned: LearnedRotations | None = None,
    method: Method = "rtn",
    calibration: Calibration | None = None,
    calibration_text: CalibrationText | None = None,
    dtype: torch.dtype | None = None,
    text: str | None = "auto",
    force: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    max_shard_size: int | None = None,
    checksums: Path | None = None,
    options: Options | None = None,
    format: Format = "native",
    runtime: str | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate and quantize a folder or hub id into a folder that `spinquant.load` and transformers load.

    learned: rotations to use in place of random ones; the spec is then theirs. family: as for `rotate_folder`.
    dtype: of everything that is not quantized, and of the arithmetic; by default as in the source. format: of the
    folder, see `check_format`, which is asked before any work. runtime: refuse what it does not run, see
    `formats/runtimes.py`.
    The model is never loaded, and the result has none (see `stream.py`, and `disk_calibration.py` for what needs
    calibration), but for pickles and calibrated models whose class keeps weights in another form
    than the checkpoint. Finished blocks of a calibration are kept beside `out` until it is written; the same call goes
    on where another was stopped. max_shard_size, checksums: of a stream, as for `rotate_folder`.
    """
    spec, rotations = (learned.spec, learned.rotations) if learned else (spec, None)
    calibrated, streamed = check_request(
        model,
        out,
        scheme,
        spec,
        method,
        calibration,
        calibration_text=calibration_text,
        max_shard_size=max_shard_size,
        checksums=checksums,
        runtime=runtime,
        format=format,
        force=force,
        allow_pickle=allow_pickle,
        family=family,
    )
    options = options or Options()
    calibrating = None
    if calibrated is not None:
        calibrating = Calibrating(method, calibrated, calibration_text or CalibrationText(seed=spec.seed))
    if streamed:
        request = Request(
            spec,
            dtype,
            device,
            max_shard_size,
            text,
            scheme,
            options,
            learned,
            calibrating,
            "native" if format == "hf" else format,
            checksums,
            family=family,
        )
        return stream_folder(model, out, request, force=force)
    check = partial(check_plan, scheme=scheme, spec=spec) if format == "compressed-tensors" else None
    loaded, tokenizer, sample, notes = _open(
        model, dtype, text or "auto", allow_pickle, device, options.drop_mtp, family, check
    )
    if dtype is not None:
        _cast(loaded, dtype)
    tokens, store = None, None
    if calibrating is not None:
        progress = options.stage("generate text")
        name, tokens = calibration_tokens(loaded, tokenizer, calibrating.text, progress=progress)
        notes["calibration_text"] = {"text": name, "samples": tokens.shape[0], "length": tokens.shape[1]}
        store = store_for(
            out,
            model,
            scheme,
            spec,
            calibrating,
            tokens,
            loaded.dtype,
            options,
            learned,
            recorded_family(loaded.config),
        )
    result = quantize(
        loaded,
        scheme,
        spec,
        method=method,
        rotations=rotations,
        tokens=tokens,
        calibration=calibration,
        sample=None if text is None else sample,
        store=store,
        options=options,
    )
    result = replace(result, notes={**notes, **_learned_note(learned)})
    save(result, out, tokenizer, force=force, format=format)
    if store is not None:
        store.remove()
    return result


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
            "pickles are loaded as a whole, and so are models for calibration whose class keeps weights in another "
            "form than the checkpoint: leave --max-shard-size and --checksums out"
        )
    if not streamed and not is_alone():
        raise CheckpointError("this model is loaded as a whole, by one process: repeat the command without torchrun")
    check_free(out, force=force, source=model)
    return calibrated, streamed


def from_disk(model: str | Path, family: FamilyLike | None = None) -> bool:
    """Whether the decoder blocks of a folder can be calibrated one by one from disk, in the form they are stored in."""
    config, folder = load_config(model, family=family), folder_of(model)
    with closing(Source(folder, config)) as source:
        return why_not(config, make_plan(config, source.shapes), source) is None


def _learned_note(learned: LearnedRotations | None) -> dict[str, Any]:
    return {"learned": learned.record} if learned else {}


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


def _open(
    model: str | Path,
    dtype: torch.dtype | None,
    text: str,
    allow_pickle: bool,
    device: str,
    drop_mtp: bool,
    family: FamilyLike | None,
    check: Callable[[Plan], None] | None = None,
) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    config = load_config(model, family=family)
    check_unquantized(config, model)
    if not allow_pickle:
        # An architecture that no table explains is refused before gigabytes are loaded.
        plan = make_plan(config, {name: info.shape for name, info in read_headers(model).items()})
        if check:
            check(plan)
        if plan.predictors and not drop_mtp:
            raise CheckpointError(
                f"{str(model)!r} holds layers for multi-token prediction ({plan.predictors[0]}, ...), and transformers "
                "loads the model without them: they would be missing from the result. Say so with --drop-mtp"
            )
    loaded = load_model(model, allow_pickle=allow_pickle, device=device, family=family)
    if drop_mtp:
        for name in (name for name in COUNTS if hasattr(loaded.config, name)):
            setattr(loaded.config, name, 0)
    if dtype is not None and dtype.itemsize > loaded.dtype.itemsize:
        _cast(loaded, dtype)  # widened before anything is rounded
    name, sample = sample_tokens(folder_of(model, allow_pickle=allow_pickle), loaded.config, text)
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError:
        tokenizer = None
    return loaded, tokenizer, sample, {"source": str(model), "sample_text": name}


def _cast(model: Any, dtype: torch.dtype) -> None:
    # Parameters alone: a narrowed rotary frequency would spoil long contexts, and is wide again after loading.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
