"""Options of the command line, each defined once: name, help text, and the panel of the help that shows it.

The options that people use first have panels by subject; the rest are under "Advanced". Nothing here imports torch or
transformers at the top, since every `--help` imports this module.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spinquant.cli.output import note
from spinquant.errors import LearningError, RotationError, SchemeError
from spinquant.formats.runtimes import RUNTIMES
from spinquant.plan import ROTATION_NAMES, parse_rotation_names
from spinquant.quantization.scheme import Clip, Scheme

if TYPE_CHECKING:
    import torch

    from spinquant.rotations.factory import RotationSpec
    from spinquant.rotations.learned import LearnedRotations

ALL_ROTATIONS = ",".join(ROTATION_NAMES)
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Panels of the help.
ROTATIONS, WEIGHTS, ACTIVATIONS = "Rotations", "Weights", "Activations and KV cache"
CALIBRATION, LEARNING, OUTPUT, ADVANCED = "Calibration", "Learning", "Output", "Advanced"


def check_repo(repo: str | None) -> str | None:
    """The repository of --push-to-hub, checked before any work. Raises CheckpointError where a push would fail."""
    if repo is not None:
        from spinquant.entrypoints import hub

        hub.check_repo(repo)
    return repo


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder in Hugging Face format, or a model id on the hub.")
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write. It is written atomically: complete, or not at all.")
]

# The scheme is required by some commands and optional in others.
SCHEME = typer.Option(
    help="What to quantize to: W4A4KV4 (bits of weights, activations, KV cache), W4g128A16, W8A8, FP8_DYNAMIC, ...; "
    "none for rotations alone.",
    rich_help_panel=WEIGHTS,
)
SchemeName = Annotated[str, SCHEME]
OptionalScheme = Annotated[str | None, SCHEME]

Rotations = Annotated[
    str,
    typer.Option(
        help="Rotations to apply, some of R1,R2,R3,R4, or none. R1 and R2 are fused into the weights; R3 and R4 run "
        "online.",
        rich_help_panel=ROTATIONS,
    ),
]
Learned = Annotated[
    Path | None,
    typer.Option(
        help="Folder written by `spinquant learn`: use its rotations instead of random ones (with --rotations, only "
        "those named there).",
        rich_help_panel=ROTATIONS,
    ),
]
Type = Annotated[
    str,
    typer.Option(
        "--type",
        help="Type of rotation: hadamard, random-hadamard, random-matrix or auto; or one per rotation, as in "
        "R1=random-matrix,R4=hadamard.",
        rich_help_panel=ADVANCED,
    ),
]
BlockSize = Annotated[
    str | None,
    typer.Option(
        help="Block size of block-diagonal rotations: one number, or one per rotation, as in R1=64,R4=128. By default "
        "one block per space.",
        rich_help_panel=ADVANCED,
    ),
]
Randomize = Annotated[
    bool,
    typer.Option(
        "--randomize", help="Draw a separate rotation for every layer.", rich_help_panel=ADVANCED, show_default=False
    ),
]
Family = Annotated[
    Path | None,
    typer.Option(
        help="Family file (TOML) for an architecture that spinquant does not know; see docs/how-to/own-model.md.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
Proof = Annotated[
    bool,
    typer.Option(
        "--proof/--no-proof",
        help="Check first, on a tiny random model of the same architecture in float64, that the rotations leave its "
        "logits unchanged.",
        rich_help_panel=ADVANCED,
    ),
]
AllowInexact = Annotated[
    bool,
    typer.Option(
        "--allow-inexact",
        help="Write the folder even if rotating changed the logits by more than rounding errors.",
        rich_help_panel=ADVANCED,
        show_default=False,
    ),
]
DropMtp = Annotated[
    bool,
    typer.Option(
        "--drop-mtp",
        help="Leave out layers for multi-token prediction, which cannot be rotated by R1.",
        rich_help_panel=ADVANCED,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare/--no-compare",
        help="Compare logits on real tokens before and after rotating.",
        rich_help_panel=ADVANCED,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Calibration text: a file, manual, wikitext, dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], generated (by the "
        "model itself), or auto (the default).",
        show_default=False,
        rich_help_panel=CALIBRATION,
    ),
]
# In `learn` the calibration text may be called --text too.
LearningText = Annotated[
    str,
    typer.Option(
        "--calibration",
        "--text",
        help="Calibration text: a file, manual, wikitext, dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], generated (by the "
        "model itself), or auto (the default).",
        show_default=False,
        rich_help_panel=CALIBRATION,
    ),
]
SAMPLES = typer.Option(help="Calibration samples; 128 by default.", show_default=False, rich_help_panel=CALIBRATION)
SAMPLE_LENGTH = typer.Option(
    help="Tokens per calibration sample; 512 by default.", show_default=False, rich_help_panel=CALIBRATION
)
Text = Annotated[
    str,
    typer.Option(
        help="Text to measure on: a file, manual (the Python manual), wikitext, "
        "dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], or auto.",
        rich_help_panel=ADVANCED,
    ),
]
Length = Annotated[int, typer.Option(help="Tokens per window of text.", rich_help_panel=ADVANCED)]
Windows = Annotated[
    int,
    typer.Option(
        help="Windows of text to measure on, spread evenly over it (evaluate and verify: 0 for all).",
        rich_help_panel=ADVANCED,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.", rich_help_panel=ADVANCED)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Dtype to compute in and to write: {', '.join(DTYPES)}; by default that of the model.",
        rich_help_panel=ADVANCED,
    ),
]
Device = Annotated[str, typer.Option(help="Device to work on: cpu, cuda, cuda:1, mps, ...")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no notes; errors and the result are still printed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace OUT if it exists.", show_default=False, rich_help_panel=OUTPUT)
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help=f"Runtime that is to load the result; what it cannot run is refused before any work: "
        f"{', '.join(RUNTIMES)}.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA adapter (peft) or EAGLE-3 draft head, a folder or hub id, to rotate into OUT/adapters/NAME; may be "
        "repeated.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="REPO",
        help="Upload OUT to this repository on the Hugging Face hub when it is written.",
        show_default=False,
        rich_help_panel=OUTPUT,
        callback=check_repo,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        help="Largest weight file, such as 5GB; by default the same files as the source.", rich_help_panel=ADVANCED
    ),
]
Checksums = Annotated[
    Path | None,
    typer.Option(
        help="File with the SHA-256 of the model's files, in sha256sum's format; a file with another checksum is "
        "refused.",
        rich_help_panel=ADVANCED,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory, such as 8GB, for hidden states during calibration before they go to disk (by default a quarter "
        "of what is free), and for a decoder block that is compared.",
        rich_help_panel=ADVANCED,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load pickle weights (pytorch_model.bin) too; they can run code.",
        rich_help_panel=ADVANCED,
        show_default=False,
    ),
]


def parse_spec(rotations: str, kind: str, block_size: str | None, randomize: bool, seed: int) -> "RotationSpec":
    """The spec that the options describe. Raises RotationError for what cannot be read."""
    from spinquant.rotations.factory import RotationSpec

    types: Any = _per_rotation(kind)
    blocks: Any = None if block_size is None else _per_rotation(block_size)
    try:
        sizes = {k: int(v) for k, v in blocks.items()} if isinstance(blocks, dict) else blocks and int(blocks)
    except ValueError:
        raise RotationError(
            f"cannot read block size {block_size!r}: expected a number, or one per rotation as in R1=64,R4=128"
        ) from None
    return RotationSpec(tuple(rotations.split(",")), types, sizes, randomize, seed)


def taken_from(
    learned: Path, model: str, context: typer.Context, *, scheme: Scheme | None = None, drawing: bool = False
) -> "LearnedRotations":
    """The rotations of --learned: all, or those that --rotations names.

    scheme: the scheme that they are used for, where something is quantized; a note says so if they were learned for
    another. drawing: whether anything but rotations is drawn with the seed. Raises LearningError for options that would
    have no effect.
    """
    from spinquant.entrypoints.learn import read_learned

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    idle = [name for name in ("type", "block_size", "randomize") if is_given(name)]
    if not drawing and is_given("seed"):
        idle.append("seed")
    if idle:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise LearningError(f"{names} would do nothing: --learned takes rotations as they are. Leave them out")
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
            f"note: the rotations of {folder} were learned for {learned.record['model']}; {model} has other weights",
            quiet=quiet,
        )


def _sizes(scheme: Scheme) -> list[Any]:
    """What rotations are learned for: how activations and KV cache are rounded."""
    return [part and (part.kind, part.bits, part.group_size) for part in (scheme.activations, scheme.kv)]


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
    """A dtype by name. Raises SchemeError for an unknown one."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise SchemeError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
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


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises SchemeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip(), re.IGNORECASE)
    unit = (match.group(2) or "").upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise SchemeError(f"cannot read size {text!r}: expected a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return int(float(match.group(1)) * _UNITS[unit])
