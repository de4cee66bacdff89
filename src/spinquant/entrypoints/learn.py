"""Learned rotations on disk: rotations.safetensors and learned.json, a folder that `rotate` and `quantize` take."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinquant.architectures import FamilyLike, recorded_family
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.checkpoint.folder import folder_of, is_local, load_config, load_tokenizer, weights_digest, weights_sample
from spinquant.checkpoint.run_directory import LEARNING, atomic_folder, opened_run
from spinquant.compute.distributed import LONGEST, check_same, is_first, joined
from spinquant.entrypoints.model_card import learned_card
from spinquant.entrypoints.request import LearnText
from spinquant.entrypoints.source_card import CARD, read_card
from spinquant.entrypoints.validation import run_identity, text_files
from spinquant.errors import CheckpointError, SpinquantError, TextError
from spinquant.formats.load import load_model
from spinquant.learning.learn import learn
from spinquant.learning.options import LearnOptions, Watch
from spinquant.models.modules import tensor_shapes
from spinquant.quantization.scheme import Scheme
from spinquant.quantization.targets import check_fits
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.serialization import saved, to_save

TENSORS, ABOUT = "rotations.safetensors", "learned.json"
DONE = "learned"  # where a run keeps them until OUT is written


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
    command: str | None = None,
) -> LearnedRotations:
    """Learn rotations for a model folder or hub id into a folder, which appears complete or not at all.

    start: a folder that this function wrote before, for the same model: what is in it is judged like the random
    rotations, and learned from where it beats them. family: a file that explains the model where no table does. The run
    is kept beside `out` until that is written, so that the same call goes on where another was stopped; a call that
    asks for something else is refused, or starts anew with `force`. Under torchrun all processes work on it and the
    first one writes.
    """
    text, watch, options = text or LearnText(), watch or Watch(), options or LearnOptions()
    with joined(device, timeout=LONGEST) as processes, processes.together():
        config, folder = load_config(model, family=family), folder_of(model, allow_pickle=allow_pickle)
        asked = {
            **run_identity(model, folder, spec, scheme, config),
            "dtype": str(dtype),
            "options": options.to_dict(),
            "text": asdict(text),
            "text files": text_files(text.calibration.text, text.held_out),
            "start": None if start is None else read_learned(start).digest(),
        }
        check_same(asked, processes)
        with opened_run(out, asked, processes, force=force, source=folder) as run:
            learned = learn_from(
                model,
                run.home / LEARNING,
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
                if not run.published:
                    write_files(learned, run.data, command=command)
                run.publish(checksums=False)
    return learned


def learn_from(
    model: str | Path,
    store: Path,
    scheme: Scheme,
    spec: RotationSpec,
    options: LearnOptions,
    *,
    text: LearnText,
    start: str | Path | None = None,
    device: str,
    dtype: torch.dtype | str = "auto",
    allow_pickle: bool = False,
    watch: Watch | None = None,
    family: FamilyLike | None = None,
) -> LearnedRotations:
    """Learned rotations of a model folder or hub id. store: where the run is saved, and resumed from."""
    watch, done = watch or Watch(), store / DONE
    if (done / ABOUT).exists():
        return read_learned(done)
    given = None if start is None else read_learned(start)
    loaded = load_model(model, dtype=dtype, device=device, allow_pickle=allow_pickle, family=family)
    check_fits(plan_of(loaded), tensor_shapes(loaded), scheme)
    name, tokens, held_out = _texts(loaded, model, text, watch)
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
    named = {"model": str(model), "weights": weights_sample(model)}
    learned = replace(learned, record={**learned.record, **named, "tokens": about, **begun})
    if is_first():
        with atomic_folder(done, force=True) as folder:
            write_files(learned, folder, whole=False)
    return learned


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
            f"there are {len(tokens)} windows of {wanted.length} tokens ({wanted.samples} samples and {text.windows} "
            "windows were asked for): too few to learn from some and to judge on others, with one between. Give more "
            "--samples, a longer text, a shorter --sample-length, or another text to judge on (--held-out)"
        )
    return name, tokens[: -text.windows - 1], tokens[-text.windows :]


def write_learned(learned: LearnedRotations, out: str | Path, *, force: bool = False) -> None:
    """Write a folder of learned rotations atomically, with pictures where matplotlib is installed."""
    with atomic_folder(out, force=force) as folder:
        write_files(learned, folder)


def write_files(learned: LearnedRotations, folder: Path, *, whole: bool = True, command: str | None = None) -> None:
    """Write the files of a folder of learned rotations; `whole` with pictures and a model card."""
    about, tensors = to_save(learned.rotations)
    save_file(tensors, folder / TENSORS)
    data = {**about, "spec": learned.spec.to_dict(), **learned.record}
    (folder / ABOUT).write_text(json.dumps(data, indent=1, default=dict) + "\n", encoding="utf-8")
    if whole:
        _draw(learned, folder)
        drawn = sorted(path.name for path in folder.glob("*.png"))
        source = learned.record["model"]
        original = read_card(Path(source)) if is_local(source) else read_card(folder_of(source))
        card = learned_card(learned, source=source, source_card=original, command=command, pictures=drawn)
        (folder / CARD).write_text(card, encoding="utf-8", newline="\n")


def _draw(learned: LearnedRotations, folder: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from spinquant.evaluation.plots import plot_learning_curve, plot_rounding_errors

    through = [step["loss"] for step in learned.record.get("steps", ())]
    local = learned.record.get("local_steps", {})
    if through or local:
        of = learned.record["rotation_of"]
        plot_learning_curve(
            {space: (of[space], losses) for space, losses in local.items()}, through, folder / "curve.png"
        )
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
