"""Measure the peak memory of GPTQ from disk against the number of layers, and for one block of a large shape.

bf16 Llamas with random weights are generated, and each is quantized by the command line in a process of its own, on a
few windows of the Python manual (byte tokenizer). Peak memory is ru_maxrss of the process, Python, torch and
transformers included; "starting" is that of a process that only imports them.

    python benchmarks/gptq_memory.py                    # hidden 1024, inner 4096; 4, 8 and 16 layers
    python benchmarks/gptq_memory.py --shape 8b-block   # one block of the 8B shape: 14336 inputs are the widest
    python benchmarks/gptq_memory.py --shape 2b-block   # the same at half the width: a quarter of a matrix

Memory beyond starting and the block's own weights is also printed in units of the widest linear's n x n matrix in
float64; it includes the moments in float32, the weights being rounded, and activations.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stream import generate, tensor_shapes, timed

SHAPES = {
    "small": {"hidden": 1024, "inner": 4096, "layers": 0, "heads": 16, "kv": 8, "vocabulary": 1024, "tied": False},
    "2b-block": {"hidden": 2048, "inner": 7168, "layers": 1, "heads": 16, "kv": 4, "vocabulary": 1024, "tied": False},
    "8b-block": {"hidden": 4096, "inner": 14336, "layers": 1, "heads": 32, "kv": 8, "vocabulary": 1024, "tied": False},
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(folder: Path, shape: dict, options: list[str]) -> dict[str, float]:
    """Generate and quantize a model; return its bytes, those of a block in memory, and the peak of the process."""
    nbytes = generate(folder / "model", shape)
    write_tokenizer(folder / "model")
    command = [sys.executable, "-m", "spinquant", "quantize", str(folder / "model"), str(folder / "out"), *options]
    seconds, cpu, peak, output = timed(command)
    about = json.loads(output)
    assert about["method"] == "gptq"
    block = [2 * torch.Size(s).numel() for name, s in tensor_shapes(shape).items() if ".layers.0." in name]
    for name in ("model", "out"):
        shutil.rmtree(folder / name)
    return {"model": nbytes, "block": sum(block), "peak": peak, "seconds": seconds, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="layers, for the small shape")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", default="16MB", help="memory for hidden states")
    parser.add_argument("--folder", type=Path, help="folder in which the model is generated")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    layers = arguments.layers if arguments.shape == "small" else [shape["layers"]]
    given = {"scheme": arguments.scheme, "method": arguments.method, "rotations": "R1,R2", "calibration": "manual"}
    given |= {"samples": arguments.samples, "sample-length": arguments.length, "memory": arguments.memory}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options += ["--no-proof", "--no-compare", "--json"]
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads; {' '.join(options)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        *_, starting, _ = timed(
            [sys.executable, "-c", "import spinquant.cli.main, transformers.models.llama.modeling_llama"]
        )
        print(f"starting {starting / 1e6:6.0f} MB")
        for count in layers:
            found = measure(Path(name), {**shape, "layers": count}, options)
            matrices = (found["peak"] - starting - found["block"]) / (8 * shape["inner"] ** 2)
            print(
                f"{count:3} layers, model {found['model'] / 1e6:6.0f} MB, block {found['block'] / 1e6:5.0f} MB: "
                f"peak {found['peak'] / 1e6:6.0f} MB, {matrices:4.2f} n x n float64 beyond starting and block; "
                f"{found['cpu']:.0f} s of CPU"
            )


if __name__ == "__main__":
    main()
