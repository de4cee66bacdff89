"""Recurrent and hybrid families: Mamba, Jamba, Bamba, Qwen3-Next, LFM2, RecurrentGemma, Zamba, Nemotron-H, ...

Their mixers (state spaces, gated delta nets, short convolutions) read the residual space through one linear and write
to it through another. Between them are depthwise convolutions, and gates and norms that act elementwise, so nothing
there is rotated. Layers with attention have R2 and R3, and layers with an MLP have R4.
"""

from spinquant.architectures.family import INSIDE, AxisPart, Family, Refusal, Shared
from spinquant.architectures.llama import ATTENTION, GEMMA, HIDDEN, LAYER, LLAMA, MLP, VALUE
from spinquant.architectures.moe import EXPERT, GRANITE_MOE, QWEN2_MOE, QWEN3_MOE, SHARED

_INPUT = f"{LAYER}.input_layernorm.weight"
_MAMBA = ("A_log", "D", "conv1d.weight", "conv1d.bias?")
MAMBA1 = (*_MAMBA, "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
MAMBA2 = (*_MAMBA, "dt_bias")


def with_mixer(
    family: Family,
    mixer: str,
    inside: tuple[str, ...],
    *,
    reads: tuple[str, ...] = ("in_proj",),
    writes: str = "out_proj",
    norm: str = _INPUT,
    beside: bool = False,
) -> Family:
    """The family with a recurrent mixer instead of attention in some layers, or beside attention in every layer.

    Args:
        family: the family without the mixer.
        mixer: pattern of the mixer module.
        inside: tensors of the mixer that belong to no space.
        reads: linears of the mixer that read the norm.
        writes: the linear that writes to the residual space.
        norm: the norm that they read.
        beside: every layer has both.
    """
    alternatives = ((f"{ATTENTION}.",), (f"{mixer}.",))
    return family.like(
        family.name,
        *family.model_types,
        tensors={
            **{f"{mixer}.{name}.weight": (None, "residual") for name in reads},
            f"{mixer}.{writes}.weight": ("residual", None),
            **{f"{mixer}.{name}": INSIDE for name in inside},
        },
        gains={norm: (*family.readers(norm), *(f"{mixer}.{name}" for name in reads))},
        linears=(tuple(f"{mixer}.{name}" for name in reads), (f"{mixer}.{writes}",), *family.linears),
        choices=family.choices if beside else (*family.choices, alternatives),
    )


_GATED = Refusal(
    "R2",
    "model.layers.*.self_attn multiplies the attention's output by a gate, sigmoid of rows of q_proj, element by "
    "element before o_proj, and (x R) * g is not (x * g) R",
)
_DELTA = ("dt_bias", "A_log", "conv1d.weight", "norm.weight")
QWEN3_NEXT = with_mixer(
    QWEN2_MOE.like("qwen3_next", "qwen3_next", norm_offset=1.0, refused=(_GATED,)),
    f"{LAYER}.linear_attn",
    _DELTA,
    reads=("in_proj_qkvz", "in_proj_ba"),
)
_QWEN3_5_READS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
QWEN3_5 = with_mixer(
    LLAMA.like("qwen3_5", "qwen3_5_text", norm_offset=1.0, refused=(_GATED,)),
    f"{LAYER}.linear_attn",
    _DELTA,
    reads=_QWEN3_5_READS,
)
QWEN3_5_MOE = with_mixer(
    QWEN2_MOE.like("qwen3_5_moe", "qwen3_5_moe_text", norm_offset=1.0, refused=(_GATED,)),
    f"{LAYER}.linear_attn",
    _DELTA,
    reads=_QWEN3_5_READS,
)

_FORWARD = {
    "mlp.": "feed_forward.",
    "post_attention_layernorm": "pre_ff_layernorm",
    "model.norm": "model.final_layernorm",
}
_NORMS = tuple(f"{name}_layernorm.weight" for name in ("dt", "b", "c"))
JAMBA = with_mixer(QWEN3_MOE, f"{LAYER}.mamba", (*MAMBA1, *_NORMS)).like(
    "jamba",
    "jamba",
    rename={"mlp.gate.": "mlp.router.", **_FORWARD},
    spaces={"layers.{i}.experts": ("R4", "intermediate_size")},
    gains={
        f"{LAYER}.pre_ff_layernorm.weight": tuple(
            reader.replace(MLP, f"{LAYER}.feed_forward").replace("feed_forward.gate", "feed_forward.router", 1)
            if reader == f"{MLP}.gate"
            else reader.replace(MLP, f"{LAYER}.feed_forward")
            for reader in QWEN3_MOE.readers(f"{LAYER}.post_attention_layernorm.weight")
        )
    },
    experts="num_experts",
)
BAMBA = with_mixer(LLAMA, f"{LAYER}.mamba", (*MAMBA2, "norm.weight")).like("bamba", "bamba", rename=_FORWARD)
# Attention and Mamba in parallel, each multiplied by a scalar.
FALCON_H1 = with_mixer(LLAMA, f"{LAYER}.mamba", (*MAMBA2, "norm.weight?"), beside=True).like(
    "falcon_h1", "falcon_h1", rename=_FORWARD
)
GRANITE_HYBRID = with_mixer(GRANITE_MOE, f"{LAYER}.mamba", (*MAMBA2, "norm.weight")).like(
    "granitemoehybrid",
    "granitemoehybrid",
    without=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "{e}"),
    tensors={
        f"{LAYER}.shared_mlp.{name}.weight": axes
        for name, axes in (("input_linear", (None, "residual")), ("output_linear", ("residual", "layers.{i}.shared")))
    },
    # Some have no routed experts, only the shared MLP.
    choices=(
        ((f"{ATTENTION}.",), (f"{LAYER}.mamba.",)),
        ((f"{LAYER}.block_sparse_moe.",), (f"{LAYER}.shared_mlp.",)),
    ),
)

