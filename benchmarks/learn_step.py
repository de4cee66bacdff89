"""Time a step of end-to-end learning, as a ratio to a plain forward and backward pass of the same batch.

- plain: the 16-bit model, weights frozen, gradients down to the embeddings
- spinquant: rounding in rotated coordinates, the gradients of all rotations, and the Cayley step; with the default
  loss (the expected cost of rounding) and with cross-entropy
- every weight: as in the reference implementation, each weight is rotated under autograd at each step (with
  `learning/parametrization.py`), in float32, and in float64 as the reference does

All run in turn in one process, with cross-entropy unless another loss is named, 4-bit activations and cache, R1 and R2
learned, R3 and R4 online:

    python benchmarks/learn_step.py
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import spinquant
from spinquant.demo.model import demo_model
from spinquant.learning.cayley import Descent
from spinquant.learning.fake_quant import fuse_gains, rounding
from spinquant.learning.parametrization import begin_training
from spinquant.learning.sensitivity import sampled_nll
from spinquant.online.attachment import attachment_of
from spinquant.quantization.moving import Moving, Tally
from spinquant.rotations.rotation import matrix


def loss_of(model, rows, **inputs):
    logits = model(use_cache=False, **(inputs or {"input_ids": rows})).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.model or demo_model()
    _, text = spinquant.load_text("manual")
    tokenizer = spinquant.load_tokenizer(folder)
    rows = spinquant.token_windows(tokenizer, text, length=arguments.length, count=arguments.batch)
    scheme = spinquant.parse_scheme("A4KV4")

    def load():
        return spinquant.load(folder, dtype=arguments.dtype)

    ways: dict[str, Callable[[], None]] = {
        "plain": plain(load(), rows),
        "spinquant, expected cost": rotated_coordinates(load(), rows, scheme, Tally()),
        "spinquant, cross-entropy": rotated_coordinates(load(), rows, scheme, None),
        "every weight, float32": every_weight(load(), rows, scheme, torch.float32),
        "every weight, float64": every_weight(load(), rows, scheme, torch.float64),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):  # the first round warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        found = statistics.median(values)
        print(f"{name:26} {found:7.2f} s   {found / base:6.2f} x plain   ({min(values):.2f} - {max(values):.2f} s)")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1))


def plain(model, rows) -> Callable[[], None]:
    model.requires_grad_(False)

    def step() -> None:
        embedded = model.get_input_embeddings()(rows).requires_grad_()
        loss_of(model, rows, inputs_embeds=embedded).backward()

    return step


def made_for(plan):
    return spinquant.make_rotations(plan, spinquant.RotationSpec("R1,R2,R3,R4"))


def learned_names(plan) -> dict[str, str]:
    return {s.name: "R1" if s.rotation == "R1" else s.name for s in plan.spaces if s.rotation in ("R1", "R2")}


def rotated_coordinates(model, rows, scheme, tally) -> Callable[[], None]:
    plan = spinquant.plan_of(model)
    made = made_for(plan)
    fuse_gains(model, plan, made)
    model.requires_grad_(False)
    names = learned_names(plan)
    moving = {name: Moving.starting(matrix(made[space], torch.float32), tally=tally) for space, name in names.items()}
    used = {space: moving[names[space]] if space in names else r for space, r in made.items()}
    descent = Descent({name: m.weight for name, m in moving.items()})

    def step() -> None:
        with rounding(model, plan, used, scheme):
            if tally is None:
                loss_of(model, rows).backward()
            else:
                sampled_nll(model, rows, [torch.Generator().manual_seed(0)] * len(rows)).backward()
                tally.take()
        descent.step({name: m.skew.grad for name, m in moving.items() if m.skew.grad is not None}, 0.1)
        for m in moving.values():
            m.skew.grad = None

    return step


def every_weight(model, rows, scheme, precision) -> Callable[[], None]:
    plan = spinquant.plan_of(model)
    made = made_for(plan)
    names = {space: name.replace(".", "_") for space, name in learned_names(plan).items()}
    learning = begin_training(model, plan, made, names, online=made, precision=precision)
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.remove()
    spinquant.attach(model, plan, learning.rotations, scheme)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step() -> None:
        for rotation in model.spinquant_learned.values():
            rotation.forget()
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
