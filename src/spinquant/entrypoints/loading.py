"""The section of a model card that shows how to load a folder in each runtime that runs it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from spinquant.architectures.model_classes import head_of_class, is_body
from spinquant.entrypoints.markdown import fence
from spinquant.formats.runtimes import RUNTIMES, runtime_rows
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import RotationSpec

_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
# How to load a folder in runtimes whose `Runtime.how` is not a command line.
LOADING = {
    "spinquant": """import spinquant

model = spinquant.load("FOLDER")
tokenizer = spinquant.load_tokenizer("FOLDER")""",
    "transformers": _TRANSFORMERS,
    "transformers-ct": f"# needs the package compressed-tensors\n{_TRANSFORMERS}",
    "vllm-plugin": "# with spinquant installed in vLLM's environment\nvllm serve FOLDER",
}


def runtimes_of(format: str, spec: RotationSpec, scheme: Scheme, plan: Plan | None) -> list[str]:
    """Names of the runtimes that load a folder of a format, and run its rotations and its scheme."""
    return [
        name
        for name, runtime in RUNTIMES.items()
        if runtime.format is not None
        and format in ("hf", runtime.format)
        and all(row["runs"] for row in runtime_rows(name, spec, scheme, plan))
    ]


def auto_class(config: Mapping[str, Any]) -> str:
    """The auto class of transformers that loads the model of a config.json."""
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText"
    return "AutoModel" if is_body(name) else f"AutoModel{head_of_class(name) or 'ForCausalLM'}"


def loading_lines(
    format: str, spec: RotationSpec, scheme: Scheme, plan: Plan, *, loads_with: str = "AutoModelForCausalLM"
) -> Iterable[str]:
    """Paragraphs of Markdown: for each runtime that runs the folder a heading, the code, and whether it is tested.

    loads_with: the auto class of transformers, see `auto_class`.
    """
    for name in runtimes_of(format, spec, scheme, plan):
        lines = LOADING.get(name, "").replace("AutoModelForCausalLM", loads_with) or re.sub(
            r"\bfolder\b", "FOLDER", RUNTIMES[name].how
        )
        yield f"### {RUNTIMES[name].title} (`{name}`)"
        yield fence("python" if "import " in lines else "sh", lines)
        tried = all(row["why"].startswith("test: ") for row in runtime_rows(name, spec, scheme, plan))
        yield "Tested by the tests of spinquant." if tried else "Not tested: its documentation or source states it."