_CONVOLUTION = f"{LAYER}.conv"
LFM2_NAMES = {
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "self_attn.o_proj": "self_attn.out_proj",
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "model.norm": "model.embedding_norm",
}
LFM2 = with_mixer(LLAMA, _CONVOLUTION, ("conv.weight", "conv.bias?")).like(
    "lfm2",
    "lfm2",
    rename=LFM2_NAMES,
    spaces={"layers.{i}.hidden": ("R4", "intermediate_size")},
)

# Attention, or a gated linear recurrence, under one name, in front of an MLP whose size the config gives twice.
_TEMPORAL = f"{LAYER}.temporal_block"
RECURRENT_GEMMA = with_mixer(
    GEMMA,
    _TEMPORAL,
    (
        "conv_1d.weight",
        "conv_1d.bias",
        "rg_lru.recurrent_param",
        *(f"rg_lru.{gate}_gate_{part}" for gate in ("input", "recurrent") for part in ("weight", "bias")),
    ),
    reads=("linear_y", "linear_x"),
    writes="linear_out",
).like(
    "recurrent_gemma",
    "recurrent_gemma",
    rename={
        "self_attn": "temporal_block",
        "mlp.": "mlp_block.",
        "input_layernorm": "temporal_pre_norm",
        "post_attention_layernorm": "channel_pre_norm",
        "model.norm": "model.final_norm",
    },
    without=("q_norm", "k_norm"),
    spaces={HIDDEN: ("R4", "intermediate_size/2")},
    attention_part="q_proj.",
    choices=(
        (
            tuple(f"{_TEMPORAL}.{name}_proj." for name in "qkvo"),
            tuple(f"{_TEMPORAL}.{name}." for name in ("linear_y", "linear_x", "linear_out", "conv_1d", "rg_lru")),
        ),
    ),
)

