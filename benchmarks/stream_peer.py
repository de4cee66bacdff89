"""Rotate a folder with llm-compressor (load, rotate, save); `stream.py` runs this in the peer's environment.

python stream_peer.py MODEL OUT
"""

import json
import sys
import time
from importlib.metadata import version

from llmcompressor import oneshot
from llmcompressor.modifiers.transform import SpinQuantModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, out = sys.argv[1:]
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded = time.perf_counter()
    oneshot(model=model, recipe=[SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")])
    rotated = time.perf_counter()
    model.save_pretrained(out)
    phases = {"load": loaded - start, "compute": rotated - loaded, "write": time.perf_counter() - rotated}
    print(json.dumps({"version": version("llmcompressor"), "seconds": phases}))


if __name__ == "__main__":
    main()
