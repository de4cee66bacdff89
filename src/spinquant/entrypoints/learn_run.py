"""Where a run of learning is kept until what it was for is written: a folder beside OUT, for one run at a time.

.OUT.learning/settings.json      what the run was asked to do: the same command goes on, another one is refused
.OUT.learning/judged.json        scores of what was judged (`state.py`)
.OUT.learning/*.safetensors      states of descents, those of local learning in a folder of their own
.OUT.learning/learned            the rotations, once they are found
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spinquant.checkpoint.atomic import check_free
from spinquant.checkpoint.resumable import Hold
from spinquant.compute.distributed import Processes
from spinquant.learning.training_state import JUDGED


def learning_folder(out: str | Path) -> Path:
    """Where a run of learning for `out` is kept."""
    return Path(out).parent / f".{Path(out).name}.learning"


@contextmanager
def keeping(
    out: str | Path, settings: Mapping[str, Any], source: str | Path, processes: Processes, *, force: bool = False
) -> Iterator[Path]:
    """The folder of a run, for all processes of its job; it goes when the block ends well.

    settings: what the run is asked to do. source: the model that it reads. Raises CheckpointError where `out` is not
    free, another run is at work, or one was stopped that was asked for something else and `force` is off; ProcessError
    where another process ends.
    """
    home = learning_folder(out)
    settings = json.loads(json.dumps(settings, default=str))
    with processes.together():
        hold = _taken(home, out, settings, source, force) if processes.first else None
        try:
            processes.meet()
            with processes.locked(home / "processes"):
                try:
                    yield home
                except RuntimeError:  # a collective whose other side is gone
                    processes.find_loss()
                    raise
                processes.meet()
            if hold is not None:
                shutil.rmtree(home, ignore_errors=True)
        except BaseException:
            if hold is not None and not any(home.rglob("*.safetensors")) and not (home / JUDGED).exists():
                shutil.rmtree(home, ignore_errors=True)  # there is nothing to go on from
            raise
        finally:
            if hold is not None:
                hold.close()


def _taken(home: Path, out: str | Path, settings: Mapping[str, Any], source: str | Path, force: bool) -> Hold:
    check_free(out, force=force, source=source)
    hold = Hold(home, Path(out))
    try:
        if force and hold.settings() != settings:
            hold.remove_settings()
        hold.check_settings(settings)
        if hold.settings() is None:
            _clear(home)
            hold.enter_settings(settings)
    except BaseException:
        hold.close()
        raise
    return hold


def _clear(home: Path) -> None:
    for path in home.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
