"""llm-compressor's answer to `architectures.py`, which runs this in the peer's environment: a line of JSON a model."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.transform import SpinQuantModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

EXACT = 1e-4  # in float32


@torch.no_grad()
def verdict(folder: Path) -> str:
    """What R1 and R2 do to the logits of a saved model."""
    try:
        config = AutoConfig.from_pretrained(folder)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # whatever an older transformers says to a config that it does not know
        return f"not loaded ({type(error).__name__})"
    ids = torch.load(folder / "ids.pt")
    before = model(input_ids=ids, use_cache=False).logits
    try:
        oneshot(model=model, recipe=[SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")])
        after = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # its verdict, whatever it is
        message = " ".join(str(error).replace("|", "/").split())[:70]
        return f"raises {type(error).__name__}" + (f" ({message} ...)" if message else "")
    moved = ((after - before).norm() / before.norm()).item()
    return "exact" if moved < EXACT else f"wrong by {moved:.1g}"


def main() -> None:
    folder, *names = sys.argv[1:]
    print(json.dumps({"version": version("llmcompressor")}), flush=True)
    for name in names:
        print(json.dumps({"name": name, "verdict": verdict(Path(folder) / name)}), flush=True)


if __name__ == "__main__":
    main()
