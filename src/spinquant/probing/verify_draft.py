"""Verify a drafted family on a tiny model, one statement at a time.

For each statement one norm's scale is fused, or one kind of space is rotated or scaled, and the logits must not move by
more than 1e-9 (relative). What fails is refused in the draft, with the reason and with how far the logits moved.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from spinquant.architectures import FAMILIES
from spinquant.architectures.build import build_plan
from spinquant.architectures.family_file import FamilyFile, family_from
from spinquant.architectures.family_file_conversion import to_family
from spinquant.errors import SpinquantError
from spinquant.evaluation.equivalence import difference, greedy_logits
from spinquant.models.modules import module_and_attribute, tensor_shapes
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.probing.branches import EXPERTS
from spinquant.probing.channel_scaling import candidates, scales
from spinquant.probing.layer_kinds import choices_of, groups_of
from spinquant.probing.module_roles import LINEARS
from spinquant.probing.observation import Draft, Observation
from spinquant.probing.tiny_models import random_tokens
from spinquant.probing.trace import run
from spinquant.rotation_names import USUAL
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Orthogonal, Transform

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Finding:
    """A statement that was tested on a tiny model.

    moved: relative error of the logits, None if it could not be tested. reason: why it does not hold, else empty.
    """

    statement: str
    moved: float | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the tiny model's function was unchanged."""
        return self.moved is not None and self.moved <= TOLERANCE and not self.reason


def verify_draft(
    tiny: Any, seen: Observation, drafted: Draft
) -> tuple[FamilyFile | None, tuple[Finding, ...], tuple[str, ...]]:
    """Test the statements of a draft on a tiny model, one by one.

    tiny: the tiny model that was observed. seen: what was observed.

    Returns:
        The family without what failed (None if the draft does not give a plan), the findings, and what the family does
        not cover.
    """
    trial = _Trial(tiny, seen, drafted)
    family = trial.family()
    return family, tuple(trial.findings), tuple(drafted.left)


