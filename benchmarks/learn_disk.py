"""Measure `learn --method closed-form` from disk: against a model in memory, and for one block of a large shape.

With --model, the command line learns for a folder twice, each in a process of its own: in memory, and from disk
(--memory 1MB). With --shapes, a bf16 checkpoint with random weights and one block of the shape is generated, and the
parts of a walk are timed on it: forward, and back with moments, per block and sample; and one window of one candidate.
What a model of all layers costs follows by multiplication, and is printed with the bytes that are read and kept:

    weights        read at every walk, forward and back: forward walks + 2
    states         of `samples` samples before each block and the head, kept on disk until the way back has passed them
    gradient       as much as the states before one block
    moments        (forward + back) * samples * layers
    scores         window * windows of all candidates of all walks * layers

    python benchmarks/learn_disk.py --model SMOLLM2
    python benchmarks/learn_disk.py --shapes 8b 70b
    python benchmarks/learn_disk.py --shapes 8b 70b --device cuda --samples 8
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

import spinquant
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.entrypoints.learn_blocks import opened_blocks
from spinquant.learning.fake_quant import learning_scheme
from spinquant.learning.free_transforms import free_spaces
from spinquant.learning.learn import CLIP_WINDOWS, MOMENT_SAMPLES
from spinquant.learning.moments import sites_of
from spinquant.learning.scoring import RATIOS, Candidate
from spinquant.learning.walk import walked_moments
from spinquant.learning.walk_scores import walked_scores
from stream import generate, tensor_shapes, timed

SHAPES = {
    "8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv": 8, "vocabulary": 128256, "tied": False},
    "70b": {"hidden": 8192, "inner": 28672, "layers": 80, "heads": 64, "kv": 8, "vocabulary": 128256, "tied": False},
}
LENGTH = 512
WINDOWS, BASELINES = 8, 5  # defaults of `learn`
# Walks that a run takes when another random rotation than the first leads, and every kind is kept. Windows of all
# candidates: clip ratios three times (the 16-bit model beside 6 ratios, and beside 5 more), and scores of all random
# rotations, of the leader, of all kinds, and of what is kept, each beside the 16-bit model.
WALKS = 3 * 3 + 1 + 1
CARRIED = 3 * CLIP_WINDOWS * (2 * len(RATIOS) - 1 + 2) + WINDOWS * (BASELINES + 1 + 2 + 5 + 2)


def one_block(name: str, samples: int, device: str, folder: Path) -> dict[str, float]:
    """Seconds per block and sample, of the process (CPU) or by the clock (other devices), and peak memory."""
    shape = {**SHAPES[name], "layers": 1, "vocabulary": 512}
    generate(folder / "model", shape)
    clock = time.process_time if device == "cpu" else time.perf_counter
    scheme, spec = spinquant.parse_scheme("W4A4KV4"), spinquant.RotationSpec("R1,R2,R3,R4", "random-hadamard")
    tokens = torch.randint(0, 512, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    ends: list[float] = []

    def progress(done: int, total: int) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        ends.append(clock())

    with opened_blocks(folder / "model", scheme, spec, device=device) as blocks:
        plan, learning = blocks.home.plan, learning_scheme(scheme, weights=False)
        rotations = spinquant.make_rotations(plan, spec)
        spaces = [space for names in free_spaces(plan, rotations, learning).values() for space in names]
        pieces, generator = Pieces(folder / "pieces"), torch.Generator().manual_seed(0)
        sites = sites_of(plan, spaces, learning, rotations)
        progress(0, 0)
        walked_moments(blocks.home, plan, sites, scheme, tokens, pieces, generator=generator, progress=progress)
        forward, _, back = (b - a for a, b in pairwise(ends))
        ends.clear()
        progress(0, 0)
        candidates = {str(i): Candidate(rotations) for i in range(2)}
        walked_scores(blocks.home, plan, candidates, learning, tokens, progress=progress)
        windows = len(tokens) * (len(candidates) + 1)
        return {
            "forward": forward / samples,
            "back": back / samples,
            "window": (ends[1] - ends[0]) / windows,
            "computed": blocks.computed.dtype.itemsize,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def report(name: str, found: dict[str, float]) -> None:
    """Print what was measured, and what it makes of a whole model."""
    shape = SHAPES[name]
    shapes = tensor_shapes(shape)
    numbers = sum(torch.Size(size).numel() for size in shapes.values())
    block = sum(torch.Size(size).numel() for tensor, size in shapes.items() if ".layers.0." in tensor)
    layers, size = shape["layers"], int(found["computed"])
    states = MOMENT_SAMPLES * LENGTH * shape["hidden"] * size
    moments = (found["forward"] + found["back"]) * MOMENT_SAMPLES * layers
    scores = found["window"] * CARRIED * layers
    product = 2 * block * LENGTH
    print(
        f"{name}: {layers} blocks of {block / 1e6:.0f} M weights, {2 * numbers / 1e9:.1f} GB\n"
        f"  a sample of {LENGTH} tokens through a block: forward {found['forward']:.2f} s "
        f"({product / found['forward'] / 1e9:.0f} GFLOP/s), back {found['back']:.2f} s, a candidate's window "
        f"{found['window']:.2f} s; peak {found['peak'] / 1e6:.0f} MB, of which the block {2 * block / 1e6:.0f}\n"
        f"  weights read: {2 * numbers / 1e9:.1f} GB times {WALKS + 1} = {2 * numbers * (WALKS + 1) / 1e12:.2f} TB\n"
        f"  states kept: {states / 1e6:.0f} MB times {layers + 1} = {states * (layers + 1) / 1e9:.1f} GB, "
        f"gradient {states / 1e6:.0f} MB\n"
        f"  moments: ({found['forward']:.2f} + {found['back']:.2f}) * {MOMENT_SAMPLES} * {layers} = "
        f"{moments / 3600:.2f} h\n"
        f"  scores: {found['window']:.2f} * {CARRIED} * {layers} = {scores / 3600:.2f} h",
        flush=True,
    )


def compare(model: Path, folder: Path, options: list[str]) -> None:
    """Learn for a folder in memory and from disk; print time and memory of both, and whether they agree."""
    *_, starting, _ = timed(
        [sys.executable, "-c", "import spinquant.cli.main, transformers.models.llama.modeling_llama"]
    )
    print(f"starting {starting / 1e6:.0f} MB")
    scores = []
    for name, words in (("memory", []), ("disk", ["--memory", "1MB"])):
        command = [sys.executable, "-m", "spinquant", "learn", str(model), str(folder / name), *options, *words]
        wall, cpu, peak, output = timed(command)
        about = json.loads(output)
        scores.append({key: value["kl"] for key, value in about["scores"].items()})
        seconds = {key: round(value) for key, value in about["seconds"].items()}
        print(
            f"{name:6}: {cpu:.0f} s of CPU ({wall:.0f} s by the clock; {seconds}), peak {peak / 1e6:.0f} MB, walks "
            f"{about.get('walks', 0)}, kept {about['kept']}, {about['arithmetic']['dtype']}, kinds "
            f"{[kind for kind, found in about['closed_form'].items() if found['kept']]}",
            flush=True,
        )
    for key, kl in scores[0].items():
        print(f"  {key:12} KL in memory {kl:.5f}, from disk {scores[1].get(key, float('nan')):.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shapes", nargs="*", default=[], choices=list(SHAPES))
    parser.add_argument("--samples", type=int, default=2, help="samples through the block of a shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the comparison")
    parser.add_argument("--learn-samples", type=int, default=32, help="samples of the comparison")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sample of the comparison")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of the comparison")
    parser.add_argument("--baselines", type=int, default=BASELINES, help="random rotations of the comparison")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            report(name, one_block(name, arguments.samples, arguments.device, Path(folder)))
    if arguments.model:
        options = ["--scheme", "W4A4KV4", "--method", "closed-form", "--json", "--quiet", "--text", "manual"]
        options += ["--samples", str(arguments.learn_samples), "--sample-length", str(arguments.length)]
        options += ["--windows", str(arguments.windows), "--baselines", str(arguments.baselines)]
        options += ["--dtype", arguments.dtype] if arguments.dtype else []
        with tempfile.TemporaryDirectory() as folder:
            compare(arguments.model, Path(folder), options)


if __name__ == "__main__":
    main()
