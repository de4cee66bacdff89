"""The command `quantize`."""

from typing import Annotated, Any

import typer

from spinquant.cli import options as opt
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages, step_report

EXAMPLES = (
    "spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4",
    "spinquant quantize ./llama ./llama-w4 --scheme W4g128A16 --rotations R1,R2 --method gptq --device cuda",
    "spinquant quantize ./llama ./llama-w4a8 --scheme W4A8KV8 --method gptq --clips --calibration ./text.txt",
    "spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --method gptaq --clips --tune 100",
    "spinquant quantize ./llama ./llama-w8a8 --scheme W8A8 --rotations R1,R2 --runtime vllm",
)


def quantize(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    scheme: opt.SchemeName,
    rotations: opt.Rotations = opt.ALL_ROTATIONS,
    online: opt.Online = "none",
    learned: opt.Learned = None,
    method: Annotated[
        str,
        opt.option(
            opt.WEIGHTS, "How weights are rounded: rtn (round-to-nearest), gptq, or gptaq (GPTQ, asymmetric target)."
        ),
    ] = "rtn",
    group_size: Annotated[
        int | None, opt.option(opt.WEIGHTS, "Weights per scale; by default one scale per output channel.")
    ] = None,
    clips: Annotated[
        bool,
        opt.option(
            opt.ACTIVATIONS, "Search clip ratios of activations and KV cache per layer, by calibration.", "--clips"
        ),
    ] = False,
    symmetric_activations: Annotated[
        bool | None,
        opt.option(
            opt.ACTIVATIONS,
            "Quantize activations symmetrically or asymmetrically; by default asymmetrically, and symmetrically for "
            "compressed-tensors.",
            "--symmetric-activations/--asymmetric-activations",
        ),
    ] = None,
    calibration: opt.Calibration = None,
    samples: Annotated[int | None, opt.SAMPLES] = None,
    sample_length: Annotated[int | None, opt.SAMPLE_LENGTH] = None,
    learn_first: Annotated[
        str | None,
        opt.option(
            opt.LEARNING,
            "Learn rotations first, on the calibration text, by this method: closed-form, auto, local, end-to-end or "
            "local+end-to-end.",
            "--learn",
        ),
    ] = None,
    budget: opt.Budget = None,
    tune: Annotated[
        int | None,
        opt.option(
            opt.LEARNING,
            "Tune the quantized model towards the 16-bit one for so many steps on the calibration text: scales of "
            "weights, norms, biases and clip ratios. Kept only if it lowers KL on held-out windows. The model is then "
            "loaded as a whole.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        opt.option(
            opt.OUTPUT,
            "Format of OUT: native (the default; loads with spinquant), compressed-tensors (needs the extra of that "
            "name; loads in vLLM), or hf (a plain 16-bit folder).",
        ),
    ] = None,
    runtime: opt.Runtime = None,
    force: opt.Force = False,
    push: opt.PushToHub = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
    lm_head: Annotated[bool, opt.option(opt.ADVANCED, "Quantize the output head too.", "--lm-head")] = False,
    weight_clip: Annotated[
        str, opt.option(opt.ADVANCED, "Clip ratio of weights: a number, or mse to search it per scale.")
    ] = "mse",
    activation_clip: Annotated[float, opt.option(opt.ADVANCED, "Clip ratio of activations.")] = 1.0,
    kv_clip: Annotated[float, opt.option(opt.ADVANCED, "Clip ratio of keys and values.")] = 1.0,
    damping: Annotated[
        float,
        opt.option(opt.ADVANCED, "GPTQ: share of the mean of the Hessian's diagonal that is added to the diagonal."),
    ] = 0.01,
    act_order: Annotated[
        bool, opt.option(opt.ADVANCED, "GPTQ: quantize the columns with the largest inputs first.", "--act-order")
    ] = False,
    asymmetry: Annotated[
        float | None,
        opt.option(
            opt.ADVANCED,
            "GPTAQ: weight of the unquantized model's outputs in the target, from 0 (GPTQ) to 1; 0.1 by default.",
        ),
    ] = None,
    sequential: Annotated[
        bool,
        opt.option(
            opt.ADVANCED,
            "GPTQ: quantize the linears of a decoder block one after the other, each on inputs computed with the "
            "quantized ones before it.",
            "--sequential",
        ),
    ] = False,
    exact_inputs: Annotated[
        bool, opt.option(opt.ADVANCED, "Calibrate on unquantized activations and KV cache.", "--exact-inputs")
    ] = False,
    tune_lr: Annotated[
        float | None,
        opt.option(opt.ADVANCED, "Tuning: largest relative change of a number in one step; 0.002 by default."),
    ] = None,
    tune_batch: Annotated[int | None, opt.option(opt.ADVANCED, "Tuning: samples per step; 1 by default.")] = None,
    checkpointing: Annotated[bool, opt.option(opt.ADVANCED, opt.CHECKPOINTING, "--checkpointing")] = False,
    moments: opt.MomentsOf = "gradients",
    type: opt.Type = "auto",
    block_size: opt.BlockSize = None,
    randomize: opt.Randomize = False,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    text: opt.Text = "auto",
    compare: opt.Compare = True,
    proof: opt.Proof = True,
    max_shard_size: opt.MaxShardSize = None,
    checksums: opt.Checksums = None,
    memory: opt.Memory = None,
    family: opt.Family = None,
    drop_mtp: opt.DropMtp = False,
    allow_inexact: opt.AllowInexact = False,
    allow_pickle: opt.AllowPickle = False,
) -> None:
    """Rotate and quantize a model into a folder that `spinquant.load`, or transformers after `import spinquant`, loads.

    With `--format compressed-tensors`, vLLM serves the folder. The model is never loaded as a whole, except to tune it:
    weights are streamed, and calibration works decoder block by decoder block. If the command is stopped, rerun it to
    resume.
    """
    from spinquant.calibration.blockwise import Calibration
    from spinquant.calibration.data import CalibrationText
    from spinquant.cli.tables import learning_table, result_table
    from spinquant.entrypoints.folders import quantize_folder
    from spinquant.entrypoints.request import LearnText
    from spinquant.entrypoints.result import Options
    from spinquant.entrypoints.validation import settle_format
    from spinquant.errors import LearningError
    from spinquant.formats.compressed_config import scheme_for
    from spinquant.learning.budget import parse_duration
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions
    from spinquant.learning.options import LearnOptions, Watch
    from spinquant.quantization.gptq import GPTQOptions
    from spinquant.quantization.scheme import parse_scheme, static_parts

    if learn_first and learned:
        raise LearningError(
            "--learn and --learned cannot be combined: the first learns rotations, the second reads them from a "
            "folder. Give one of them"
        )
    if not learn_first and (budget is not None or moments != "gradients"):
        name, wanted = ("--budget", "auto") if budget is not None else ("--moments", "closed-form")
        raise LearningError(f"{name} is an option of learning: give --learn {wanted} too, or leave out {name}")
    # What to write: rotations, format, scheme.
    spec = opt.parse_spec(rotations, type, block_size, randomize, seed, online)
    settled = settle_format(format, runtime, parse_scheme(scheme), spec)
    parsed = scheme_for(
        scheme,
        settled,
        group_size=group_size,
        weight_clip=opt.parse_ratio(weight_clip),
        activation_clip=activation_clip,
        activation_symmetric=symmetric_activations,
        kv_clip=kv_clip,
        lm_head=lm_head,
    )
    # Calibration: how, and on which text. Text options given for --learn alone are not for calibration.
    calibrated = method != "rtn" or clips or bool(static_parts(parsed))
    how = Calibration(
        GPTQOptions(damping, act_order, asymmetry), clips=clips, round_inputs=not exact_inputs, sequential=sequential
    )
    about = {"text": calibration, "samples": samples, "length": sample_length}
    chosen: dict[str, Any] = {name: value for name, value in about.items() if value is not None}
    source = CalibrationText(**chosen, seed=seed)
    reads = calibrated or tune is not None
    given = bool(chosen) and (reads or not learn_first)
    saving = checkpointing and (tune is not None or not learn_first)
    tuning = opt.tune_options(tune, lr=tune_lr, batch=tune_batch, checkpointing=saving, seed=seed)
    # Learned rotations: from a folder, or learned first.
    taken = opt.taken_from(learned, model, context, scheme=parsed, drawing=reads) if learned else None
    less = {"local": LocalOptions(checkpointing=True), "end_to_end": EndToEndOptions(checkpointing=True)}
    how_learned: dict[str, Any] = {"method": learn_first, "moments": moments, "seed": seed}
    how_learned["budget"] = parse_duration(budget)
    how_learned |= less if checkpointing else {}
    learning = LearnOptions(**how_learned) if learn_first else None

    with stages(quiet=quiet, out=out) as progress:
        result = quantize_folder(
            model,
            out,
            parsed,
            spec,
            learned=taken,
            learn=learning,
            learn_text=LearnText(source),
            tune=tuning,
            watch=Watch(progress, step_report(progress)),
            method=method,  # pyright: ignore[reportArgumentType] - checked by the function
            calibration=how,
            calibration_text=source if given or (taken and reads) else None,
            dtype=opt.parse_dtype(dtype),
            text=text if compare else None,
            device=device,
            max_shard_size=opt.parse_size(max_shard_size),
            checksums=checksums,
            options=Options(
                prove=proof,
                allow_inexact=allow_inexact,
                drop_mtp=drop_mtp,
                memory=opt.parse_size(memory),
                progress=progress,
            ),
            format=settled,
            runtime=runtime,
            family=family,
            force=force,
            allow_pickle=allow_pickle,
            command=command_line(),
        )
    push_to_hub(out, push, quiet=quiet)
    if result.learned is not None and learn_first and not json_:
        print_result(False, {}, learning_table(result.learned, f"rotations of {out}"))
    print_result(json_, {**result.record(), "seconds": result.seconds}, result_table(result, str(out)))
