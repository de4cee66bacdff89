"""Rotate, quantize and save a model in memory, and check that rotating did not change its logits.

From folder to folder: `entrypoints/folders.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike, use_family
from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.blockwise import Calibration, Method, quantize_blocks
from spinquant.checkpoint.atomic_folder import atomic_folder
from spinquant.checkpoint.folder import check_finite
from spinquant.compute.dtypes import Arithmetic, arithmetic
from spinquant.entrypoints.output_folder import write_record
from spinquant.entrypoints.result import Options, Result
from spinquant.entrypoints.tuning import before_tuning
from spinquant.entrypoints.validation import check_calibration, check_format, check_tune
from spinquant.errors import CalibrationError, CheckpointError, TextError
from spinquant.evaluation.equivalence import check, compare, prove, snapshot
from spinquant.evaluation.scheme_proof import prove_scheme
from spinquant.formats.compressed_config import check_plan, check_rotations, scheme_for
from spinquant.formats.compressed_tensors import write_compressed
from spinquant.formats.native import check_fresh, is_marked, mark, unmark
from spinquant.learning.tuning import TuneOptions
from spinquant.models.context import check_context
from spinquant.models.modules import check_causal, check_changeable, config_of, in_eval_mode, largest, tensor_shapes
from spinquant.models.tokens import check_model, check_tokens
from spinquant.online.hooks import attach
from spinquant.plan import Plan
from spinquant.quantization.rtn import round_weights
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.quantization.targets import check_fits
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fast_transform import kernels_for
from spinquant.rotations.fuse_module import fuse_module, plan_of
from spinquant.rotations.random_transforms import general_kinds
from spinquant.rotations.rotation import Transform
from spinquant.rotations.wrappers import check_given, in_precision, online_part


def rotate(
    model: Any,
    spec: RotationSpec | None = None,
    *,
    rotations: Mapping[str, Transform] | None = None,
    sample: Tensor | None = None,
    options: Options | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate a model in memory: fuse R1 and R2 into its weights, attach online ones, and check that its logits stay.

    The model is changed in place. `spinquant.save` writes it, and `spinquant.detach` removes the online rotations.

    Args:
        model: A causal language model of transformers, or a classifier or embedding model made from one.
        spec: Which rotations, of which type, block size and seed. Default: random Hadamard R1 and R2.
        rotations: Rotations by the name of their space, such as learned ones, instead of those that `spec` describes.
        sample: Real tokens to compare logits on, int64, (batch, length). Default: none, only a tiny model of the same
            architecture is checked.
        options: Checks, precision and progress. Default: `Options()`.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.

    Returns:
        The model with its plan, its rotations, and how far the logits moved.

    Raises:
        ArchitectureError: The architecture is unknown, the model is wrapped or has an adapter, or two of its tensors
            share a weight that the config does not tie.
        CheckpointError: Weights are not in memory, or not finite.
        RotationError: A rotation is not possible in this model, or the model is rotated online or quantized already.
        TextError: The sample is longer than the model's context.
        ProofError: The logits moved by more than rounding; the first deviating module is named. If that was found on
            `sample`, the model is changed already and must not be used.

    Example:
        >>> import spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> result = spinquant.rotate(model, spinquant.RotationSpec("R1,R2"), sample=torch.tensor([[1, 2, 3]]))
        >>> sorted(result.rotations), result.real.relative < 1e-4
        (['layers.0.value', 'layers.1.value', 'residual'], True)
    """
    spec, options = spec or RotationSpec(), options or Options()
    check_model(model)
    check_fresh(model)
    if sample is not None:
        check_tokens(sample, model, "the sample's tokens", TextError)
    use_family(model.config, family)
    plan = plan_of(model)
    check_changeable(model, plan)
    check_finite(model, "the model")
    if rotations is None:
        rotations = make_rotations(plan, spec)
    check_given(plan, spec, rotations)
    if sample is not None:
        check_context(model.config, sample.shape[-1], "give a shorter sample")
    kinds = general_kinds(plan, rotations)
    tiny = prove(config_of(model), spec, kinds=kinds) if options.prove and rotations else None
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
    rotations: Mapping[str, Transform],
    spec: RotationSpec,
    *,
    online: Mapping[str, Transform] | None = None,
    options: Options | None = None,
) -> None:
    """Fuse rotations into a model's weights, attach the online ones, and make `save_pretrained` write them.

    online: the rotations to attach. Default: the same rotations, in the precision of the options.
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
    format: str = "native",
    rotations: Mapping[str, Transform] | None = None,
    tokens: Tensor | None = None,
    calibration: Calibration | None = None,
    sample: Tensor | None = None,
    tune: TuneOptions | None = None,
    store: BlockStore | None = None,
    options: Options | None = None,
    family: FamilyLike | None = None,
) -> Result:
    """Rotate a model in memory, then quantize its weights, activations and KV cache.

    Weights are quantized in place. Activations and KV cache are quantized at inference by hooks, which
    `spinquant.detach` removes. `spinquant.save` writes the model.

    Args:
        model: A causal language model of transformers, or a classifier or embedding model made from one.
        scheme: What is quantized, and to how many bits, such as "W4A8KV4".
        spec: Which rotations, of which type, block size and seed. Default: none.
        method: How weights are quantized: `rtn` (round-to-nearest, the default), `gptq`, or `gptaq` (GPTQ with the
            asymmetric target).
        format: The format that the model will be saved in. For `compressed-tensors`, activations are symmetric unless
            the scheme says otherwise, and the ranges that its runtimes need static (KVFP8, NVFP4) are calibrated; what
            the format cannot store is refused at once. Default: `native`.
        rotations: Rotations by the name of their space, such as learned ones, instead of those that `spec` describes.
        tokens: Calibration tokens, int64, (samples, length). Needed unless the method is `rtn` without clip search and
            without static ranges.
        calibration: Options of calibration. Default: `Calibration()`.
        sample: Real tokens on which the logits of the rotated model are compared before it is quantized, int64,
            (batch, length). Default: none.
        tune: Tune scales, norms, biases and clip ratios of the quantized model towards the 16-bit one, with these
            options. The last of `tokens` decide whether that is kept, and are not calibrated on. Default: no tuning.
        store: Where quantized blocks, and the state of tuning, are kept, so that a rerun resumes from them. Default:
            nowhere.
        options: Checks, precision and progress. Default: `Options()`.
        family: A family file that describes the architecture, for models without a built-in table; see `use_family`.

    Returns:
        The model with its plan, rotations, scheme and clip ratios, and how far the logits moved by rotating it.

    Raises:
        SchemeError: The scheme cannot be parsed, or does not fit the model or the format.
        ArchitectureError: As in `rotate`.
        CheckpointError: Weights are not in memory, or not finite.
        CalibrationError: Calibration tokens are missing or cannot be used, or an option would have no effect.
        LearningError: There is nothing to tune, or its loss is not finite.
        TextError: Tokens are longer than the model's context.
        RotationError: A rotation is not possible in this model, or the model is rotated online or quantized already.
        ProofError: Rotating moved the logits by more than rounding, see `rotate`; or quantizers of activations or KV
            cache do not round what they should in a tiny model of the same architecture.

    Example:
        >>> import spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> tokens = torch.randint(64, (8, 16))
        >>> result = spinquant.quantize(model, "W4A8KV8", spinquant.RotationSpec(), method="gptq", tokens=tokens)
        >>> str(result.scheme), result.method, model(input_ids=tokens).logits.shape
        ('W4A8KV8', 'gptq', torch.Size([8, 16, 64]))
    """
    scheme, options = scheme_for(scheme, format), options or Options()
    check_format(format, scheme, spec or RotationSpec(()), clips=calibration is not None and calibration.clips)
    calibration = check_calibration(method, scheme, calibration)
    if tokens is None and (calibration is not None or tune is not None):
        user = method if tune is None else "tuning"
        raise CalibrationError(f"{user} works on calibration tokens, int64 (samples, length), and none were given")
    check_tune(tune, scheme)
    check_model(model)
    check_fresh(model)
    if tokens is not None:
        check_tokens(tokens, model, "calibration tokens", CalibrationError)
        check_context(model.config, tokens.shape[-1], "give shorter samples")
    if sample is not None:
        check_tokens(sample, model, "the sample's tokens", TextError)
    use_family(model.config, family)
    plan = plan_of(model)
    check_changeable(model, plan)
    check_fits(plan, tensor_shapes(model), scheme)
    if format == "compressed-tensors" and rotations is not None:
        check_rotations(plan, rotations)
    spec = spec or RotationSpec(())
    tuning = None
    if tune is not None and tokens is not None:
        check_causal(model, "tuning")
        tokens, tuning = before_tuning(model, tokens, tune, options)
    quantizers = prove_scheme(config_of(model), scheme, spec) if options.prove else None
    rotated = rotate(model, spec, rotations=rotations, sample=sample, options=options)
    unmark(model)
    online = in_precision(rotated.rotations, options.precision)
    clips = Clips()
    notes: dict[str, Any] = {}
    if calibration is None:
        round_weights(model, rotated.plan, scheme, progress=options.stage("quantize"))
    else:
        assert tokens is not None
        computed = calibration_arithmetic(model, rotated.plan, calibration)
        notes = {"arithmetic": {"calibration": computed.to_dict()}}
        # The same kernels as a calibration from disk, and the same inputs: without dropout.
        with kernels_for(largest(model)), in_eval_mode(model):
            clips = quantize_blocks(
                model,
                rotated.plan,
                online,
                scheme,
                tokens,
                replace(calibration, dtype=None if computed.dtype == model.dtype else computed.dtype),
                error_feedback=method != "rtn",
                store=store,
                progress=options.stage("calibrate"),
            )
    if tuning is not None:
        tuned = tuning.run(model, rotated.plan, online, scheme, clips, format=format, store=store)
        clips, notes = tuned.clips, {**notes, "tuning": tuned.record}
    if scheme.weights or scheme.activations or scheme.kv or online_part(rotated.plan, online):
        attach(model, rotated.plan, online, scheme, clips)
        mark(model, rotated.plan, online, rotated.spec, scheme, clips)
    return replace(
        rotated,
        scheme=scheme,
        method=method,
        calibration=calibration,
        clips=clips,
        quantizers=quantizers,
        notes={**rotated.notes, **notes},
    )


def calibration_arithmetic(model: Any, plan: Plan, calibration: Calibration) -> Arithmetic:
    """The dtype that a model's blocks are calibrated in, of which one at a time is cast to it."""
    blocks = (sum(p.numel() for p in model.get_submodule(name).parameters()) for name in plan.blocks)
    numbers = max(blocks, default=0) + largest(model) // 4
    return arithmetic("calibration", model.dtype, numbers, calibration.device or model.device, wanted=calibration.dtype)


