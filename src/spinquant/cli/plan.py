"""`spinquant plan --probe`: what can be rotated in a model that no table knows, printed or written as a draft."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import spinquant
from spinquant.architectures import recorded_family
from spinquant.checkpoint.folder import (
    check_unquantized,
    load_config,
    read_headers,
)
from spinquant.cli import tables as report
from spinquant.cli.main import app
from spinquant.cli.options import (
    ALL_ROTATIONS,
    BlockSize,
    Family,
    Json,
    Model,
    Randomize,
    Rotations,
    Runtime,
    Type,
    parse_spec,
)
from spinquant.cli.output import err_console, out_console, print_json
from spinquant.errors import ArchitectureError, SchemeError
from spinquant.formats.runtimes import runtime_rows
from spinquant.probing.draft import draft_text, write_draft
from spinquant.probing.probe import probe
from spinquant.quantization.scheme import parse_scheme


def probe_command(config: Any, shapes: Mapping[str, Sequence[int]], draft: Path | None, json_: bool) -> None:
    """Probe the models of a config, and hand the draft to the user; exit code 1 where there is none."""
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
        err_console.print(f"draft: {draft}; agree to it with --family {draft}", highlight=False, soft_wrap=True)
    if found.family is None:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: `spinquant plan ./llama --rotations R1,R2,R4 --block-size R4=128`, "
    "`spinquant plan ./llama --runtime vllm --scheme W8A8`"
)
def plan(
    model: Model,
    rotations: Rotations = ALL_ROTATIONS,
    type: Type = "random-hadamard",
    block_size: BlockSize = None,
    randomize: Randomize = False,
    runtime: Runtime = None,
    scheme: Annotated[str | None, typer.Option(help="What a runtime is to run: W8A8, W4A16, ...")] = None,
    family: Family = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Of a model that no table knows: try out what can be rotated; print a draft."),
    ] = False,
    draft: Annotated[Path | None, typer.Option(help="With --probe: file for the draft of a family file.")] = None,
    json_: Json = False,
) -> None:
    """Show which tensors each rotation touches, from the config and the safetensors headers alone.

    With --runtime, also what that runtime runs, why, and what would work instead. With --probe, try small random
    models of the class, and draft a family file, which --family takes.
    """
    if draft is not None and not probe:
        raise ArchitectureError("--draft is the file that --probe writes: give --probe too")
    if scheme is not None and runtime is None:
        raise SchemeError("--scheme says what a runtime is to run: give --runtime too")
    wanted = parse_scheme(scheme) if scheme is not None else None
    spec = parse_spec(rotations, type, block_size, randomize, 0)
    config = load_config(model, family=family)
    check_unquantized(config, model)
    shapes = {name: info.shape for name, info in read_headers(model).items()}
    if probe:
        return probe_command(config, shapes, draft, json_)
    made = spinquant.make_plan(config, shapes)
    rows = report.plan_rows(made, spec)
    notes = report.plan_notes(made, spec)
    if recorded_family(config) is not None:
        notes.append(f"the family {made.family} is a family file's, not one of the tables of this library")
    claims = runtime_rows(runtime, spec, wanted, made) if runtime else []
    if json_:
        plain = [{**row, "axes": [asdict(axis) for axis in row["axes"]]} for row in rows]
        data: dict[str, Any] = {"family": made.family, "rotations": plain, "notes": notes}
        print_json({**data, "runtime": claims or None, "plan": made.to_dict()})
    else:
        out_console.print(report.plan_table(made, rows, spec))
        if runtime:
            out_console.print(report.runtime_table(runtime, claims))
        for note in notes:
            out_console.print(f"- {note}", highlight=False)
    if any(row["error"] for row in rows) or not all(claim["runs"] for claim in claims):
        raise typer.Exit(1)
