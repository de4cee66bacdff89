"""The whole story: prove, rotate, check, quantize, save.

`rotate` and `quantize` work on a model in memory; `rotate_folder` and `quantize_folder` go from a folder or hub id to
a new folder, which appears complete or not at all.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from spinquant.architectures import make_plan
from spinquant.calibrate import CalibrationText, calibration_tokens, load_text, token_windows
from spinquant.checkpoint import (
    BESIDE,
    RECORD,
    ROTATIONS,
    atomic_folder,
    check_finite,
    check_free,
    load_config,
    load_model,
    load_tokenizer,
    read_headers,
)
from spinquant.errors import CalibrationError, CheckpointError, RotationError, SchemeError
from spinquant.formats.compressed_config import check_scheme, quantization_scheme
from spinquant.formats.compressed_tensors import write_compressed
from spinquant.formats.native import distinct_rotations, is_marked, mark, unmark
from spinquant.formats.runtimes import check_runtime, runtime_of
from spinquant.module import fuse_module, plan_of
from spinquant.online import attach
from spinquant.plan import MERGEABLE, Plan
from spinquant.proof import Deviation, check, compare, prove, snapshot
from spinquant.quantization.blockwise import Calibration, quantize_blocks
from spinquant.quantization.progress import BlockStore, digest
from spinquant.quantization.rtn import round_weights
from spinquant.quantization.scheme import Clips, Scheme, parse_scheme
from spinquant.rotation import Rotation, RotationSpec, in_precision, make_rotations

Method = Literal["rtn", "gptq", "gptaq"]
METHODS = get_args(Method)
Format = Literal["native", "compressed-tensors", "hf"]
ASYMMETRY = 0.25  # of method gptaq where nothing else is said; measured in quantization/gptq.py
SAMPLE_TOKENS = 128  # real tokens on which the fused model is compared with the original

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a run goes about it, apart from what it computes.

    prove: try the rotations on a small model of the same architecture first. allow_inexact: save even when the
    logits of real tokens moved by more than rounding. precision: dtype of fusing (see `fuse.transform`) and of online
    rotations, by default the wider of the tensor's own and float32.
    progress(stage, done, total): called as the work goes on.
    """

    prove: bool = True
    allow_inexact: bool = False
    precision: torch.dtype | None = None
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

    def record(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON: seeds, scheme, plan, proofs, versions."""
        kinds = distinct_rotations(self.rotations)
        index = {id(rotation): i for i, rotation in enumerate(kinds)}
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
            "rotations": [rotation.describe() for rotation in kinds],
            "spaces": {space: index[id(rotation)] for space, rotation in self.rotations.items()},
            "proof": {
                "twin": self.twin.to_dict() if self.twin else None,
                "real_tokens": self.real.to_dict() if self.real else None,
            },
            **self.notes,
            "plan": self.plan.to_dict(),
        }


def rotate(
    model: Any, spec: RotationSpec | None = None, *, sample: Tensor | None = None, options: Options | None = None
) -> Result:
    """Rotate a model in memory: fuse what can be fused, attach the rest (R3, R4), and prove that nothing changed.

    `sample`, int64 (batch, length), are real tokens to compare logits on. Raises ProofError, naming the first module
    that departs, when the function changed; the model is then spoilt and must not be used.
    """
    spec, options = spec or RotationSpec(), options or Options()
    check_fresh(model)
    plan = plan_of(model)
    rotations = make_rotations(plan, spec)
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
    if _online(plan, rotations):
        online = in_precision(rotations, options.precision) if online is None else online
        attach(model, plan, online)
        mark(model, plan, online, spec, Scheme())


def quantize(
    model: Any,
    scheme: Scheme | str,
    spec: RotationSpec | None = None,
    *,
    method: Method = "rtn",
    tokens: Tensor | None = None,
    calibration: Calibration | None = None,
    sample: Tensor | None = None,
    store: BlockStore | None = None,
    options: Options | None = None,
) -> Result:
    """Rotate a model in memory, then quantize its weights, activations and KV cache.

    Weights are rounded in place: to nearest (rtn), by GPTQ, or by GPTQ with the asymmetric target (gptaq). All but
    plain rtn work on calibration `tokens`, int64 (samples, length). Activations and cache are rounded at run time by
    hooks, which `spinquant.detach(model)` removes. Raises RotationError for a model that has been through this before,
    SchemeError for a scheme that does not fit, CalibrationError for tokens that are missing or do not serve, and what
    `rotate` raises.
    """
    scheme, options = parse_scheme(scheme), options or Options()
    calibration = _calibration(method, scheme, calibration)
    if calibration is not None and (tokens is None or tokens.numel() == 0):
        raise CalibrationError(f"{method} works on calibration tokens, int64 (samples, length), and none were given")
    check_fresh(model)
    check_groups(plan_of(model), model, scheme)
    rotated = rotate(model, spec or RotationSpec(()), sample=sample, options=options)
    unmark(model)
    online = in_precision(rotated.rotations, options.precision)
    clips = Clips()
    if calibration is None:
        round_weights(model, rotated.plan, scheme, progress=options.stage("quantize"))
    else:
        assert tokens is not None
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
    if scheme.weights or scheme.activations or scheme.kv or _online(rotated.plan, rotated.rotations):
        attach(model, rotated.plan, online, scheme, clips)
        mark(model, rotated.plan, online, rotated.spec, scheme, clips)
    return replace(rotated, scheme=scheme, method=method, calibration=calibration, clips=clips)


def _calibration(method: str, scheme: Scheme, calibration: Calibration | None) -> Calibration | None:
    """The calibration that a method needs; None for plain rounding."""
    if method not in METHODS:
        raise SchemeError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    calibration = calibration or Calibration()
    searched = calibration.clips
    if searched and scheme.activations is None and scheme.kv is None:
        raise SchemeError(
            f"scheme {scheme} rounds neither activations nor the KV cache: there is no clip ratio to search"
        )
    if method == "rtn" and not searched:
        return None
    if method != "rtn" and scheme.weights is None:
        raise SchemeError(f"method {method} rounds weights, and scheme {scheme} leaves them at 16 bits: use method rtn")
    if method == "gptaq" and not calibration.gptq.asymmetry:
        return replace(calibration, gptq=replace(calibration.gptq, asymmetry=ASYMMETRY))
    if method != "gptaq" and calibration.gptq.asymmetry:
        raise CalibrationError(f"asymmetry belongs to method gptaq, and the method is {method}")
    return calibration


def save(
    result: Result, out: str | Path, tokenizer: Any = None, *, force: bool = False, format: Format = "native"
) -> None:
    """Write a model, its tokenizer, and beside them the rotations and the record of how it came about.

    The folder appears complete or not at all. A model without online parts and quantization is a plain Hugging Face
    folder; any other is in our own format (see `formats/native.py`), or in that of compressed-tensors. Raises
    CheckpointError when `out` exists and `force` is off, the disk is full, a weight is not finite, or the online parts
    were removed from the model; SchemeError and RotationError for what the format cannot hold.
    """
    check_format(format, result.scheme or Scheme(), result.spec)
    if _online(result.plan, result.rotations) and not is_marked(result.model):
        raise CheckpointError(
            "the online rotations were removed from this model: what is left is not what the result describes. Save "
            "the model with its own save_pretrained, or rotate it again"
        )
    check_finite(result.model, "the model to be saved")
    with atomic_folder(out, force=force) as folder:
        if format == "compressed-tensors":
            online = {o.space: result.rotations[o.space] for o in result.plan.onlines if o.space in result.rotations}
            write_compressed(result.model, result.plan, online, result.scheme or Scheme(), folder)
        else:
            result.model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        kinds = distinct_rotations(result.rotations)
        tensors = {f"{i}.{k}": v.contiguous() for i, r in enumerate(kinds) for k, v in r.tensors().items()}
        # In a folder of their own: runtimes load every safetensors file that lies beside the weights.
        (folder / BESIDE).mkdir()
        save_file(tensors, folder / BESIDE / ROTATIONS)
        record = json.dumps(result.record(), indent=1, default=dict)
        (folder / BESIDE / RECORD).write_text(record + "\n", encoding="utf-8")


def check_format(format: str, scheme: Scheme, spec: RotationSpec) -> None:
    """Raise SchemeError or RotationError, saying what would work, for what a format of folders cannot hold."""
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if format == "hf":
        if scheme != Scheme(lm_head=scheme.lm_head):
            raise SchemeError(
                f"format hf is a plain 16-bit folder, which cannot hold {scheme}: use --scheme none, or --format "
                "compressed-tensors or native"
            )
        if online:
            raise RotationError(
                f"{', '.join(online)} run at run time, which a plain folder cannot say. Leave them out, or write "
                "--format native or compressed-tensors"
            )
    elif format == "compressed-tensors":
        check_scheme(scheme, spec)
        quantization_scheme(scheme)  # raises where the library is missing
        if scheme.weights is None and not online:
            raise SchemeError(
                "nothing is quantized and nothing rotated online, so compressed-tensors has nothing to say: use "
                "--format hf"
            )
    elif format != "native":
        raise SchemeError(f"unknown format {format!r}: expected native, compressed-tensors or hf")


def rotate_folder(
    model: str | Path,
    out: str | Path,
    spec: RotationSpec,
    *,
    dtype: torch.dtype | None = None,
    text: str = "auto",
    force: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    options: Options | None = None,
) -> Result:
    """Rotate a folder or hub id into a plain folder that transformers loads with nothing of ours installed.

    dtype: of the weights written, by default as in the source. Raises RotationError for rotations that need work at
    run time (R3, R4): a plain folder cannot hold them.
    """
    online = [name for name in spec.rotations if name not in MERGEABLE]
    if online:
        raise RotationError(
            f"{', '.join(online)} run at run time, which a plain folder cannot say. Leave them out, or write a folder "
            "with online parts: spinquant quantize MODEL OUT --scheme none --rotations " + ",".join(spec.rotations)
        )
    check_free(out, force=force, source=model)
    options = options or Options()
    loaded, tokenizer, sample, notes = _open(model, dtype, text, allow_pickle, device)
    result = rotate(loaded, spec, sample=sample, options=options)
    if dtype is not None:
        _cast(loaded, dtype)
    save(replace(result, notes=notes), out, tokenizer, force=force)
    return result


def quantize_folder(
    model: str | Path,
    out: str | Path,
    scheme: Scheme,
    spec: RotationSpec,
    *,
    method: Method = "rtn",
    calibration: Calibration | None = None,
    calibration_text: CalibrationText | None = None,
    dtype: torch.dtype | None = None,
    text: str = "auto",
    force: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    options: Options | None = None,
    format: Format = "native",
    runtime: str | None = None,
) -> Result:
    """Rotate and quantize a folder or hub id into a folder that `spinquant.load` and transformers load.

    dtype: of everything that is not quantized, and of the arithmetic; by default as in the source. format: of the
    folder, see `check_format`, which is asked before any work. runtime: refuse what it does not run, see
    `formats/runtimes.py`.
    Finished blocks of a calibration are kept beside `out` until it is written, so that the same call goes on where
    another was stopped.
    """
    if runtime is not None:
        _check_for(runtime, format, scheme, spec, None if allow_pickle else model)
    check_format(format, scheme, spec)
    check_free(out, force=force, source=model)
    options = options or Options()
    calibrated = _calibration(method, scheme, calibration) is not None
    loaded, tokenizer, sample, notes = _open(model, dtype, text, allow_pickle, device)
    if dtype is not None:
        _cast(loaded, dtype)
    tokens, store = None, None
    if calibrated:
        source = calibration_text or CalibrationText()
        name, tokens = calibration_tokens(loaded, tokenizer, source, progress=options.stage("generate text"))
        notes["calibration_text"] = {"text": name, "samples": tokens.shape[0], "length": tokens.shape[1]}
        settings = [version("spinquant"), str(model), scheme, spec, method, calibration, loaded.dtype, digest(tokens)]
        store = BlockStore(Path(out).parent / f".{Path(out).name}.calibration", json.dumps([str(s) for s in settings]))
    result = quantize(
        loaded,
        scheme,
        spec,
        method=method,
        tokens=tokens,
        calibration=calibration,
        sample=sample,
        store=store,
        options=options,
    )
    result = replace(result, notes=notes)
    save(result, out, tokenizer, force=force, format=format)
    if store is not None:
        store.remove()
    return result


def _check_for(runtime: str, format: str, scheme: Scheme, spec: RotationSpec, model: str | Path | None) -> None:
    """Raise SchemeError or RotationError for what a runtime does not load or run."""
    reads = runtime_of(runtime).format
    if format not in ("hf", reads):
        raise SchemeError(f"{runtime} reads {reads or 'no'} folders of ours, not {format}: leave --format out")
    check_runtime(runtime, scheme, spec)  # before the model is looked at, which may be on the hub
    if model is not None:
        shapes = {name: info.shape for name, info in read_headers(model).items()}
        check_runtime(runtime, scheme, spec, make_plan(load_config(model), shapes))


def _open(
    model: str | Path, dtype: torch.dtype | None, text: str, allow_pickle: bool, device: str
) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    config = load_config(model)
    check_unquantized(config, model)
    if not allow_pickle:
        # An architecture that no table explains is refused before gigabytes are loaded.
        make_plan(config, {name: info.shape for name, info in read_headers(model).items()})
    loaded = load_model(model, allow_pickle=allow_pickle, device=device)
    if dtype is not None and dtype.itemsize > loaded.dtype.itemsize:
        _cast(loaded, dtype)  # widened before anything is rounded
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError:
        # A folder of weights alone can be rotated too; random tokens then stand in for text.
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, loaded.config.vocab_size, (1, SAMPLE_TOKENS), generator=generator)
        return loaded, None, tokens, {"source": str(model), "sample_text": "random tokens (no tokenizer)"}
    name, content = load_text(text)
    sample = token_windows(tokenizer, content[:20_000], length=SAMPLE_TOKENS, count=1)
    return loaded, tokenizer, sample, {"source": str(model), "sample_text": name}


def _cast(model: Any, dtype: torch.dtype) -> None:
    # Parameters alone: a narrowed rotary frequency would spoil long contexts, and is wide again after loading.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _online(plan: Plan, rotations: Mapping[str, Rotation]) -> bool:
    return any(online.space in rotations for online in plan.onlines)


def check_fresh(model: Any) -> None:
    """Raise RotationError for a model that this library has rotated online or quantized."""
    if is_marked(model):
        raise RotationError(
            "this model is rotated or quantized already: doing it again would lose its online rotations. Load the "
            "original, or make it plain first with spinquant.detach(model)"
        )


def check_unquantized(config: Any, model: str | Path) -> None:
    """Raise CheckpointError when a config says that the model is quantized."""
    found = getattr(config, "quantization_config", None)
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise CheckpointError(
            f"{str(model)!r} is quantized already ({method}): rotate and quantize the 16-bit model it came from"
        )


def check_groups(plan: Plan, model: Any, scheme: Scheme) -> None:
    """Raise SchemeError when a group size of the scheme does not divide the input of a linear that it covers."""
    # Found out now, this costs nothing; found out by the rounding, it costs a rotated model.
    for label, quantizer in (("weight", scheme.weights), ("activation", scheme.activations)):
        if quantizer is None or quantizer.group_size is None:
            continue
        for name in (name for group in plan.linears for name in group):
            length = model.get_submodule(name).in_features
            if length % quantizer.group_size:
                raise SchemeError(
                    f"{label} group size {quantizer.group_size} does not divide the {length} inputs of {name}: "
                    "choose a group that divides every linear's input, or none"
                )
