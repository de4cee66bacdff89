"""Walk through the decoder blocks of a model larger than memory, forward and back: moments with one block loaded.

    forward   the input of every block is kept, for all samples
    head      labels are drawn from the model's own predictions, as in `sensitivity.py`
    back      from the last block to the first, a block's forward pass is computed again from its input, the gradient of
              its output is backpropagated, and its sites are added to the moments (`moments.py`)

Weights get no gradients. The result is that of `collect_moments` on a model in memory. Hidden states, gradients and
moments are pieces on disk, so memory is that of a block, its activations for one sample, and the states of all samples
at one place; a rerun goes on after the last finished block. A block has to read hidden states alone, beside what is the
same for every sample (positions, masks). Families where it reads more are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinquant.calibration.sequential import (
    Home,
    InMemory,
    block_calls,
    block_output,
    check_finite_output,
    logits_after,
    run_block,
)
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.errors import ArchitectureError
from spinquant.evaluation.equivalence import Float64Arithmetic
from spinquant.evaluation.tiny_model import TINY_VOCABULARY, make_tiny_model
from spinquant.learning.closed_form import Moments
from spinquant.learning.moments import MomentSums, Site
from spinquant.learning.sensitivity import nll_of_own
from spinquant.models.capture import watching_calls
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.fuse_module import plan_of

GRADIENT = "walk-gradient"  # the piece with the gradients of the inputs of the last block that the way back has passed
EXACT = 1e-9  # relative difference of a tiny model's logits and gradients up to which a walk is the model

_NONE = torch.zeros(1, 1, dtype=torch.int64)


@dataclass(frozen=True)
class Entered:
    """What the blocks of a model are called with.

    states: of all samples before the first block, (samples, length, ..). arguments: by block, the same for all samples.
    """

    states: Tensor
    arguments: Mapping[str, Mapping[str, Any]]


def entered(home: Home, plan: Plan, tokens: Tensor) -> Entered:
    """The hidden states before the first block, and the other arguments of every block.

    Raises:
        ArchitectureError: an argument of a block differs between samples.
    """
    with home.outside(tokens):
        calls = block_calls(home.model, plan.blocks, tokens)
    for block, (first, *others) in calls.arguments.items():
        for one in others:
            if one is not first:
                name = next(key for key in one if one[key] is not first.get(key))
                raise ArchitectureError(
                    f"{block} of a {type(home.model).__name__} reads {name} beside the hidden states, which differs "
                    "between samples, so the model cannot be learned from block by block from disk: learn where it "
                    "fits in memory, or use random rotations (leave --learn out)"
                )
    first = {block: found[0] for block, found in calls.arguments.items()}
    return Entered(torch.cat([state.cpu() for state in calls.hidden]), first)


def part_of(plan: Plan, block: str) -> Plan:
    """The plan of the linears, experts and attention of one block; of what is outside of all blocks for ""."""

    def inside(name: str) -> bool:
        return place_of(plan, name) == block

    return replace(
        plan,
        linears=tuple(group for group in plan.linears if inside(group[0])),
        experts=tuple(experts for experts in plan.experts if inside(experts.module)),
        attentions=tuple(name for name in plan.attentions if inside(name)),
        blocks=(block,) if block else (),
        head="" if block else plan.head,
    )


def place_of(plan: Plan, name: str) -> str:
    """The block that a module or tensor is in; "" for none."""
    return next((block for block in plan.blocks if name.startswith(f"{block}.")), "")


def walked_moments(
    home: Home,
    plan: Plan,
    sites: Sequence[Site],
    scheme: Scheme,
    tokens: Tensor,
    pieces: Pieces,
    *,
    generator: torch.Generator,
    share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[Moments]]]:
    """The moments of sites, by space, as `collect_moments` computes them, with one block loaded at a time.

    Args:
        home: where the weights are, with the gains of norms fused.
        plan: plan of the model.
        sites: from `sites_of`.
        scheme: what is quantized.
        tokens: calibration tokens, int64 (samples, length), at least two samples.
        pieces: where hidden states, gradients and moments are kept, and a rerun resumes from.
        generator: of the sampled labels, in the same state in every run.
        share: part of the error of rounded weights that counts (`weights_share`). Default: all of it.
        progress: called with (blocks done, blocks in all), where every block counts twice, and the head once.

    Raises:
        ArchitectureError: blocks read more than hidden states.
        CalibrationError: a hidden state is not finite; the module is named.
        LearningError: a gradient is not finite.
    """
    walk = _Walk(home, plan, sites, scheme, share, tokens, pieces, progress or (lambda done, total: None))
    if not pieces.has(GRADIENT):
        walk.forward()
        walk.head(generator)
    walk.back()
    return walk.found()


class _Walk:
    """One walk forward and back. Block i reads the piece `_states(i)`; the head reads that after the last block."""

    def __init__(
        self,
        home: Home,
        plan: Plan,
        sites: Sequence[Site],
        scheme: Scheme,
        share: float,
        tokens: Tensor,
        pieces: Pieces,
        progress: Callable[[int, int], None],
    ):
        self.home, self.model, self.plan, self.scheme, self.pieces = home, home.model, plan, scheme, pieces
        self.share, self.progress, self.total = share, progress, 2 * len(plan.blocks) + 1
        self.entered = entered(home, plan, tokens)
        self.sites: dict[str, list[Site]] = {place: [] for place in (*plan.blocks, "")}
        for site in sites:
            self.sites[place_of(plan, site.name)].append(site)

    def forward(self) -> None:
        """Keep the inputs of all blocks, and of the head."""
        blocks, pieces = self.plan.blocks, self.pieces
        first = max((i for i in range(len(blocks) + 1) if pieces.has(_states(i))), default=0)
        states = self._load(_states(first)) if first else self.entered.states
        if not pieces.has(_states(first)):
            pieces.save(_states(first), {"states": states}, {})
        for i, name in enumerate(blocks[first:], first):
            block, arguments = self.model.get_submodule(name), self.entered.arguments[name]
            with self.home.block(name):
                found = []
                for state in states.split(1):
                    found.append(run_block(block, state, arguments).cpu())
                    check_finite_output(block, name, state, arguments, found[-1])
            states = torch.cat(found)
            pieces.save(_states(i + 1), {"states": states}, {})
            self.progress(i + 1, self.total)

    def head(self, generator: torch.Generator) -> None:
        """Keep the gradients of the head's inputs."""
        last = len(self.plan.blocks)
        with self.home.outside(_NONE), self.home.head():
            device = self.model.get_input_embeddings().weight.device

            def nll(state: Tensor) -> Tensor:
                return nll_of_own(logits_after(self.model, self.plan.blocks, state.to(device)), [generator])

            gradient = self._backward("", nll, self._load(_states(last)))
        self.pieces.save(GRADIENT, {"gradient": gradient}, {"block": last})
        self.pieces.remove(_states(last))
        self.progress(last + 1, self.total)

    def back(self) -> None:
        """Compute the moments of all blocks that have none, from the last to the first."""
        kept = self.pieces.load(GRADIENT)
        assert kept is not None
        gradient, last = kept[0]["gradient"], kept[1]["block"]
        for i in reversed(range(last)):
            name = self.plan.blocks[i]
            block, arguments = self.model.get_submodule(name), self.entered.arguments[name]
            with self.home.block(name):
                run = partial(block_output, block, arguments=arguments)
                gradient = self._backward(name, run, self._load(_states(i)), gradient)
            self.pieces.save(GRADIENT, {"gradient": gradient}, {"block": i})
            self.pieces.remove(_states(i))
            self.progress(self.total - i, self.total)

    def _backward(
        self, place: str, function: Callable[[Tensor], Tensor], states: Tensor, gradient: Tensor | None = None
    ) -> Tensor:
        """Gradients of the states, from those of what a function makes of each; the moments there become a piece."""
        part = part_of(self.plan, place)
        sums = MomentSums(self.model, part, self.sites[place], self.scheme, self.share)
        found = []
        with attach(self.model, part, {}, self.scheme, around=True) as attachment:
            sums.observe(attachment)
            with attachment.exact(), watching_calls(self.model, sums.linears, sums.watch_call), torch.enable_grad():
                for number, state in enumerate(states.split(1)):
                    sums.next_sample(number)
                    x = state.detach().clone().requires_grad_()
                    output = function(x)
                    output.backward(None if gradient is None else gradient[number : number + 1].to(output.device))
                    assert x.grad is not None
                    found.append(x.grad.cpu())
        _save_moments(self.pieces, _moments(self.plan, place), sums.found())
        return torch.cat(found)

    def found(self) -> dict[str, list[list[Moments]]]:
        """The moments of all places, by space; none of a space that lacks them at a place where it has sites."""
        found: dict[str, list[list[Moments]]] = {}
        missing: set[str] = set()
        for place, sites in self.sites.items():
            here = _load_moments(self.pieces, _moments(self.plan, place))
            missing |= {site.space.name for site in sites} - here.keys()
            for space, folds in here.items():
                earlier = found.setdefault(space, [[] for _ in folds])
                for one, other in zip(earlier, folds, strict=True):
                    one.extend(other)
        return {space: folds for space, folds in found.items() if space not in missing}

    def _load(self, name: str) -> Tensor:
        kept = self.pieces.load(name)
        assert kept is not None
        return kept[0]["states"]


