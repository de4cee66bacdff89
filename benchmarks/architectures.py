"""Write docs/reference/architectures.md: which rotations every architecture allows, with the error on tiny models.

Every table's tiny random instance (tests/families.py, tests/models.py) is rotated in float64 and compared; the same
instance is saved and rotated by llm-compressor's SpinQuantModifier and by auto-round's SpinQuant (R1, R2, random
Hadamard):

    python benchmarks/architectures.py --peer PYTHON [--auto-round PYTHON] [--out docs/reference/architectures.md]

PYTHON is the interpreter of an environment with llm-compressor, in which `architectures_peer.py` runs; --auto-round
names another one if auto-round is not installed there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402
import models  # noqa: E402
import spinquant  # noqa: E402
from spinquant.architectures import family_of, known_model_types  # noqa: E402
from spinquant.architectures.unsupported import UNSUPPORTED  # noqa: E402
from spinquant.evaluation.tiny_model import exact_experts  # noqa: E402
from spinquant.models.modules import model_class  # noqa: E402
from spinquant.rotation_names import USUAL  # noqa: E402

NOTHING = "\N{EN DASH}"
INTRODUCTION = """# Architectures

What each rotation does to the models of transformers {transformers}, and what is refused. `benchmarks/architectures.py`
writes this page from the tables in `src/spinquant/architectures/` and a run on tiny random models of every family, in
float64, with non-zero biases and non-unit gains.

- **R1** rotates the residual stream, **R2** the values of every head (and the latents of DeepSeek's attention), **R3**
  queries and keys at run time, **R4** the input of an MLP's second linear at run time (of every expert's, in mixtures).
  **Online R1** takes the place of R1, at run time, at the inputs of the linears and experts that read the residual
  stream; it is exact for every table, also where R1 is refused.
- *yes*: allowed, and exact in the run. *no*: refused, for the reason in the note. {nothing}: the architecture has no
  such part.
- *centred*: the norms subtract the mean, so R1 is a mean-preserving rotation
  (`src/spinquant/rotations/mean_preserving.py`). The scale of such a norm is fused into the linears that read it; its
  bias is divided by the scale and rotated, so the model keeps its class and no linear needs a bias that it does not
  have. Where a scale is zero and the bias is not, that is impossible, and is refused by name.
- *error*: the largest ||logits' - logits|| / ||logits|| over the allowed rotations, alone and together.
- *llm-compressor*: what version {llm_compressor} does with R1 and R2 on the same model, in float32: *exact* below 1e-4,
  else how far the logits moved by the same measure, or the error that it raises. It centers embeddings, which changes
  the function under RMSNorm. The mean of a random embedding is larger than that of a trained one, so how far the logits
  move here says nothing about a real model, only that the function is a different one.
- *auto-round*: the same for version {auto_round}, with both rotations fused (`online_r1_rotation=False`; R1 in blocks
  of 16, since it needs a power of two). It is exact on Llamas without biases; it does not rotate the bias of a value.
- Several verdicts in a cell are those of the table's several instances (`tests/families.py`). *not loaded*: the peers'
  environment has an older transformers ({peer_transformers}), which does not know the config.

A model that no table describes is refused by name, and so is a tensor that its table does not describe. Such a model
takes a family file, which `spinquant plan --probe` drafts ([A model of your own](../how-to/own-model.md)). Of a
vision-language model the language part is rotated, and the projector, which writes to its residual stream; the tiny
model that is tried before the real one is changed gets text only (the tests use images too).

Other classes of a text-only family have the same table. Sequence classification, reward models
(`score`) and token classification have another head in the language model's place, into which R1 is fused.
Embedding models are the body alone (`...Model`, tensors without the prefix `model.`) and return the output of the last
norm, which R1 would change: it is refused, and R2, R3 and R4 are exact. So it is for a causal LM in a folder of
sentence-transformers (with `modules.json`).

Stacked experts and Conv1D are quantized like linears, each expert on the tokens that it gets; the format
`compressed-tensors` cannot store them. Adapters, draft heads, and layers for multi-token prediction:
[LoRA adapters and draft heads](../how-to/adapters.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--auto-round", type=Path, help="interpreter with auto-round; by default that of --peer")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/reference/architectures.md")
    arguments = parser.parse_args()
    instances = {name: families.Instance(config) for name, config in models.CONFIGS.items()} | families.FAMILIES
    with tempfile.TemporaryDirectory() as folder:
        ours = {name: measured(name, instance, Path(folder) / name) for name, instance in instances.items()}
        names = list(instances)
        peers = {
            "llm-compressor": answers_of("llmcompressor", arguments.peer, Path(folder), names),
            "auto-round": answers_of("auto-round", arguments.auto_round or arguments.peer, Path(folder), names),
        }
    arguments.out.write_text(page(instances, ours, peers), encoding="utf-8")