# Some layers have a shared block of attention and MLP before their Mamba layer. It reads the hidden states concatenated
# with the embeddings, through one norm over both: two copies of the residual space, each rotated by R1. The block has
# no residual connections inside, so its output belongs to that space too.
_SHARED_BLOCK = f"{LAYER}.shared_transf"
_BEFORE = tuple(f"{LAYER}.{mamba}" for mamba in ("mamba", "mamba_decoder.mamba"))
_SIDE_BY_SIDE = AxisPart("residual", "0", "hidden_size", "hidden_size")
_ATTENTION_INPUTS = tuple(f"{_SHARED_BLOCK}.self_attn.{name}_proj" for name in "qkv")


def _mamba_tensors(inside: tuple[str, ...]) -> dict[str, tuple]:
    return {
        **{f"{mamba}.in_proj.weight": (None, "residual") for mamba in _BEFORE},
        **{f"{mamba}.out_proj.weight": ("residual", None) for mamba in _BEFORE},
        **{f"{mamba}.{name}": INSIDE for mamba in _BEFORE for name in inside},
    }


ZAMBA = LLAMA.like(
    "zamba",
    "zamba",
    filled=2,
    rename={
        "self_attn": "shared_transf.self_attn",
        "mlp.": "shared_transf.feed_forward.",
        "input_layernorm": "shared_transf.input_layernorm",
        "post_attention_layernorm": "shared_transf.pre_ff_layernorm",
        "model.norm": "model.final_layernorm",
    },
    without=("q_norm", "k_norm"),
    tensors={
        **{f"{name}.weight": (None, _SIDE_BY_SIDE) for name in _ATTENTION_INPUTS[:2]},
        f"{_ATTENTION_INPUTS[2]}.weight": (VALUE, _SIDE_BY_SIDE),
        f"{LAYER}.linear.weight": ("residual", "residual"),
        **_mamba_tensors((*_MAMBA, "x_proj_weight", "dt_proj_weight", "dt_proj_bias")),
    },
    gains={
        _INPUT: (f"{_BEFORE[0]}.in_proj",),
        f"{LAYER}.mamba_decoder.input_layernorm.weight": (f"{_BEFORE[1]}.in_proj",),
    },
    linears=(
        _ATTENTION_INPUTS,
        (f"{_SHARED_BLOCK}.self_attn.o_proj",),
        (f"{_SHARED_BLOCK}.feed_forward.gate_proj", f"{_SHARED_BLOCK}.feed_forward.up_proj"),
        (f"{_SHARED_BLOCK}.feed_forward.down_proj",),
        (f"{LAYER}.linear",),
        *((f"{mamba}.{name}_proj",) for mamba in _BEFORE for name in ("in", "out")),
    ),
    choices=(
        (
            (f"{_BEFORE[0]}.", _INPUT),
            (f"{LAYER}.linear.", f"{LAYER}.mamba_decoder.", f"{_SHARED_BLOCK}."),
        ),
    ),
    shared=Shared(_SHARED_BLOCK, f"{LAYER}.linear.weight", "1"),
)

# Every layer adds its own low-rank adapters to the shared weights; the axis between their factors is not rotated.
_ZAMBA2_BLOCK = f"{LAYER}.shared_transformer"
_ADAPTERS = {name: f"{_ZAMBA2_BLOCK}.self_attn.linear_{name}_adapter_list.{{e}}" for name in "qkv"}
_GATE_ADAPTER = f"{_ZAMBA2_BLOCK}.feed_forward.gate_up_proj_adapter_list.{{e}}"
_ZAMBA2_NORMS = tuple(f"{_ZAMBA2_BLOCK}.{name}_layernorm.weight" for name in ("input", "pre_ff"))
ZAMBA2 = ZAMBA.like(
    "zamba2",
    "zamba2",
    rename={"shared_transf": "shared_transformer", "feed_forward.gate_proj": "feed_forward.gate_up_proj"},
    without=("feed_forward.up_proj", "x_proj_weight", "dt_proj_weight", "dt_proj_bias"),
    tensors={
        **{f"{mamba}.{name}": INSIDE for mamba in _BEFORE for name in ("dt_bias", "norm.weight")},
        **{f"{adapter}.0.weight?": (None, _SIDE_BY_SIDE) for adapter in _ADAPTERS.values()},
        **{f"{adapter}.1.weight?": (VALUE if name == "v" else None, None) for name, adapter in _ADAPTERS.items()},
        f"{_GATE_ADAPTER}.0.weight?": (None, "residual"),
        f"{_GATE_ADAPTER}.1.weight?": (None, None),
    },
    gains={
        _ZAMBA2_NORMS[0]: (
            *(f"{_ZAMBA2_BLOCK}.self_attn.{name}_proj" for name in "qkv"),
            *(f"{adapter}.0" for adapter in _ADAPTERS.values()),
        ),
        _ZAMBA2_NORMS[1]: (f"{_ZAMBA2_BLOCK}.feed_forward.gate_up_proj", f"{_GATE_ADAPTER}.0"),
    },
    experts="num_hidden_layers",  # one adapter at most for each layer
    shared=Shared(_ZAMBA2_BLOCK, f"{LAYER}.linear.weight", "num_mem_blocks"),
)


