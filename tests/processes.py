"""Commands in processes of their own, which begin with everything imported: alone, or several as torchrun starts them.

A new interpreter spends seconds on imports before it does what a test is about. These processes are forked from one
that has done that and nothing else. What torchrun itself adds is tried with torchrun (`learning/test_distributed.py`).
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
LONGEST = 300  # seconds


def start_source(source: str, arguments: Sequence[object], environment: Mapping[str, str], place: Path):
    """Start Python source as a script; its streams go to the files `out` and `err` of a folder."""
    _warm()
    given = (source, [str(argument) for argument in arguments], {**os.environ, **environment}, str(place))
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def run_source(source: str, arguments: Sequence[object] = (), environment: Mapping[str, str] | None = None):
    """Run Python source as a script with these arguments, in a process of its own."""
    with TemporaryDirectory() as folder:
        process = start_source(source, arguments, environment or {}, Path(folder))
        process.join(LONGEST)
        process.kill()
        return _completed(process, [Path(folder)])


def run_together(
    source: str, arguments: Sequence[object] = (), environment: Mapping[str, str] | None = None, *, processes: int = 2
):
    """Run Python source in several processes, with the store and the environment that torchrun gives its workers.

    When one fails, those that have not ended within seconds are sent SIGTERM, as torchrun does.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        places, running = [Path(folder) / str(rank) for rank in range(processes)], []
        for rank, place in enumerate(places):
            place.mkdir()
            worker = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": 0,
                "TORCHELASTIC_RUN_ID": "tests",
            }
            given = {**(environment or {}), **{name: str(value) for name, value in worker.items()}}
            running.append(start_source(source, arguments, given, place))
        deadline = time.monotonic() + LONGEST
        while any(process.is_alive() for process in running) and time.monotonic() < deadline:
            if any(process.exitcode for process in running):
                deadline = min(deadline, time.monotonic() + 30)
            time.sleep(0.02)
        for process in running:
            process.terminate()
            process.join(10)
            process.kill()
        failed = next((process for process in running if process.exitcode), running[0])
        return _completed(failed, places)


@cache
def _warm() -> None:
    """Start the process that the others are forked from."""
    CONTEXT.set_forkserver_preload(["warm"])
    before = os.environ.get("PYTHONPATH")
    # It does not take over sys.path before Python 3.13, and skips what it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _completed(process, places: Sequence[Path]) -> CompletedProcess[str]:
    out, err = ("".join((place / name).read_text() for place in places) for name in ("out", "err"))
    return CompletedProcess([], process.exitcode, out, err)


def _run(source: str, arguments: list[str], environment: dict[str, str], place: str) -> None:
    """In the new process: be the script, from its streams to its exit status."""
    import torch

    assert "warm" in sys.modules
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(place) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # as torchrun gives its workers
    sys.argv = ["spinquant", *arguments]
    status: object = 0
    try:
        exec(compile(source, "worker", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else bool(status))
