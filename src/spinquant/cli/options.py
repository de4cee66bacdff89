"""Options that several commands share, each defined once: name, help text, and panel of the help.

The options that people use first have panels by subject; the rest are under "Advanced". Commands import this module as
`opt` and annotate their parameters with it: `seed: opt.Seed = 0`. Nothing here imports torch or transformers at the
top, since every `--help` imports this module.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spinquant.cli.output import note
from spinquant.errors import LearningError, RotationError, SchemeError
from spinquant.formats.runtimes import RUNTIMES
from spinquant.quantization.scheme import Clip, Scheme
from spinquant.rotation_names import ONLINE_R1, USUAL, parse_rotation_names, run_online

if TYPE_CHECKING:
    import torch

    from spinquant.learning.tuning import TuneOptions
    from spinquant.rotations.factory import RotationSpec
    from spinquant.rotations.learned import LearnedRotations

ALL_ROTATIONS = ",".join(USUAL)
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Panels of the help.
ROTATIONS, WEIGHTS, ACTIVATIONS = "Rotations", "Weights", "Activations and KV cache"
CALIBRATION, LEARNING, OUTPUT, ADVANCED = "Calibration", "Learning", "Output", "Advanced"
CHECKPOINTING = "Learning and tuning: gradient checkpointing of decoder blocks: less memory, a third more time."


def option(panel: str | None, help: str, *names: str) -> Any:
    """An option in a panel of the help. names: spellings, by default that of the parameter."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


