"""Write a rotated or quantized folder as a stream of safetensors shards, without loading the model."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from spinquant.checkpoint.checksums import Known, SourceHash, known_hashes
from spinquant.checkpoint.folder import load_config
from spinquant.checkpoint.reader import Source
from spinquant.checkpoint.run_directory import RunDirectory
from spinquant.compute.distributed import Processes
from spinquant.entrypoints.output_folder import write_config_and_copies, write_record
from spinquant.entrypoints.result import Result
from spinquant.entrypoints.stream_run import Clock, StreamRun
from spinquant.entrypoints.validation import Job
from spinquant.evaluation.equivalence import prove
from spinquant.evaluation.scheme_proof import prove_scheme
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.random_transforms import general_kinds
from spinquant.streaming.pipeline import Rotated, stream

STREAMED = "stream"  # the stage of a run that counts bytes


def stream_folder(job: Job, run: RunDirectory, processes: Processes) -> Result:
    """Carry out a job tensor by tensor: calibrate block by block if needed, then write a stream of shards.

    The folder is a plain checkpoint, or in the job's format if something is quantized or rotated online. The result has
    no model. All processes of a job call this.

    Raises:
        CheckpointError: a tensor of the source is corrupted, or a rotated one overflows its dtype.
        ProofError: rotating moved the logits by more than rounding, or quantizers do not round what they should.
    """
    clock = Clock()
    with closing(Source(job.folder, job.config, without=job.dropped)) as source, kernels_for(source.largest):
        work = StreamRun(source, job, processes.device)
        known = known_hashes(job.folder, source.files, job.request.checksums)
        if job.calibration is not None and processes.first:
            with clock.phase("check"):
                work.note_source(SourceHash(job.folder, source.files).finish(source.files, known))
        if job.request.options.prove and processes.first:
            with clock.phase("prove"):
                kinds = general_kinds(work.result.plan, work.result.rotations)
                twin = prove(job.config, job.spec, kinds=kinds) if work.result.rotations else None
                quantizers = prove_scheme(job.config, job.scheme, job.spec) if job.scheme else None
                work.result = replace(work.result, twin=twin, quantizers=quantizers)
        if job.calibration is not None:
            work.calibrate(run, clock, processes)
        if not run.published:
            _write(work, run, processes, clock, known)
        if processes.first:
            run.publish()
        processes.meet()
    return replace(work.result, seconds=clock.seconds(processes))


def _write(work: StreamRun, run: RunDirectory, processes: Processes, clock: Clock, known: Mapping[str, Known]) -> None:
    """Write the folder; the first process writes everything but tensors."""
    first, calibrated = processes.first, work.job.calibration is not None
    if first:
        work.write_adapters(run.data)  # first, so that an adapter that cannot be rotated is refused before any shard
    # Logits are compared before quantization; a calibration has done that already.
    if first and not work.is_plain and not calibrated:
        with clock.phase("compare"):
            work.compare(Rotated(work.source, work.change, work.untied))
    hashes = None
    if not calibrated:
        with clock.phase("check"):
            hashes = _checked_source(work, run, processes, known)
    progress = work.job.request.options.stage(STREAMED)
    kind: dict[str, Any] = {"processes": processes, "hashes": hashes, "progress": progress}
    clock.add(stream(work.source, work.shards, work.change, run, **kind))
    if hashes is not None:
        with clock.phase("check"):
            work.note_source(hashes.finish(work.source.files, known))
    processes.meet()
    if first:
        write_config_and_copies(work.source, work.shards, run.data, work.changes)
        if work.is_plain:
            with clock.phase("compare"), closing(Source(run.data, load_config(run.data))) as written:
                work.compare(written)
        request = work.job.request
        write_record(work.result, run.data, format=work.job.format, source=work.job.folder, command=request.command)


def _checked_source(
    work: StreamRun, run: RunDirectory, processes: Processes, known: Mapping[str, Known]
) -> SourceHash | None:
    """Check that the source is the one that an interrupted run read, by its hashes.

    A single process hashes the rest while it reads the source, with the returned object. Of several processes none
    reads a whole file, so each hashes some of the files first, and None is returned.
    """
    source, journal = work.source, run.journal()
    hashes = SourceHash(source.folder, source.files)
    if processes.size == 1:
        hashes.check(journal)
        return hashes
    mine = source.files[processes.rank :: processes.size]
    hashes.check([{name: prefix for name, prefix in one.items() if name in mine} for one in journal])
    hashes.finish(mine, known)
    found = processes.gather({name: hashes.files[name].prefix() for name in mine})
    whole = {name: prefix for one in found for name, prefix in sorted(one.items())}
    work.note_source({name: sha256 for name, (_, sha256) in sorted(whole.items())})
    if processes.first:
        run.enter_source(whole)
    return None
