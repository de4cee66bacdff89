"""State of one streamed job: rotations, shards and their packing, calibration, and the comparison of logits."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinquant.adapters.base_model import BaseModel
from spinquant.adapters.folder import ADAPTERS, write_adapter
from spinquant.architectures import RECORDED, recorded_family
from spinquant.architectures.model_classes import class_name, is_body
from spinquant.architectures.mtp import COUNTS
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.data import calibration_tokens, fitted, load_text, token_windows
from spinquant.checkpoint.folder import load_tokenizer
from spinquant.checkpoint.reader import Source, read_gains
from spinquant.checkpoint.run_directory import CALIBRATION, RunDirectory
from spinquant.compute.distributed import Processes
from spinquant.compute.dtypes import Arithmetic
from spinquant.compute.hashing import digest
from spinquant.entrypoints.arithmetic import arithmetic_by_block, arithmetic_of
from spinquant.entrypoints.local_paths import source_name
from spinquant.entrypoints.output_folder import dtype_of, model_dtype
from spinquant.entrypoints.result import Result, Stage
from spinquant.entrypoints.validation import Job
from spinquant.errors import CheckpointError
from spinquant.evaluation.equivalence import allowed, check
from spinquant.formats.compressed_config import check_plan, quantization_config
from spinquant.formats.compressed_packing import CompressedPacking
from spinquant.formats.load import load_model
from spinquant.formats.native import make_config
from spinquant.formats.native_packing import Finished, NativePacking
from spinquant.models.context import context_of
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.quantization.targets import check_fits, linears_of, parts_tied
from spinquant.rotations.factory import make_rotations
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.mean_preserving import check_mean_preserving
from spinquant.rotations.wrappers import check_given, in_precision, online_part
from spinquant.streaming.calibrate import calibrate_on_disk
from spinquant.streaming.compare import compare_on_disk
from spinquant.streaming.offloaded_model import Weights, form_in, hollow_model, unfillable
from spinquant.streaming.pipeline import Rotated, Timing
from spinquant.streaming.rounding_noise import rounding_on_disk
from spinquant.streaming.shards import Change, Packing, Plain, make_shards

SAMPLE_TOKENS = 128  # real tokens on which the fused model is compared with the original, if its context allows
# A decoder block is loaded for that if it takes at most BLOCK_SHARE times the largest tensor in float32, plus so many
# bytes.
BLOCK_SHARE, BLOCK_FREE = 2, 1 << 28


class Clock:
    """Seconds per phase; reading, computing and writing overlap."""

    def __init__(self):
        self._start = time.perf_counter()
        phases = ("prove", "calibrate", "read", "check", "compute", "write", "hash", "compare")
        self._phases: dict[str, float] = dict.fromkeys(phases, 0.0)
        self._bytes = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[name] += time.perf_counter() - start

    def add(self, timing: Timing) -> None:
        for name in ("read", "check", "compute", "write", "hash"):
            self._phases[name] += getattr(timing, name)
        self._bytes += timing.nbytes

    def seconds(self, processes: Processes) -> dict[str, float]:
        """Seconds per phase (summed over processes) and in total, and the megabytes that were read."""
        total = time.perf_counter() - self._start
        found = processes.gather({**self._phases, "megabytes": self._bytes / 1e6})
        summed = {name: sum(one[name] for one in found) for name in found[0]}
        return {**summed, "total": total, "processes": processes.size}


class StreamRun:
    """Rotations, shards, packing and changes of the config that follow from a job and its open source."""

    def __init__(self, source: Source, job: Job, device: str):
        self.source, self.job, self.device = source, job, device
        request, plan, scheme = job.request, job.plan, job.scheme
        assert plan is not None
        rotations = make_rotations(plan, job.spec) if request.learned is None else request.learned.rotations
        check_given(plan, job.spec, rotations)
        check_mean_preserving(plan, rotations)
        if scheme is not None:
            check_fits(plan, source.shapes, scheme)
            if job.format == "compressed-tensors":
                check_plan(plan, scheme, job.spec)
        self.online = in_precision(online_part(plan, rotations), request.options.precision)
        self.is_plain = not self.online and (scheme is None or scheme == Scheme(lm_head=scheme.lm_head))
        self.change = Change(
            plan,
            rotations,
            read_gains(source, plan),
            packing=Plain(),
            dtype=request.dtype,
            fp8_dtype=dtype_of(job.config),
            precision=request.options.precision,
            device=device,
        )
        parts = scheme is not None and not self.is_plain and parts_tied(plan, scheme)
        unties = bool(plan.ties) and (plan.unties(rotations) or parts)
        self.untied = [(tie.tensor, tie.source) for tie in plan.ties] if unties else []
        self.changes: dict[str, Any] = {"tie_word_embeddings": False} if unties else {}
        if is_body(class_name(job.config)):  # which the source may name by its causal LM
            self.changes["architectures"] = job.config.architectures
        if request.options.drop_mtp:
            self.changes |= dict.fromkeys((name for name in COUNTS if hasattr(job.config, name)), 0)
        if recorded_family(job.config) is not None:  # the written folder then needs no family file
            self.changes[RECORDED] = recorded_family(job.config)
        if request.dtype is not None:
            self.changes["dtype"] = str(request.dtype).removeprefix("torch.")
        notes: dict[str, Any] = {"source": str(request.model)}
        if request.learned is not None:
            notes["learned"] = request.learned.note()
        method = None if scheme is None else "rtn"
        self.result = Result(None, plan, job.spec, rotations, scheme=scheme, method=method, notes=notes)
        self._store_as(None)

    def _store_as(self, finished: Finished | None) -> None:
        """Set shards and packing once all clip ratios are known. finished: weights that calibration has quantized."""
        job = self.job
        if not self.is_plain:
            packing, described = FORMATS[job.format](self, job.scheme or Scheme(), finished)
            self.change = replace(self.change, packing=packing)
            self.changes["quantization_config"] = json.loads(json.dumps(described))
        self.shards = make_shards(
            self.source, self.change, untied=self.untied, max_shard_size=job.request.max_shard_size
        )

    def note_source(self, found: Mapping[str, str]) -> None:
        """Record the SHA-256 of the source's files."""
        self.result = replace(self.result, notes={**self.result.notes, "source_files": dict(found)})

    def calibrate(self, run: RunDirectory, clock: Clock, processes: Processes) -> None:
        """Calibrate and quantize block by block into the run directory, from which the stream takes the weights.

        The first process does that while the others wait; then it shares the clip ratios with them.
        """
        config = unquantized(self.job.config)
        dtype = self.job.request.dtype or model_dtype(config, self.source)
        rotated = Rotated(self.source, self.change, self.untied)
        mine = self._calibrated(run, config, dtype, rotated, clock, processes) if processes.first else None
        found = processes.agree(mine)
        computed = {**self.result.notes.get("arithmetic", {}), "calibration": found["arithmetic"]}
        notes = {**self.result.notes, "calibration_text": found["text"], "arithmetic": computed}
        clips, how = Clips.from_dict(found["clips"]), {"method": self.job.request.method}
        self.result = replace(self.result, calibration=self.job.calibration, clips=clips, notes=notes, **how)
        plan, store = self.result.plan, BlockStore(run.pieces(CALIBRATION, writes=False))
        form = form_in(hollow_model(config, dtype), rotated, plan)
        self._store_as(Finished(store, (*plan.blocks, *plan.heads), dtype, form))

    def _calibrated(
        self,
        run: RunDirectory,
        config: Any,
        dtype: torch.dtype,
        rotated: Rotated,
        clock: Clock,
        processes: Processes,
    ) -> dict[str, Any]:
        """Calibrate; the clip ratios and the text that was used, ready for JSON."""
        job, request = self.job, self.job.request
        assert job.calibration is not None and job.scheme is not None
        with clock.phase("compare"):
            self.compare(rotated)
        with clock.phase("calibrate"):
            options = replace(request.options, progress=_looking(request.options.progress, processes))
            name, tokens = tokens_for(job, progress=options.stage("generate text"))
            wanted, device = job.calibration.dtype or request.dtype, job.calibration.device or self.device
            computed = self._arithmetic("calibration", dtype, device, wanted)
            clips = calibrate_on_disk(
                config,
                self.result.plan,
                self.online,
                rotated,
                job.scheme,
                tokens,
                job.calibration,
                block_store(run, tokens, computed.dtype),
                error_feedback=request.method != "rtn",
                dtype=computed.dtype,
                stored=dtype,
                device=self.device,
                memory=options.memory,
                progress=options.stage("calibrate"),
            )
        about = {"text": name, "samples": tokens.shape[0], "length": tokens.shape[1]}
        return {"clips": clips.to_dict(), "text": about, "arithmetic": computed.to_dict()}

    def _arithmetic(
        self, what: str, stored: torch.dtype, device: torch.device | str, wanted: torch.dtype | None
    ) -> Arithmetic:
        return arithmetic_by_block(what, self.source, self.result.plan, stored, device, wanted)

    def write_adapters(self, data: Path) -> None:
        """Write the LoRA adapters and draft heads, rotated, into a folder `adapters` of `data`."""
        change, found, name = self.change, {}, source_name(str(self.job.request.out))
        base = BaseModel(name, self.job.config, self.source, change.plan, change.rotations)
        for name, folder in self.job.adapters.items():
            found[name] = write_adapter(folder, base, data / ADAPTERS / name)
        if found:
            self.result = replace(self.result, notes={**self.result.notes, "adapters": found})

    def compare(self, after: Weights) -> None:
        """Compare logits on real tokens before and after rotating, if blocks can be loaded one by one from disk."""
        request, result, source = self.job.request, self.result, self.source
        if request.text is None or not result.rotations:
            return
        config = unquantized(self.job.config)
        written = [job.dtype for shard in self.shards for job in shard.jobs if job.dtype.is_floating_point]
        dtype = max((*written, *(stored.dtype for stored in source.tensors.values())), key=_width)
        reason = self._why_not_compared(hollow_model(config, dtype))
        if reason is not None:
            self.result = replace(result, notes={**result.notes, "real_tokens": f"not compared: {reason}"})
            return
        name, tokens = sample_tokens(source.folder, config, request.text)
        narrowest, computed = min(written, key=_width), self._arithmetic("comparison", dtype, "cpu", request.dtype)
        if _width(computed.dtype) < _width(dtype):  # what is compared is not rounded to a narrower dtype first
            computed = Arithmetic(dtype, "the wider dtype of the source and the result")
        dtype = computed.dtype
        real = compare_on_disk(
            config,
            result.plan,
            result.rotations,
            source,
            after,
            tokens,
            dtype=dtype,
            tolerance=allowed(narrowest),
            online=self.online,
            progress=request.options.stage("compare"),
        )
        about = {**result.notes.get("arithmetic", {}), "comparison": computed.to_dict()}
        notes = {**result.notes, "sample_text": name, "arithmetic": about}
        if not real.relative <= allowed(narrowest):  # an ill-conditioned model, or a wrong one
            rounding = rounding_on_disk(config, result.plan, source, tokens, dtype=dtype, written=narrowest)
            notes["rounding_alone"] = rounding
            if not request.options.allow_inexact:
                check(real, narrowest, what="this model", rounding=rounding)
                real = replace(real, module=None)
        self.result = replace(result, real=real, notes=notes)

    def _why_not_compared(self, model: Any) -> str | None:
        plan, source, options = self.result.plan, self.source, self.job.request.options
        reason = unfillable(model, plan)
        if reason is not None or self.job.calibration is not None:  # a calibration loads every block in any case
            return reason
        room = max(BLOCK_SHARE * source.largest + BLOCK_FREE, options.memory or 0)
        state = model.state_dict()
        for block in plan.blocks:
            size = sum(tensor.nbytes for name, tensor in state.items() if name.startswith(f"{block}."))
            if size > room:
                needed = math.ceil(size / 1e8) / 10
                return f"{block} takes more than {room} bytes; --memory {needed:.1f}GB allows it"
        return None


