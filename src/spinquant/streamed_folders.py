"""From a folder or hub id to a new folder without loading the model: what is around the stream.

Everything that is not a weight is copied as it is; config.json is changed where it has to be. Other formats of the same
weights (pickles, GGUF, consolidated.safetensors, ...) stay behind: they would still hold the unrotated model.
"""

import copy
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from spinquant.architectures import make_plan
from spinquant.calibrate import load_text, token_windows
from spinquant.checkpoint import (
    BESIDE,
    INDEX,
    RECORD,
    ROTATIONS,
    SINGLE,
    check_device,
    check_replaceable,
    check_unquantized,
    folder_of,
    is_full,
    load_config,
    load_tokenizer,
    weights_digest,
)
from spinquant.disk_model import hollow_model, unfillable
from spinquant.disk_proof import compare_on_disk, tolerance_of
from spinquant.errors import CheckpointError, SchemeError, SpinquantError
from spinquant.formats.native import distinct_rotations
from spinquant.pipeline import Options, Result
from spinquant.plan import Plan
from spinquant.proof import check, prove
from spinquant.resumable import Resumable, write_file
from spinquant.rotation import RotationSpec, make_rotations
from spinquant.source import Source, fp8_block
from spinquant.stream import Change, Shard, Timing, make_shards, read_gains, stream

