"""From a folder or hub id to a new folder without loading the model: what is around the stream."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from spinquant.architectures import prediction_tensors
from spinquant.checkpoint.atomic import check_free, check_replaceable, is_full, why_full
from spinquant.checkpoint.checksums import Known, SourceHash, known_hashes
from spinquant.checkpoint.folder import check_device, check_unquantized, folder_of, load_config, read_headers
from spinquant.checkpoint.reader import Source, fp8_block
from spinquant.checkpoint.resumable import Growing, Resumable, read_settings
from spinquant.compute.distributed import Processes, joined
from spinquant.entrypoints.output_folder import write_config_and_copies, write_record
from spinquant.entrypoints.request import Request
from spinquant.entrypoints.result import Result
from spinquant.entrypoints.stream_run import Clock, Run
from spinquant.errors import (
    CheckpointError,
    ProcessError,
    SourceChangedError,
    SpinquantError,
)
from spinquant.evaluation.equivalence import prove
from spinquant.rotations.fast_transform import kernels_for
from spinquant.streaming.pipeline import Rotated, stream

STREAMED = "stream"  # the stage of a run that counts bytes
# The others wait while the first process compares; that one of them ended is seen otherwise.
_LONGEST = timedelta(days=7)


def stream_folder(model: str | Path, out: str | Path, request: Request, *, force: bool = False) -> Result:
    """Rotate a folder or hub id, and quantize its weights where a scheme says so, tensor by tensor.

    Where they are calibrated, decoder block by decoder block first; what that finds is kept beside `out` until it is
    written.

    The result is a plain folder, or one in our own format where something is quantized or rotated at run time. A run
    that was stopped goes on where it was when it is repeated. The result has no model in it. Raises CheckpointError for
    a source that is damaged, an `out` that exists, or a stopped run that was asked for something else.
    """
    clock = Clock()
    with joined(request.device, timeout=_LONGEST) as processes, processes.together():
        check_device(processes.device)
        folder = folder_of(model)
        begun = read_settings(Growing(out).home) is not None
        check_replaceable(out, force=force or begun, source=folder)
        if request.calibrating:
            check_free(out, force=force, source=folder)  # before hours of calibration
        config = load_config(model, family=request.family)
        if fp8_block(config) is None:
            check_unquantized(config, model)
        dropped = prediction_tensors(config, read_headers(folder)) if request.options.drop_mtp else ()
        source = Source(folder, config, without=frozenset(dropped))
        with closing(source), kernels_for(source.largest) as compiled:
            settings = request.settings(model, folder, config, compiled=compiled)
            check_same(settings, processes)
            run = Run(source, config, replace(request, device=processes.device), model)
            known = known_hashes(folder, source.files, request.checksums)
            if request.calibrating and processes.first:
                with clock.phase("check"):
                    run.note_source(SourceHash(folder, source.files).finish(source.files, known))
            if request.options.prove and run.result.rotations and processes.first:
                with clock.phase("prove"):
                    run.result = replace(run.result, twin=prove(config, request.spec))
            store = run.calibrate(out, clock, processes) if request.calibrating else None
            with _open(out, settings, force, processes) as work:
                _write(run, work, Growing(out), processes, clock, known)
            if store is not None and processes.first:
                store.remove()
        result = replace(run.result, seconds=clock.seconds(processes))
    return result


def check_same(settings: Mapping[str, Any], processes: Processes) -> None:
    """Raise ProcessError where processes were asked for different things, or have learned different rotations."""
    # Each machine may have a copy of the model, elsewhere and of another time.
    found = processes.gather({name: value for name, value in settings.items() if name not in ("model", "files")})
    names = sorted({name for one in found for name in one if one[name] != found[0][name]})
    if names:
        raise ProcessError(
            f"the processes of this job differ in {', '.join(names)}: start all of them with the same command, on the "
            "same files. Rotations that they have learned may differ in the last bits where their machines do: then "
            "use `spinquant learn` first, and --learned with what it writes"
        )


def _write(
    run: Run, work: Resumable | None, files: Growing, processes: Processes, clock: Clock, known: Mapping[str, Known]
) -> None:
    """Write the folder; the first process, which has `work`, does all that is no tensor."""
    # Published already where a run before was killed between its last rename and tidying up.
    if not processes.agree(work is not None and work.published):
        with processes.locked(files.home / "processes"):
            if work:
                run.write_adapters(work)  # first: what cannot be rotated should be refused before gigabytes are
            # What is quantized cannot be compared any more; a calibration has compared before it began.
            if work and not run.is_plain and not run.request.calibrating:
                with clock.phase("compare"):
                    run.compare(Rotated(run.source, run.change, run.untied))
            hashes = None
            if not run.request.calibrating:
                with clock.phase("check"):
                    hashes = _checked_source(run, files, processes, known)
            progress = run.request.options.stage(STREAMED)
            kind: dict[str, Any] = {"processes": processes, "hashes": hashes, "progress": progress}
            clock.add(stream(run.source, run.shards, run.change, files, **kind))
            if hashes is not None:
                with clock.phase("check"):
                    run.note_source(hashes.finish(run.source.files, known))
            processes.meet()
            if work:
                write_config_and_copies(run.source, run.shards, work.data, run.changes)
                if run.is_plain:
                    with clock.phase("compare"), closing(Source(work.data, load_config(work.data))) as written:
                        run.compare(written)
                write_record(run.result, work.data)
            processes.meet()
    if work:
        work.publish()
    processes.meet()


def _checked_source(run: Run, files: Growing, processes: Processes, known: Mapping[str, Known]) -> SourceHash | None:
    """Hold the source against what a run before has read; what takes the rest while it is read, by one process.

    None of several processes reads a whole file, so they hash the files first, each some of them.
    """
    source, journal = run.source, files.journal()
    hashes = SourceHash(source.folder, source.files)
    if processes.size == 1:
        hashes.check(journal)
        return hashes
    mine = source.files[processes.rank :: processes.size]
    hashes.check([{name: prefix for name, prefix in one.items() if name in mine} for one in journal])
    hashes.finish(mine, known)
    found = processes.gather({name: hashes.files[name].prefix() for name in mine})
    whole = {name: prefix for one in found for name, prefix in sorted(one.items())}
    run.note_source({name: sha256 for name, (_, sha256) in sorted(whole.items())})
    if processes.first:
        files.enter_source(whole)
    return None


@contextmanager
def _open(
    out: str | Path, settings: Mapping[str, Any], force: bool, processes: Processes
) -> Iterator[Resumable | None]:
    """The folder in the making, for the first process; the others come when it is there."""
    if not processes.first:
        processes.meet()
        yield None
        return
    work, keep = Resumable(out, settings, force=force), True
    try:
        processes.meet()
        yield work
    except (ProcessError, SourceChangedError):
        raise  # what is finished is of use to the run that goes on
    except SpinquantError:
        keep = False  # the same would happen again
        raise
    except OSError as error:
        if not is_full(error):
            raise
        raise CheckpointError(
            f"{why_full(error)} while writing {out}. Then repeat the command: it goes on behind the last file that was "
            f"finished (they are kept in {work.home})"
        ) from error
    finally:
        work.close(keep=keep)