def _native(run: StreamRun, scheme: Scheme, finished: Finished | None) -> tuple[Packing, dict[str, Any]]:
    """Packing and `quantization_config` of the native format."""
    plan = run.result.plan
    described = make_config(plan, run.online, run.job.spec, scheme, run.result.clips)
    return NativePacking(plan, scheme, run.online, finished), described.to_dict()


def _compressed(run: StreamRun, scheme: Scheme, finished: Finished | None) -> tuple[Packing, dict[str, Any]]:
    """Packing and `quantization_config` of compressed-tensors, which names modules; tensors keep their stored names."""
    plan, config = run.result.plan, unquantized(run.job.config)
    dtype = run.job.request.dtype or model_dtype(config, run.source)
    packing = CompressedPacking(plan, scheme, run.online, dtype, finished, run.result.clips)
    model = hollow_model(config, dtype)
    plan = plan_of(model)
    covered = set(linears_of(plan, scheme)) if scheme.weights is not None else set()
    ignore = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name not in covered]
    return packing, quantization_config(plan, run.online, scheme, ignore=ignore)


FORMATS = {"native": _native, "compressed-tensors": _compressed}


def _looking(progress: Stage | None, processes: Processes) -> Stage:
    """A progress function that also raises an error when another process has ended."""

    def report(stage: str, done: int, total: int) -> None:
        processes.look()
        if progress:
            progress(stage, done, total)

    return report


