"""Write the model card (README.md) of a folder: what was done and measured, how to load it, and the source's card.

The front matter is the Hub's YAML, written and read by huggingface_hub (`source_card.py`). The same request gives the
same card: no times, no paths (`local_paths.py`), and no options that do not affect what is written.
"""

import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spinquant.checkpoint.checksums import CHECKSUMS
from spinquant.checkpoint.folder import BESIDE, RECORD, ROTATIONS
from spinquant.entrypoints.loading import loading_lines
from spinquant.entrypoints.local_paths import hub_id, public, public_command, source_name
from spinquant.entrypoints.markdown import code, fence, listed, plain, row
from spinquant.entrypoints.result import Result
from spinquant.entrypoints.source_card import front_matter, linked, split_card
from spinquant.formats.runtimes import scheme_names
from spinquant.plan import Plan
from spinquant.quantization.scheme import Quantizer, Scheme
from spinquant.rotation_names import MERGEABLE, ONLINE_R1
from spinquant.rotations.factory import RotationSpec
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform
from spinquant.rotations.transforms import Diagonal
from spinquant.rotations.wrappers import online_part

ORIGINAL = "Original model card"  # the heading above the source's card

METHODS = {"rtn": "round-to-nearest (RTN)", "gptq": "GPTQ", "gptaq": "GPTAQ (asymmetric GPTQ)"}
TUNED = {
    "scales": "scales of weights",
    "norms": "numbers of norms",
    "biases": "numbers of biases",
    "clips": "clip ratios",
}
ACTS_ON = {
    "R1": "residual stream",
    "R2": "value heads",
    "R3": "queries and keys, after position embeddings",
    "R4": "input of the last linear of each MLP",
    ONLINE_R1: "inputs of the linears that read the residual stream",
}
# By kind, with its construction.
MATRICES = {
    "hadamard": "Hadamard, {}",
    "random-hadamard": "Hadamard with random signs, {}",
    "orthogonal": "{}",
    "kronecker": "{}, random signs",
    "centred-hadamard": "{}",
    "centred-random-hadamard": "{}",
    "diagonal": "{}",
    "matrix": "invertible, {}",
    "kronecker-matrix": "invertible, {}",
    "composed": "{}",
}


def model_card(
    result: Result,
    *,
    format: str,
    source: str,
    source_card: str | None,
    command: str | None = None,
    learned: Mapping[str, Any] | None = None,
    loads_with: str = "AutoModelForCausalLM",
) -> str:
    """The text of README.md for a folder that holds a rotated or quantized model.

    Args:
        result: What was done and measured.
        format: `native`, `compressed-tensors` or `hf`. Without online rotations and quantization it is always `hf`.
        source: Folder or Hub id of the model that it was made from.
        source_card: The source's README.md, see `read_card`.
        command: The command line that was run.
        learned: Record of learned rotations. Default: the one in the notes of the result.
        loads_with: The auto class of transformers that loads the folder.

    Returns:
        Markdown with front matter; the same for the same arguments.
    """
    spec, scheme, plan = result.spec, result.scheme or Scheme(), result.plan
    learned = learned if learned is not None else result.notes.get("learned")
    quantized, online = scheme_names(scheme) != ("none",), _online(result)
    kind = format if quantized or online else "hf"
    metadata, original, note = split_card(source_card)
    front = front_matter(
        source,
        metadata,
        library_name="spinquant" if kind == "native" else "transformers",
        tags=_tags(result, scheme if quantized else None, kind),
        base_model_relation="quantized" if quantized else None,
    )
    done = ["rotated"] if result.rotations else []
    done += [f"quantized to {scheme}"] if quantized else []
    lines = [
        f"# {plain(source_name(source))}, {' and '.join(done) or 'unchanged'}",
        f"{linked(source)}{_story(result, online, quantized)}. Written by spinquant {version('spinquant')}, after "
        "[SpinQuant](https://arxiv.org/abs/2405.16406) and [QuaRot](https://arxiv.org/abs/2404.00456).",
        *_rotations(spec, _by_name(plan, spec, result.rotations), plan, learned),
        *(_quantization(result, scheme) if quantized else []),
        *_adapters(result.notes.get("adapters", {})),
        "## How to load it",
        "`FOLDER` is this folder, or the id of its repository on the Hub. These runtimes run it:",
        *loading_lines(kind, spec, scheme, plan, loads_with=loads_with),
        "## What was measured",
        *_measured(result, quantized, source),
        *(_scores(learned) if learned else []),
        *_origin(command, result.record()["versions"]),
        *_files(result.model is None),
        *_original(original, note),
    ]
    return _encodable(front + "\n\n".join(lines) + "\n")


