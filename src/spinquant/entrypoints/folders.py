"""From a folder or hub id to a new folder, which appears complete or not at all."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from spinquant.adapters.folder import read_adapters
from spinquant.architectures import FamilyLike, make_plan
from spinquant.architectures.mtp import COUNTS
from spinquant.calibration.blockwise import Calibration, Method
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.checkpoint.atomic import atomic_folder, check_free
from spinquant.checkpoint.folder import (
    BESIDE,
    RECORD,
    ROTATIONS,
    check_finite,
    check_unquantized,
    folder_of,
    has_pickles_only,
    load_config,
    load_tokenizer,
    read_headers,
)
from spinquant.entrypoints.in_memory import quantize, rotate
from spinquant.entrypoints.request import Request, store_for
from spinquant.entrypoints.result import Options, Result
from spinquant.entrypoints.stream import stream_folder
from spinquant.entrypoints.stream_run import sample_tokens
from spinquant.entrypoints.validation import check_format, check_request
from spinquant.errors import CheckpointError, RotationError
from spinquant.formats.compressed_config import check_plan
from spinquant.formats.compressed_tensors import write_compressed
from spinquant.formats.load import load_model
from spinquant.formats.native import is_marked
from spinquant.plan import MERGEABLE, Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.serialization import to_save
from spinquant.rotations.wrappers import online_part
from spinquant.streaming.calibrate import Calibrating

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
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if learned and online:
        raise RotationError(
            f"{', '.join(online)} of the learned rotations run at run time, which a plain folder cannot say. Take the "
            f"others alone (--rotations {','.join(n for n in spec.rotations if n in MERGEABLE) or 'none'}), or write a "
            "folder with online parts: spinquant quantize MODEL OUT --scheme none --learned LEARNED"
        )
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
            also=read_adapters(also),
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
    if streamed:
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
        store = store_for(out, model, request, tokens, loaded.dtype, loaded.config)
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


def _learned_note(learned: LearnedRotations | None) -> dict[str, Any]:
    return {"learned": learned.note()} if learned else {}


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
