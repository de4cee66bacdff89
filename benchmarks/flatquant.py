"""FlatQuant (arXiv 2410.09426) by this library's transforms, to compare with: row `flatquant` of `transforms.py`.

Invertible matrices are learned block by block, together with clip ratios, so that a block with quantized weights,
activations and KV cache has the outputs of the 16-bit block on its 16-bit inputs. Its parts, in our spaces:

    input of q, k, v; of gate, up     scales in the norm's weight, then F1 kron F2 at run time (online-R1)
    input of down_proj                scales in up_proj, then F1 kron F2 at run time (R4)
    values                            a matrix for each layer, shared by its heads, in v_proj and o_proj (R2)
    keys                              a matrix for each layer, shared by its heads, its dual on queries (R3); if the
                                      scheme has a KV cache

    F = U diag(d) V^T        U, V by Cayley from random orthogonal matrices, d from one

Settings are those of the paper and its code: mean squared error divided by itself, AdamW with torch's defaults, 15
epochs of batches of 4 in the order of the text, learning rate 5e-3 (of clip ratios ten times that) along half a cosine
to a thousandth, scales from max|w|^0.7 / max|x|^0.3, clip ratios sigmoid(4) for the lower and the upper end of a
range, gradients through the ranges.

What differs: the part at o_proj's input that mixes heads is left out, since it belongs to no space of ours; q, k and v
(gate and up) share the clip ratios of their input, as they share its quantizer; v_proj is clipped after the matrix of
the values instead of before it; the scheme decides whether activations are symmetric (in the paper they are);
arithmetic is float32, on a GPU with TF32, instead of half precision. The learned clip ratios are used while learning
alone: a row is quantized like any other, with clip ratios searched. The paper learns from 128 samples of 2048 tokens of
WikiText-2. The Python manual has 55 of that length, so `transforms.py` takes 128 of the length of its windows, 512
tokens: as many steps.

    python benchmarks/flatquant.py LEARNED --device cuda --processes 4

writes a folder as `spinquant learn` does, of SmolLM2-135M. `flatquant_check.py` checks it on tiny models.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

import spinquant
from flatquant_block import BlockLearner, FlatOptions, flat_rotations
from spinquant.calibration.data import CalibrationText, calibration_tokens
from spinquant.calibration.sequential import block_calls, run_block
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.entrypoints.learn import write_files
from spinquant.formats.load import load_model
from spinquant.learning.fake_quant import learning_scheme
from spinquant.models.capture import watched_calls
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.rotation import Transform
from spinquant.rotations.serialization import saved, to_save

HELD_OUT = 8  # samples at the end of the text that only errors are measured on, with one as a gap


@torch.no_grad()
def exact_outputs(
    model: Any, plan: Plan, name: str, inputs: Tensor, arguments: Mapping[str, Any], batch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of a block at 16 bits, and the largest magnitude of every channel at the inputs of its linears."""
    peaks: dict[str, Tensor] = {}

    def watch(linear: str, args: tuple[Any, ...]) -> None:
        found = args[0].abs().flatten(0, -2).amax(0)
        peaks[linear] = torch.maximum(peaks[linear], found) if linear in peaks else found

    block = model.get_submodule(name)
    firsts = [group[0] for group in plan.linears if group[0].startswith(f"{name}.")]
    with watched_calls(model, firsts, watch):
        return torch.cat([run_block(block, x, arguments) for x in inputs.split(batch)]), peaks


def learn_blocks(
    model: Any,
    plan: Plan,
    scheme: Scheme,
    tokens: Tensor,
    options: FlatOptions,
    *,
    held_out: int = 0,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], object] = print,
) -> tuple[dict[str, Transform], dict[str, dict[str, float]]]:
    """Learn the transforms of all blocks of a model, whose weights stay as they are.

    Args:
        model: The model, on the device to compute on.
        plan: Its plan.
        scheme: What is quantized.
        tokens: int64 (samples, length).
        options: Options.
        held_out: Number of samples at the end that only errors are measured on; the one before them is left out.
        share: (i, n) for block i and every n-th after it alone. Blocks learn from 16-bit inputs, so one does not depend
            on another.
        say: Called with a line for each block.

    Returns:
        Transforms by space; and for each block the errors, before and after, and the seconds.
    """
    model.requires_grad_(False)
    scheme = learning_scheme(scheme, weights=True)
    calls = block_calls(model, plan.blocks, tokens)
    states = torch.cat(list(calls.hidden))
    inputs, unseen = (states[: -held_out - 1], states[-held_out:]) if held_out else (states, states[:0])
    found: dict[str, Transform] = {}
    record: dict[str, dict[str, float]] = {}
    for number, name in enumerate(plan.blocks):
        begun, arguments = time.perf_counter(), calls.arguments[name][0]
        outputs, peaks = exact_outputs(model, plan, name, inputs, arguments, options.batch)
        judged = exact_outputs(model, plan, name, unseen, arguments, options.batch)[0] if held_out else unseen
        if number % share[1] == share[0]:
            learner = BlockLearner(model, plan, name, scheme, peaks, options)
            with learner.attached():
                errors = [learner.error(unseen, judged, arguments, options.batch)] if held_out else []
                losses = learner.learn(inputs, outputs, arguments, options)
                errors += [learner.error(unseen, judged, arguments, options.batch)] if held_out else []
            row = {"first_epoch": float(losses[0]), "last_epoch": float(losses[-1])}
            if not math.isfinite(row["last_epoch"]):
                raise SystemExit(f"the loss of {name} is not finite: use a smaller learning rate")
            found |= learner.found()
            row |= dict(zip(("held_out_before", "held_out_after"), map(float, errors), strict=False))
            record[name] = {**row, "seconds": time.perf_counter() - begun}
            shown = ", ".join(f"{key} {value:.3g}" for key, value in record[name].items())
            say(f"block {number + 1} of {len(plan.blocks)}: {shown}")
        inputs, unseen = outputs, judged
    return found, record