def learned_card(
    learned: LearnedRotations,
    *,
    source: str,
    command: str | None = None,
    source_card: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The text of README.md for a folder of learned rotations.

    Args:
        learned: The rotations and their record.
        source: Folder or Hub id of the model that they were learned for.
        command: The command line that was run.
        source_card: The source's README.md; its license and language are inherited, its text is not repeated.
        pictures: Names of the pictures in the folder.

    Returns:
        Markdown with front matter; the same for the same arguments.
    """
    metadata, _, _ = split_card(source_card)
    metadata = {key: value for key, value in metadata.items() if key not in ("pipeline_tag", "tags", "datasets")}
    tags = ["spinquant", "rotation", "learned-rotations"]
    front = front_matter(source, metadata, library_name="spinquant", tags=tags)
    record, of = learned.record, learned.record.get("rotation_of", {})
    groups = {
        name: {s: r for s, r in learned.rotations.items() if of.get(s) == name} for name in learned.spec.rotations
    }
    scheme = Scheme.from_dict(record["scheme"]) if record.get("scheme") else Scheme()
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    lines = [
        f"# Rotations for {plain(source_name(source))}, learned for {scheme}",
        f"{linked(source)}: rotations to apply to it before it is quantized to {scheme}. Of several candidates, those "
        "with the least KL to the 16-bit model on held-out text. Written by spinquant "
        f"{version('spinquant')}, after [SpinQuant](https://arxiv.org/abs/2405.16406). The folder contains no model.",
        *_rotations(learned.spec, groups, None, record),
        "## How to use it",
        "With the model that it was learned for; `FOLDER` is this folder:",
        fence("sh", f"spinquant quantize MODEL OUT --scheme {scheme} --learned FOLDER"),
        "## What was measured",
        *_scores(record),
        *(f"![{plain(Path(name).stem)}]({name})" for name in pictures),
        *_origin(command, versions),
        "## Files",
        "- `rotations.safetensors`: the rotations\n- `learned.json`: what they are, all scores, steps and options",
    ]
    return _encodable(front + "\n\n".join(lines) + "\n")


# What was done


def _online(result: Result) -> list[str]:
    """Which rotations are applied at run time."""
    spaces = online_part(result.plan, result.rotations)
    return sorted({space.rotation for space in result.plan.spaces if space.name in spaces})


def _tags(result: Result, scheme: Scheme | None, format: str) -> list[str]:
    tags = ["spinquant", *(["rotation"] if result.rotations else [])]
    if scheme:
        names = [name for name in scheme_names(scheme) if name != "none"]
        tags += ["quantized", "".join(names).replace("_ASYM", "").lower()]
    return [*tags, *([format] if format == "compressed-tensors" else [])]


def _story(result: Result, online: Sequence[str], quantized: bool) -> str:
    """The rest of the first sentence, after the name of the source."""
    fused = [name for name in result.spec.rotations if name not in online]
    parts = [f"with {listed(fused)} fused into its weights"] if fused and result.rotations else []
    parts += [f"with {listed(online)} applied at run time"] if online else []
    if quantized:
        parts.append(f"quantized to {result.scheme} by {METHODS.get(result.method or 'rtn', result.method)}")
    return ", " + ", ".join(parts) if parts else ", neither rotated nor quantized"


def _by_name(plan: Plan, spec: RotationSpec, rotations: Mapping[str, Transform]) -> dict[str, dict[str, Transform]]:
    """Rotations by space, grouped by their names."""
    return {
        name: {
            space.name: rotations[space.name]
            for space in (*plan.spaces_of(name), *plan.scales_beside(name))
            if space.name in rotations
        }
        for name in spec.rotations
    }


def _rotations(
    spec: RotationSpec,
    groups: Mapping[str, Mapping[str, Transform]],
    plan: Plan | None,
    learned: Mapping[str, Any] | None,
) -> list[str]:
    """A table of the rotations. plan: for the sizes of spaces, if there is one. learned: the record of learning."""
    sizes = {space.name: space.size for space in plan.spaces} if plan else {}
    rows, scaled = [], []
    for name, group in groups.items():
        scaled += [name] if any(isinstance(found, Diagonal) for found in group.values()) else []
        group = {space: found for space, found in group.items() if not isinstance(found, Diagonal)}
        if not group:
            continue
        matrices = {id(rotation): rotation.describe() for rotation in group.values()}
        made = dict.fromkeys(MATRICES[d["kind"]].format(d["construction"]) for d in matrices.values())
        orders = dict.fromkeys(_order(rotation.order, sizes.get(space)) for space, rotation in group.items())
        where = "fused into weights" if name in MERGEABLE else "at run time"
        rows.append(row(name, ACTS_ON[name], len(group), len(matrices), "; ".join(orders), "; ".join(made), where))
    if not rows:
        return []
    head = [row("", "acts on", "spaces", "matrices", "order", "construction", "where"), row(*["---"] * 7)]
    items = [f"- seed: {spec.seed}"]
    if learned:
        items.append(f"- `{learned.get('kept')}` was kept of the candidates that `spinquant learn` scored, see below")
    elif spec.randomize:
        items.append("- randomized: a different rotation for every layer")
    if scaled:
        items.append(f"- channels beside {listed(scaled)} are scaled; the scales are in the weights")
    return ["## Rotations", "\n".join([*head, *rows]), "\n".join(items)]


def _order(order: int, size: int | None) -> str:
    return str(order) if size in (None, order) else f"{order} ({size // order} blocks)"


def _quantization(result: Result, scheme: Scheme) -> list[str]:
    rows = [row("", "numbers"), row("---", "---")]
    rows.append(row("weights", _numbers(scheme.weights, "output channel")))
    rows.append(row("activations", _numbers(scheme.activations, "token")))
    rows.append(row("KV cache", _numbers(scheme.kv, "head and token")))
    rows.append(row("output head", "quantized too" if scheme.lm_head else "not quantized"))
    items = [f"- method: {METHODS.get(result.method or 'rtn', result.method)}"]
    how, text = result.calibration, result.notes.get("calibration_text")
    if text:
        items.append(
            f"- calibration text: {text['samples']} samples of {text['length']} tokens from {code(text['text'])}"
        )
    if how is not None:
        if result.method != "rtn":
            items.append(f"- damping: {how.gptq.damping}; act-order: {'yes' if how.gptq.act_order else 'no'}")
        if how.clips:
            items.append("- clip ratios of activations and KV cache: searched per layer")
        if how.sequential:
            items.append(
                "- sequential: each linear is calibrated on the outputs of the quantized linears before it in its block"
            )
        if not how.round_inputs:
            items.append("- calibrated on activations and KV cache that are not quantized")
    items += _tuned(result.notes.get("tuning"))
    return ["## Quantization", "\n".join(rows), "\n".join(items)]


def _tuned(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    options, kl, numbers = record["options"], record["kl"], record["numbers"]
    what = listed(f"{count} {TUNED[kind]}" for kind, count in numbers.items())
    text = (
        f"- tuned after that: {options['steps']} steps of {options['batch']} of the calibration samples; KL to the "
        f"16-bit model on {options['windows']} held-out windows {kl['before']:#.4g} nats per token before, "
        f"{kl['after']:#.4g} after"
    )
    return [f"{text}. {what} were moved" if record["kept"] else f"{text}, so it was not kept"]


def _numbers(quantizer: Quantizer | None, unit: str) -> str:
    if quantizer is None:
        return "not quantized"
    if quantizer.kind == "int":
        kind = f"{quantizer.bits}-bit integers, {'symmetric' if quantizer.symmetric else 'asymmetric'}"
    else:
        kind = {"fp8": "FP8 (E4M3)", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}[quantizer.kind]
    scales = f"a scale per {f'{quantizer.group_size} numbers' if quantizer.group_size else unit}"
    if quantizer.static:
        scales += ", static range" if quantizer.group_size else ""
        scales = scales if quantizer.group_size else "static range of the whole tensor"
    clip = {1.0: "", "mse": ", clip ratio of least squared error"}.get(quantizer.clip, f", clip ratio {quantizer.clip}")
    return f"{kind}, {scales}{clip}"


def _adapters(adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not adapters:
        return []
    items = [
        f"- {code(f'adapters/{name}')}: {done['kind']} of {code(source_name(done['source']))}"
        for name, done in adapters.items()
    ]
    return ["## Adapters", "Rotated with the model:", "\n".join(items)]


# What was measured


def _measured(result: Result, quantized: bool, source: str) -> list[str]:
    items = []
    if not result.rotations:
        items.append("- nothing was rotated, so there is no difference to measure")
    else:
        before = " (rotated, before quantization)" if quantized else " (rotated)"
        if result.twin:
            items.append(
                "- tiny model of the same architecture, random weights, float64, rotations of the same spec: logits "
                f"differ by at most {result.twin.max_abs:.1e} (relative error {result.twin.relative:.1e})"
            )
        else:
            items.append("- tiny model of the same architecture: not measured")
        if result.real:
            text = result.notes.get("sample_text")
            items.append(
                f"- this model{before}, real tokens{f' of {code(text)}' if text else ''}: logits differ by at most "
                f"{result.real.max_abs:.1e}, {result.real.mean_abs:.1e} on average (relative error "
                f"{result.real.relative:.1e})"
            )
        else:
            items.append(f"- this model, real tokens: {result.notes.get('real_tokens', 'not compared, as asked')}")
        if "rounding_alone" in result.notes:
            alone = result.notes["rounding_alone"]
            items.append(f"- rounding the original's numbers alone: relative error of logits {alone:.1e}")
    lines = ["\n".join(items)]
    if quantized:
        reference = hub_id(source) or "ORIGINAL"
        note = "" if hub_id(source) else " (`ORIGINAL`: the model before it was quantized)"
        lines.append(f"Perplexity and KL of the quantized model were not measured here. To measure them{note}:")
        lines.append(fence("sh", f"spinquant evaluate FOLDER --reference {shlex.quote(reference)}"))
    return lines


def _scores(record: Mapping[str, Any]) -> list[str]:
    """Scores of learned rotations and of the baselines."""
    scores, kept, options = record.get("scores"), record.get("kept"), record.get("options", {})
    if not scores:
        return []
    scheme = Scheme.from_dict(record["scheme"]) if record.get("scheme") else Scheme()
    weights = scheme.weights is not None and options.get("end_to_end", {}).get("weights", False)
    rounded = {"weights": weights, "activations": scheme.activations is not None, "KV cache": scheme.kv is not None}
    tokens = record.get("tokens")
    text = f"Candidates were scored with {listed(n for n, yes in rounded.items() if yes)} quantized as in {scheme}"
    text += "" if weights or scheme.weights is None else ", weights at 16 bits"
    if tokens:
        (samples, length), (windows, _) = tokens["samples"], tokens["judged"]
        text += f", on {windows} windows of held-out text from {code(public(tokens['held_out']))}"
        text += f" (learned from {samples} samples of {length} tokens of {code(public(tokens['text']))})"
    rows = [row("rotations", "KL to 16 bits, nats per token", "perplexity", ""), row("---", "---:", "---:", "---")]
    for name, score in sorted(scores.items(), key=lambda item: item[1]["kl"]):
        rows.append(row(name, f"{score['kl']:#.4g}", f"{score['perplexity']:.2f}", "kept" if name == kept else ""))
    lines = [f"### Scores of the rotations\n\n{text}. Least KL is kept.", "\n".join(rows)]
    if options.get("method") != "random" and record.get("learned") is False:
        lines.append("The learned rotations are no better than random ones, so they were not kept.")
    return lines


# Where it comes from


def _origin(command: str | None, versions: Mapping[str, str]) -> list[str]:
    numbers = {"spinquant": version("spinquant"), **versions}
    lines = ["## How it was made"]
    if command:
        lines.append(fence("sh", public_command(command)))
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in numbers.items()) + ".")
    return lines


def _files(streamed: bool) -> list[str]:
    items = [
        f"- `{BESIDE}/{RECORD}`: what was done and measured, as JSON, with the plan of the rotations",
        f"- `{BESIDE}/{ROTATIONS}`: the rotations",
    ]
    if streamed:
        items.append(f"- `{BESIDE}/{CHECKSUMS}`: SHA-256 of all files (`spinquant verify --checksums FOLDER`)")
    return ["## Files", "Beside the weights:", "\n".join(items)]


def _original(text: str, note: str | None) -> list[str]:
    parts = [part for part in (note, text.strip("\n")) if part and part.strip()]
    return [f"# {ORIGINAL}", *parts] if parts else []


def _encodable(text: str) -> str:
    """The text without what UTF-8 cannot encode: file names may be any bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")
