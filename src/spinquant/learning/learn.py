"""`learn`: learn rotations for a quantization scheme, and keep them only if they beat random ones on held-out text.

    1  Score random rotations of several seeds on held-out text, with clip ratios found by a search.
    2  Compute the transforms that cost nothing, in closed form, and keep those that lower KL (`closed_form_steps.py`).
    3  Learn from the best candidate so far, or from rotations learned before: on captured activations (local), end to
       end through the quantized network, or one after the other.
    4  Score the learned rotations on the same text, compute the transforms that depend on them, and select the
       candidate with the lowest KL to the 16-bit model.

The record lists the scores of all candidates and which one was selected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spinquant.architectures import FamilyLike
from spinquant.checkpoint.run_pieces import Pieces
from spinquant.compute.distributed import is_first
from spinquant.compute.hashing import digest
from spinquant.errors import LearningError
from spinquant.learning import budget
from spinquant.learning.auto import REST, Allowed
from spinquant.learning.budget import Budget
from spinquant.learning.closed_form_steps import MOMENT_SAMPLES, transform_in_closed_form
from spinquant.learning.fake_quant import fuse_gains, learning_scheme, shard_blocks
from spinquant.learning.learn_run import AFTER, CLOSED_FORM, Run
from spinquant.learning.learned import initial_rotations
from spinquant.learning.options import (
    LearnOptions,
    Watch,
    check_used,
    learned_spaces,
    learns_r1,
    weights_share,
)
from spinquant.learning.rows import row_samples
from spinquant.learning.selection import Selection
from spinquant.learning.step_times import StepTimes
from spinquant.models.context import check_context
from spinquant.models.modules import check_causal, check_changeable, in_eval_mode
from spinquant.models.tokens import check_model, check_tokens
from spinquant.plan import Plan
from spinquant.quantization.scheme import Scheme, parse_scheme
from spinquant.rotations.factory import RotationSpec, make_rotations
from spinquant.rotations.fuse_module import plan_of
from spinquant.rotations.learned import LearnedRotations
from spinquant.rotations.rotation import Transform

CLIP_WINDOWS = 2  # training samples that clip ratios are searched on


def learn(
    model: Any,
    scheme: Scheme | str,
    spec: RotationSpec,
    tokens: Tensor,
    held_out: Tensor,
    options: LearnOptions | None = None,
    *,
    start: LearnedRotations | None = None,
    store: Path | None = None,
    settings: Sequence[Any] = (),
    watch: Watch | None = None,
    family: FamilyLike | None = None,
) -> LearnedRotations:
    """Learn rotations for a model and a scheme, and keep them if they beat random rotations on held-out text.

    The gains of norms, and the scales and matrices of values that are kept, are fused into the model's weights and a
    tied head is untied, in place; its function is unchanged. It is not rotated: pass the rotations found to `rotate` or
    `quantize`, with a newly loaded model.

    Args:
        model: A causal language model of transformers.
        scheme: The quantization scheme to learn for, such as "W4A4KV4". Its activations and KV cache are quantized
            during learning, weights only if the options ask for it.
        spec: Which rotations, of which type and block size; its seed is that of the random baselines.
        tokens: Training tokens, int64 (samples, length).
        held_out: Tokens to score candidates on, int64 (windows, length).
        options: The method and its settings. Default: `LearnOptions()`.
        start: Rotations learned for this model before, with their scales. They are scored like the random ones, and
            learning starts from them if they score best.
        store: Folder where the run is saved; repeat the call to resume. Default: not saved.
        settings: Whatever else the run depends on, such as a digest of the model's files. A run with other settings
            is not resumed.
        watch: Progress callbacks.
        family: A family file for a model without a built-in table, see `use_family`.

    Returns:
        The rotations with the lowest KL divergence, and the scores of all candidates in their record.

    Raises:
        LearningError: There is nothing to learn, an option would have no effect, or a loss is not finite.
        ArchitectureError: As in `rotate`.
        CheckpointError: Weights are not in memory.
        TextError: Tokens are longer than the model's context.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from spinquant import LearnOptions, LocalOptions, RotationSpec, learn, parse_scheme
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
        >>> options = LearnOptions("local", baselines=2, transforms=False, local=LocalOptions(steps=4))
        >>> learned = learn(LlamaForCausalLM(config), parse_scheme("A4"), RotationSpec("R1,R2"), tokens[:6],
        ...                 tokens[6:], options)
        >>> sorted(learned.rotations)
        ['layers.0.value', 'residual']
    """
    options, watch, begun = options or LearnOptions(), watch or Watch(), budget.clock()
    scheme = parse_scheme(scheme)
    check_model(model)
    check_causal(model, "learning rotations, which are scored by the tokens that they predict,")
    check_tokens(tokens, model, "training tokens", LearningError, least=2)
    check_tokens(held_out, model, "held-out tokens", LearningError, least=2)
    check_context(model.config, max(tokens.shape[-1], held_out.shape[-1]), "give shorter samples")
    plan = plan_of(model, family=family)
    check_changeable(model, plan)
    names = learned_spaces(plan, spec, scheme, options)
    check_used(plan, spec, scheme, names, options)
    settings = [*settings, scheme, spec, options, digest(tokens), digest(held_out)]
    given: Mapping[str, Transform] = {}
    if start is not None:
        settings.append(start.digest())
        given = initial_rotations(start, plan, spec, options)
    pieces = None if store is None else Pieces(store, settings, writes=is_first())
    limit = Budget(options.budget, pieces, begun=begun)
    watch = limit.watching(watch)
    random = baselines_of(plan, spec, options)
    fuse_gains(model, plan, next(iter(random.values())))
    if options.shard:
        shard_blocks(model, plan)
    learning = learning_scheme(scheme, weights=options.end_to_end.weights)
    judged, share = learning_scheme(scheme, weights=not options.shard), weights_share(options)
    with in_eval_mode(model):
        candidates = Selection(model, plan, judged, tokens[:CLIP_WINDOWS], held_out, watch.stage, pieces, share=share)
        first, counts = next(iter(random.values())), (MOMENT_SAMPLES, row_samples(options.local))
        times = StepTimes(model, plan, scheme, learning, first, names, tokens, candidates, options, counts)
        allowed = Allowed(limit, times, REST if options.transforming and learns_r1(plan, names, options) else ())
        run = Run(model, plan, scheme, learning, spec, names, tokens, options, candidates, pieces, watch, allowed)
        run.score_baselines(allowed.baselines(random), given)
        if not run.keeps_scales:
            candidates.set_aside(["norms"])
        kinds = allowed.first_kinds()
        if options.transforming and (samples := allowed.closed_form(kinds)):
            transform_in_closed_form(run, CLOSED_FORM, kinds, samples)
        initial, sites = run.draw_signs()
        if run.is_local:
            assert sites is not None
            run.learn_layerwise(initial, sites)
        if run.is_end_to_end:
            run.learn_end_to_end()
        if allowed.last and not allowed.is_over and (samples := allowed.closed_form(allowed.last)):
            transform_in_closed_form(run, AFTER, allowed.last, samples)
        return run.result()


def baselines_of(plan: Plan, spec: RotationSpec, options: LearnOptions) -> dict[str, dict[str, Transform]]:
    """Random rotations by name; a single one if all are of type hadamard, which is deterministic."""
    fixed = all(spec.type_of(name) == "hadamard" for name in spec.rotations)
    count = 1 if fixed else options.baselines
    return {f"random {i}": make_rotations(plan, replace(spec, seed=spec.seed + i)) for i in range(count)}