def _only_mixer(name: str, *model_types: str, inside: tuple[str, ...]) -> Family:
    """A family with recurrent mixers only; the residual space is its only space."""
    layer = "backbone.layers.{i}"
    return Family(
        name=name,
        model_types=model_types,
        tensors={
            "backbone.embeddings.weight": (None, "residual"),
            "lm_head.weight": (None, "residual"),
            f"{layer}.mixer.in_proj.weight": (None, "residual"),
            f"{layer}.mixer.out_proj.weight": ("residual", None),
            **{f"{layer}.mixer.{part}": INSIDE for part in inside},
        },
        spaces={"residual": ("R1", "hidden_size")},
        gains={f"{layer}.norm.weight": (f"{layer}.mixer.in_proj",), "backbone.norm_f.weight": ("lm_head",)},
        onlines={},
        linears=((f"{layer}.mixer.in_proj",), (f"{layer}.mixer.out_proj",)),
        attention=f"{layer}.attention",  # none
        block=layer,
        embedding="backbone.embeddings.weight",
        head="lm_head.weight",
        stored=((r"^backbone\.embedding\.", "backbone.embeddings."),),
    )


MAMBA = _only_mixer("mamba", "mamba", "falcon_mamba", inside=MAMBA1)
MAMBA_2 = _only_mixer("mamba2", "mamba2", inside=(*MAMBA2, "norm.weight"))

# One mixer in every layer: Mamba, attention, an MLP without a gate, or experts without gates.
_MIXER = f"{LAYER}.mixer"
_EXPERTS, _SHARED = f"{_MIXER}.experts", f"{_MIXER}.shared_experts"
_LATENT = tuple(f"{_MIXER}.{name}_latent_proj" for name in ("fc1", "fc2"))
_ATTENTION_PARTS = tuple(f"{_MIXER}.{name}_proj" for name in "qkvo")


