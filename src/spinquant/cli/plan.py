"""The command `plan`: where each rotation goes, and which rotations and schemes a runtime supports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from spinquant.cli import options as opt
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
    model: opt.Model,
    rotations: opt.Rotations = opt.ALL_ROTATIONS,
    online: opt.Online = "none",
    scheme: opt.OptionalScheme = None,
    runtime: opt.Runtime = None,
    json_: opt.Json = False,
    type: opt.Type = "auto",
    block_size: opt.BlockSize = None,
    randomize: opt.Randomize = False,
    family: opt.Family = None,
    probe: Annotated[
        bool,
        opt.option(
            opt.ADVANCED,
            "For an architecture without a built-in table: find out by experiment what can be rotated, and print a "
            "draft of a family file.",
            "--probe",
        ),
    ] = False,
    draft: Annotated[
        Path | None,
        opt.option(opt.ADVANCED, "With --probe: write the draft of the family file to this path."),
    ] = None,
) -> None:
    """Show which tensors each rotation is fused into and where it runs online, from config and headers only.

    With --runtime, also which rotations and schemes that runtime supports, why, and the alternatives. With --probe, try
    rotations on small random models of the class and draft a family file for --family.
    """
    if draft is not None and not probe:
        raise ArchitectureError("--draft names the file that --probe writes: add --probe, or leave --draft out")
    if scheme is not None and runtime is None:
        raise SchemeError("plan checks --scheme against a runtime: add --runtime, or leave --scheme out")
    wanted = parse_scheme(scheme) if scheme is not None else None

    from spinquant.architectures import make_plan, recorded_family
    from spinquant.checkpoint.folder import check_unquantized, folder_of, is_local, load_config, plan_in, read_headers
    from spinquant.cli.tables import plan_notes, plan_rows, plan_table, runtime_table
    from spinquant.formats.runtimes import runtime_rows

    spec = opt.parse_spec(rotations, type, block_size, randomize, 0, online)
    config = load_config(model, family=family)
    check_unquantized(config, model)
    shapes = {name: info.shape for name, info in read_headers(model).items()}
    if probe:
        return _probe(config, shapes, draft, json_)
    made = make_plan(config, shapes)
    made = plan_in(folder_of(model), config, made) if is_local(model) else made
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
    from spinquant.probing.draft_text import draft_text, write_draft
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
        note(f"wrote the draft {draft}: read and correct it, then use it with --family {draft}")
    if found.family is None:
        raise typer.Exit(1)