def option_without_default(panel: str, help: str, *names: str) -> Any:
    """An option whose help text states the default, so that none is appended."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def check_repo(repo: str | None) -> str | None:
    """The repository of --push-to-hub, checked before any work. Raises CheckpointError where a push would fail."""
    if repo is not None:
        from spinquant.entrypoints import hub

        hub.check_repo(repo)
    return repo


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder in Hugging Face format, or a model id on the hub.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write. It is written atomically.")]

# The scheme is required by some commands and optional in others.
SCHEME = option(
    WEIGHTS,
    "What to quantize to: W4A4KV4 (bits of weights, activations, KV cache), W4g128A16, W8A8, FP8_DYNAMIC, ...; none "
    "for rotations only.",
)
SchemeName = Annotated[str, SCHEME]
OptionalScheme = Annotated[str | None, SCHEME]

Rotations = Annotated[
    str,
    option(
        ROTATIONS,
        "Rotations to apply, some of R1,R2,R3,R4,online-R1, or none. R1 and R2 are fused into the weights; the others "
        "run online.",
    ),
]
Online = Annotated[
    str,
    option(
        ROTATIONS,
        "Rotations to run online instead of fusing them: R1, or none. Its transform then is at the inputs of q, k, v "
        "and gate, up: two more per layer and token, and more accurate than R1 in the residual stream.",
    ),
]
Learned = Annotated[
    Path | None,
    option(
        ROTATIONS,
        "Folder written by `spinquant learn`: use its rotations instead of random ones (with --rotations, only those "
        "named there).",
    ),
]
Type = Annotated[
    str,
    option(
        ADVANCED,
        "Type of rotation: auto (random-hadamard where a Hadamard matrix of the order is known, else its Kronecker "
        "product with a random orthogonal matrix), hadamard, random-hadamard or random-matrix; or one per rotation, as "
        "in R1=random-matrix,R4=hadamard.",
        "--type",
    ),
]
BlockSize = Annotated[
    str | None,
    option(
        ADVANCED,
        "Block size of block-diagonal rotations: one number, or one per rotation, as in R1=64,R4=128. By default one "
        "block per space.",
    ),
]
Randomize = Annotated[bool, option(ADVANCED, "Draw a separate rotation for every layer.", "--randomize")]
Family = Annotated[
    Path | None,
    option(ADVANCED, "Family file (TOML) for an architecture without a built-in table; see docs/how-to/own-model.md."),
]
Proof = Annotated[
    bool,
    option(
        ADVANCED,
        "Check first, on a tiny random model of the same architecture in float64, that the rotations leave its logits "
        "unchanged and that quantizers of activations and KV cache round what they should.",
        "--proof/--no-proof",
    ),
]
AllowInexact = Annotated[
    bool,
    option(
        ADVANCED,
        "Write the folder even if rotating changed the logits by more than rounding errors.",
        "--allow-inexact",
    ),
]
DropMtp = Annotated[
    bool,
    option(ADVANCED, "Leave out layers for multi-token prediction, which cannot be rotated by R1.", "--drop-mtp"),
]
Compare = Annotated[
    bool, option(ADVANCED, "Compare logits on real tokens before and after rotating.", "--compare/--no-compare")
]
CALIBRATION_TEXT = (
    "Calibration text: a file (text, or .jsonl of texts or chats), manual, wikitext, "
    "dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], generated (by the model itself), or auto (the default)."
)
Calibration = Annotated[str | None, option(CALIBRATION, CALIBRATION_TEXT, "--calibration")]
# `learn` accepts --text for the calibration text too.
LearningText = Annotated[str, option_without_default(CALIBRATION, CALIBRATION_TEXT, "--calibration", "--text")]
SAMPLES = option_without_default(CALIBRATION, "Calibration samples; 128 by default.")
SAMPLE_LENGTH = option_without_default(
    CALIBRATION, "Tokens per calibration sample; 512 by default, or the model's context if that is shorter."
)
Text = Annotated[
    str,
    option(
        ADVANCED,
        "Text to measure on: a file (text, or .jsonl of texts or chats), manual (the Python manual), wikitext, "
        "dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], or auto.",
    ),
]
Length = Annotated[
    int | None,
    option_without_default(
        ADVANCED,
        "Tokens per window of text; by default 1024 (verify 256, demo 512), or the model's context if that is shorter.",
    ),
]
Windows = Annotated[
    int, option(ADVANCED, "Windows of text to measure on, spread evenly over it (evaluate and verify: 0 for all).")
]
Budget = Annotated[
    str | None,
    option(
        LEARNING,
        "Time for learning with method auto, such as 90s, 10m or 1h: random rotations, closed form, local and "
        "end-to-end learning are tried in this order, each only if it ends in time.",
        "--budget",
    ),
]
MomentsOf = Annotated[
    str,
    option(
        ADVANCED,
        "Closed-form transforms, what they are computed from: gradients (one pass forward and back), or weights "
        "(forward passes alone, for a model that a backward pass is impossible for; coarser).",
    ),
]
Seed = Annotated[int, option(ADVANCED, "Seed of all random numbers.")]
Dtype = Annotated[
    str | None,
    option(
        ADVANCED,
        f"Dtype to compute in and to write: {', '.join(DTYPES)}, or auto (the default): that of the model; a CPU that "
        "is slow in half precision then computes in float32 if memory allows, and still writes the model's dtype.",
    ),
]
Device = Annotated[str, option(None, "Device to compute on: cpu, cuda, cuda:1, mps, ...")]
Quiet = Annotated[
    bool, option(None, "Print no progress and no notes; errors and the result are still printed.", "--quiet", "-q")
]
Json = Annotated[bool, option(None, "Print the result as JSON on standard output.", "--json")]
Force = Annotated[bool, option(OUTPUT, "Replace OUT if it exists.", "--force")]
Runtime = Annotated[
    str | None,
    option(
        OUTPUT,
        "Runtime that will load the result. Rotations and schemes that it does not support are refused before any "
        f"work: {', '.join(RUNTIMES)}.",
    ),
]
Also = Annotated[
    list[str] | None,
    option(
        OUTPUT,
        "LoRA adapter (peft) or EAGLE-3 draft head, a folder or hub id, to rotate into OUT/adapters/NAME; may be "
        "repeated.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload OUT to this repository on the Hugging Face hub when it is written.",
        rich_help_panel=OUTPUT,
        callback=check_repo,
    ),
]
MaxShardSize = Annotated[
    str | None, option(ADVANCED, "Largest weight file, such as 5GB; by default the same files as the source.")
]
Checksums = Annotated[
    Path | None,
    option(
        ADVANCED,
        "File with the SHA-256 of the model's files, in sha256sum's format; a file with another checksum is refused.",
    ),
]
Memory = Annotated[
    str | None,
    option(
        ADVANCED,
        "Memory, such as 8GB: for the model while learning (by default what is free; a larger one is read from disk, "
        "block by block, by method closed-form), for hidden states during calibration before they go to disk (by "
        "default a quarter of what is free), and for the decoder block that is compared.",
    ),
]
AllowPickle = Annotated[
    bool,
    option(ADVANCED, "Load pickle weights (pytorch_model.bin) too; they can run code.", "--allow-pickle"),
]


def parse_spec(
    rotations: str, kind: str, block_size: str | None, randomize: bool, seed: int, online: str = "none"
) -> "RotationSpec":
    """The RotationSpec that the options describe. Raises RotationError for a value that cannot be parsed."""
    from spinquant.rotations.factory import RotationSpec

    names = run_online(rotations, online)
    types: Any = _per_rotation(kind)
    blocks: Any = None if block_size is None else _per_rotation(block_size)
    if ONLINE_R1 in names and "R1" not in names:  # what is said of R1 holds for it where it runs online
        types, blocks = ({_online(k): v for k, v in o.items()} if isinstance(o, dict) else o for o in (types, blocks))
    try:
        sizes = {k: int(v) for k, v in blocks.items()} if isinstance(blocks, dict) else blocks and int(blocks)
    except ValueError:
        raise RotationError(
            f"cannot read block size {block_size!r}: expected a number, or one per rotation as in R1=64,R4=128"
        ) from None
    return RotationSpec(names, types, sizes, randomize, seed)


def _online(rotation: str) -> str:
    return ONLINE_R1 if rotation.strip().upper() == "R1" else rotation


def taken_from(
    learned: Path, model: str, context: typer.Context, *, scheme: Scheme | None = None, drawing: bool = False
) -> "LearnedRotations":
    """The rotations of --learned: all, or those that --rotations names.

    scheme: the scheme that they are used for, where something is quantized; a note says so if they were learned for
    another. drawing: whether anything but rotations is drawn with the seed. Raises LearningError for options that
    have no effect beside --learned.
    """
    from spinquant.entrypoints.learn import read_learned

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    idle = [name for name in ("type", "block_size", "randomize", "online") if is_given(name)]
    if not drawing and is_given("seed"):
        idle.append("seed")
    if idle:
        names = spelled(idle)
        raise LearningError(
            f"{names} cannot be combined with --learned, which uses the rotations of the folder unchanged: leave out "
            f"{names}, or --learned"
        )
    found, quiet = read_learned(learned), bool(context.params.get("quiet"))
    note_another_model(learned, found, model, quiet=quiet)
    if is_given("rotations"):
        found = found.only(parse_rotation_names(context.params["rotations"]))
    meant = found.record.get("scheme", {})
    if scheme is not None and meant and _sizes(before := Scheme.from_dict(meant)) != _sizes(scheme):
        note(
            f"note: the rotations of {learned} were learned for {before}, not for {scheme}: they may gain less than "
            "rotations learned for this scheme",
            quiet=quiet,
        )
    return found


def note_another_model(folder: Path, learned: "LearnedRotations", model: str, *, quiet: bool = False) -> None:
    """Print a note if rotations were learned for other weights than a model's: they fit, and may gain nothing."""
    from spinquant.checkpoint.folder import is_local, weights_sample

    known = learned.record.get("weights")
    if known is not None and is_local(model) and Path(model).is_dir() and known != weights_sample(model):
        note(
            f"note: the rotations of {folder} were learned for {learned.record.get('model')}, and {model} has other "
            "weights",
            quiet=quiet,
        )


