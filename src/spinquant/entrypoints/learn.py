"""Learn rotations into a folder (rotations.safetensors, learned.json, README.md), and read such a folder.

`rotate` and `quantize` take the folder as `--learned`.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spinquant.architectures import FamilyLike, recorded_family
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.checkpoint.folder import folder_of, load_config, load_tokenizer, weights_digest, weights_sample
from spinquant.checkpoint.run_directory import LEARNING, opened_run
from spinquant.checkpoint.safetensors_io import read_tensors
from spinquant.checkpoint.untrusted import file_in, read_json
from spinquant.compute.distributed import LONGEST, Processes, check_same, is_first, joined
from spinquant.compute.values import validated
from spinquant.entrypoints.arithmetic import arithmetic_of
from spinquant.entrypoints.learn_blocks import fits_in_memory, note_start, opened_blocks, started_from
from spinquant.entrypoints.local_paths import public_source, source_name
from spinquant.entrypoints.model_card import learned_card
from spinquant.entrypoints.request import LearnText
from spinquant.entrypoints.source_card import CARD, read_card
from spinquant.entrypoints.validation import run_identity, text_files
from spinquant.errors import CheckpointError, SpinquantError, TextError
from spinquant.formats.load import load_model
from spinquant.learning.from_disk import check_from_disk, learn_from_disk
from spinquant.learning.learn import learn
from spinquant.learning.options import LearnOptions, Watch
from spinquant.models.modules import tensor_shapes
from spinquant.quantization.scheme import Scheme, parse_scheme
from spinquant.quantization.targets import check_fits
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRecord, LearnedRotations
from spinquant.rotations.serialization import saved, to_save

TENSORS, ABOUT = "rotations.safetensors", "learned.json"
DONE = "learned"  # subfolder of a run that has finished learning and has not written OUT yet


def learn_folder(
    model: str | Path,
    out: str | Path,
    scheme: Scheme | str,
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
    memory: int | None = None,
) -> LearnedRotations:
    """Learn rotations for a model folder or hub id, and write them to a folder.

    The folder is written atomically; rerun an interrupted call to resume it. While a run is unfinished, a call with
    other arguments is refused, or starts over with `force`. Under torchrun all processes learn together, and the first
    one writes.

    Args:
        model: A folder, or the id of a model on the Hugging Face hub.
        out: Folder to write.
        scheme: What the rotations are learned for, such as "W4A4KV4"; its activations and KV cache are quantized while
            learning.
        spec: Which rotations, of which type and block size. Its seed draws the random rotations to beat.
        options: Method of learning and its settings. Default: `LearnOptions()`.
        text: Text to learn from and to score candidates on. Default: `LearnText()`.
        start: A folder that this function wrote for the same model. Its rotations are scored like the random ones, and
            learning starts from them if they are the best. Default: none.
        device: Device to compute on. Default: "cpu".
        dtype: Dtype to compute in. Default: "auto", that of the checkpoint, or float32 where a CPU is faster in it than
            in half precision and memory allows it.
        force: Replace `out` if it exists. Default: False.
        allow_pickle: Accept pickled weights (`.bin`), which can run code when they are loaded. Default: False.
        watch: Progress callbacks.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.
        command: The command line that is named in the model card. Default: none.
        memory: Bytes that the model may take while learning. With method closed-form or random, a larger one is read
            from disk decoder block by decoder block, as often as the record says ("walks"); other methods refuse it.
            Default: what is free on the device.

    Returns:
        The rotations of least KL divergence, with the scores of all candidates in their record.

    Raises:
        LearningError: There is nothing to learn, or a loss is not finite.
        SchemeError: The scheme does not fit the model.
        TextError: The text cannot be read, or is too short to learn from one part and score on another.
        CheckpointError: The model cannot be read, or `out` exists.

    Example:
        >>> import pathlib, spinquant, tempfile
        >>> from spinquant.entrypoints.request import LearnText
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> temporary = tempfile.TemporaryDirectory()
        >>> folder = pathlib.Path(temporary.name)
        >>> AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        >>> scheme, spec = spinquant.parse_scheme("W4A4"), spinquant.RotationSpec("R1,R2")
        >>> local = spinquant.LocalOptions(steps=4)
        >>> options = spinquant.LearnOptions("local", baselines=2, transforms=False, local=local)
        >>> text = LearnText(spinquant.CalibrationText("generated", samples=8, length=16), windows=2)
        >>> learned = spinquant.learn_folder(folder / "model", folder / "learned", scheme, spec, options, text=text)
        >>> sorted(learned.record["scores"])
        ['16-bit', 'local', 'random 0', 'random 1']
        >>> spinquant.read_learned(folder / "learned").kept == learned.kept
        True
        >>> temporary.cleanup()
    """
    text, watch, options = text or LearnText(), watch or Watch(), options or LearnOptions()
    scheme = parse_scheme(scheme)
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
                processes=processes,
                dtype=dtype,
                allow_pickle=allow_pickle,
                watch=watch,
                family=family,
                memory=memory,
            )
            if processes.first:
                if not run.published:
                    write_files(learned, run.data, source=model, command=command)
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
    processes: Processes,
    dtype: torch.dtype | str = "auto",
    allow_pickle: bool = False,
    watch: Watch | None = None,
    family: FamilyLike | None = None,
    memory: int | None = None,
) -> LearnedRotations:
    """Learn rotations of a model folder or hub id.

    store: where the run is saved, and resumed from. memory: see `learn_folder`.
    """
    watch, done = watch or Watch(), store / DONE
    if (done / ABOUT).exists():
        return read_learned(done)
    given = None if start is None else read_learned(start)
    device = processes.device
    (computed,) = arithmetic_of(model, device=device, wanted=dtype, allow_pickle=allow_pickle, processes=processes)
    # An interrupted run goes on as it began, whatever memory is free now.
    begun = None if memory is not None else started_from(store)
    fits = options.shard or begun == "memory"
    if not options.shard and begun is None:
        fits = fits_in_memory(model, computed.dtype, device, memory, allow_pickle=allow_pickle)
    fits = processes.agree(fits)
    if processes.first:
        note_start(store, "memory" if fits else "disk")
    if not fits:
        check_from_disk(options, start=start is not None)
        if not processes.first:  # one process reads the checkpoint
            processes.meet()
            return read_learned(done)
        with opened_blocks(model, scheme, spec, device=device, dtype=dtype, family=family) as blocks:
            (name, tokens), (held_out_name, held_out) = _texts(blocks.reads(text), model, text, watch)
            pieces = blocks.pieces(store, options, tokens, held_out)
            learned = learn_from_disk(
                blocks.home, blocks.home.plan, scheme, spec, tokens, held_out, options, pieces, watch=watch
            )
        computed = blocks.computed
    else:
        loaded = load_model(model, dtype=computed.dtype, device=device, allow_pickle=allow_pickle, family=family)
        check_fits(plan_of(loaded), tensor_shapes(loaded), scheme)
        (name, tokens), (held_out_name, held_out) = _texts(loaded, model, text, watch)
        settings = [weights_digest(model), str(loaded.dtype), recorded_family(loaded.config)]
        learned = learn(
            loaded, scheme, spec, tokens, held_out, options, start=given, store=store, settings=settings, watch=watch
        )
    about = {
        "text": name,
        "samples": list(tokens.shape),
        "held_out": held_out_name,
        "judged": list(held_out.shape),
    }
    begun = {} if start is None else {"given": source_name(str(start))}
    named = {"model": public_source(str(model)), "weights": weights_sample(model), "arithmetic": computed.to_dict()}
    learned = replace(learned, record={**learned.record, **named, "tokens": about, **begun})
    if is_first():
        with atomic_folder(done, force=True) as folder:
            write_files(learned, folder)
    if not fits:
        processes.meet()
    return learned


def _texts(
    loaded: Any, model: str | Path, text: LearnText, watch: Watch
) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """(name, tokens) of the text to learn from, and of the text to score candidates on."""
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError:
        tokenizer = None

    def tokens_of(source: CalibrationText) -> tuple[str, Tensor]:
        return calibration_tokens(loaded, tokenizer, source, progress=lambda *n: watch.stage("generate text", *n))

    wanted = text.calibration
    if text.held_out is not None:
        return tokens_of(wanted), tokens_of(replace(wanted, text=text.held_out, samples=text.windows))
    name, tokens = tokens_of(replace(wanted, samples=wanted.samples + text.windows))
    # The end of the text, with a window as a gap before it.
    if len(tokens) < text.windows + 2:
        raise TextError(
            f"there are {len(tokens)} windows of {tokens.shape[1]} tokens ({wanted.samples} samples and {text.windows} "
            "windows were asked for): too few to learn from some and to score on others, with one between them. Give "
            "more --samples, a longer text, a shorter --sample-length, or another text to score on (--held-out)"
        )
    return (name, tokens[: -text.windows - 1]), (name, tokens[-text.windows :])


def write_files(
    learned: LearnedRotations, folder: Path, *, source: str | Path | None = None, command: str | None = None
) -> None:
    """Write the files of a folder of learned rotations; pictures and a model card only if there is a source.

    source: the model that they were learned for, a folder or hub id.
    """
    about, tensors = to_save(learned.rotations)
    save_file(tensors, folder / TENSORS)
    data = {**about, "spec": learned.spec.to_dict(), **learned.record}
    (folder / ABOUT).write_text(json.dumps(data, indent=1, default=dict) + "\n", encoding="utf-8")
    if source is not None:
        _draw(learned, folder)
        drawn = sorted(path.name for path in folder.glob("*.png"))
        original = read_card(folder_of(source))
        card = learned_card(learned, source=str(source), source_card=original, command=command, pictures=drawn)
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
    """Read learned rotations from a folder that `learn_folder` (or `spinquant learn`) wrote.

    Args:
        folder: The folder.

    Returns:
        The rotations with their spec and the record of how they were learned, for `quantize_folder` and `rotate_folder`
        to take.

    Raises:
        CheckpointError: The folder has no learned rotations, or is incomplete.

    Example:
        >>> import pathlib, spinquant, tempfile
        >>> from spinquant.entrypoints.request import LearnText
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> temporary = tempfile.TemporaryDirectory()
        >>> folder = pathlib.Path(temporary.name)
        >>> AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        >>> scheme, options = spinquant.parse_scheme("W4A4"), spinquant.LearnOptions("random", baselines=2)
        >>> text = LearnText(spinquant.CalibrationText("generated", samples=8, length=16), windows=2)
        >>> written = spinquant.learn_folder(
        ...     folder / "model", folder / "learned", scheme, spinquant.RotationSpec(), options, text=text
        ... )
        >>> learned = spinquant.read_learned(folder / "learned")
        >>> learned.spec.rotations, sorted(learned.rotations)
        (('R1', 'R2'), ['layers.0.value', 'layers.1.value', 'residual'])
        >>> temporary.cleanup()
    """
    folder = Path(folder)
    try:
        about = read_json(file_in(folder, ABOUT))
        record: LearnedRecord = validated(LearnedRecord, about, ABOUT, CheckpointError)
        rotations = saved(about, read_tensors(file_in(folder, TENSORS))[0])
        spec = RotationSpec.from_dict(about.pop("spec"))
        Scheme.from_dict(record.scheme or {})
    except SpinquantError as error:
        raise CheckpointError(
            f"{folder} holds no learned rotations ({error}): expected a folder that `spinquant learn` wrote"
        ) from None
    return LearnedRotations(rotations, spec, {k: v for k, v in about.items() if k not in ("rotations", "spaces")})
