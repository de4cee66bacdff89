"""The command `learn`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from spinquant.cli import options as opt
from spinquant.cli.output import command_line, print_result, push_to_hub
from spinquant.cli.progress import stages, step_report
from spinquant.errors import LearningError
from spinquant.quantization.scheme import parse_scheme
from spinquant.rotation_names import parse_rotation_names

EXAMPLES = (
    "spinquant learn ./llama ./learned --scheme W4A4KV4",
    "spinquant quantize ./llama ./llama-w4a4 --scheme W4A4KV4 --learned ./learned --method gptq --clips",
    "spinquant learn ./llama ./learned --scheme W4A4KV4 --method local --device cuda",
    "torchrun --nproc-per-node 4 -m spinquant learn ./llama ./learned --scheme W4A4KV4 --method end-to-end "
    "--device cuda",
)


def learn(
    model: opt.Model,
    out: opt.Out,
    scheme: opt.SchemeName,
    rotations: opt.Rotations = opt.ALL_ROTATIONS,
    online: opt.Online = "none",
    method: Annotated[
        str,
        opt.option(
            opt.LEARNING,
            "closed-form: the best transforms from one pass forward and back; local: on captured activations; "
            "end-to-end: through the quantized model; local+end-to-end: one after "
            "the other; auto: local, and end-to-end only if local does not beat the random rotations, or as much as "
            "--budget allows; random: learn nothing, take the best random rotation.",
        ),
    ] = "auto",
    budget: opt.Budget = None,
    which: Annotated[
        str | None,
        opt.option(
            opt.LEARNING,
            "Rotations to learn; by default those of R1,R2,R3 that are applied. R4 and online-R1 (end to end alone) "
            "need blocks of at most 512, as in --block-size R4=64.",
            "--learn",
        ),
    ] = None,
    steps: Annotated[
        int | None, opt.option(opt.LEARNING, "Optimizer steps; by default 400 for local, 100 for end-to-end.")
    ] = None,
    lr: Annotated[
        float | None,
        opt.option(
            opt.LEARNING,
            "Learning rate (length of a step); by default 0.5, and 0.15 for end-to-end that starts from learned "
            "rotations.",
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        opt.option(
            opt.LEARNING,
            "How the weights will be rounded, which decides how much their rounding counts: rtn, gptq (the default) or "
            "gptaq.",
        ),
    ] = None,
    text: opt.LearningText = "auto",
    held_out: Annotated[
        str | None,
        opt.option(
            opt.CALIBRATION,
            "Held-out text that candidates are scored on; by default the end of the calibration text, whose last "
            "sample is then left out as a gap.",
        ),
    ] = None,
    samples: Annotated[int, opt.SAMPLES] = 128,
    sample_length: Annotated[int | None, opt.SAMPLE_LENGTH] = None,
    force: opt.Force = False,
    push: opt.PushToHub = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    json_: opt.Json = False,
    baselines: Annotated[
        int, opt.option(opt.ADVANCED, "Number of random rotations that learned ones are compared with.")
    ] = 5,
    start: Annotated[
        Path | None,
        opt.option(opt.ADVANCED, "Folder of rotations learned before: start from them if they beat the random ones."),
    ] = None,
    windows: opt.Windows = 8,
    objective: Annotated[
        str | None, opt.option(opt.ADVANCED, "local: error (of rounding; the default), whip or kurtosis.")
    ] = None,
    solver: Annotated[str | None, opt.option(opt.ADVANCED, "local: cayley (the default), qr or procrustes.")] = None,
    rows: Annotated[
        int | None,
        opt.option(opt.ADVANCED, "local: activation vectors sampled at each quantizer; 1024 by default."),
    ] = None,
    weighting: Annotated[
        str | None,
        opt.option(
            opt.ADVANCED,
            "local, how vectors are sampled: fisher (by their estimated cost in KL, which takes a forward and backward "
            "pass through the model; the default), uniform (one decoder block at a time), or massive.",
        ),
    ] = None,
    massive: Annotated[
        float | None,
        opt.option(opt.ADVANCED, "local, --weighting massive: weight of a vector with a massive activation."),
    ] = None,
    loss: Annotated[
        str | None,
        opt.option(opt.ADVANCED, "end-to-end: fisher (expected KL; the default), kl or cross-entropy."),
    ] = None,
    batch: Annotated[int | None, opt.option(opt.ADVANCED, "end-to-end: samples per step; 4 by default.")] = None,
    micro_batch: Annotated[
        int | None,
        opt.option(opt.ADVANCED, "end-to-end: samples per pass; gradients accumulate over the passes of a step."),
    ] = None,
    schedule: Annotated[
        str | None, opt.option(opt.ADVANCED, "end-to-end: cosine (the default), linear or constant.")
    ] = None,
    optimizer: Annotated[str | None, opt.option(opt.ADVANCED, "adam (the default) or sgd.")] = None,
    weights: Annotated[
        bool, opt.option(opt.ADVANCED, "end-to-end: quantize weights too while learning.", "--weights")
    ] = False,
    checkpointing: Annotated[bool, opt.option(opt.ADVANCED, opt.CHECKPOINTING, "--checkpointing")] = False,
    shard: Annotated[
        bool, opt.option(opt.ADVANCED, "end-to-end under torchrun: shard the weights (FSDP2).", "--shard")
    ] = False,
    signs: Annotated[
        int,
        opt.option(opt.ADVANCED, "Random sign vectors to try per layer for R3 and R4, of which the best is taken."),
    ] = 0,
    transforms: Annotated[
        bool | None,
        opt.option(
            opt.ADVANCED,
            "Compute transforms that cost nothing (channel scales, matrices of value and key heads) in closed form, "
            "beside the rotations that are learned; by default where gradients are computed anyway.",
            "--transforms/--no-transforms",
        ),
    ] = None,
    moments: opt.MomentsOf = "gradients",
    type: opt.Type = "auto",
    block_size: opt.BlockSize = None,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = None,
    memory: opt.Memory = None,
    family: opt.Family = None,
    allow_pickle: opt.AllowPickle = False,
) -> None:
    """Learn rotations for a model and a scheme; they are kept only if they beat the best of several random ones.

    If the command is stopped, rerun it to resume. A rerun with other options is refused; --force starts anew.
    """
    from spinquant.calibration.data import CalibrationText
    from spinquant.cli.tables import learning_table
    from spinquant.entrypoints.learn import LearnText, learn_folder, read_learned
    from spinquant.learning.budget import parse_duration
    from spinquant.learning.options import LearnOptions, Watch

    spec = opt.parse_spec(rotations, type, block_size, False, seed, online)
    both = _given(steps=steps, lr=lr, optimizer=optimizer)
    local = _given(objective=objective, solver=solver, rows=rows, weighting=weighting, massive=massive)
    end_to_end = _given(loss=loss, batch=batch, micro_batch=micro_batch, schedule=schedule, weights=weights or None)
    if checkpointing:
        # Local learning computes gradients only if it samples vectors by their expected cost.
        gradients = weighting in (None, "fisher") and massive is None
        (both if gradients else end_to_end)["checkpointing"] = True
    _check_used(method, which, both, local, end_to_end, moments)
    options = LearnOptions(
        method=method,  # pyright: ignore[reportArgumentType] - checked by the class
        rotations=None if which is None else parse_rotation_names(which),
        baselines=baselines,
        signs=signs,
        transforms=transforms,
        budget=parse_duration(budget),
        moments=moments,  # pyright: ignore[reportArgumentType] - checked by the class
        rounding=rounding,  # pyright: ignore[reportArgumentType] - checked by the class
        shard=shard,
        **_method_options(method, both, local, end_to_end),
        seed=seed,
    )
    if start is not None:
        opt.note_another_model(start, read_learned(start), model, quiet=quiet)
    with stages(quiet=quiet, out=out) as progress:
        learned = learn_folder(
            model,
            out,
            parse_scheme(scheme),
            spec,
            options,
            text=LearnText(CalibrationText(text, samples, sample_length, seed), held_out, windows),
            start=start,
            device=device,
            dtype=opt.parse_dtype(dtype) or "auto",
            force=force,
            allow_pickle=allow_pickle,
            command=command_line(),
            family=family,
            watch=Watch(progress, step_report(progress)),
            memory=opt.parse_size(memory),
        )
    push_to_hub(out, push, quiet=quiet)
    print_result(json_, learned.record, learning_table(learned, str(out)))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_used(
    method: str,
    which: str | None,
    both: Mapping[str, Any],
    local: Mapping[str, Any],
    end_to_end: Mapping[str, Any],
    moments: str,
) -> None:
    """Raise LearningError for given options that the method does not use."""
    if method == "local" and "checkpointing" in end_to_end:
        raise LearningError(
            "--checkpointing saves memory in backward passes, and --method local has none unless --weighting is "
            "fisher: leave out --checkpointing, or use --weighting fisher without --massive"
        )
    if method in ("random", "closed-form") and which is not None:
        raise LearningError(
            f"--learn cannot be combined with --method {method}, which learns no rotation: leave out --learn, or "
            "choose another --method"
        )
    everything = {**both, **local, **end_to_end}
    # Moments of weights take no backward pass, in which checkpointing would save memory.
    others = {n: value for n, value in everything.items() if n != "checkpointing" or moments == "weights"}
    unused = {"local": end_to_end, "end-to-end": local, "random": everything, "closed-form": others}.get(method)
    if unused:
        names = opt.spelled(unused)
        raise LearningError(
            f"{names} cannot be combined with --method {method}, which does not use them: leave out {names}, or choose "
            "another --method"
        )


def _method_options(
    method: str, both: Mapping[str, Any], local: Mapping[str, Any], end_to_end: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of each method, for LearnOptions; --massive N is the factor of --weighting massive."""
    from spinquant.learning.end_to_end import EndToEndOptions
    from spinquant.learning.layerwise import LocalOptions

    layerwise = {name: value for name, value in local.items() if name != "massive"}
    if "massive" in local:
        layerwise = {"weighting": "massive", **layerwise, "factor": local["massive"]}
    return {
        "local": LocalOptions(**layerwise, **({} if method == "end-to-end" else both)),
        "end_to_end": EndToEndOptions(**end_to_end, **({} if method == "local" else both)),
    }
