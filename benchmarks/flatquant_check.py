"""Checks of `flatquant.py` on tiny random models on the CPU: what is learned changes no logit, and it learns.

    python benchmarks/flatquant_check.py

0. Numbers and gradients of the quantizer are those of FlatQuant's formula, by autograd.
1. Learned transforms leave the logits as they are (float64, 1e-9).
2. While learning, a block without clipping has the outputs of the same block quantized by `spinquant.quantize`.
3. The loss falls, and on held-out samples the error of each block is lower than that of random Hadamards.
4. The same seed gives the same transforms, also in several processes, and another seed gives others.
"""

import copy
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import spinquant
from flatquant import Job, exact_outputs, learn_blocks, learn_folder
from flatquant_block import BlockLearner, FlatOptions, flat_rotations, rounded
from spinquant.calibration.data import CalibrationText
from spinquant.calibration.sequential import block_calls, run_block
from spinquant.evaluation.equivalence import Float64Arithmetic

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, attention_bias=True),
}
SCHEME = "W4A4KV4"
TOKENS = torch.randint(0, 128, (41, 32), generator=torch.Generator().manual_seed(7))


def tiny_model(name: str) -> Any:
    """A random model in float64 with biases, gains that are not one, and channels of very different sizes."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise if tensor.endswith("bias") else noise.exp())
    return model.eval()


def check_quantizer(symmetric: bool) -> None:
    """round(x / scale) with a straight-through gradient, clamped, with autograd through range and clip ratios."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 24, generator=generator, dtype=torch.float64).requires_grad_()
    clip = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ratios, low, high = clip.sigmoid(), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if symmetric:
        scale, zero = torch.maximum(-low * ratios[0], high * ratios[1]) / 7, torch.full_like(low, 8)
    else:
        scale = (high * ratios[1] - low * ratios[0]) / 15
        zero = (-low * ratios[0] / scale).round().detach()
    level = x / scale
    wanted = ((level + (level.round() - level).detach() + zero).clamp(0, 15) - zero) * scale
    found = rounded(x, spinquant.Quantizer(4, symmetric=symmetric), clip)
    pairs = [torch.autograd.grad((y * weights).sum(), (x, clip)) for y in (found, wanted)]
    for one, other in ((found, wanted), *zip(*pairs, strict=True)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert 0 < int((found.detach().sub(x).abs() > scale).sum())  # some are clipped


@torch.no_grad()
def check_exact(model: Any, found: dict[str, Any], spec: Any) -> None:
    """The logits of the model with transforms, and without quantizers, are those of the model."""
    changed = copy.deepcopy(model)
    spinquant.rotate(changed, spec, rotations=found, options=spinquant.Options(prove=False))
    with Float64Arithmetic():  # norms of transformers compute in float32
        before, after = (one(input_ids=TOKENS[:4]).logits for one in (model, changed))
    moved = float((after - before).abs().max() / before.abs().max())
    print(f"  logits moved by {moved:.1e}")
    assert moved < 1e-9


def quantized(model: Any, scheme: Any, spec: Any, found: dict[str, Any] | None) -> Any:
    """A copy, quantized by the library, to nearest and without a search for clip ratios."""
    changed = copy.deepcopy(model)
    spinquant.quantize(changed, scheme, spec, rotations=found, options=spinquant.Options(prove=False))
    return changed


@torch.no_grad()
def errors(model: Any, changed: Any, tokens: Tensor) -> list[float]:
    """Mean squared error of each block of a quantized copy, on the inputs that the block has in the model."""
    blocks = spinquant.plan_of(model).blocks
    calls = block_calls(model, blocks, tokens)
    states, found = torch.cat(list(calls.hidden)), []
    for name in blocks:
        exact = run_block(model.get_submodule(name), states, calls.arguments[name][0])
        rounded = run_block(changed.get_submodule(name), states, calls.arguments[name][0])
        found.append(float((rounded - exact).square().mean()))
        states = exact
    return found


@torch.no_grad()
def check_block(model: Any, options: FlatOptions) -> None:
    """A block while it is learned, its clip ratios at one, is the block that the library quantizes."""
    scheme, plan = spinquant.parse_scheme(SCHEME, weight_clip=1.0), spinquant.plan_of(model)
    calls = block_calls(model, plan.blocks, TOKENS[:4])
    states, name = torch.cat(list(calls.hidden)), plan.blocks[0]
    _, peaks = exact_outputs(model, plan, name, states, calls.arguments[name][0], 4)
    learner = BlockLearner(model, plan, name, scheme, peaks, options)
    for clip in learner.clips.values():
        clip.fill_(60.0)
    for middle in learner.middles.values():  # not orthogonal
        middle.copy_(torch.linspace(0.5, 2, middle.shape[-1], dtype=middle.dtype))
    with learner.attached():
        learner.update()
        found = learner.output(states, calls.arguments[name][0])
    spec = spinquant.RotationSpec(flat_rotations(plan, scheme))
    other = {}
    for block in plan.blocks[1:]:  # the library wants those of all blocks
        _, peaks = exact_outputs(model, plan, block, states, calls.arguments[block][0], 4)
        other |= BlockLearner(model, plan, block, scheme, peaks, options).found()
    changed = quantized(model, scheme, spec, {**learner.found(), **other})
    wanted = run_block(changed.get_submodule(name), states, calls.arguments[name][0])
    moved = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"  a block while learning is off the quantized block by {moved:.1e}")
    assert moved < 1e-9


def main() -> None:
    for symmetric in (False, True):
        check_quantizer(symmetric)
    for name in CONFIGS:
        print(name)
        model, scheme = tiny_model(name), spinquant.parse_scheme(SCHEME)
        plan, options = spinquant.plan_of(model), FlatOptions(epochs=10, batch=4, seed=3)
        check_block(model, options)
        spec = spinquant.RotationSpec(flat_rotations(plan, scheme), seed=options.seed)
        found, record = learn_blocks(
            model, plan, scheme, TOKENS, options, held_out=8, say=lambda line: print("  " + line)
        )
        check_exact(model, found, spec)
        own = errors(model, quantized(model, scheme, spec, found), TOKENS[-8:])
        random = errors(model, quantized(model, scheme, spec, None), TOKENS[-8:])
        print(f"  held-out error of blocks, of random Hadamards {random}, of what is learned {own}")
        for row, one, other in zip(record.values(), own, random, strict=True):
            assert row["last_epoch"] < 0.9 * row["first_epoch"]
            assert row["held_out_after"] < row["held_out_before"]
            assert one < other
    check_seeds()


def check_seeds() -> None:
    """One seed, in one process and in two, and another seed."""
    text = CalibrationText("generated", 4, 16)
    with TemporaryDirectory() as place:
        tiny_model("llama").float().save_pretrained(place)
        jobs = [
            Job(place, spinquant.parse_scheme(SCHEME), text, FlatOptions(1, seed=seed), "cpu") for seed in (3, 3, 4)
        ]
        runs = [learn_folder(job, f"{place}/{i}", processes=1 + i % 2) for i, job in enumerate(jobs)]
        assert spinquant.read_learned(f"{place}/0").digest() == runs[0].digest()
    first, second, other = (run.rotations for run in runs)
    assert first.keys() == second.keys() == other.keys()
    for space, one in first.items():
        for key, tensor in one.tensors().items():
            assert torch.equal(tensor, second[space].tensors()[key])
            assert not torch.equal(tensor, other[space].tensors()[key])
    print("the same seed gives the same transforms in one process and in two, another one others")


if __name__ == "__main__":
    main()
