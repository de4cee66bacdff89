"""`spinquant plan --probe`: what can be rotated in a model that no table knows, printed or written as a draft."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from spinquant.cli_output import err_console, print_json
from spinquant.probing.draft import draft_text, write_draft
from spinquant.probing.probe import probe


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
