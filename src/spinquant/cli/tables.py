"""Results as rich tables for the terminal, from the same data that `--json` prints."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from spinquant.errors import SpinquantError
from spinquant.formats.runtimes import RUNTIMES
from spinquant.plan import Plan
from spinquant.rotation_names import MERGEABLE, ONLINE_R1
from spinquant.rotations.factory import RotationSpec, choose

if TYPE_CHECKING:  # a table of a plan needs none of them
    from spinquant.compute.dtypes import Arithmetic
    from spinquant.entrypoints.result import Result
    from spinquant.evaluation.metrics import Comparison, Evaluation
    from spinquant.rotations.learned import LearnedRotations

NEEDS = {
    "R1": "nothing",
    "R2": "nothing",
    "R3": "rotates queries and keys after RoPE",
    "R4": "rotates the input of the linear",
    ONLINE_R1: "rotates the inputs of the linears",
}


UNLEARNED = {
    "closed-form": "random rotations with closed-form transforms",
    "random signs": "random rotations with the best of several signs",
}


def learning_table(learned: "LearnedRotations", out: str) -> Table:
    """Every candidate with its score on held-out text, and the one that was kept."""
    from spinquant.learning.budget import duration  # imported here since it imports torch

    record = learned.record
    table = Table(title=f"{out}: kept {record['kept']}", box=SIMPLE)
    for column in ("rotations", "KL to 16 bits", "perplexity", "clip of activations, cache", ""):
        table.add_column(column)
    for name, score in sorted(record["scores"].items(), key=lambda item: item[1]["kl"]):
        clips = record["clips"].get(name)
        used = f"{clips['activations']:.2f}, {clips['kv']:.2f}" if clips else ""
        mark = "kept" if name == record["kept"] else ""
        table.add_row(name, f"{score['kl']:#.4g}", f"{score['perplexity']:.2f}", used, mark)
    tokens, kept = record.get("tokens"), record["kept"]
    about = []
    if tokens:
        (samples, length), (windows, _) = tokens["samples"], tokens["judged"]
        about.append(
            f"learned from {samples} samples of {length} tokens ({tokens['text']}), scored on {windows} held-out "
            f"windows ({tokens['held_out']})"
        )
    if "arithmetic" in record:
        about.append("arithmetic: {dtype} ({reason})".format(**record["arithmetic"]))
    for kind, tried in record.get("closed_form", {}).items():
        verdict = "kept" if tried["kept"] else "not kept"
        # None: rounding in half precision would move the logits too much, so it was not scored.
        score = "not scored" if tried["kl"] is None else f"KL {tried['kl']:#.4g}"
        about.append(
            f"closed form, {kind}: {score}, {verdict} ({tried['spaces']} spaces, condition number up to "
            f"{tried['condition']:.3g}{', moments of weights' if tried.get('moments') == 'weights' else ''})"
        )
    if "budget" in record:
        given, spent = (duration(record["budget"][name]) for name in ("seconds", "spent"))
        about.append(f"budget: {spent} of {given} spent")
        about += [f"budget, {what}: {why}" for what, why in record["budget"]["left_out"].items()]
    if record["options"]["method"] == "random" and kept.startswith("random"):
        about.append("method random learns nothing: the best random rotation was written")
    elif kept in UNLEARNED:
        tried = any(name in record["scores"] for name in ("local", "end-to-end", "local+end-to-end"))
        about.append(f"wrote {UNLEARNED[kept]}{': learned rotations score no better' if tried else ''}")
    elif "closed_form" not in record and all(n == "16-bit" or n.startswith("random") for n in record["scores"]):
        about.append("wrote the best random rotation: there was no time for anything else")
    elif not record["learned"]:
        about.append("wrote the best random rotation: the learned ones score no better")
    table.caption = "\n".join(about) or None
    return table


def plan_rows(plan: Plan, spec: RotationSpec) -> list[dict[str, Any]]:
    """One dict per rotation of the spec: spaces, order, construction, tensors fused, sites online, or the refusal.

    `error` is None where the rotation is possible.
    """
    refused = dict(plan.refused)
    rows = []
    for name in spec.rotations:
        spaces = plan.spaces_of(name)
        names = {space.name for space in spaces}
        scaled = {space.name for space in plan.scales_beside(name)}
        row: dict[str, Any] = {
            "rotation": name,
            "spaces": [space.name for space in spaces],
            "size": spaces[0].size if spaces else None,
            "order": None,
            "construction": None,
            "axes": [axis for axis in plan.axes if axis.space in names],
            "gains": [gain.norm for gain in plan.gains if gain.space in names],
            "scaled": [axis.tensor for axis in plan.axes if axis.space in scaled and not axis.reads],
            "online": [f"{online.module} ({online.site})" for online in plan.onlines if online.space in names],
            "runtime_needs": NEEDS[name],
            "error": refused.get(name),
        }
        try:
            chosen = [choose(space, spec) for space in spaces]
            row["order"], row["construction"] = chosen[0]["order"], chosen[0]["construction"]
        except SpinquantError as error:
            row["error"] = row["error"] or str(error)
        rows.append(row)
    return rows


def plan_table(plan: Plan, rows: Sequence[Mapping[str, Any]], spec: RotationSpec) -> Table:
    """The rows of `plan_rows` for a terminal."""
    title = f"{plan.family} family, {len(plan.attentions)} layers"
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE)
    table.add_column(style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for row in rows:
        kinds = "each with a rotation of its own" if spec.randomize else "all with one rotation"
        single = len(row["spaces"]) == 1
        table.add_row(
            row["rotation"],
            "rotates",
            f"{', '.join(collapse(row['spaces']))}: size {row['size']}" + ("" if single else f", {kinds}"),
        )
        if row["error"]:
            table.add_row("", "impossible", f"[red]{escape(row['error'])}[/red]", end_section=True)
            continue
        blocks = row["size"] // row["order"]
        with_ = f"order {row['order']}" + (f", {blocks} blocks" if blocks > 1 else "") + f": {row['construction']}"
        table.add_row("", "with", with_)
        for dim in sorted({axis.dim for axis in row["axes"]}):
            names = collapse([axis.tensor for axis in row["axes"] if axis.dim == dim])
            table.add_row("", f"fused, axis {dim}", ", ".join(names))
        if row["gains"]:
            table.add_row("", "gains fused", ", ".join(collapse(row["gains"])))
        if row["scaled"]:
            writers = ", ".join(collapse(row["scaled"]))
            table.add_row("", "can be scaled", f"by rows of {writers} (spinquant learn)")
        online = collapse(row["online"]) if row["rotation"] not in MERGEABLE else []
        table.add_row("", "at run time", ", ".join(online) or "nothing", end_section=True)
    return table


def plan_notes(plan: Plan, spec: RotationSpec) -> list[str]:
    """Notes below the table: tensors that R1 unties, and what a runtime has to support."""
    notes = []
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if "R1" in spec.rotations:
        heads = [tie for tie in plan.ties if tie.tensor == plan.head]
        notes += [f"{tie.tensor} shares memory with {tie.source}: R1 unties them" for tie in heads]
        if len(plan.ties) > len(heads):
            notes.append(
                f"{len(plan.ties) - len(heads)} tensors belong to shared (weight-tied) blocks: R1 and quantization "
                "untie them, so the result is larger"
            )
    if online:
        needs = "; ".join(f"{name} {NEEDS[name]}" for name in online)
        notes.append(
            f"{', '.join(online)} run online ({needs}): spinquant.load attaches them; `plan --runtime NAME` shows "
            "whether another runtime supports them"
        )
    elif spec.rotations:
        notes.append("all rotations are fused into the weights: any runtime can load the result")
    return notes


def runtime_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `runtime_rows` for a terminal."""
    table = Table(title=f"runtime {name}: {RUNTIMES[name].title}", title_justify="left", box=SIMPLE)
    for header in ("", "runs", "why", "instead"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(row["what"], "yes" if row["runs"] else "[red]no[/red]", escape(row["why"]), row["instead"] or "")
    return table


def result_table(result: "Result", out: str) -> Table:
    """What was done to a model, and how far rotating moved its logits."""
    table = Table(title=escape(f"wrote {out}"), title_justify="left", show_header=False)
    spec = result.spec
    table.add_row("rotations", ", ".join(spec.rotations) or "none")
    if result.scheme is not None:
        table.add_row("scheme", f"{result.scheme} by {result.method}")
    if result.twin:
        table.add_row("tiny model, float64", f"logits moved by {result.twin.max_abs:.1e} at most")
    if result.quantizers:
        table.add_row("tiny model, quantized", f"{result.quantizers.relative:.1e} from a computation without hooks")
    if result.real:
        moved = f"logits moved by {result.real.max_abs:.1e} at most, {result.real.mean_abs:.1e} on average"
        table.add_row("this model, real tokens", f"{moved}, before quantization" if result.scheme else moved)
    elif "real_tokens" in result.notes:
        table.add_row("this model, real tokens", escape(result.notes["real_tokens"]))
    if tuned := result.notes.get("tuning"):
        table.add_row(
            f"tuned, {tuned['options']['steps']} steps",
            f"KL {tuned['kl']['before']:#.4g} before, {tuned['kl']['after']:#.4g} after, on held-out windows"
            + ("" if tuned["kept"] else ": not kept"),
        )
    for what, computed in result.notes.get("arithmetic", {}).items():
        table.add_row(f"arithmetic of {what}", escape(f"{computed['dtype']} ({computed['reason']})"))
    for name, done in result.notes.get("adapters", {}).items():
        table.add_row(*_adapter_row(f"adapters/{name}", done))
    table.add_row("seed", str(spec.seed))
    return table


def adapters_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rotated adapters and draft heads, by folder."""
    table = Table(title=escape(f"wrote {', '.join(found)}"), title_justify="left", show_header=False)
    for out, done in found.items():
        table.add_row(*_adapter_row(out, done))
    return table


def _adapter_row(out: str, done: Mapping[str, Any]) -> tuple[str, str]:
    return escape(out), escape(f"{done['kind']} of {done['source']}: {done['rotated']} of {done['tensors']} tensors")


def evaluation_table(name: str, text: str, evaluation: "Evaluation", computed: "Arithmetic") -> Table:
    """Perplexity, and agreement with the reference model if there is one."""
    table = Table(title=escape(f"{name} on {text}"), title_justify="left", show_header=False)
    table.add_row("perplexity", f"{evaluation.perplexity:.4f}")
    if evaluation.kl is not None and evaluation.top1 is not None:
        table.add_row("reference perplexity", f"{evaluation.reference_perplexity:.4f}")
        table.add_row("KL to reference", f"{evaluation.kl:.3e} nats per token")
        table.add_row("same top token", f"{100 * evaluation.top1:.2f} %")
    table.add_row("tokens", f"{evaluation.tokens}")
    table.add_row("speed", f"{evaluation.tokens / evaluation.seconds:.0f} tokens/s")
    table.add_row("arithmetic", escape(str(computed)))
    return table


def comparison_table(reference: str, other: str, comparison: "Comparison", computed: "Arithmetic") -> Table:
    """Differences between the logits of two models."""
    table = Table(title=escape(f"{other} against {reference}"), title_justify="left", show_header=False)
    table.add_row("largest logit difference", f"{comparison.max_abs:.3e}")
    table.add_row("mean logit difference", f"{comparison.mean_abs:.3e}")
    table.add_row("relative error of logits", f"{comparison.relative:.3e}")
    table.add_row("KL", f"{comparison.kl:.3e} nats per token")
    table.add_row("same top token", f"{100 * comparison.top1:.2f} %")
    table.add_row("tokens", f"{comparison.tokens}")
    table.add_row("arithmetic", escape(str(computed)))
    return table


def checksum_table(folder: str, damaged: Sequence[str], missing: Sequence[str]) -> Table:
    """Whether the files of a folder match their checksums."""
    table = Table(title=escape(f"checksums of {folder}"), title_justify="left", show_header=False)
    for name in damaged:
        table.add_row(escape(name), f"[red]{'missing' if name in missing else 'changed'}[/red]")
    if not damaged:
        table.add_row("all files", "unchanged")
    return table


def tasks_table(results: Mapping[str, Mapping[str, Any]], computed: "Arithmetic") -> Table:
    """Results of lm-eval: one row per task and metric."""
    table = Table(title="lm-eval", title_justify="left", caption=escape(f"arithmetic: {computed}"))
    for header in ("task", "metric", "value"):
        table.add_column(header)
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}")
    return table


def rows_table(title: str, rows: Sequence[tuple[str, float | None, float | None]]) -> Table:
    """Perplexities of plain and rotated models, (label, plain, rotated)."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("plain", justify="right")
    table.add_column("rotated", justify="right")
    for label, plain, rotated in rows:
        table.add_row(label, *("" if value is None else f"{value:.2f}" for value in (plain, rotated)))
    return table


def collapse(names: Sequence[str]) -> list[str]:
    """Names that differ in one number only, as one name each: layers.{0-29}.mlp."""
    patterns: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d+)\.", name)
        if match:
            pattern = f"{name[: match.start(1)]}{{}}{name[match.end(1) :]}"
            patterns.setdefault(pattern, []).append(int(match.group(1)))
        else:
            patterns.setdefault(name, [])
    return [pattern.format("{" + _ranges(found) + "}") if found else pattern for pattern, found in patterns.items()]


def _ranges(numbers: Sequence[int]) -> str:
    found = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        found.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(found)