def save(
    result: Result, out: str | Path, tokenizer: Any = None, *, force: bool = False, format: str = "native"
) -> None:
    """Write a model from `rotate` or `quantize`, with its rotations and a record of how it was made.

    The folder is written atomically. A model without online rotations and quantization is written as a plain Hugging
    Face checkpoint in any format.

    Args:
        result: The model in memory and what was done to it.
        out: Folder to write.
        tokenizer: A tokenizer of transformers to write beside the model. Default: none.
        force: Replace `out` if it exists. Default: False.
        format: `native` (the default; see `formats/native.py`), `compressed-tensors`, or `hf`, which refuses what a
            plain checkpoint cannot store.

    Raises:
        CheckpointError: `out` exists, the disk is full, a weight is not finite, or the online rotations were removed
            from the model.
        SchemeError: The format cannot store the scheme.
        RotationError: The format cannot store the rotations.

    Example:
        >>> import pathlib, spinquant, tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> result = spinquant.quantize(model, "W4A8", spinquant.RotationSpec())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     spinquant.save(result, pathlib.Path(folder) / "W4A8")
        ...     type(spinquant.load(pathlib.Path(folder) / "W4A8")).__name__
        'LlamaForCausalLM'
    """
    searched = result.calibration is not None and result.calibration.clips
    tuned = result.notes.get("tuning", {})
    moved = bool(tuned.get("kept")) and "clips" in tuned["numbers"]
    check_format(format, result.scheme or Scheme(), result.spec, clips=searched or moved)
    online = online_part(result.plan, result.rotations)
    if format == "compressed-tensors":
        check_plan(result.plan, result.scheme or Scheme(), result.spec)
    if online and not is_marked(result.model):
        raise CheckpointError(
            "the online rotations were removed from this model: what is left is not what the result describes. Save "
            "the model with its own save_pretrained, or rotate it again"
        )
    check_finite(result.model, "the model to be saved")
    with atomic_folder(out, force=force) as folder:
        write_model(result, folder, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_record(result, folder, format=format)


def write_model(result: Result, folder: Path, format: str) -> None:
    """Write weights and config of a model in memory."""
    if format == "compressed-tensors":
        online = online_part(result.plan, result.rotations)
        write_compressed(result.model, result.plan, online, result.scheme or Scheme(), result.clips, folder)
    else:
        result.model.save_pretrained(folder)