def _states(number: int) -> str:
    return f"walk-states-{number}"


def _moments(plan: Plan, place: str) -> str:
    return f"walk-moments-{plan.blocks.index(place) if place else len(plan.blocks)}"


def _save_moments(pieces: Pieces, name: str, found: Mapping[str, Sequence[Sequence[Moments]]]) -> None:
    tensors, about = {}, []
    for space, folds in found.items():
        for fold, moments in enumerate(folds):
            for one in moments:
                tensors |= {f"{len(about)}.x": one.x, f"{len(about)}.g": one.g}
                where = {"space": space, "fold": fold, "folds": len(folds)}
                about.append({**where, "length": one.length, "noise": one.noise})
    pieces.save(name, tensors, {"moments": about})


def _load_moments(pieces: Pieces, name: str) -> dict[str, list[list[Moments]]]:
    kept = pieces.load(name)
    assert kept is not None
    found: dict[str, list[list[Moments]]] = {}
    for i, one in enumerate(kept[1]["moments"]):
        folds = found.setdefault(one["space"], [[] for _ in range(one["folds"])])
        folds[one["fold"]].append(Moments(kept[0][f"{i}.x"], kept[0][f"{i}.g"], one["length"], one["noise"]))
    return found


def check_walkable(config: Any) -> None:
    """Check on a tiny model of a config's class that its blocks, walked one by one, are the whole model.

    Raises:
        ArchitectureError: they are not: blocks pass more to each other than hidden states.
    """
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):
        tiny: Any = make_tiny_model(config)
        tiny.requires_grad_(False)
        plan, generator = plan_of(tiny), torch.Generator().manual_seed(0)
        tokens = torch.randint(0, TINY_VOCABULARY - 1, (2, 12), generator=generator)
        start = entered(InMemory(tiny, plan.blocks), plan, tokens)
        expected = tiny(input_ids=tokens[1:], use_cache=False).logits
        walked = start.states[1:]
        for name in plan.blocks:
            walked = run_block(tiny.get_submodule(name), walked, start.arguments[name])
        moved = float((logits_after(tiny, plan.blocks, walked) - expected).norm() / expected.norm())
    if not moved <= EXACT:
        raise ArchitectureError(
            f"the blocks of a {type(tiny).__name__} pass more to each other than hidden states: walked one by one, a "
            f"tiny model of this class has other logits (by {moved:.2g}, relative). So the model cannot be learned "
            "from block by block from disk: learn where it fits in memory, or use random rotations (leave --learn out)"
        )
