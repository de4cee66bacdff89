"""Rotate models with a peer, for `architectures.py`: runs in the peer's environment, prints one JSON line per model."""

import contextlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

EXACT = 1e-4  # in float32
BLOCK = 16  # of auto-round's R1, which wants a power of two; it divides every hidden size of the tiny models


def llm_compressor(model: Any) -> None:
    """R1 and R2 by llm-compressor's SpinQuantModifier."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform import SpinQuantModifier

    oneshot(model=model, recipe=[SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")])


def auto_round(model: Any) -> None:
    """R1 and R2 by auto-round, both fused into the weights and random; R1 in blocks."""
    from auto_round.algorithms.transforms.spinquant.preprocessor import SpinQuantConfig, SpinQuantPreprocessor

    config = SpinQuantConfig(
        r1=True, r2=True, random_r1=True, random_r2=True, rotation_size=BLOCK, online_r1_rotation=False, device="cpu"
    )
    with contextlib.redirect_stdout(sys.stderr):  # it prints a table
        SpinQuantPreprocessor(model, config).preprocess()


PEERS = {"llmcompressor": llm_compressor, "auto-round": auto_round}


@torch.no_grad()
def verdict(peer: str, folder: Path) -> str:
    """How far R1 and R2 move the logits of a saved model."""
    try:
        config = AutoConfig.from_pretrained(folder)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # whatever an older transformers says to a config that it does not know
        return f"not loaded ({type(error).__name__})"
    ids = torch.load(folder / "ids.pt")
    before = model(input_ids=ids, use_cache=False).logits
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        PEERS[peer](model)
        after = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # its verdict, whatever it is
        message = " ".join(str(error).replace("|", "/").split())[:70]
        return f"raises {type(error).__name__}" + (f" ({message} ...)" if message else "")
    moved = ((after - before).norm() / before.norm()).item()
    found = dict(model.named_parameters())
    if all(name in found and torch.equal(found[name], weight) for name, weight in weights.items()):
        return "does nothing"
    return "exact" if moved < EXACT else f"wrong by {moved:.1g}"


def main() -> None:
    peer, folder, *names = sys.argv[1:]
    print(json.dumps({"version": version(peer), "transformers": version("transformers")}), flush=True)
    for name in names:
        print(json.dumps({"name": name, "verdict": verdict(peer, Path(folder) / name)}), flush=True)


if __name__ == "__main__":
    main()