class _Trial:
    """The tests of a draft's statements, with the tiny model and its logits before any change."""

    def __init__(self, tiny: Any, seen: Observation, drafted: Draft):
        self.tiny, self.seen, self.draft = tiny, seen, drafted
        self.tokens = random_tokens(tiny)
        self.before, self.generated = run(tiny, self.tokens), greedy_logits(tiny, self.tokens)
        self.findings: list[Finding] = []

    def family(self) -> FamilyFile | None:
        """Test every statement; the family that is left, None if the draft does not give a plan."""
        try:
            self._add_rest()
            plan = self._plan()
        except SpinquantError as error:
            self.draft.left.append(f"the findings do not give a plan: {error}")
            return None
        for norm in {self.seen.starred(gain.norm): None for gain in plan.gains}:
            self._try(f"the scale of {norm} can be fused into its readers", *self._one_norm(plan, norm))
        plan = self._without_impossible_experts(plan)
        refused = [self._try_r1(plan)]
        refused += [self._try_rotation(plan, name) for name in USUAL[1:]]
        data = self.draft.data
        self._find_scaled(plan)
        lacking = dict(found for found in refused if found is not None)
        if lacking:
            data["refused"] = [{"rotation": name, "reason": why} for name, why in lacking.items()]
        family = family_from(data, "the draft")
        names = [name for name in USUAL if name not in lacking and plan.spaces_of(name)]
        if len(names) > 1:
            spec = RotationSpec(tuple(names), "auto", randomize=True, seed=1)
            self._try(
                f"{', '.join(names)} together, a different rotation for every layer", plan, make_rotations(plan, spec)
            )
        return family

    def _without_impossible_experts(self, plan: Plan) -> Plan:
        """The plan, without R4 inside experts if no hook can run between their two matrix products."""
        data, spaces = self.draft.data, {o.space for o in plan.onlines if o.site == "experts"}
        if not spaces:
            return plan
        rotations = make_rotations(plan, RotationSpec(("R4",), "auto"))
        moved, error = self._moved(plan, {space: rotations[space] for space in spaces})
        why = error or ("" if moved <= TOLERANCE else "the logits move")
        self.findings.append(Finding("R4: the hidden activation of experts can be rotated online", moved, why))
        if not why:
            return plan
        data["onlines"] = {name: online for name, online in data["onlines"].items() if online["site"] != "experts"}
        inside = {online.space for online in plan.onlines if online.site == "input"}
        data["spaces"] = {n: s for n, s in data["spaces"].items() if n != EXPERTS or EXPERTS in inside}
        for axes in data["tensors"].values():
            axes[:] = ["-" if axis == EXPERTS else axis for axis in axes]
        return self._plan()

    def _find_scaled(self, plan: Plan) -> None:
        """Add to the draft the first linear found, per kind of space, whose outputs scale that space."""
        found: dict[str, Any] = {}
        for space, entries in candidates(self.draft.data, plan, self.seen.shapes, self.seen.starred):
            for linear, entry in entries:
                tried = replace(self._plan(scaled={linear: entry}), onlines=())
                moved, error = self._moved(tried, scales(tried))
                if not error and moved <= TOLERANCE:
                    found[linear] = entry
                    self.findings.append(Finding(f"{space} can be scaled by the rows of {linear}", moved))
                    break
        if found:
            self.draft.data["scaled"] = found

    def _plan(self, **more: Any) -> Plan:
        family = to_family(family_from({**self.draft.data, **more}, "the draft"), FAMILIES)
        return build_plan(family, self.tiny.config, tensor_shapes(self.tiny))

    def _add_rest(self) -> None:
        """Add the tensors that have no role, as tensors in no space."""
        data = self.draft.data
        if self.draft.silent:
            data["ignored"] = [rf"{re.escape(name)}\..*" for name in self.draft.silent]
        file = to_family(family_from({**data, "ignored": [".*"]}, "the draft"), FAMILIES)
        known = {name.removesuffix("?") for name in file.tensors} | set(file.gains)
        known |= {f"{name.removesuffix('weight')}bias" for name in file.gains if file.centred}
        known |= {f"{module}.bias" for group in file.linears for module in group}
        known |= {f"{file.head.removesuffix('weight')}bias"}
        groups = groups_of(self.seen.shapes, self.seen.pattern)
        choices, loose = choices_of(groups, len(self.seen.layers))
        if choices:
            data["choices"] = choices
        for star in loose & set(data["tensors"]):
            data["tensors"][f"{star}?"] = data["tensors"].pop(star)
        multiplied: dict[str, None] = {}
        for name, shape in self.seen.shapes.items():
            star = self.seen.starred(name)
            if name.startswith(tuple(f"{part}." for part in self.draft.silent)):
                continue
            if star.replace("*", "{i}") in known or self._is_bias_of_norm(star):
                continue
            data["tensors"][f"{star}?" if star in loose else star] = ["-"] * len(shape)
            if len(shape) > 2 or (isinstance(module_and_attribute(self.tiny, name)[0], LINEARS) and len(shape) > 1):
                multiplied[star] = None
        if multiplied:
            self.draft.left.append(f"{', '.join(multiplied)}: no role found, so neither rotated nor quantized")

    def _is_bias_of_norm(self, name: str) -> bool:
        return f"{name.removesuffix('bias')}weight" in self.draft.data["norms"]

    def _one_norm(self, plan: Plan, norm: str) -> tuple[Plan, dict[str, Transform]]:
        gains = tuple(gain for gain in plan.gains if self.seen.starred(gain.norm) == norm)
        size = plan.space["residual"].size
        return replace(plan, gains=gains, onlines=()), {"residual": Orthogonal(torch.eye(size).double())}

    def _try_r1(self, plan: Plan) -> tuple[str, str] | None:
        spec = RotationSpec(("R1",), "auto")
        problems = list(
            dict.fromkeys(self._starred(p) for part in (*self.seen.layers, self.seen.ends) for p in part.problems)
        )
        what = "R1: the residual stream can be rotated"
        if self.draft.silent:
            why = (
                f"{', '.join(self.draft.silent)} did not run on text, and may write image or audio features to the "
                "residual stream, which would have to be rotated too"
            )
            self.findings.append(Finding(what, None, why))
            return "R1", f"found by probing: {why}"
        plain = replace(plan, spaces=tuple(replace(space, allows="orthogonal") for space in plan.spaces))
        moved, error = self._moved(plain, make_rotations(plain, spec))
        if plan.space["residual"].centred:
            reason = "; ".join(problems) or error or "norms subtract the mean, which not every rotation preserves"
            self.findings.append(Finding(f"{what} by any rotation", moved, "" if moved <= TOLERANCE else reason))
            moved, error = self._moved(plan, make_rotations(plan, spec))
            what = f"{what} by mean-preserving rotations"
        # A problem that was observed may be harmless: norms without a scale, for example, commute with a rotation.
        why = "" if moved <= TOLERANCE else "; ".join(problems) or error or "the logits move; no cause was found"
        self.findings.append(Finding(what, moved, why))
        return ("R1", f"found by probing: {why}") if why else None

    def _starred(self, text: str) -> str:
        prefix = self.seen.pattern.removesuffix("*")
        for i in range(len(self.seen.layers)):
            text = text.replace(f"{prefix}{i}.", f"{prefix}*.").replace(f"{prefix}{i} ", f"{prefix}* ")
        return text

    def _try_rotation(self, plan: Plan, name: str) -> tuple[str, str] | None:
        what = {
            "R2": "values can be rotated head by head",
            "R3": "queries and keys can be rotated after the position embedding",
            "R4": "the input of the MLP's output projection can be rotated online",
        }[name]
        statement = f"{name}: {what}"
        expected = self.draft.values if name == "R2" else None
        if not plan.spaces_of(name):
            self.findings.append(Finding(statement, None, expected or "no such space was found"))
            return (name, f"found by probing: {expected}") if expected else None
        seen: list[bool] = []
        moved, error = self._moved(plan, make_rotations(plan, RotationSpec((name,), "auto")), seen.append)
        why = error
        if not why and moved > TOLERANCE:
            why = expected or "the logits move" + (
                ": queries do not go through transformers' attention interface, where they could be rotated"
                if name == "R3"
                else ""
            )
        if not why and name == "R3" and not seen:
            why = "keys do not go through a KV cache, where they could be rotated"
        self.findings.append(Finding(statement, moved, why))
        return (name, f"found by probing: {why}") if why else None

    def _try(self, statement: str, plan: Plan, rotations: Mapping[str, Transform]) -> None:
        moved, error = self._moved(plan, rotations)
        self.findings.append(Finding(statement, moved, error or ("" if moved <= TOLERANCE else "the logits move")))

    def _moved(
        self, plan: Plan, rotations: Mapping[str, Transform], seen: Callable[[bool], object] | None = None
    ) -> tuple[float, str]:
        """Relative error of the logits, of whole sequences and of greedy generation; and an error message, if any."""
        model = copy.deepcopy(self.tiny)
        try:
            fuse_module(model, plan, rotations)
            with attach(model, plan, rotations) as attachment:
                attachment.stop_checking()
                for site in attachment.keys_values.values():
                    site.watch = lambda keys, values: seen(True) if seen else None
                moved = difference(self.before, run(model, self.tokens)).relative
                cached = difference(self.generated, greedy_logits(model, self.tokens)).relative
        except Exception as error:  # the code of an unknown class, with hooks that it may not expect
            return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0]
        return max(moved, cached), ""