def unquantized(config: Any) -> Any:
    """A copy of a config without `quantization_config`: an FP8 checkpoint is dequantized when it is read."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _width(dtype: torch.dtype) -> tuple[bool, int, int]:
    # bfloat16 is coarser than float16.
    return dtype.is_floating_point, dtype.itemsize, dtype != torch.bfloat16


def sample_tokens(folder: Path, config: Any, text: str) -> tuple[str, torch.Tensor]:
    """(name, tokens) of real text, int64, (1, length); random tokens for a folder without a tokenizer."""
    length = min(SAMPLE_TOKENS, context_of(config) or SAMPLE_TOKENS)
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError:
        generator = torch.Generator().manual_seed(0)
        vocabulary = config.get_text_config().vocab_size
        return "random tokens (no tokenizer)", torch.randint(0, vocabulary, (1, length), generator=generator)
    name, content = load_text(text, tokenizer)
    return name, token_windows(tokenizer, content[:20_000], length=length, count=1)


def tokens_for(job: Job, *, progress: Callable[[int, int], None]) -> tuple[str, Tensor]:
    """(name, tokens) of the calibration text. Generating it takes the whole model in memory."""
    request = job.request
    try:
        tokenizer = load_tokenizer(job.folder)
    except CheckpointError:
        tokenizer = None
    text = fitted(job.text, job.config)
    generated = text.text == "generated" or (tokenizer is None and text.text == "auto")
    loaded = None
    if generated:
        (computed,) = arithmetic_of(job.folder, device="cpu", wanted=request.dtype)
        loaded = load_model(job.folder, dtype=computed.dtype, family=request.family)
    return calibration_tokens(loaded, tokenizer, text, progress=progress)


def block_store(run: RunDirectory, tokens: Tensor, dtype: torch.dtype) -> BlockStore:
    """The store of a run's calibrated blocks. With other tokens than those of an interrupted run it starts empty."""
    return BlockStore(run.pieces(CALIBRATION, [digest(tokens), dtype]))
