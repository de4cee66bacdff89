"""Probe an unknown architecture: find by experiment which rotations leave its function unchanged.

Tiny models of its class, in float64 with random weights, are run and traced (`explain.py`), and the observations become
the draft of a family file (`roles.py`). Then each statement is tested by itself: one norm's scale is fused, or one kind
of space is rotated, and the logits must not move by more than 1e-9 (relative). The draft refuses what fails, with the
reason and with how far the logits moved. It is never used on its own: a user accepts it with --family.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spinquant.architectures import FAMILIES
from spinquant.architectures.build import build_plan
from spinquant.architectures.family import Named
from spinquant.architectures.family_file import FamilyFile, family_from
from spinquant.architectures.family_file_conversion import to_family
from spinquant.errors import ArchitectureError, SpinquantError
from spinquant.evaluation.equivalence import Float64Arithmetic, difference, greedy_logits
from spinquant.evaluation.tiny_model import Sizing, make_tiny_model, tiny_config
from spinquant.models.modules import model_class, module_and_attribute, tensor_shapes
from spinquant.online.hooks import attach
from spinquant.plan import ROTATION_NAMES, Plan
from spinquant.probing.branches import EXPERTS
from spinquant.probing.channel_scaling import candidates, scales
from spinquant.probing.checkpoints import with_single_experts
from spinquant.probing.explain import LINEARS, explain_ends, explain_layer
from spinquant.probing.layer_kinds import choices_of, groups_of
from spinquant.probing.observation import Draft, Observation
from spinquant.probing.roles import draft, same_attention
from spinquant.probing.trace import cached_layers, run, silent_parts, trace
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import fuse_module
from spinquant.rotations.rotation import Orthogonal, Rotation

TOLERANCE = 1e-9
HEAD = 16  # head size of tiny models, unless the class needs more
LARGEST = 50_000_000  # parameters of a tiny model; with more, the config's size fields were not understood
# Other names of the usual size fields.
SYNONYMS = {
    "hidden_size": ("d_model", "n_embd", "dim", "embed_dim", "model_dim", "width"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers", "depth"),
    "num_attention_heads": ("n_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "kv_heads"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "mlp_dim", "d_ff", "dff", "ff_dim", "hidden_dim"),
    "head_dim": ("d_head", "head_size", "kv_channels"),
    "vocab_size": ("n_vocab", "vocabulary_size", "padded_vocab_size"),
}


@dataclass(frozen=True)
class Finding:
    """A statement that was tested.

    moved: relative error of the logits, None if it could not be tested. reason: why it does not hold, else empty.
    """

    statement: str
    moved: float | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the tiny model's function was unchanged."""
        return self.moved is not None and self.moved <= TOLERANCE and not self.reason


@dataclass(frozen=True)
class Probe:
    """Result of probing an architecture: a draft of a family file, and the experiments behind it.

    Attributes:
        model_type: Of the config.
        family: The draft; None if too little was found for one.
        findings: The tested statements, each with the relative error of the logits and, if it failed, the reason.
        left: What the draft does not cover, and why.

    Example:
        >>> import spinquant
        >>> found = spinquant.Probe("acme", family=None, findings=(), left=("it has no list of layers",))
        >>> print(spinquant.draft_text(found))
        # Draft of a family file for model_type 'acme', found by probing.
        ...
        # Not covered:
        #   - it has no list of layers
        ...
    """

    model_type: str
    family: FamilyFile | None
    findings: tuple[Finding, ...]
    left: tuple[str, ...] = ()


