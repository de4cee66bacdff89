"""Recognize stacked experts and routers in a probed model.

An axis of a stack is in the residual space if its length is the hidden size in two tiny models of different sizes. Of
the two matrices, the first is the one whose other axis is larger, or the first parameter. Both are guesses, which
`verify_draft.py` tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from spinquant.probing.trace import TracedCall

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Parameters of a module of experts: the first and second matrix, and which axes are in the residual stream."""

    first: str
    second: str
    axes: Mapping[str, tuple[bool, ...]]
    transposed: bool

    @property
    def inner(self) -> int:
        """The axis of `second` that is between the two matrix products."""
        return 1 if self.transposed else 2


def parameters_of(module: nn.Module, ndim: int) -> dict[str, Shape]:
    """Shapes of a module's own parameters with `ndim` axes."""
    return {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == ndim}


def is_stack(call: TracedCall) -> bool:
    """Whether a module has two or more parameters that stack several matrices."""
    found = list(parameters_of(call.module, 3).values())
    return len(found) > 1 and len({shape[0] for shape in found}) == 1 and found[0][0] > 1


def is_router(call: TracedCall) -> bool:
    """Whether a module has one matrix and is not a linear, like a router."""
    weights = parameters_of(call.module, 2)
    if isinstance(call.module, nn.Linear | nn.Embedding | Conv1D | nn.Conv1d) or set(weights) != {"weight"}:
        return False
    return not is_stack(call) and weights["weight"][1] == call.input.shape[-1]


def stack_of(modules: Sequence[tuple[nn.Module, int]]) -> Stack | None:
    """How a module's experts are stacked. modules: (module, hidden size) in tiny models of several sizes."""
    axes: dict[str, tuple[bool, ...]] = {}
    shapes = [{**parameters_of(module, 3), **parameters_of(module, 2)} for module, _ in modules]
    for name, shape in shapes[0].items():
        widths = [hidden for _, hidden in modules]
        every = [found[name] for found in shapes]
        # The first axis counts experts.
        axes[name] = tuple(
            d > 0 and all(s[d] == w for s, w in zip(every, widths, strict=True)) for d in range(len(shape))
        )
    matrices = [name for name in axes if len(axes[name]) == 3]
    if len(matrices) != 2 or any(sum(axes[name]) != 1 for name in matrices):
        return None
    other = {name: shapes[0][name][3 - axes[name].index(True)] for name in matrices}
    second = matrices[0] if other[matrices[0]] < other[matrices[1]] else matrices[1]
    first = next(name for name in matrices if name != second)
    if axes[first].index(True) == axes[second].index(True):
        return None
    return Stack(first, second, axes, transposed=axes[second].index(True) == 2)
