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
from spinquant.checkpoint.run_directory import LEARNING, RunDirectory, opened_run
from spinquant.compute.distributed import LONGEST, Processes, check_same, joined
from spinquant.entrypoints.in_memory import calibration_arithmetic, quantize, rotate, write_model
from spinquant.entrypoints.learn import learn_from
from spinquant.entrypoints.output_folder import copy_files, write_record
from spinquant.entrypoints.request import LearnText, Request
from spinquant.entrypoints.result import Options, Result
from spinquant.entrypoints.stream import stream_folder
from spinquant.entrypoints.stream_run import block_store, sample_tokens
from spinquant.entrypoints.tuning import with_held_out
from spinquant.entrypoints.validation import Job, settle_format, validate
from spinquant.errors import CheckpointError, RotationError
from spinquant.formats.compressed_config import scheme_for
from spinquant.formats.load import load_model
from spinquant.learning.options import LearnOptions, Watch, for_rounding
from spinquant.learning.tuning import TuneOptions, split_held_out
from spinquant.quantization.scheme import Scheme, parse_scheme
from spinquant.rotation_names import MERGEABLE
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRotations


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
    """Rotate a model folder or hub id into a plain Hugging Face folder, which loads without spinquant installed.

    The model is never loaded as a whole: tensors are rotated one by one and written as a stream of shards. The folder
    is written atomically; rerun an interrupted call to resume it. Only pickled weights are loaded as a whole.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub.
        out: Folder to write.
        spec: Which rotations, of which type, block size and seed; only R1 and R2. Not used with `learned`.
        learned: Learned rotations, instead of those that `spec` describes.
        dtype: Dtype of the weights that are written, and in which logits are compared. Default: that of the source; a
            CPU that is faster in float32 than in half precision compares in it if memory allows.
        text: Source of the real tokens on which logits are compared, see `load_text`; None for no comparison. Default:
            "auto".
        force: Replace `out` if it exists. Default: False.
        allow_pickle: Accept pickled weights (`.bin`), which can run code when they are loaded. Default: False.
        device: Device to compute on. Default: "cpu".
        max_shard_size: Largest shard in bytes. Default: the shards of the source.
        also: Folders of LoRA adapters (peft) and draft heads (EAGLE-3) of the model, which are rotated to match it and
            written to `adapters/NAME` in `out`.
        checksums: A file of SHA-256 checksums, as sha256sum writes it, which the source's files must have. Default:
            none.
        options: Checks, precision, memory and progress. Default: `Options()`.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.
        command: The command line that is named in the model card. Default: none.

    Returns:
        What was done, and how far the logits moved; with the model only if it was loaded as a whole.

    Raises:
        RotationError: A rotation is not possible in this model, a plain checkpoint cannot store it (R3, R4, online R1),
            or an adapter has no exact equivalent in the rotated model.
        ArchitectureError: The architecture is unknown.
        CheckpointError: The source cannot be read, is quantized already or contains values that are not finite, or
            `out` exists.
        ProofError: Rotating moved the logits by more than rounding.

    Example:
        >>> import pathlib, spinquant, tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> temporary = tempfile.TemporaryDirectory()
        >>> folder = pathlib.Path(temporary.name)
        >>> AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        >>> spec = spinquant.RotationSpec("R1,R2")
        >>> result = spinquant.rotate_folder(folder / "model", folder / "rotated", spec)
        >>> result.real.relative < 1e-4
        True
        >>> type(AutoModelForCausalLM.from_pretrained(folder / "rotated")).__name__
        'LlamaForCausalLM'
        >>> temporary.cleanup()
    """
    online = [name for name in learned.spec.rotations if name not in MERGEABLE] if learned else []
    if learned and online:
        mergeable = ",".join(n for n in learned.spec.rotations if n in MERGEABLE) or "none"
        raise RotationError(
            f"{', '.join(online)} of the learned rotations are online rotations, which a plain checkpoint cannot "
            f"store. Use only the others (--rotations {mergeable}), or write the native format: spinquant quantize "
            "MODEL OUT --scheme none --learned LEARNED"
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
    scheme: Scheme | str,
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
    tune: TuneOptions | None = None,
    watch: Watch | None = None,
    command: str | None = None,
) -> Result:
    """Rotate and quantize a model folder or hub id into a folder that `spinquant.load` and transformers load.

    The model is never loaded as a whole: it is calibrated one decoder block at a time and written as a stream of
    shards. Exceptions are pickled weights, and models that need calibration and whose modules cannot be filled from the
    checkpoint block by block. The folder is written atomically; rerun an interrupted call to resume it, which keeps the
    blocks that are calibrated already.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub.
        out: Folder to write.
        scheme: What is quantized, and to how many bits, such as "W4A8KV4"; see `parse_scheme`. Words mean what they
            mean on the command line: for compressed-tensors, activations are symmetric.
        spec: Which rotations, of which type, block size and seed. Not used with `learned`.
        learned: Learned rotations, instead of those that `spec` describes.
        method: How weights are quantized: `rtn` (round-to-nearest, the default), `gptq`, or `gptaq` (GPTQ with the
            asymmetric target).
        calibration: Options of calibration. Default: `Calibration()`.
        calibration_text: Which text to calibrate on; refused if nothing is calibrated. Default: `CalibrationText()`
            with the seed of the rotations.
        dtype: Dtype of what is not quantized, and of the computation. Default: that of the source; a CPU that is faster
            in float32 than in half precision computes in it if memory allows, and writes the source's.
        text: Source of the real tokens on which the logits of the rotated model are compared, see `load_text`; None
            for no comparison. Default: "auto".
        force: Replace `out` if it exists. Default: False.
        allow_pickle: Accept pickled weights (`.bin`), which can run code when they are loaded. Default: False.
        device: Device to compute on. Default: "cpu".
        max_shard_size: Largest shard in bytes. Default: the shards of the source.
        checksums: A file of SHA-256 checksums, as sha256sum writes it, which the source's files must have. Default:
            none.
        options: Checks, precision, memory and progress. Default: `Options()`.
        format: `native`, `compressed-tensors` or `hf`. Default: what `runtime` reads, else `native`.
        runtime: Name of a runtime (`formats/runtimes.py`); what it does not run is refused. Default: none.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.
        learn: Learn rotations first, with these options. Default: no learning.
        learn_text: Text to learn from and to score candidates on. Default: `LearnText()`.
        tune: Tune scales, norms, biases and clip ratios of the quantized model towards the 16-bit one, on the
            calibration text. The model is then loaded as a whole. Default: no tuning.
        watch: Progress callbacks of learning.
        command: The command line that is named in the model card. Default: none.

    Returns:
        What was done, and how far rotating moved the logits; with the model only if it was loaded as a whole.

    Raises:
        SchemeError: The scheme does not fit the model, or the format or runtime does not support it.
        RotationError: A rotation is not possible in this model, or the format or runtime does not support it.
        CalibrationError: Options of calibration do not fit the method, or its tokens cannot be used.
        ArchitectureError: The architecture is unknown.
        CheckpointError: The source cannot be read, is quantized already or contains values that are not finite, or
            `out` exists.
        LearningError: Rotations cannot be learned with these options, or the model cannot be tuned with them.
        ProofError: Rotating moved the logits by more than rounding.

    Example:
        >>> import pathlib, spinquant, tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> temporary = tempfile.TemporaryDirectory()
        >>> folder = pathlib.Path(temporary.name)
        >>> AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        >>> spec = spinquant.RotationSpec("R1,R2,R3,R4")
        >>> result = spinquant.quantize_folder(folder / "model", folder / "quantized", "W4A8KV4", spec)
        >>> str(result.scheme), result.method, result.model
        ('W4A8KV4', 'rtn', None)
        >>> type(spinquant.load(folder / "quantized")).__name__
        'LlamaForCausalLM'
        >>> temporary.cleanup()
    """
    if isinstance(scheme, str):
        rotations = learned.spec if learned else spec
        scheme = scheme_for(scheme, settle_format(format, runtime, parse_scheme(scheme), rotations))
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
            learn=None if learn is None else for_rounding(learn, scheme, method),
            learn_text=learn_text or LearnText(),
            tune=tune,
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
    """Carry out a request: validate it, learn rotations if asked, then stream the model or load it as a whole.

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
        processes=processes,
        dtype=request.dtype or "auto",
        allow_pickle=request.allow_pickle,
        watch=request.watch,
        family=request.family,
        memory=request.options.memory,
    )
    check_same({"learned": learned.digest()}, processes)
    return learned


def _in_memory(job: Job, run: RunDirectory) -> Result:
    """Carry out a job that cannot be streamed (`Job.streamed`) on a model that is loaded as a whole."""
    request = job.request
    if run.published:
        run.publish()
        raise CheckpointError(f"{request.out} exists and is complete: only the run directory had not been removed")
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
        tokens = None
        if job.calibration is not None or request.tune is not None:
            progress = request.options.stage("generate text")
            name, tokens = calibration_tokens(
                loaded, tokenizer, with_held_out(job.text, request.tune), progress=progress
            )
            samples = len(split_held_out(tokens, request.tune)[0])
            notes["calibration_text"] = {"text": name, "samples": samples, "length": tokens.shape[1]}
            given["tokens"] = tokens
            given["store"] = block_store(run, tokens, loaded.dtype)
        if job.calibration is not None and tokens is not None:
            asked = replace(job.calibration, dtype=job.calibration.dtype or request.dtype)
            computed = calibration_arithmetic(loaded, plan_of(loaded), asked)
            given["store"] = block_store(run, tokens, computed.dtype)
            given |= {"calibration": replace(job.calibration, dtype=computed.dtype)}
            notes["arithmetic"] = {"calibration": computed.to_dict()}
        result = quantize(
            loaded, job.scheme, job.spec, method=request.method, format=job.format, tune=request.tune, **given
        )
        result = replace(result, calibration=job.calibration)
    learned = {"learned": request.learned.note()} if request.learned else {}
    result = replace(result, notes={**result.notes, **notes, **learned})
    check_finite(result.model, "the model to be saved")
    write_model(result, run.data, job.format)
    copy_files(job.folder, run.data)  # as a stream does: after the model, whose generation_config.json is the source's
    write_record(result, run.data, format=job.format, source=job.folder, command=request.command)
    run.publish(checksums=False)
    return result


def _open(job: Job) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """The model, its tokenizer if it has one, real tokens to compare logits on, and notes for the record."""
    request = job.request
    loaded = load_model(job.folder, allow_pickle=request.allow_pickle, device=request.device, family=request.family)
    if request.options.drop_mtp:
        for name in (name for name in COUNTS if hasattr(loaded.config, name)):
            setattr(loaded.config, name, 0)
    if request.dtype is not None and request.dtype.itemsize > loaded.dtype.itemsize:
        _cast(loaded, request.dtype)  # before anything is rounded
    name, sample = sample_tokens(job.folder, loaded.config, request.text or "auto")
    try:
        tokenizer = load_tokenizer(job.folder)
    except CheckpointError:
        tokenizer = None
    return loaded, tokenizer, sample, {"source": str(request.model), "sample_text": name}


def _cast(model: Any, dtype: torch.dtype) -> None:
    # Parameters only: rotary frequencies in half precision would spoil long contexts; loading makes them float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
