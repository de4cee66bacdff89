"""Options that several commands share, and how their texts are read."""

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spinquant.checkpoint.folder import (
    is_local,
    weights_sample,
)
from spinquant.cli.output import err_console
from spinquant.compute.distributed import is_first
from spinquant.entrypoints.learn import read_learned
from spinquant.errors import (
    LearningError,
    RotationError,
    SchemeError,
)
from spinquant.formats.runtimes import RUNTIMES
from spinquant.plan import ROTATION_NAMES, parse_rotation_names
from spinquant.quantization.scheme import Clip, Scheme
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations

ALL_ROTATIONS = ",".join(ROTATION_NAMES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or the id of one on the hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; it appears complete or not at all.")]
Rotations = Annotated[str, typer.Option(help="Some of R1,R2,R3,R4, or none.")]
Type = Annotated[
    str,
    typer.Option(
        "--type",
        help="hadamard, random-hadamard, random-matrix or auto; or one per rotation: R1=random-matrix,R4=hadamard.",
    ),
]
BlockSize = Annotated[
    str | None, typer.Option(help="Order of the rotations' blocks: one number, or one per rotation: R1=64,R4=128.")
]
Randomize = Annotated[bool, typer.Option(help="A rotation of its own for every layer.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"Dtype of what is written or computed: {', '.join(DTYPES)}; by default the source's."),
]
Text = Annotated[str, typer.Option(help="A file, manual, wikitext, dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]], or auto.")]
Force = Annotated[bool, typer.Option(help="Replace OUT when it exists.")]
AllowPickle = Annotated[bool, typer.Option(help="Load pickle weights too; they can run code.")]
AllowInexact = Annotated[bool, typer.Option(help="Save even when rotating moved the logits by more than rounding.")]
DropMtp = Annotated[
    bool, typer.Option("--drop-mtp", help="Leave out layers for multi-token prediction, which R1 cannot take along.")
]
Proof = Annotated[bool, typer.Option("--proof/--no-proof", help="Try the rotations on a small model first.")]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Largest file of weights, such as 5GB; by default the files of the source.")
]
Checksums = Annotated[
    Path | None,
    typer.Option(help="SHA-256 of the model's files, as sha256sum writes them: refuse a file that has another."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Room for hidden states of a calibration before they go to disk (by default a quarter of what is free), "
        "and for a decoder block that is compared."
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare/--no-compare", help="Compare logits on real tokens before and after rotating.")
]
Device = Annotated[str, typer.Option(help="Device to work on: cpu, cuda, cuda:1, mps, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Length = Annotated[int, typer.Option(help="Tokens per window.")]
Runtime = Annotated[
    str | None,
    typer.Option(
        help=f"Refuse what a runtime does not run, before any work: {', '.join(RUNTIMES)}.", show_default=False
    ),
]
Learned = Annotated[
    Path | None,
    typer.Option(
        help="Folder of rotations that `spinquant learn` wrote, in place of random ones; of them those that "
        "--rotations names, where it is given."
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder or hub id of a LoRA adapter (peft) or an EAGLE-3 head, rotated into OUT/adapters/NAME; may be "
        "repeated.",
        show_default=False,
    ),
]
Family = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with the family of a model that no table knows: docs/families.md.", show_default=False
    ),
]
Windows = Annotated[int, typer.Option(help="Windows, spread evenly over the text; 0 for all.")]


def parse_spec(rotations: str, kind: str, block_size: str | None, randomize: bool, seed: int) -> RotationSpec:
    """The spec that the options say. Raises RotationError for what cannot be read."""
    types: Any = _per_rotation(kind)
    blocks: Any = None if block_size is None else _per_rotation(block_size)
    try:
        sizes = {k: int(v) for k, v in blocks.items()} if isinstance(blocks, dict) else blocks and int(blocks)
    except ValueError:
        raise RotationError(f"block size {block_size!r} is not a number, or R1=64,R4=128") from None
    return RotationSpec(tuple(rotations.split(",")), types, sizes, randomize, seed)


def taken_from(
    learned: Path, model: str, context: typer.Context, *, scheme: Scheme | None = None, drawing: bool = False
) -> LearnedRotations:
    """The rotations of --learned: all, or those that --rotations names.

    scheme: what they are used for, where something is quantized; a note says so when it is not what they were learned
    for. drawing: whether anything but rotations is drawn with the seed. Raises LearningError for options that would do
    nothing.
    """

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    idle = [name for name in ("type", "block_size", "randomize") if is_given(name)]
    if not drawing and is_given("seed"):
        idle.append("seed")
    if idle:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise LearningError(f"{names} would do nothing: --learned takes rotations as they are. Leave them out")
    found = read_learned(learned)
    note_another_model(learned, found, model)
    if is_given("rotations"):
        found = found.only(parse_rotation_names(context.params["rotations"]))
    meant = found.record.get("scheme", {})
    if is_first() and scheme is not None and meant and _sizes(before := Scheme.from_dict(meant)) != _sizes(scheme):
        err_console.print(
            f"note: the rotations of {learned} were learned for {before}, and {scheme} is asked for: they may gain "
            "less than rotations that are learned for it",
            highlight=False,
            soft_wrap=True,
        )
    return found


def note_another_model(folder: Path, learned: LearnedRotations, model: str) -> None:
    """Say so where rotations were learned for weights that are not those of a model: they fit, and may gain nothing."""
    known = learned.record.get("weights")
    if is_first() and known is not None and is_local(model) and Path(model).is_dir() and known != weights_sample(model):
        err_console.print(
            f"note: the rotations of {folder} were learned for {learned.record['model']}; {model} has other weights",
            highlight=False,
            soft_wrap=True,
        )


def _sizes(scheme: Scheme) -> list[Any]:
    """What of the rounding of activations and cache rotations are learned for."""
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


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by name. Raises SchemeError for an unknown one."""
    if name is None:
        return None
    if name not in DTYPES:
        raise SchemeError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


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
