"""Seconds that the parts of a run of `learn` take on this machine, from measured passes and steps.

The first pass of each kind is measured when it is asked for, and discarded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spinquant.learning import budget
from spinquant.learning.activations import collect
from spinquant.learning.closed_form import MATRIX, Moments, choose_damping
from spinquant.learning.end_to_end import learn_end_to_end
from spinquant.learning.fake_quant import learning_scheme
from spinquant.learning.free_transforms import Kind
from spinquant.learning.joint_sites import collect_jointly
from spinquant.learning.joint_steps import joint_spaces, learn_together
from spinquant.learning.layerwise import learn_locally
from spinquant.learning.moments import FOLDS, collect_moments, sites_of
from spinquant.learning.options import LearnOptions, learns_scales
from spinquant.learning.scoring import Candidate, Exact, Rounded, observed
from spinquant.learning.selection import FIRST_WINDOWS, Selection
from spinquant.learning.sensitivity import backward_own_predictions
from spinquant.learning.weight_moments import collect_weight_moments
from spinquant.models.capture import device_of
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme
from spinquant.rotations.factory import generator_for
from spinquant.rotations.rotation import Transform


@dataclass
class StepTimes:
    """Estimates for one run.

    Attributes:
        model: The model, with its gains fused.
        plan: Its plan.
        scheme: What is quantized.
        learning: The same during learning.
        rotations: A random rotation of every space.
        names: The spaces that are learned, with the name of their rotation.
        tokens: Calibration tokens, int64 (samples, length).
        selection: What candidates are scored with.
        options: Of the run.
        samples: Number of samples for moments, and to capture rows from, without a limit.
    """

    model: Any
    plan: Plan
    scheme: Scheme
    learning: Scheme
    rotations: Mapping[str, Transform]
    names: Mapping[str, str]
    tokens: Tensor
    selection: Selection
    options: LearnOptions
    samples: tuple[int, int]
    _passes: dict[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def window(self) -> float:
        """Of one window through the quantized network, with its score."""
        return self._window[0]

    @cached_property
    def weights(self) -> float:
        """Of rounding the weights for one candidate."""
        return self._window[1]

    @cached_property
    def _window(self) -> tuple[float, float]:
        """Of a window, and of what is done once for all windows."""
        one, scheme = Candidate(self.rotations), self.selection.scheme
        rounded = Rounded(self.model, self.plan, scheme, self.selection.rounded.share)
        exact = Exact(self.model, self.selection.held_out[:1])
        rounded.hold(exact, [0])
        both = self._measured(lambda: observed(rounded, one, exact))
        window = self._measured(lambda: observed(rounded, one, exact))  # the weights are rounded already
        rounded.close()
        return window, max(both - window, 0.0)

    @cached_property
    def backward(self) -> float:
        """Of one sample forward and back."""
        args = self.model, self.plan, self.learning, self.tokens[:1], lambda attachment: None
        return self._measured(lambda: backward_own_predictions(*args, progress=None, **self._backward_options))

    @property
    def moment_samples(self) -> int:
        """Samples that moments are summed over, without a limit."""
        return min(self.samples[0], len(self.tokens))

    @property
    def row_samples(self) -> int:
        """Samples that rows are captured from."""
        return min(self.samples[1], len(self.tokens))

    def moments(self, spaces: Mapping[Kind, Sequence[str]]) -> float:
        """Of one sample with the sums of moments."""
        return self._moments(tuple(name for names in spaces.values() for name in names))[1]

    def _moments(self, spaces: tuple[str, ...]) -> tuple[float, float]:
        """Of what is done once, after the last sample, and of one sample."""
        if spaces not in self._passes:
            scheme, ends = learning_scheme(self.scheme, weights=True), []
            args = self.model, self.plan, sites_of(self.plan, spaces, scheme, self.rotations), scheme, self.tokens[:1]
            gradients = self.options.moments == "gradients"
            collect = collect_moments if gradients else collect_weight_moments
            how: dict[str, Any] = dict(self._backward_options) if gradients else {}
            how["progress"] = lambda done, total: ends.append(budget.clock())
            whole = self._measured(lambda: collect(*args, **how))
            once = min(budget.clock() - ends[-1], whole)
            self._passes[spaces] = FOLDS * once, whole - once  # one sample is in one fold
        return self._passes[spaces]

    @property
    def _backward_options(self) -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(0), "checkpointing": self.options.checkpointing}

    @property
    def scoring(self) -> float:
        """Of one candidate in a race, with clip ratios that are known: few see all windows."""
        windows = min(2 * FIRST_WINDOWS, len(self.selection.held_out))
        return 2 * self.weights + windows * self.window  # weights once for each round

    @property
    def baselines(self) -> float:
        """Of scoring one random rotation, with the predictions of the 16-bit model and a search of clip ratios."""
        windows = self.selection.held_out, self.selection.clip_windows
        return self.judging() + sum(map(len, windows)) * self.window

    @property
    def all_windows(self) -> float:
        """Of scoring one candidate on all windows, with clip ratios that are known."""
        return self.weights + len(self.selection.held_out) * self.window

    def judging(self) -> float:
        """Of scoring one candidate on all windows, with clip ratios of its own."""
        scheme = self.selection.scheme
        parts = sum(part is not None for part in (scheme.activations, scheme.kv))
        # A ratio and its two neighbours, for each part.
        return self.all_windows + len(self.selection.clip_windows) * (2 * parts + 1) * self.window

    def closed_form(self, spaces: Mapping[Kind, Sequence[str]], samples: int) -> float:
        """Of computing transforms from some samples, and trying one kind after another. spaces: by kind.

        That is with clip ratios that are known; those of its own take as long as `judging`.
        """
        if not spaces:
            return 0.0
        once, each = self._moments(tuple(name for names in spaces.values() for name in names))
        # Kinds may be tried twice; most are not.
        return once + samples * each + self._solving(spaces) + (len(spaces) + 1) * self.scoring + self.all_windows

    def least_closed_form(self, samples: int) -> float:
        """The same at least, from the time of a window: gradients take longer than a pass forward."""
        return samples * self.window + self.all_windows

    def capturing(self) -> float:
        """Of capturing the rows that local learning needs."""
        return self.row_samples * (self.backward if self.options.local.weighting == "fisher" else self.window)

    @property
    def local_step(self) -> float:
        """Of one step of all rotations."""
        return self._local[1]

    @property
    def local_rest(self) -> float:
        """Of local learning before its first step and after its last."""
        return self._local[0]

    @property
    def end_to_end_step(self) -> float:
        """Of one step through the quantized network."""
        return self._end_to_end[1]

    @property
    def end_to_end_rest(self) -> float:
        """Of end-to-end learning before its first step and after its last."""
        return self._end_to_end[0]

    @cached_property
    def _local(self) -> tuple[float, float]:
        local, generator = self.options.local, generator_for(0, "rows")
        rows = min(local.batch, self.tokens.shape[1])
        where, together = (self.model, self.plan, list(self.names)), self._together()
        if together:
            how: dict[str, Any] = {"weights": self.scheme.weights, "seed": self.options.seed, "rows": 2 * rows}
            sites, joint = collect_jointly(
                *where, together, self.learning, self.tokens[:2], generator=generator, **how, checkpointing=True
            )
        else:
            sites, joint = collect(*where, self.learning, self.tokens[:1], rows=rows, generator=generator), {}
        sites = [site for site in sites if site.space not in joint]
        if local.solver == "procrustes":  # reads all rows at every step
            times = -(-local.rows // rows)
            sites = [replace(site, rows=site.rows.repeat(times, 1)[: local.rows]) for site in sites]
        device = device_of(self.model)

        def learn(count: int) -> None:
            steps = replace(local, steps=count)
            learn_locally(sites, self.rotations, steps, device=device)
            learn_together(self.plan, joint, self.rotations, self.scheme.weights, steps, device=device)

        return self._parts(learn)

    @cached_property
    def _end_to_end(self) -> tuple[float, float]:
        args = self.model, self.plan, self.rotations, self.names, self.scheme, self.tokens
        return self._parts(lambda count: learn_end_to_end(*args, replace(self.options.end_to_end, steps=count)))

    def _parts(self, learn: Callable[[int], object]) -> tuple[float, float]:
        """Seconds of what learning does once, and of a step, from runs of one step and of two."""
        one, two = (self._measured(lambda count=count: learn(count)) for count in (1, 2))
        step = max(two - one, 0.0)
        return max(one - step, 0.0), step

    def _together(self) -> list[str]:
        """The spaces whose rotation is learned with scales of norms."""
        if not learns_scales(self.options):
            return []
        return [name for name in joint_spaces(self.plan, self.rotations, self.learning) if name in self.names]

    def _solving(self, spaces: Mapping[Kind, Sequence[str]]) -> float:
        """Of choosing the damping of matrices, from that of one space of each size with two random moments."""
        total = 0.0
        every = [self.plan.space[name] for names in spaces.values() for name in names]
        for (size, heads), count in Counter((one.size, one.heads) for one in every if one.allows == "any").items():
            rows = torch.randn(heads, 1, size, 2 * size, dtype=torch.float64, generator=generator_for(0, "moments"))
            one = Moments(rows @ rows.mT, torch.eye(size, dtype=torch.float64).expand(heads, 1, -1, -1), size)
            total += count * self._measured(lambda one=one: choose_damping([[one, one]] * FOLDS, MATRIX))
        return total / torch.get_num_threads()  # spaces are solved side by side

    def _measured(self, action: Any) -> float:
        start = budget.clock()
        action()
        if device_of(self.model).type == "cuda":
            torch.cuda.synchronize()
        return budget.clock() - start
