"""The command `plan`: which tensors each rotation touches, and what a runtime runs of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spinquant.cli.options import (
    ADVANCED,
    ALL_ROTATIONS,
    BlockSize,
    Family,
    Json,
    Model,
    OptionalScheme,
    Randomize,
    Rotations,
    Runtime,
    Type,
    parse_spec,
)
from spinquant.cli.output import note, out_console, print_json
from spinquant.errors import ArchitectureError, SchemeError
from spinquant.quantization.scheme import parse_scheme

EXAMPLES = (
    "spinquant plan ./llama",
    "spinquant plan ./llama --rotations R1,R2,R4 --block-size R4=128",
    "spinquant plan ./llama --runtime vllm --scheme W8A8",
    "spinquant plan ./my-model --probe --draft my-model.toml",
)


def plan(
    model: Model,
    rotations: Rotations = ALL_ROTATIONS,
    scheme: OptionalScheme = None,
    runtime: Runtime = None,
    json_: Json = False,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    family: Family = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="For an architecture that spinquant does not know: find out by experiment what can be rotated, and "
            "print a draft of a family file.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    draft: Annotated[
        Path | None,
        typer.Option(
            help="With --probe: write the draft of the family file here.", show_default=False, rich_help_panel=ADVANCED
        ),
    ] = None,
) -> None:
    """Show which tensors each rotation touches, from the config and the safetensors headers alone.

    With --runtime, also what that runtime can run, why, and what would work instead. With --probe, try rotations on
    small random models of the class and draft a family file for --family.
    """
    if draft is not None and not probe:
        raise ArchitectureError("--draft is the file that --probe writes: give --probe too")
    if scheme is not None and runtime is None:
        raise SchemeError("--scheme is what a runtime is to run: give --runtime too")
    wanted = parse_scheme(scheme) if scheme is not None else None

    from spinquant.architectures import make_plan, recorded_family
    from spinquant.checkpoint.folder import check_unquantized, load_config, read_headers
    from spinquant.cli.tables import plan_notes, plan_rows, plan_table, runtime_table
    from spinquant.formats.runtimes import runtime_rows

    spec = parse_spec(rotations, type, block_size, randomize, 0)
    config = load_config(model, family=family)
    check_unquantized(config, model)
    shapes = {name: info.shape for name, info in read_headers(model).items()}
    if probe:
        return _probe(config, shapes, draft, json_)
    made = make_plan(config, shapes)
    rows = plan_rows(made, spec)
    notes = plan_notes(made, spec)
    if recorded_family(config) is not None:
        notes.append(f"the family {made.family} comes from a family file, not from the tables of this library")
    claims = runtime_rows(runtime, spec, wanted, made) if runtime else []
    if json_:
        plain = [{**row, "axes": [asdict(axis) for axis in row["axes"]]} for row in rows]
        data: dict[str, Any] = {"family": made.family, "rotations": plain, "notes": notes}
        print_json({**data, "runtime": claims or None, "plan": made.to_dict()})
    else:
        console = out_console()
        console.print(plan_table(made, rows, spec))
        if runtime:
            console.print(runtime_table(runtime, claims))
        for line in notes:
            console.print(f"- {line}", highlight=False)
    if any(row["error"] for row in rows) or not all(claim["runs"] for claim in claims):
        raise typer.Exit(1)


def _probe(config: Any, shapes: Mapping[str, Sequence[int]], draft: Path | None, json_: bool) -> None:
    """Probe the models of a config, and print or write the draft; exit code 1 if there is none."""
    from spinquant.probing.draft import draft_text, write_draft
    from spinquant.probing.probe import probe

    found = probe(config, shapes=shapes)
    if draft is not None and found.family is not None:
        write_draft(found, draft)
    if json_:
        family = found.family and found.family.recorded()
        findings = [{**asdict(finding), "holds": finding.holds} for finding in found.findings]
        print_json({"model_type": found.model_type, "family": family, "findings": findings, "left": found.left})
    elif draft is None or found.family is None:
        typer.echo(draft_text(found), nl=False)
    else:
        note(f"draft: {draft}; read it, then use it with --family {draft}")
    if found.family is None:
        raise typer.Exit(1)