@dataclass(frozen=True)
class Job:
    """What `learn_folder` learns."""

    folder: str
    scheme: Scheme
    text: CalibrationText
    options: FlatOptions
    device: str

    def learn(self, share: tuple[int, int]) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
        """Learn a share of the blocks: transforms as they are saved, and the record."""
        if torch.device(self.device).type == "cuda":
            torch.set_float32_matmul_precision("high")
        model: Any = load_model(self.folder, dtype=torch.float32, device=self.device)
        plan = spinquant.plan_of(model)
        names = flat_rotations(plan, self.scheme)
        tokenizer = None if self.text.text == "generated" else spinquant.load_tokenizer(self.folder)
        wanted = replace(self.text, samples=self.text.samples + HELD_OUT + 1)
        source, tokens = calibration_tokens(model, tokenizer, wanted)
        samples, length = len(tokens) - HELD_OUT - 1, tokens.shape[1]
        if samples < self.options.batch:
            raise SystemExit(f"{source} has {len(tokens)} samples of {length} tokens: too few to learn from")
        if share[0] == 0:
            say(f"{source}: {samples} samples of {length} tokens, of {self.text.samples} wanted; {HELD_OUT} held out")
        found, blocks = learn_blocks(
            model, plan, self.scheme, tokens, self.options, held_out=HELD_OUT, share=share, say=say
        )
        about, tensors = to_save(found)
        record = {
            "rotations": names,
            "rotation_of": {space: plan.space[space].rotation for space in found},
            "tokens": {"text": source, "samples": [samples, length], "held_out": source, "judged": [HELD_OUT, length]},
            "blocks": blocks,
        }
        return about, save(tensors), record


def say(line: str) -> None:
    """Print a line about progress."""
    print(line, file=sys.stderr, flush=True)


def learn_folder(job: Job, out: str | Path, *, processes: int = 1) -> spinquant.LearnedRotations:
    """Learn the transforms of a model in a folder, and write them as `spinquant learn` does; returns them.

    processes: of which each learns some blocks. A step of a small model is some thousand small kernels, and one process
    launches them slower than a GPU computes them.
    """
    begun = time.perf_counter()
    shares = [(i, processes) for i in range(processes)]
    if processes == 1:
        parts = [job.learn(shares[0])]
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            parts = list(pool.map(job.learn, shares))
    found: dict[str, Transform] = {}
    record = {"kept": "flatquant", "learned": True, "scores": {}, "scheme": job.scheme.to_dict(), **parts[0][2]}
    for about, tensors, own in parts:
        found |= saved(about, load(tensors))
        for key in ("rotation_of", "blocks"):
            record[key] |= own[key]
    record["options"] = {"method": "flatquant", **asdict(job.options)}
    record["seconds"] = {"flatquant": time.perf_counter() - begun}
    spec = spinquant.RotationSpec(record.pop("rotations"), seed=job.options.seed)
    learned = spinquant.LearnedRotations(found, spec, record)
    with atomic_folder(out, force=True) as place:
        write_files(learned, place)
    return learned


def main() -> None:
    from models import MODELS, model_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--model", default=MODELS[0], help=f"{', '.join(MODELS)}, or a folder (default: %(default)s)")
    parser.add_argument("--scheme", default="W4A4KV4")
    parser.add_argument("--text", default="manual")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--epochs", type=int, default=FlatOptions.epochs)
    parser.add_argument("--batch", type=int, default=FlatOptions.batch)
    parser.add_argument("--lr", type=float, default=FlatOptions.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--processes", type=int, default=1, help="that learn some blocks each; on a GPU 4 take less time"
    )
    given = parser.parse_args()
    folder = str(model_folder(given.model) if given.model in MODELS else Path(given.model).resolve())
    print(f"torch {torch.__version__}, {given.device}", flush=True)
    options = FlatOptions(given.epochs, given.batch, given.lr, seed=given.seed)
    text = CalibrationText(given.text, given.samples, given.length, given.seed)
    job = Job(folder, spinquant.parse_scheme(given.scheme), text, options, given.device)
    learned = learn_folder(job, given.out, processes=given.processes)
    print(f"{len(learned.rotations)} transforms in {learned.record['seconds']['flatquant']:.0f} s: {given.out}")


if __name__ == "__main__":
    main()