def _sizes(scheme: Scheme) -> list[Any]:
    """The part of a scheme that rotations are learned for: activations and KV cache."""
    return [part and (part.kind, part.bits, part.group_size) for part in (scheme.activations, scheme.kv)]


def spelled(names: Iterable[str]) -> str:
    """Names of parameters as options: --type, --block-size."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _per_rotation(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [item.partition("=") for item in text.split(",")]
    for name, equals, value in pairs:
        if not equals or not value:
            raise RotationError(
                f"cannot read {name!r} in {text!r}: expected one value, or one per rotation as in R1=..,R4=.."
            )
    return {name.strip().upper(): value.strip() for name, _, value in pairs}


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """A dtype by name; None for auto. Raises SchemeError for an unknown one."""
    import torch

    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise SchemeError(f"unknown dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def parse_ratio(text: str) -> Clip:
    """A clip ratio, or mse. Raises SchemeError for anything else."""
    if text == "mse":
        return "mse"
    try:
        return float(text)
    except ValueError:
        raise SchemeError(f"clip ratio {text!r} is neither a number nor mse") from None


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | None) -> int | None:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises SchemeError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip(), re.IGNORECASE)
    unit = (match.group(2) or "").upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise SchemeError(f"cannot read size {text!r}: expected a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return int(float(match.group(1)) * _UNITS[unit])


def tune_options(
    steps: int | None, *, lr: float | None, batch: int | None, checkpointing: bool, seed: int
) -> "TuneOptions | None":
    """The options of tuning; None without --tune. Raises LearningError for the others without it."""
    from spinquant.learning.tuning import TuneOptions

    given: dict[str, Any] = {"lr": lr, "batch": batch, "checkpointing": checkpointing or None}
    given = {name: value for name, value in given.items() if value is not None}
    if steps is not None:
        return TuneOptions(steps, seed=seed, **given)
    if given:
        names = {"lr": "--tune-lr", "batch": "--tune-batch", "checkpointing": "--checkpointing"}
        raise LearningError(
            f"{names[next(iter(given))]} is an option of tuning: give --tune STEPS too, or leave it out"
        )
    return None