def measured(name: str, instance: families.Instance, folder: Path) -> float:
    """Largest relative error over the allowed rotations, alone and together. Saves the model to the folder."""
    ids = models.tokens()
    worst = 0.0
    for rotations in [(), *((rotation,) for rotation in instance.allowed), instance.allowed]:
        model = tiny(instance.config())
        before = models.logits(model, ids)
        if not rotations:
            model.save_pretrained(folder)
            torch.save(ids, folder / "ids.pt")
            continue
        plan = spinquant.plan_of(model)
        made = spinquant.make_rotations(plan, spinquant.RotationSpec(rotations, "auto"))
        spinquant.fuse_module(model, plan, made)
        with spinquant.attach(model, plan, made):
            moved = models.logits(model, ids) - before
        worst = max(worst, (moved.norm() / before.norm()).item())
    print(f"{name}: {worst:.1e}", flush=True)
    return worst


def tiny(config: Any) -> Any:
    """A random float64 model of a config."""
    model = model_class(config).from_config(config, dtype=torch.float64)
    exact_experts(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return models.random_weights(model)


def answers_of(peer: str, python: Path, folder: Path, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """A peer's verdicts by name, and the versions of it and of its transformers."""
    script = Path(__file__).parent / "architectures_peer.py"
    done = subprocess.run([python, script, peer, folder, *names], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(names) + 1:
        raise SystemExit(f"{peer} stopped early:\n{done.stderr[-2000:]}")
    return {line["name"]: line["verdict"] for line in lines[1:]}, lines[0]


def page(
    instances: dict[str, Any], ours: dict[str, float], peers: dict[str, tuple[dict[str, str], dict[str, str]]]
) -> str:
    """The text of the page."""
    by_table: dict[str, list[str]] = defaultdict(list)
    tables = {}
    for name, instance in instances.items():
        table = family_of(instance.config())
        assert table is not None
        by_table[table.name].append(name)
        tables[table.name] = table
    notes: list[str] = []
    rows = []
    for title, names in by_table.items():
        table = tables[title]
        plan = spinquant.plan_of(tiny(instances[names[0]].config()))
        cells = []
        for rotation in USUAL:
            refusals = [refusal for refusal in table.refused if refusal.rotation == rotation and not refusal.is_past]
            if not refusals:
                cells.append("yes" if plan.spaces_of(rotation) else NOTHING)
            for refusal in refusals:
                if refusal.reason not in notes:
                    notes.append(refusal.reason)
                note = f"[{notes.index(refusal.reason) + 1}](#notes)"
                cells.append(f"no {note}" if refusal.when is None else f"yes; no if {refusal.when} {note}")
        types = ", ".join(f"`{name}`" for name in table.model_types)
        error = max(ours[name] for name in names)
        found = ["; ".join(dict.fromkeys(verdicts[name] for name in names)) for verdicts, _ in peers.values()]
        centred = " (centred)" if table.centred else ""
        rows.append(f"| {title}{centred} | {types} | {' | '.join(cells)} | {error:.0e} | {' | '.join(found)} |")
    head = [f"| table | model types | R1 | R2 | R3 | R4 | error | {' | '.join(peers)} |", "|" + "---|" * 9]
    numbered = [f"{i}. {note}." for i, note in enumerate(notes, 1)]
    versions = {peer.replace("-", "_"): about["version"] for peer, (_, about) in peers.items()}
    introduction = INTRODUCTION.format(
        transformers=transformers.__version__,
        nothing=NOTHING,
        peer_transformers=peers["llm-compressor"][1]["transformers"],
        **versions,
    )
    return "\n".join([introduction, *head, *rows, "", "## Notes", "", *numbered, "", *coverage(), ""])


def coverage() -> list[str]:
    """The causal LMs of transformers that no table describes, grouped by reason."""
    known = set(known_model_types())
    causal = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = {name for name in causal if name not in known}
    seeing = ", ".join(f"`{name}`" for name in sorted(known - set(causal)))
    kinds = {kind: sorted(unknown & set(names)) for kind, names in UNSUPPORTED.items()}
    kinds["not looked at"] = sorted(unknown - {name for names in UNSUPPORTED.values() for name in names})
    lines = [f"- {kind}: {', '.join(f'`{name}`' for name in names)}." for kind, names in kinds.items() if names]
    return [
        "## Coverage",
        "",
        f"transformers {transformers.__version__} lists {len(causal)} model types under `AutoModelForCausalLM`. Tables "
        f"know {len(known & set(causal))} of them, and {seeing} beside them. These have none:",
        "",
        *lines,
        "",
        "Such a model is refused by name, and the message says what to do: `spinquant plan MODEL --probe` tries out "
        "what can be rotated and drafts a family file, which `--family` takes "
        "([A model of your own](../how-to/own-model.md)).",
        "",
        "The layers of Zamba share blocks, tied by the switch that ties embedding and head. R1 has to turn it off, so "
        "every layer then has a block of its own, under its own name, which plain transformers load as they are; the "
        "result is larger for it. So are quantized folders, where each layer's block is rounded by itself. R2 alone "
        "keeps them shared.",
    ]


if __name__ == "__main__":
    main()
