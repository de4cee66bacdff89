"""Learned rotations on disk: rotations.safetensors and learned.json, a folder that `rotate` and `quantize` take."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinquant.architectures import FamilyLike, recorded_family
from spinquant.calibrate import CalibrationText, calibration_tokens
from spinquant.checkpoint import atomic_folder, check_free, load_model, load_tokenizer, weights_digest
from spinquant.errors import CheckpointError, SpinquantError, TextError
from spinquant.learning.learn import learn
from spinquant.learning.learned import LearnedRotations
from spinquant.learning.options import LearnOptions, Watch
from spinquant.module import plan_of, tensor_shapes
from spinquant.pipeline import check_fits
from spinquant.processes import joined
from spinquant.quantization.scheme import Scheme
from spinquant.rotation import RotationSpec
from spinquant.saved_rotations import saved, to_save

TENSORS, ABOUT = "rotations.safetensors", "learned.json"


@dataclass(frozen=True)
class LearnText:
    """What rotations are learned from and judged on.

    calibration: samples to learn from. held_out: another text to judge on; None takes the last windows of the same text
    away from learning. windows: to judge on.
    """

    calibration: CalibrationText = field(default_factory=CalibrationText)
    held_out: str | None = None
    windows: int = 8


def learn_folder(
    model: str | Path,
    out: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    options: LearnOptions | None = None,
    *,
    text: LearnText | None = None,
    start: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    force: bool = False,
    allow_pickle: bool = False,
    watch: Watch | None = None,
    family: FamilyLike | None = None,
) -> LearnedRotations:
    """Learn rotations for a model folder or hub id into a folder, which appears complete or not at all.

    start: a folder that this function wrote before, for the same model: what is in it is judged like the random
    rotations, and learned from where it beats them. family: a file that explains the model where no table does. The run
    is kept beside `out` until it is written, so
    that the same call goes on where another was stopped. Under torchrun all processes work on it and the first one
    writes.
    """
    text, watch = text or LearnText(), watch or Watch()
    with joined(device) as processes:
        if processes.first:
            check_free(out, force=force, source=model)
        learned, store = learn_from(
            model,
            out,
            scheme,
            spec,
            options,
            text=text,
            start=start,
            device=processes.device,
            dtype=dtype,
            allow_pickle=allow_pickle,
            watch=watch,
            family=family,
        )
        if processes.first:
            write_learned(learned, out, force=force)
            remove_store(store)
        if processes.size > 1:
            dist.barrier()
    return learned


def learn_from(
    model: str | Path,
    out: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    options: LearnOptions | None,
    *,
    text: LearnText,
    start: str | Path | None = None,
    device: str,
    dtype: torch.dtype | str = "auto",
    allow_pickle: bool = False,
    watch: Watch | None = None,
    family: FamilyLike | None = None,
) -> tuple[LearnedRotations, Path]:
    """Learned rotations of a model folder or hub id, and where the run is kept until `remove_store`."""
    watch = watch or Watch()
    given = None if start is None else read_learned(start)
    loaded = load_model(model, dtype=dtype, device=device, allow_pickle=allow_pickle, family=family)
    check_fits(plan_of(loaded), tensor_shapes(loaded), scheme)
    name, tokens, held_out = _texts(loaded, model, text, watch)
    store = Path(out).parent / f".{Path(out).name}.learning"
    settings = [weights_digest(model), str(loaded.dtype), recorded_family(loaded.config)]
    learned = learn(
        loaded, scheme, spec, tokens, held_out, options, start=given, store=store, settings=settings, watch=watch
    )
    about = {
        "text": name,
        "samples": list(tokens.shape),
        "held_out": text.held_out or name,
        "judged": list(held_out.shape),
    }
    begun = {} if start is None else {"given": str(start)}
    return replace(learned, record={**learned.record, "model": str(model), "tokens": about, **begun}), store


def remove_store(store: Path) -> None:
    """Delete what a finished run had kept."""
    shutil.rmtree(store, ignore_errors=True)


def _texts(loaded: Any, model: str | Path, text: LearnText, watch: Watch) -> tuple[str, Tensor, Tensor]:
    """(name, tokens to learn from, tokens to judge on)."""
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError:
        tokenizer = None

    def tokens_of(source: CalibrationText) -> tuple[str, Tensor]:
        return calibration_tokens(loaded, tokenizer, source, progress=lambda *n: watch.stage("generate text", *n))

    wanted = text.calibration
    if text.held_out is not None:
        name, tokens = tokens_of(wanted)
        return name, tokens, tokens_of(replace(wanted, text=text.held_out, samples=text.windows))[1]
    name, tokens = tokens_of(replace(wanted, samples=wanted.samples + text.windows))
    # The end of the text, and a window between as a distance.
    if len(tokens) < text.windows + 2:
        raise TextError(
            f"the text has {len(tokens)} windows of {wanted.length} tokens: too few to learn from some and to judge on "
            f"{text.windows} others. Give a longer text, a shorter --sample-length, or another text to judge on "
            "(--held-out)"
        )
    return name, tokens[: -text.windows - 1], tokens[-text.windows :]


def write_learned(learned: LearnedRotations, out: str | Path, *, force: bool = False) -> None:
    """Write the folder, with pictures where matplotlib is installed."""
    about, tensors = to_save(learned.rotations)
    with atomic_folder(out, force=force) as folder:
        save_file(tensors, folder / TENSORS)
        data = {**about, "spec": learned.spec.to_dict(), **learned.record}
        (folder / ABOUT).write_text(json.dumps(data, indent=1, default=dict) + "\n", encoding="utf-8")
        _draw(learned, folder)


def _draw(learned: LearnedRotations, folder: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from spinquant.plots import plot_learning_curve, plot_rounding_errors

    if learned.record.get("steps"):
        plot_learning_curve([step["loss"] for step in learned.record["steps"]], folder / "curve.png")
    errors = learned.record.get("errors")
    if errors and errors["before"]:  # none where weights alone are rounded
        plot_rounding_errors(errors["before"], errors["after"], folder / "errors.png")


def read_learned(folder: str | Path) -> LearnedRotations:
    """The rotations of a folder that `learn_folder` wrote. Raises CheckpointError for one that is not whole."""
    folder = Path(folder)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        rotations = saved(about, load_file(folder / TENSORS))
        spec = RotationSpec(**about.pop("spec"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, SpinquantError) as error:
        raise CheckpointError(
            f"{folder} holds no learned rotations ({error}): expected a folder that `spinquant learn` wrote"
        ) from None
    return LearnedRotations(rotations, spec, {k: v for k, v in about.items() if k not in ("rotations", "spaces")})
