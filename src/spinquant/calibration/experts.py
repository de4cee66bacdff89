"""Calibration of stacked (mixture-of-) experts: the tokens routed to each expert, and the inputs of its two products.

A module of experts is called with the tokens of a sample, (tokens, width), and the indices of the experts that each
token is routed to, (tokens, k). Only these are kept: the inputs of an expert's second matrix product are computed from
its tokens, by the module's own activation, when the expert is calibrated. So memory does not grow with the number of
experts.

For asymmetric calibration (GPTAQ) a token of the unquantized model is paired with the same token of the quantized one
and goes to the experts that the quantized model chooses, since their outputs have to compensate the error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.models.capture import watched_calls
from spinquant.online.sites import activated
from spinquant.plan import Experts
from spinquant.quantization.targets import Weight


@dataclass
class Routed:
    """The inputs of a module of experts, per sample: rows, (tokens, width), and chosen experts, (tokens, k)."""

    rows: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def tokens_of(self, expert: int) -> list[Tensor]:
        """Indices of the tokens routed to an expert, per sample, without repetition."""
        return [(chosen == expert).any(-1).nonzero().squeeze(-1) for chosen in self.chosen]


@dataclass(frozen=True)
class Calls:
    """The calls of one module of experts, for its calibration.

    exactly: calls of the unquantized model, for asymmetric calibration. whole: unquantized weights, by tensor.
    """

    routed: Routed
    exactly: Routed | None
    whole: Mapping[str, Tensor]

    def rows_of(self, expert: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The tokens of an expert, per sample that has any, and the same tokens of the unquantized model."""
        for i, tokens in enumerate(self.routed.tokens_of(expert)):
            if len(tokens):
                same = None if self.exactly is None else self.exactly.rows[i][tokens]
                yield self.routed.rows[i][tokens], same


@contextmanager
def routed_calls(model: nn.Module, experts: Sequence[Experts], kept: dict[str, Routed]) -> Iterator[None]:
    """Within the `with` block, record the inputs of modules of experts in `kept`, by module."""

    def keep(name: str, args: Sequence[Any]) -> None:
        found = kept.setdefault(name, Routed())
        found.rows.append(args[0].detach().clone())
        found.chosen.append(args[1].detach())

    with watched_calls(model, [stack.module for stack in experts], keep):
        yield


def between(model: nn.Module, experts: Experts, expert: int, rows: Tensor, first: Tensor | None = None) -> Tensor:
    """Input of one expert's second matrix product for rows (tokens, width), rotated and quantized as attached.

    first: the first weight of all experts in the module's layout, by default the module's own.
    """
    module: Any = model.get_submodule(experts.module)
    weight = Weight(experts.first[0], experts.transposed)
    matrices = weight.matrices(model) if first is None else weight.turned(first)
    bias = getattr(module, experts.first[0].rpartition(".")[2] + "_bias", None)
    made = nn.functional.linear(rows, matrices[expert], None if bias is None else bias[expert])
    return activated(module, made)


def expert_products(
    model: nn.Module, experts: Experts, routed: Routed, step: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(input, weight) of the first and of the second matrix products, per expert, from every `step`-th token."""
    weights = [Weight(t[0], experts.transposed).matrices(model) for t in (experts.first, experts.second)]
    first, second = [], []
    for expert, (one, two) in enumerate(zip(*weights, strict=True)):
        tokens = routed.tokens_of(expert)
        rows = torch.cat([rows[chosen[::step]] for rows, chosen in zip(routed.rows, tokens, strict=True)])
        first.append((rows, one))
        second.append((between(model, experts, expert, rows), two))
    return first, second
