"""The whole story on a model in memory: prove, rotate, check, quantize. From folder to folder: `folders.py`."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

from spinquant.architectures import FamilyLike, use_family
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import METHODS, Calibration, Method, quantize_blocks
from spinquant.errors import CalibrationError, RotationError, SchemeError
from spinquant.formats.native import is_marked, mark, unmark
from spinquant.kronecker import kernels_for
from spinquant.module import fuse_module, largest, plan_of, tensor_shapes
from spinquant.online import attach
from spinquant.plan import Plan
from spinquant.proof import Deviation, check, compare, prove, snapshot
from spinquant.quantization.gptq import GPTQOptions
from spinquant.quantization.rtn import round_weights
from spinquant.quantization.scheme import Clips, Scheme, parse_scheme, static_parts
from spinquant.quantization.weights import weights_of
from spinquant.rotation import Rotation, RotationSpec, make_rotations
from spinquant.saved_rotations import to_save
from spinquant.wrapped import check_given, in_precision, online_part

ASYMMETRY = 0.25  # of method gptaq where nothing else is said; measured in quantization/gptq.py

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a run goes about it, apart from what it computes.

    prove: try the rotations on a small model of the same architecture first. allow_inexact: save even when the
    logits of real tokens moved by more than rounding. precision: dtype of fusing (see `fuse.transform`) and of online
    rotations, by default the wider of the tensor's own and float32. drop_mtp: of a checkpoint, leave out layers for
    multi-token prediction, which R1 cannot take along. memory: bytes that the hidden states of a calibration from disk
    may take before they go to a file, by default a quarter of what is available; and that a block may take which a
    stream loads to compare it, where that is more than it takes anyway.
    progress(stage, done, total): called as the work goes on.
    """

    prove: bool = True
    allow_inexact: bool = False
    precision: torch.dtype | None = None
    drop_mtp: bool = False
    memory: int | None = None
    progress: Stage | None = None

    def stage(self, name: str) -> Callable[[int, int], None]:
        """A progress function for one stage."""

        def report(done: int, total: int) -> None:
            if self.progress:
                self.progress(name, done, total)

        return report


