"""Rotate and quantize a folder or hub id into a new folder, which is written atomically."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.architectures.mtp import COUNTS
from spinquant.calibration.blockwise import Calibration, Method
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.checkpoint.folder import check_device, check_finite, load_tokenizer
from spinquant.checkpoint.run_directory import LEARNING, RunDirectory, atomic_folder, opened_run
from spinquant.compute.distributed import LONGEST, Processes, check_same, joined
from spinquant.entrypoints.in_memory import quantize, rotate
from spinquant.entrypoints.learn import learn_from
from spinquant.entrypoints.output_folder import write_record
from spinquant.entrypoints.request import LearnText, Request
from spinquant.entrypoints.result import Options, Result
from spinquant.entrypoints.stream import stream_folder
from spinquant.entrypoints.stream_run import block_store, sample_tokens
from spinquant.entrypoints.validation import Job, check_format, validate
from spinquant.errors import CheckpointError, RotationError
from spinquant.formats.compressed_config import check_plan
from spinquant.formats.compressed_tensors import write_compressed
from spinquant.formats.load import load_model
from spinquant.formats.native import is_marked
from spinquant.learning.options import LearnOptions, Watch
from spinquant.plan import MERGEABLE
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.wrappers import online_part


def save(
    result: Result, out: str | Path, tokenizer: Any = None, *, force: bool = False, format: str = "native"
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
        _write(result, folder, tokenizer, format)


def _write(
    result: Result,
    folder: Path,
    tokenizer: Any,
    format: str,
    *,
    source: Path | None = None,
    command: str | None = None,
) -> None:
    """Write the files of a model in memory, and beside them how it came about."""
    if format == "compressed-tensors":
        online = online_part(result.plan, result.rotations)
        write_compressed(result.model, result.plan, online, result.scheme or Scheme(), result.clips, folder)
    else:
        result.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # In a folder of their own: runtimes load every safetensors file that lies beside the weights.
    write_record(result, folder, format=format, source=source, command=command)


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
    command: str | None = None,
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
    online = [name for name in learned.spec.rotations if name not in MERGEABLE] if learned else []
    if learned and online:
        mergeable = ",".join(n for n in learned.spec.rotations if n in MERGEABLE) or "none"
        raise RotationError(
            f"{', '.join(online)} of the learned rotations run at run time, which a plain folder cannot say. Take the "
            f"others alone (--rotations {mergeable}), or write a folder with online parts: spinquant quantize MODEL "
            "OUT --scheme none --learned LEARNED"
        )
    return run_request(
        Request(
            model=model,
            out=out,
            spec=spec,
            format="hf",
            learned=learned,
            dtype=dtype,
            device=device,
            text=text,
            max_shard_size=max_shard_size,
            checksums=checksums,
            also=also,
            family=family,
            force=force,
            allow_pickle=allow_pickle,
            command=command,
            options=options or Options(),
        )
    )


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
    format: str | None = None,
    runtime: str | None = None,
    family: FamilyLike | None = None,
    learn: LearnOptions | None = None,
    learn_text: LearnText | None = None,
    watch: Watch | None = None,
    command: str | None = None,
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
    return run_request(
        Request(
            model=model,
            out=out,
            spec=spec,
            scheme=scheme,
            format=format,
            method=method,
            calibration=calibration,
            calibration_text=calibration_text,
            learned=learned,
            learn=learn,
            learn_text=learn_text or LearnText(),
            dtype=dtype,
            device=device,
            text=text,
            max_shard_size=max_shard_size,
            checksums=checksums,
            runtime=runtime,
            family=family,
            force=force,
            allow_pickle=allow_pickle,
            command=command,
            options=options or Options(),
            watch=watch or Watch(),
        )
    )


def run_request(request: Request) -> Result:
    """Carry out a request: validate it, learn rotations where that is asked, then stream or load the model as a whole.

    Several processes under torchrun work on it together; each returns the result.
    """
    with joined(request.device, timeout=LONGEST) as processes, processes.together():
        check_device(processes.device)
        job = validate(request)
        check_same(job.settings, processes)
        place = {"force": request.force, "source": job.folder}
        with opened_run(request.out, job.settings, processes, **place) as run:
            if request.learn is not None and not run.published:
                job = job.with_learned(_learn(job, run, processes))
            result = stream_folder(job, run, processes) if job.streamed else _in_memory(job, run)
            return replace(result, learned=job.request.learned)


def _learn(job: Job, run: RunDirectory, processes: Processes) -> LearnedRotations:
    """The rotations that a job learns before it uses them."""
    request = job.request
    assert request.learn is not None and job.scheme is not None
    learned = learn_from(
        request.model,
        run.home / LEARNING,
        job.scheme,
        job.spec,
        request.learn,
        text=request.learn_text,
        device=processes.device,
        dtype=request.dtype or "auto",
        allow_pickle=request.allow_pickle,
        watch=request.watch,
        family=request.family,
    )
    check_same({"learned": learned.digest()}, processes)
    return learned


def _in_memory(job: Job, run: RunDirectory) -> Result:
    """Carry out a job on the model as a whole: pickles, and calibrated classes that keep weights in another form."""
    request = job.request
    if run.published:
        run.publish()
        raise CheckpointError(f"{request.out} exists and is complete: the run that wrote it was only not tidied up")
    loaded, tokenizer, sample, notes = _open(job)
    rotations = request.learned.rotations if request.learned else None
    given: dict[str, Any] = {"rotations": rotations, "options": request.options}
    given["sample"] = None if request.text is None else sample
    if job.scheme is None:
        result = rotate(loaded, job.spec, **given)
        if request.dtype is not None:
            _cast(loaded, request.dtype)
    else:
        if request.dtype is not None:
            _cast(loaded, request.dtype)
        if job.calibration is not None:
            progress = request.options.stage("generate text")
            name, tokens = calibration_tokens(loaded, tokenizer, job.text, progress=progress)
            notes["calibration_text"] = {"text": name, "samples": tokens.shape[0], "length": tokens.shape[1]}
            given |= {"tokens": tokens, "store": block_store(run, tokens, loaded.dtype)}
        result = quantize(loaded, job.scheme, job.spec, method=request.method, calibration=request.calibration, **given)
    learned = {"learned": request.learned.note()} if request.learned else {}
    result = replace(result, notes={**notes, **learned})
    check_finite(result.model, "the model to be saved")
    _write(result, run.data, tokenizer, job.format, source=job.folder, command=request.command)
    run.publish(checksums=False)
    return result


def _open(job: Job) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """The model, its tokenizer where it has one, real tokens to compare logits on, and notes for the record."""
    request = job.request
    loaded = load_model(job.folder, allow_pickle=request.allow_pickle, device=request.device, family=request.family)
    if request.options.drop_mtp:
        for name in (name for name in COUNTS if hasattr(loaded.config, name)):
            setattr(loaded.config, name, 0)
    if request.dtype is not None and request.dtype.itemsize > loaded.dtype.itemsize:
        _cast(loaded, request.dtype)  # widened before anything is rounded
    name, sample = sample_tokens(job.folder, loaded.config, request.text or "auto")
    try:
        tokenizer = load_tokenizer(job.folder)
    except CheckpointError:
        tokenizer = None
    return loaded, tokenizer, sample, {"source": str(request.model), "sample_text": name}


def _cast(model: Any, dtype: torch.dtype) -> None:
    # Parameters alone: a narrowed rotary frequency would spoil long contexts, and is wide again after loading.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
