"""Scores of candidates for a model larger than memory: one walk carries all of them through each block it loads.

Every candidate has hidden states of its own for every window of tokens. Activations, cache and weights are rounded in
its coordinates (`fake_quant.py`), weights for one candidate at a time.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from spinquant.calibration.sequential import Home, check_finite_output, logits_after, run_block
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.compute.workspace import give_back
from spinquant.learning.fake_quant import rounded_weights, rounding
from spinquant.learning.free_transforms import composed
from spinquant.learning.scoring import EXACT, EXACT_BYTES, Candidate, Observed, Score
from spinquant.learning.walk import entered, part_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme

STATES = "walk-scores"  # the piece with the hidden states of an unfinished walk
SAVED_EVERY = 30.0  # seconds between two times that they are saved


@torch.no_grad()
def walked_scores(
    home: Home,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    scheme: Scheme,
    windows: Tensor,
    *,
    share: float = 1.0,
    pieces: Pieces | None = None,
    label: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Score]:
    """Score candidates on windows of tokens, int64 (windows, length), with one block loaded at a time.

    Args:
        home: where the weights are, with the gains of norms fused and no other transform.
        plan: plan of the model.
        candidates: by name.
        scheme: what is quantized.
        windows: tokens.
        share: part of the squared error of rounded weights that is made.
        pieces: where hidden states are saved every half a minute, and a rerun resumes from.
        label: by which a rerun knows the walk.
        progress: called with (blocks done, blocks in all), the head counted as a block.

    Returns:
        The scores by name of the candidate, and that of the 16-bit model as "16-bit", as in memory.

    Raises:
        ArchitectureError: blocks read more than hidden states.
        CalibrationError: a hidden state of the 16-bit model is not finite; the module is named.
    """
    model, total = home.model, len(plan.blocks) + 1
    start = entered(home, plan, windows)
    transforms = {name: composed(one.rotations, one.free) for name, one in candidates.items()}
    states = {name: start.states for name in (EXACT, *candidates)}
    done = 0
    kept = pieces.load(STATES) if pieces else None
    if kept is not None and kept[1]["label"] == label:
        done = kept[1]["block"]
        states = {name: kept[0][str(i)] for i, name in enumerate(states)}
    saved = time.monotonic()

    @contextmanager
    def rounded(name: str, part: Plan) -> Iterator[None]:
        if name == EXACT:
            yield
            return
        made = candidates[name].scheme(scheme)
        with (
            rounded_weights(model, part, transforms[name], replace(made, activations=None, kv=None), share),
            parametrize.cached(),
            rounding(model, part, transforms[name], replace(made, weights=None)),
        ):
            yield

    for number, block in enumerate(plan.blocks[done:], done):
        part, module, arguments = part_of(plan, block), model.get_submodule(block), start.arguments[block]
        with home.block(block):
            for name, before in states.items():
                with rounded(name, part):
                    after = [run_block(module, state, arguments).cpu() for state in before.split(1)]
                if name == EXACT:
                    for state, output in zip(before.split(1), after, strict=True):
                        check_finite_output(module, block, state, arguments, output)
                states[name] = torch.cat(after)
        if pieces and time.monotonic() - saved >= SAVED_EVERY:
            tensors = {str(i): tensor for i, tensor in enumerate(states.values())}
            pieces.save(STATES, tensors, {"label": label, "block": number + 1})
            saved = time.monotonic()
        if progress:
            progress(number + 1, total)
    seen = {name: Observed() for name in (*candidates, EXACT)}  # as in memory, the 16-bit model comes last
    with home.outside(windows[:1, :1]), home.head():
        device = model.get_input_embeddings().weight.device

        def logits(name: str, number: int) -> Tensor:
            return logits_after(model, plan.blocks, states[name][number : number + 1].to(device))[0, :-1]

        left = list(range(len(windows)))
        while left:
            exact = [logits(EXACT, left[0])]
            # The head is rounded once for as many windows as predictions at 16 bits fit in memory.
            most = EXACT_BYTES // (exact[0].numel() * exact[0].element_size()) if scheme.lm_head else 1
            numbers, left = left[: max(1, most)], left[max(1, most) :]
            exact += [logits(EXACT, number) for number in numbers[1:]]
            for name, one in seen.items():
                with rounded(name, part_of(plan, "")):
                    for number, reference in zip(numbers, exact, strict=True):
                        found = reference if name == EXACT else logits(name, number)
                        one.add(reference, found, windows[number, 1:].to(device))
    give_back()  # after several walks, logits that were freed would be half a gigabyte
    if progress:
        progress(total, total)
    return {name: one.score() for name, one in seen.items()}