@dataclass(frozen=True)
class Result:
    """A model that was rotated, and quantized where a scheme says so, with all that is needed to repeat it.

    twin and real are how far logits moved by rotating: in the small model, and on real tokens (None: not tried).
    model is None where it was never loaded; seconds then says how long each phase took.
    """

    model: Any
    plan: Plan
    spec: RotationSpec
    rotations: Mapping[str, Rotation]
    scheme: Scheme | None = None
    method: str | None = None
    calibration: Calibration | None = None
    clips: Clips = field(default_factory=Clips)
    twin: Deviation | None = None
    real: Deviation | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] | None = None

    def record(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON: seeds, scheme, plan, proofs, versions."""
        return {
            "spinquant": version("spinquant"),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "spec": self.spec.to_dict(),
            "scheme": self.scheme.to_dict() if self.scheme else None,
            "method": self.method,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "clips": self.clips.to_dict() if self.clips else None,
            **to_save(self.rotations)[0],
            "proof": {
                "twin": self.twin.to_dict() if self.twin else None,
                "real_tokens": self.real.to_dict() if self.real else None,
            },
            **self.notes,
            "plan": self.plan.to_dict(),
        }


def rotate(
    model: Any,
    spec: RotationSpec | None = None,
    *,
    rotations: Mapping[str, Rotation] | None = None,
    sample: Tensor | None = None,
    options: Options | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate a model in memory: fuse what can be fused, attach the rest (R3, R4), and prove that nothing changed.

    rotations: by space, learned ones for instance, in place of those that the spec makes. family: a file that explains
    the model where no table does, see `use_family`.
    `sample`, int64 (batch, length), are real tokens to compare logits on. Raises ProofError, naming the first module
    that departs, when the function changed; the model is then spoilt and must not be used.
    """
    spec, options = spec or RotationSpec(), options or Options()
    check_fresh(model)
    use_family(model.config, family)
    plan = plan_of(model)
    if rotations is None:
        rotations = make_rotations(plan, spec)
    check_given(plan, spec, rotations)
    twin = prove(model.config, spec) if options.prove and rotations else None
    before = None if sample is None or not rotations else snapshot(model, plan, sample)
    install(model, plan, rotations, spec, options=options)
    real = None
    if before is not None:
        real = compare(before, model, plan, rotations)
        if not options.allow_inexact:
            check(real, before.logits.dtype, what="this model")
    return Result(model, plan, spec, rotations, twin=twin, real=real)


def install(
    model: Any,
    plan: Plan,
    rotations: Mapping[str, Rotation],
    spec: RotationSpec,
    *,
    online: Mapping[str, Rotation] | None = None,
    options: Options | None = None,
) -> None:
    """Put rotations into a model: fuse what can be fused, attach the rest, and mark it for `save_pretrained`.

    online: what the rotations are at run time, by default the same in the precision of the options.
    """
    options = options or Options()
    fuse_module(model, plan, rotations, precision=options.precision, progress=options.stage("rotate"))
    if online_part(plan, rotations):
        online = in_precision(rotations, options.precision) if online is None else online
        attach(model, plan, online)
        mark(model, plan, online, spec, Scheme())


def quantize(
    model: Any,
    scheme: Scheme | str,
    spec: RotationSpec | None = None,
    *,
    method: Method = "rtn",
    rotations: Mapping[str, Rotation] | None = None,
    tokens: Tensor | None = None,
    calibration: Calibration | None = None,
    sample: Tensor | None = None,
    store: BlockStore | None = None,
    options: Options | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate a model in memory, then quantize its weights, activations and KV cache.

    rotations, family: as for `rotate`. Weights are rounded in place: to nearest (rtn), by GPTQ, or by GPTQ with the
    asymmetric target (gptaq). All but plain rtn work on calibration `tokens`, int64 (samples, length). Activations and
    cache are rounded at run time by hooks, which `spinquant.detach(model)` removes. Raises RotationError for a model
    that has been through this before, SchemeError for a scheme that does not fit, CalibrationError for tokens that are
    missing or do not serve, and what `rotate` raises.
    """
    scheme, options = parse_scheme(scheme), options or Options()
    calibration = check_calibration(method, scheme, calibration)
    if calibration is not None and (tokens is None or tokens.numel() == 0):
        raise CalibrationError(f"{method} works on calibration tokens, int64 (samples, length), and none were given")
    check_fresh(model)
    use_family(model.config, family)
    check_fits(plan_of(model), tensor_shapes(model), scheme)
    rotated = rotate(model, spec or RotationSpec(()), rotations=rotations, sample=sample, options=options)
    unmark(model)
    online = in_precision(rotated.rotations, options.precision)
    clips = Clips()
    if calibration is None:
        round_weights(model, rotated.plan, scheme, progress=options.stage("quantize"))
    else:
        assert tokens is not None
        with kernels_for(largest(model)):  # as a calibration from disk does
            clips = quantize_blocks(
                model,
                rotated.plan,
                online,
                scheme,
                tokens,
                calibration,
                error_feedback=method != "rtn",
                store=store,
                progress=options.stage("calibrate"),
            )
    if scheme.weights or scheme.activations or scheme.kv or online_part(rotated.plan, online):
        attach(model, rotated.plan, online, scheme, clips)
        mark(model, rotated.plan, online, rotated.spec, scheme, clips)
    return replace(rotated, scheme=scheme, method=method, calibration=calibration, clips=clips)


def check_calibration(method: str, scheme: Scheme, calibration: Calibration | None) -> Calibration | None:
    """The calibration that a method needs, None for plain rounding.

    Raises SchemeError and CalibrationError for a method that is not known, and for options that would do nothing.
    """
    if method not in METHODS:
        raise SchemeError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    calibration = calibration or Calibration()
    ranges = {"activations": scheme.activations, "kv": scheme.kv}
    static = static_parts(scheme)
    if calibration.clips and all(ranges[part] is None for part in ranges if part not in static):
        raise SchemeError(
            f"scheme {scheme} rounds neither activations nor the KV cache in ranges of their own: there is no clip "
            "ratio to search"
        )
    if method == "rtn" and (calibration.gptq != GPTQOptions() or calibration.sequential):
        raise CalibrationError(
            "damping, act-order, asymmetry and sequential are options of gptq and gptaq, and the method is rtn"
        )
    if method == "rtn" and not calibration.clips and not static:
        if not calibration.round_inputs:
            raise CalibrationError("exact inputs are an option of calibration, and plain rtn is not calibrated")
        return None
    if method != "rtn" and scheme.weights is None:
        raise SchemeError(f"method {method} rounds weights, and scheme {scheme} leaves them at 16 bits: use method rtn")
    if method == "gptaq" and calibration.gptq.asymmetry is None:
        return replace(calibration, gptq=replace(calibration.gptq, asymmetry=ASYMMETRY))
    if method != "gptaq" and calibration.gptq.asymmetry:
        raise CalibrationError(f"asymmetry belongs to method gptaq, and the method is {method}")
    return calibration


def check_fresh(model: Any) -> None:
    """Raise RotationError for a model that this library has rotated online or quantized."""
    if is_marked(model):
        raise RotationError(
            "this model is rotated or quantized already: doing it again would lose its online rotations. Load the "
            "original, or make it plain first with spinquant.detach(model)"
        )


def check_fits(plan: Plan, shapes: Mapping[str, Sequence[int]], scheme: Scheme) -> None:
    """Raise SchemeError for inputs that cannot be rounded, and when a group size does not divide the input of a weight.

    shapes: of all tensors, by the names of the plan.
    """
    if scheme.activations is not None and plan.uncalled:
        raise SchemeError(
            f"scheme {scheme} rounds the inputs of linears, and {plan.family}, as configured, multiplies by the weight "
            f"of {plan.uncalled[0]} without calling it: nothing can be done to its input. Leave activations at 16 "
            "bits, or change the config"
        )
    # Found out now, this costs nothing; found out by the rounding, it costs a rotated model.
    for label, quantizer in (("weight", scheme.weights), ("activation", scheme.activations)):
        if quantizer is None or quantizer.group_size is None:
            continue
        for weight in weights_of(plan, scheme):
            length = shapes[weight.tensor][-2 if weight.transposed else -1] if weight.tensor in shapes else 0
            if length % quantizer.group_size:
                raise SchemeError(
                    f"{label} group size {quantizer.group_size} does not divide the {length} inputs of "
                    f"{weight.tensor.removesuffix('.weight')}: choose a group that divides "
                    "every linear's input, or none"
                )