def _nemotron_h(name: str, expert: str | None, reads: tuple[str, ...], *latent: str, when: str) -> Family:
    """Nemotron-H, with experts that read the residual space, or a latent between two linears (`latent`).

    Args:
        name: name of the family.
        expert: the space that experts read and write; None for a latent, which is not rotated.
        reads: expert linears, or the first latent linear, that read the norm.
        *latent: the linears into and out of the latent.
        when: condition on the config.
    """
    routed = (f"{_MIXER}.gate.", f"{_SHARED}.", *(f"{linear}." for linear in latent))
    return Family(
        name=name,
        model_types=("nemotron_h",),
        tensors={
            "model.embeddings.weight": (None, "residual"),
            "lm_head.weight": (None, "residual"),
            f"{_MIXER}.in_proj.weight": (None, "residual"),
            f"{_MIXER}.out_proj.weight": ("residual", None),
            **{f"{_MIXER}.{part}": INSIDE for part in (*MAMBA2, "norm.weight")},
            **{f"{_MIXER}.{part}_proj.weight": (None, "residual") for part in "qk"},
            f"{_MIXER}.v_proj.weight": (VALUE, "residual"),
            f"{_MIXER}.o_proj.weight": ("residual", VALUE),
            f"{_MIXER}.up_proj.weight": (None, "residual"),
            f"{_MIXER}.down_proj.weight": ("residual", HIDDEN),
            f"{_MIXER}.gate.weight": (None, "residual"),
            f"{_SHARED}.up_proj.weight": (None, "residual"),
            f"{_SHARED}.down_proj.weight": ("residual", SHARED),
            f"{_EXPERTS}.up_proj": (None, None, expert),
            f"{_EXPERTS}.down_proj": (None, expert, EXPERT),
            f"{_EXPERTS}.{{e}}.up_proj.weight": (None, expert),
            f"{_EXPERTS}.{{e}}.down_proj.weight": (expert, EXPERT),
            **dict(
                zip((f"{linear}.weight" for linear in latent), ((None, "residual"), ("residual", None)), strict=False)
            ),
        },
        spaces={
            "residual": ("R1", "hidden_size"),
            VALUE: ("R2", "head_dim"),
            "layers.{i}.query_key": ("R3", "head_dim"),
            HIDDEN: ("R4", "intermediate_size"),
            SHARED: ("R4", "moe_shared_expert_intermediate_size"),
            EXPERT: ("R4", "moe_intermediate_size"),
        },
        gains={
            f"{LAYER}.norm.weight": (
                *(f"{_MIXER}.{part}" for part in ("in_proj", "q_proj", "k_proj", "v_proj", "up_proj", "gate")),
                f"{_SHARED}.up_proj",
                *reads,
            ),
            "model.norm_f.weight": ("lm_head",),
        },
        onlines={
            _MIXER: ("query_key", "layers.{i}.query_key"),
            f"{_MIXER}.down_proj": ("input", HIDDEN),
            f"{_SHARED}.down_proj": ("input", SHARED),
            _EXPERTS: ("experts", EXPERT),
        },
        linears=(
            *((f"{_MIXER}.{part}",) for part in ("in_proj", "out_proj")),
            _ATTENTION_PARTS[:3],
            _ATTENTION_PARTS[3:],
            *((f"{_MIXER}.{part}",) for part in ("up_proj", "down_proj")),
            *((linear,) for linear in latent),
            *((f"{_SHARED}.{part}",) for part in ("up_proj", "down_proj")),
        ),
        attention=_MIXER,
        attention_part="q_proj.",
        block=LAYER,
        embedding="model.embeddings.weight",
        head="lm_head.weight",
        when=(when,),
        experts="n_routed_experts",
        choices=(
            (
                tuple(f"{_MIXER}.{part}" for part in ("in_proj.", "out_proj.", *_MAMBA[:3], "dt_bias", "norm.")),
                tuple(f"{part}." for part in _ATTENTION_PARTS),
                tuple(f"{_MIXER}.{part}." for part in ("up_proj", "down_proj")),
                (f"{_EXPERTS}.up_proj", f"{_EXPERTS}.down_proj", *routed),
                (f"{_EXPERTS}.{{e}}.", *routed),
            ),
        ),
        ignored=(r"model\.layers\.\d+\.mixer\.gate\.e_score_correction_bias",),
        stored=((r"^backbone\.", "model."),),
    )


NEMOTRON_H = _nemotron_h(
    "nemotron_h",
    "residual",
    tuple(f"{_EXPERTS}.{part}" for part in ("up_proj", "{e}.up_proj")),
    when="not moe_latent_size",
)
NEMOTRON_H_LATENT = _nemotron_h("nemotron_h, latent experts", None, _LATENT[:1], *_LATENT, when="moe_latent_size")

FAMILIES = (
    *(QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, JAMBA, BAMBA, FALCON_H1, GRANITE_HYBRID, LFM2, MAMBA, MAMBA_2),
    *(RECURRENT_GEMMA, ZAMBA, ZAMBA2, NEMOTRON_H, NEMOTRON_H_LATENT),
)