def probe(config: Any, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Probe:
    """Find by experiment which rotations are possible in an architecture, without a built-in table.

    Of a multimodal model the language model is probed, on text; R1 is then refused, since other inputs that write to
    the residual stream are not tested.

    Args:
        config: A config of transformers, whose model class transformers knows.
        shapes: Shapes of a checkpoint's tensors by name (`read_headers`), which the draft then has to cover too.
            Default: those of the model class.

    Returns:
        The draft of a family file, every test behind it, and what the draft does not cover.

    Raises:
        ArchitectureError: No tiny model of the class can be made or run.

    Example:
        >>> import spinquant
        >>> from transformers import LlamaConfig
        >>> found = spinquant.probe(LlamaConfig())
        >>> found.family is not None, all(finding.holds for finding in found.findings)
        (True, True)
    """
    with Float64Arithmetic(), torch.random.fork_rng(devices=[]):
        tiny_models, sizing = _small_models(config)
        seen = [_look(tiny, sizing) for tiny in tiny_models]
        for one in seen:
            if isinstance(one, str):
                return Probe(config.model_type, None, (), (one,))
        looks = [one for one in seen if isinstance(one, Observation)]
        why = next((reason for one in looks if (reason := same_attention(one))), None)
        if why is not None:
            return Probe(config.model_type, None, (), (why,))
        with torch.device("meta"):
            original = tensor_shapes(model_class(config).from_config(config))
        text = Named(config.get_text_config(), sizing.names)
        drafted = draft(config.model_type, looks, (text, original), sizing)
        drafted.silent = silent_parts(tiny_models[0], looks[0].calls) if config.get_text_config() is not config else []
        found = _Trial(tiny_models[0], looks[0], drafted).outcome()
    return found if found.family is None else _against(found, config, shapes or original)


def _against(found: Probe, config: Any, shapes: Mapping[str, Sequence[int]]) -> Probe:
    """Check the draft against the checkpoint's tensors; adapt it to single experts, or add what is not covered."""
    assert found.family is not None
    error = _unexplained(found.family, config, shapes)
    if error is None:
        return found
    single = with_single_experts(found.family, config, shapes)
    if single is not None and (error := _unexplained(single, config, shapes)) is None:
        return replace(found, family=single)
    return replace(found, left=(*found.left, f"the checkpoint's tensors are not those of the class: {error}"))


def _unexplained(family: FamilyFile, config: Any, shapes: Mapping[str, Sequence[int]]) -> ArchitectureError | None:
    try:
        build_plan(to_family(family, FAMILIES), config, shapes)
    except ArchitectureError as error:
        return error
    return None


def _small_models(config: Any) -> tuple[list[Any], Sizing]:
    """Two tiny models of different sizes that run and generate, and their sizing."""
    config_of_text = config.get_text_config()
    names = _names(config_of_text)
    narrow = {"kv_heads": 4, "group": 2, "hidden": 64, "intermediate": 112}
    known = getattr(Named(config_of_text, names), "head_dim", None) is not None
    either = (False, True) if known else (True, False)
    errors = []
    for heads, head_dim, filled in ((h, d, f) for h in (1, 4) for d in (HEAD, None) for f in either):
        sizing = Sizing(filled, heads, names, head_dim=head_dim)
        try:
            return [_running(config, one) for one in (sizing, replace(sizing, **narrow))], sizing
        except Exception as error:  # the code of an unknown class may raise anything
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise ArchitectureError(
        f"no tiny model of model_type {config.model_type!r} could be made and run, so it cannot be probed: {errors[0]}"
    )


def _running(config: Any, sizing: Sizing) -> Any:
    with torch.device("meta"):
        hollow = model_class(config).from_config(tiny_config(config, sizing))
    size = sum(p.numel() for p in hollow.parameters())
    if size > LARGEST:
        raise ArchitectureError(
            f"with tiny sizes it has {size} parameters: the config uses unknown names for its size fields"
        )
    tiny = make_tiny_model(config, sizing=sizing)
    if not run(tiny, _tokens(tiny)).isfinite().all():
        raise ArchitectureError("its logits are not finite")
    greedy_logits(tiny, _tokens(tiny))
    return tiny


def _names(config: Any) -> dict[str, str]:
    """The config's own names of the usual size fields, from SYNONYMS."""
    found = {}
    for name, others in SYNONYMS.items():
        if getattr(config, name, None) is None:
            other = next((o for o in others if type(getattr(config, o, None)) is int), None)
            if other is not None and not (name == "intermediate_size" and other in ("ffn_dim", "ffn_hidden_size")):
                found[name] = other
    return found


def _tokens(tiny: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = tiny.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary - 1, (2, 9), generator=generator)


def _look(tiny: Any, sizing: Sizing) -> Observation | str:
    """Trace a tiny model; a string with the reason if it has no list of layers to explain."""
    tokens = _tokens(tiny)
    config = Named(tiny.config.get_text_config(), sizing.names)
    count = config.num_hidden_layers
    stacks = [name for name, m in tiny.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    calls = trace(tiny, tokens)
    stacks = [name for name in stacks if all(f"{name}.{i}" in calls for i in range(count))]
    if not stacks:
        return f"{type(tiny).__name__} has no list of {count} layers that run in sequence"
    layers = [calls[f"{stacks[0]}.{i}"] for i in range(count)]
    if any(not torch.equal(a.output, b.input) for a, b in pairwise(layers)):
        return f"the output of a layer of {stacks[0]} is not the input of the next"
    if layers[0].output.ndim != 3:
        shape = tuple(layers[0].output.shape)
        return (
            f"layers of {stacks[0]} return hidden states of shape {shape}, expected (batch, tokens, hidden): parallel "
            "residual streams are not supported"
        )
    parts = tuple(
        explain_layer(tiny, layer, [c for n, c in calls.items() if n.startswith(f"{layer.name}.")], tokens[:1])
        for layer in layers
    )
    for part, caches in zip(parts, cached_layers(tiny, tokens, count), strict=True):
        part.attention = part.attention if caches else None
    ends = explain_ends(tiny, calls, layers[0], layers[-1])
    return Observation(config, calls, f"{stacks[0]}.*", parts, ends, tensor_shapes(tiny))


class _Trial:
    """Tests the statements of a draft on a tiny model, one by one."""

    def __init__(self, tiny: Any, seen: Observation, drafted: Draft):
        self.tiny, self.seen, self.draft = tiny, seen, drafted
        self.tokens = _tokens(tiny)
        self.before, self.generated = run(tiny, self.tokens), greedy_logits(tiny, self.tokens)
        self.findings: list[Finding] = []

    def outcome(self) -> Probe:
        """Run all tests; the findings, and the draft of what holds."""
        model_type = self.draft.data["model_types"][0]
        try:
            self._explain_rest()
            plan = self._plan()
        except SpinquantError as error:
            return Probe(model_type, None, (), (*self.draft.left, f"the findings do not give a plan: {error}"))
        for norm in {self.seen.starred(gain.norm): None for gain in plan.gains}:
            self._try(f"the scale of {norm} can be fused into its readers", *self._one_norm(plan, norm))
        plan = self._without_impossible_experts(plan)
        refused = [self._try_r1(plan)]
        refused += [self._try_rotation(plan, name) for name in ROTATION_NAMES[1:]]
        data = self.draft.data
        self._find_factors(plan)
        lacking = dict(found for found in refused if found is not None)
        if lacking:
            data["refused"] = [{"rotation": name, "reason": why} for name, why in lacking.items()]
        family = family_from(data, "the draft")
        names = [name for name in ROTATION_NAMES if name not in lacking and plan.spaces_of(name)]
        if len(names) > 1:
            spec = RotationSpec(tuple(names), "auto", randomize=True, seed=1)
            self._try(
                f"{', '.join(names)} together, a different rotation for every layer", plan, make_rotations(plan, spec)
            )
        return Probe(model_type, family, tuple(self.findings), tuple(self.draft.left))

    def _without_impossible_experts(self, plan: Plan) -> Plan:
        """The plan, without R4 inside experts if nothing can be hooked between their two matrix products."""
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

    def _find_factors(self, plan: Plan) -> None:
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

    def _explain_rest(self) -> None:
        """Add the tensors that no role covers, as tensors in no space."""
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

    def _one_norm(self, plan: Plan, norm: str) -> tuple[Plan, dict[str, Rotation]]:
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
        plain = replace(plan, spaces=tuple(replace(space, centred=False) for space in plan.spaces))
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

    def _try(self, statement: str, plan: Plan, rotations: Mapping[str, Rotation]) -> None:
        moved, error = self._moved(plan, rotations)
        self.findings.append(Finding(statement, moved, error or ("" if moved <= TOLERANCE else "the logits move")))

    def _moved(
        self, plan: Plan, rotations: Mapping[str, Rotation], seen: Callable[[bool], object] | None = None
    ) -> tuple[float, str]:
        """Relative error of the logits, of whole sequences and of greedy generation; and an error message, if any."""
        model = copy.deepcopy(self.tiny)
        try:
            fuse_module(model, plan, rotations)
            with attach(model, plan, rotations) as attachment:
                for site in attachment.keys_values.values():
                    site.watch = lambda keys, values: seen(True) if seen else None
                moved = difference(self.before, run(model, self.tokens)).relative
                cached = difference(self.generated, greedy_logits(model, self.tokens)).relative
        except Exception as error:  # the code of an unknown class, with hooks that it may not expect
            return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0]
        return max(moved, cached), ""