# Weights in any form: what is not streamed stays behind.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite")
SAMPLE_TOKENS = 128  # real tokens on which the fused model is compared with the original
# A decoder block is loaded for that where it takes at most so many times the largest tensor in float32, or bytes.
BLOCK_SHARE, BLOCK_FREE = 2, 1 << 28
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Request:
    """What a stream is asked to do.

    max_shard_size: bytes; None for the shards of the source. text: of the real tokens on which the result is compared
    with the source, as in `load_text`; None for no comparison.
    """

    spec: RotationSpec
    dtype: torch.dtype | None = None
    device: str = "cpu"
    max_shard_size: int | None = None
    text: str | None = "auto"
    options: Options = field(default_factory=Options)

    def settings(self, model: str | Path, folder: Path) -> dict[str, Any]:
        """Everything that decides the bytes of the result, as JSON."""
        return {
            "spinquant": version("spinquant"),
            "torch": torch.__version__,
            "model": str(model),
            "files": weights_digest(folder),
            **self.spec.to_dict(),
            "dtype": str(self.dtype),
            "precision": str(self.options.precision),
            "device": self.device,
            "max_shard_size": self.max_shard_size,
            "text": self.text,
        }


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises SchemeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip(), re.IGNORECASE)
    unit = (match.group(2) or "").upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise SchemeError(f"cannot read size {text!r}: expected a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return int(float(match.group(1)) * _UNITS[unit])


def stream_rotation(model: str | Path, out: str | Path, request: Request, *, force: bool = False) -> Result:
    """Rotate a folder or hub id into a plain folder, tensor by tensor.

    A run that was stopped goes on where it was when it is repeated. The result has no model in it. Raises
    CheckpointError for a source that is damaged, an `out` that exists, or a stopped run that was asked for something
    else.
    """
    start = time.perf_counter()
    check_device(request.device)
    folder = folder_of(model)
    check_replaceable(out, force=True, source=folder)
    config = load_config(model)
    if fp8_block(config) is None:
        check_unquantized(config, model)
    source = Source(folder, config)
    options = request.options
    try:
        plan = make_plan(config, source.shapes)
        rotations = make_rotations(plan, request.spec)
        twin = prove(config, request.spec) if options.prove and rotations else None
        proved, checked = time.perf_counter(), 0.0
        change = Change(
            plan,
            rotations,
            read_gains(source, plan),
            dtype=request.dtype,
            fp8_dtype=_dtype_of(config),
            precision=options.precision,
            device=request.device,
        )
        result = Result(None, plan, request.spec, rotations, twin=twin, notes={"source": str(model)})
        unties = "residual" in rotations
        untied = [(tie.tensor, tie.source) for tie in plan.ties] if unties else []
        shards = make_shards(source, change, untied=untied, max_shard_size=request.max_shard_size)
        with _open(out, request.settings(model, folder), force) as work:
            timing = Timing()
            if not work.published:  # else a run before was killed between its last rename and tidying up
                timing = stream(source, shards, change, work, progress=options.stage("rotate (bytes)"))
                changes: dict[str, Any] = {"tie_word_embeddings": False} if plan.ties and unties else {}
                if request.dtype is not None:
                    changes["dtype"] = str(request.dtype).removeprefix("torch.")
                write_companions(source, shards, work.data, changes)
                checked = time.perf_counter()
                result = _compare(result, request, config, source, work.data)
                checked = time.perf_counter() - checked
                write_beside(result, work.data)
            work.publish()
    finally:
        source.close()
    total = time.perf_counter() - start
    seconds = {"prove": proved - start, **vars(timing), "compare": checked, "total": total}
    read = seconds.pop("nbytes")
    return replace(result, seconds={**seconds, "megabytes": read / 1e6})


def _compare(result: Result, request: Request, config: Any, source: Source, folder: Path) -> Result:
    """Compare the logits of real tokens before and after, where the blocks of the model can be filled from disk."""
    if request.text is None or not result.rotations:
        return result
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # FP8 is read as the numbers that it stands for
    after = Source(folder, load_config(folder))
    try:
        written = [stored.dtype for stored in after.tensors.values() if stored.dtype.is_floating_point]
        dtype = max((stored.dtype for stored in (*after.tensors.values(), *source.tensors.values())), key=_width)
        reason = _why_not(result.plan, hollow_model(config, dtype), source)
        if reason is not None:
            return replace(result, notes={**result.notes, "real_tokens": f"not compared: {reason}"})
        name, tokens = sample_tokens(source.folder, config, request.text)
        tolerance = tolerance_of(min(written, key=_width))
        real = compare_on_disk(
            config,
            result.plan,
            result.rotations,
            source,
            after,
            tokens,
            dtype=dtype,
            tolerance=tolerance,
            progress=request.options.stage("compare"),
        )
    finally:
        after.close()
    if not request.options.allow_inexact:
        check(real, min(written, key=_width), what="this model")
    return replace(result, real=real, notes={**result.notes, "sample_text": name})


def _why_not(plan: Plan, model: Any, source: Source) -> str | None:
    lacking = unfillable(model, source, {tie.tensor: tie.source for tie in plan.ties})
    if lacking is not None:
        return f"the model's class keeps {lacking!r} in another form than the checkpoint"
    largest = max(math.prod(stored.entry.shape) for stored in source.tensors.values())
    state = model.state_dict()
    for block in plan.blocks:
        size = sum(tensor.nbytes for name, tensor in state.items() if name.startswith(f"{block}."))
        if size > BLOCK_SHARE * 4 * largest + BLOCK_FREE:
            return f"{block} has {size} bytes, more than what a stream may hold in memory"
    return None


def _width(dtype: torch.dtype) -> tuple[bool, int, int]:
    # bfloat16 is the coarser of the two half types.
    return dtype.is_floating_point, dtype.itemsize, dtype != torch.bfloat16


def sample_tokens(folder: Path, config: Any, text: str) -> tuple[str, torch.Tensor]:
    """(name, tokens) of real text, int64 (1, length); random tokens for a folder that has no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError:
        # A folder of weights alone can be rotated too; random tokens then stand in for text.
        generator = torch.Generator().manual_seed(0)
        vocabulary = config.get_text_config().vocab_size
        return "random tokens (no tokenizer)", torch.randint(0, vocabulary, (1, SAMPLE_TOKENS), generator=generator)
    name, content = load_text(text)
    return name, token_windows(tokenizer, content[:20_000], length=SAMPLE_TOKENS, count=1)


@contextmanager
def _open(out: str | Path, settings: Mapping[str, Any], force: bool) -> Iterator[Resumable]:
    work, keep = Resumable(out, settings, force=force), True
    try:
        yield work
    except SpinquantError:
        keep = False  # the same would happen again
        raise
    except OSError as error:
        if not is_full(error):
            raise
        raise CheckpointError(
            f"no space left while writing {out}. Free some space and repeat the command: it goes on behind the last "
            f"file that was finished (they are kept in {work.home})"
        ) from error
    finally:
        work.close(keep=keep)


def write_companions(source: Source, shards: Sequence[Shard], folder: Path, changes: Mapping[str, Any]) -> None:
    """Write all that lies beside the weights: the index, the config with its changes, and copies of everything else."""
    names = {shard.file: shard.layout for shard in shards}
    if list(names) != [SINGLE]:
        sizes = sum(torch.Size(s).numel() * d.itemsize for layout in names.values() for d, s in layout.values())
        weight_map = {name: file for file, layout in names.items() for name in layout}
        index = {
            "metadata": {**source.index_metadata, "total_size": sizes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if fp8_block(config) is not None:
        del config["quantization_config"]
        changes = {"dtype": str(_dtype_of(config)).removeprefix("torch."), **changes}
    _change(config, changes)
    write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    for path in companions(source.folder):
        write_file(folder / path, source.folder / path)


def companions(folder: Path) -> list[Path]:
    """The files of a folder that are copied, relative to it: no weights, nothing hidden, nothing of ours."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or inside.parts[0] == BESIDE or not path.is_file() or inside == Path("config.json"):
            continue
        if path.suffix not in WEIGHTS and not path.name.endswith(".index.json"):
            found.append(inside)
    return found


def write_beside(result: Result, folder: Path) -> None:
    """Write the rotations and the record of how the folder came about."""
    kinds = distinct_rotations(result.rotations)
    tensors = {f"{i}.{k}": v.contiguous() for i, r in enumerate(kinds) for k, v in r.tensors().items()}
    write_file(folder / BESIDE / ROTATIONS, save_bytes(tensors))
    record = json.dumps(result.record(), indent=1, default=dict)
    write_file(folder / BESIDE / RECORD, (record + "\n").encode())


def _change(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        # Configs of old transformers say torch_dtype, those of models with several parts say it for the text part.
        places = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        keys = [(part, name) for part in places for name in (key, f"torch_{key}") if name in part]
        for part, name in keys or [(config, key)]:
            part[name] = value


def _dtype_of(config: Any) -> torch.dtype:
    """The dtype that an FP8 checkpoint computes in."""
    values = config if isinstance(config, dict) else {"dtype": getattr(config, "dtype", None)}
    found = values.get("dtype") or values.get("torch_dtype")
    found = getattr(torch, found) if isinstance(found, str) else found
    return found if found in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16
