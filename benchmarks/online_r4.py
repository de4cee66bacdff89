"""Measure what R4 as another matrix than a Hadamard would gain and cost: Kronecker products, blocks, a dense matrix.

R4 runs online, so it may be any matrix T, at the price of what T costs more than a Hadamard transform. For the input
of down_proj, after the closed-form scales of its channels, the best T of each kind is computed in closed form, and
printed is the expected cost of rounding that it leaves, as a fraction of what the scales alone leave: on samples that
it was not made from, of activations and the weights that read them, for each layer, then for all. An orthogonal matrix
may follow T at the same cost.

    AxB    T = TA kron TB, by alternation: with B fixed, A is the best matrix for moments traced over P_B = TB TB^T,
           X_A[i, j] = sum over b, c of X[ib, jc] P_B[b, c], and G_A with the inverse of P_B; then B with A fixed
    block  a matrix of its own for each block of that many channels

Then the time of T for 1 and 512 tokens, as a ratio to the Hadamard transform of the same order, the two in turn. Blocks
need a Hadamard transform after them, since large numbers stay in their block, and are timed with it.

    OMP_NUM_THREADS=1 python benchmarks/online_r4.py --factors 32x48 12x128 --blocks 32 128 1536
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import spinquant
from models import MODELS, model_folder
from spinquant.learning.closed_form import DIAGONAL, Damping, Moments, best_transform, choose_damping, chosen_transforms
from spinquant.learning.fake_quant import learning_scheme
from spinquant.learning.moments import Site, collect_moments
from spinquant.learning.options import WEIGHTS_SHARE
from spinquant.rotations.factory import generator_for, random_orthogonal, random_signs
from spinquant.rotations.rotation import Hadamard

DAMPINGS = tuple(Damping(mean) for mean in (1.0, 0.3, 0.1, 0.03, 0.01))
ITERATIONS = 4  # of the alternation; four more change the cost by less than 1e-3
Pair = tuple[Tensor, Tensor]
Fold = Sequence[Moments]  # of the activation, and of the weights that read it


def dense(moments: Moments) -> Pair:
    """X and G as matrices."""
    return moments.x[0, 0], moments.g[0, 0]


def traced(moment: Tensor, orders: Sequence[int], factor: int, p: Tensor) -> Tensor:
    """The moment of one factor of a Kronecker product, with P of the other."""
    parts = moment.view(*orders, *orders)
    return torch.einsum("ibjc,bc->ij" if factor == 0 else "ibjc,ij->bc", parts, p)


def part_of(moments: Moments, orders: Sequence[int], factor: int, other: Tensor) -> Moments:
    """The moments of one factor of a Kronecker product, with P of the other."""
    x, g = dense(moments)
    x, g = traced(x, orders, factor, other), traced(g, orders, factor, other.inverse())
    return replace(moments, x=x[None, None], g=g[None, None])


def kronecker(fold: Fold, orders: Sequence[int]) -> Pair:
    """P_A and P_B of the best Kronecker product."""
    p = [torch.eye(order, dtype=torch.float64) for order in orders]
    for _ in range(ITERATIONS):
        for factor in (0, 1):
            p[factor] = best_transform([part_of(one, orders, factor, p[1 - factor]) for one in fold])[0]
    return p[0], p[1]


def cost_of(fold: Fold, p: Pair) -> float:
    """Expected cost after a Kronecker product, as a fraction of that without."""
    total = 0.0
    for one in fold:
        part, (x, _) = part_of(one, [len(factor) for factor in p], 0, p[1]), dense(one)
        energy = (part.x[0, 0] * p[0]).sum() / x.trace()
        total += float(energy * (part.g[0, 0] * p[0].inverse()).sum()) * one.noise / one.length
    return total / without(fold)


def without(fold: Fold) -> float:
    """Expected cost without a transform."""
    return sum(float(one.g[0, 0].trace()) * one.noise / one.length for one in fold)


def left_by_kronecker(folds: Sequence[Fold], orders: Sequence[int]) -> float:
    """Cost that is left on the fold that the transform was not made from, with the best damping."""
    found = [1.0]
    for damping in DAMPINGS:
        made = [kronecker([damping.of(one) for one in fold], orders) for fold in folds]
        found.append(math.prod(cost_of(folds[i], made[1 - i]) for i in (0, 1)) ** 0.5)
    return min(found)


def left_by_blocks(folds: Sequence[Fold], order: int) -> float:
    """The same for a matrix of its own for each block."""

    def blocks(moment: Tensor) -> Tensor:
        n = moment.shape[-1] // order
        return moment.view(n, order, n, order).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[None].contiguous()

    cut = [[replace(m, x=blocks(m.x[0, 0]), g=blocks(m.g[0, 0])) for m in fold] for fold in folds]
    return choose_damping(cut, DAMPINGS)[1]


def scaled(folds: Sequence[Fold]) -> tuple[list[list[Moments]], float]:
    """Moments after the best scales of channels, and the cost that the scales leave."""
    diagonals = [
        [replace(m, **{n: t[0, 0].diagonal()[None, :, None, None] for n, t in (("x", m.x), ("g", m.g))}) for m in fold]
        for fold in folds
    ]
    ((p, _, left),) = chosen_transforms([diagonals], DIAGONAL)
    scale = torch.ones(folds[0][0].length, dtype=torch.float64) if p is None else p.sqrt().flatten()
    outer = scale[:, None] * scale
    return [[replace(m, x=m.x * outer, g=m.g / outer) for m in fold] for fold in folds], left


def ratio(one: Callable[[], object], base: Callable[[], object], rounds: int) -> float:
    """Median over rounds of the time of one task relative to another."""
    found = []
    for _ in range(rounds):
        taken = []
        for task in (one, base):
            start = time.perf_counter()
            for _ in range(10):
                task()
            taken.append(time.perf_counter() - start)
        found.append(taken[0] / taken[1])
    return statistics.median(found)


def times(order: int, factors: Sequence[Sequence[int]], blocks: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Time of each kind for 1 and 512 tokens, relative to the Hadamard transform."""
    generator = torch.Generator().manual_seed(0)
    plain = Hadamard(order, random_signs(order, generator))
    made: dict[str, Callable[[Tensor], Tensor]] = {}
    for pair in factors:
        product = spinquant.KroneckerMatrix(tuple(random_orthogonal(one, generator) for one in pair))
        made["x".join(map(str, pair))] = product.apply
    for block in blocks:
        whole = spinquant.Matrix(torch.stack([random_orthogonal(block, generator) for _ in range(order // block)]))
        made[f"block {block}"] = whole.apply if block == order else lambda x, m=whole: plain.apply(m.apply(x))
    found = {}
    for name, apply in made.items():
        rows = [torch.randn(tokens, order, generator=generator) for tokens in (1, 512)]
        found[name] = [ratio(lambda a=apply, x=x: a(x), lambda x=x: plain.apply(x), rounds) for x in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--factors", nargs="*", default=[], help="orders of Kronecker factors, such as 32x48")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="orders of blocks")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    factors = [tuple(map(int, text.split("x"))) for text in arguments.factors]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    folder = model_folder(arguments.model)
    model = spinquant.load(folder, dtype="float32")
    plan, scheme = spinquant.plan_of(model), spinquant.parse_scheme("W4A4KV4")
    spaces = [space.name for space in plan.spaces_of("R4")]
    chosen = spaces if arguments.layers is None else [spaces[layer] for layer in arguments.layers]
    order = plan.space[chosen[0]].size
    timed = times(order, factors, arguments.blocks, arguments.rounds)
    for name, (one, many) in timed.items():
        print(f"{name:12} {one:.2f} x the Hadamard transform for 1 token, {many:.2f} x for 512")
    learning = learning_scheme(scheme, weights=False)
    sites = [
        Site(group[0], replace(space, allows="any", heads=1), learning.activations, readers=group)
        for group in plan.linears
        for space in plan.spaces_read_by(group[0])
        if space.name in chosen and learning.activations is not None
    ]
    _, text = spinquant.load_text("manual")
    tokens = spinquant.token_windows(spinquant.load_tokenizer(folder), text, length=512, count=arguments.samples)
    moments = collect_moments(
        model,
        plan,
        sites,
        replace(learning, weights=scheme.weights),
        tokens,
        generator=generator_for(0, "moments"),
        share=WEIGHTS_SHARE["gptq"],
    )
    total: dict[str, float] = {}
    for name in chosen:
        folds = moments.pop(name)
        # In nats per token; see `learning/sensitivity.py`.
        whole = sum(map(without, folds)) / 2 / tokens.numel()
        folds, left = scaled(folds)
        row = {"x".join(map(str, pair)): left_by_kronecker(folds, pair) for pair in factors}
        row |= {f"block {block}": left_by_blocks(folds, block) for block in arguments.blocks}
        print(f"{name:18} {whole:.4f}, scales {left:.3f}; " + ", ".join(f"{n} {v:.3f}" for n, v in row.items()))
        for kind, value in {"Hadamard": whole, "scales": left * whole}.items():
            total[kind] = total.get(kind, 0.0) + value
        for kind, value in row.items():
            total[kind] = total.get(kind, 0.0) + value * left * whole
    print("all, nats per token: " + ", ".join(f"{kind} {value:.4f}" for kind, value in total.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cost": total, "times": timed}) + "\n")


if __name__ == "__main__":
    main()
