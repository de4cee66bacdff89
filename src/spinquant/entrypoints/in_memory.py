"""The whole story on a model in memory: prove, rotate, check, quantize. From folder to folder: `folders.py`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike, use_family
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import Calibration, Method, quantize_blocks
from spinquant.entrypoints.result import Options, Result
from spinquant.entrypoints.validation import check_calibration
from spinquant.errors import CalibrationError
from spinquant.evaluation.equivalence import check, compare, prove, snapshot
from spinquant.formats.native import check_fresh, mark, unmark
from spinquant.models.modules import largest, tensor_shapes
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.rtn import round_weights
from spinquant.quantization.scheme import Clips, Scheme, parse_scheme
from spinquant.quantization.targets import check_fits
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.fuse_module import fuse_module, plan_of
from spinquant.rotations.rotation import Rotation
from spinquant.rotations.wrappers import check_given, in_precision, online_part


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
    tiny = prove(model.config, spec) if options.prove and rotations else None
    before = None if sample is None or not rotations else snapshot(model, plan, sample)
    install(model, plan, rotations, spec, options=options)
    real = None
    if before is not None:
        real = compare(before, model, plan, rotations)
        if not options.allow_inexact:
            check(real, before.logits.dtype, what="this model")
    return Result(model, plan, spec, rotations, twin=tiny, real=real)


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
