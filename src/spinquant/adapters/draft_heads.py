"""Rotate draft heads for speculative decoding to match a rotated base model.

R1 turns hidden states x between the blocks into x R. After the last norm, whose scale g is fused into the head, it
turns u diag(g) into u R.

- **EAGLE-3** (arXiv 2503.01840) reads the residual stream after some blocks through one linear `fc`, and embeddings
  through a norm. Both can absorb R exactly, and everything after them has its own, unrotated basis.
- **EAGLE-1 and 2** (arXiv 2401.15077) continue the states after the last norm in a residual stream of their own, whose
  outputs o are both their next inputs and the input of the model's head. That stream would have to be o diag(1/g) R,
  but its length differs from the length of o, by which the layer's norm divides.
- **Medusa** (arXiv 2401.10774) adds SiLU(W u diag(g)), which is elementwise in the unrotated basis, to a state in the
  rotated basis.
- **Layers for multi-token prediction** are in the model's own folder: see `architectures/mtp.py`.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from spinquant.adapters.base_model import BaseModel
from spinquant.errors import RotationError
from spinquant.plan import Axis, Gain, Plan, Span
from spinquant.rotations.fuse import transform

Kind = Literal["eagle3", "eagle", "medusa"]

_FIRST = r"(?:midlayer|layers\.0)"
# Tensors of EAGLE-3 in its own basis, after `fc` and the first attention's inputs.
_INSIDE = re.compile(
    r"fc\.bias|norm\.weight|lm_head\.weight|d2t|t2d"
    rf"|{_FIRST}\.(hidden_norm|post_attention_layernorm)\.weight"
    rf"|{_FIRST}\.self_attn\.((q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa)\.bias"
    rf"|{_FIRST}\.self_attn\.(o_proj|q_norm|k_norm|q_b_proj|kv_b_proj|q_a_layernorm|kv_a_layernorm)\.(weight|bias)"
    rf"|{_FIRST}\.mlp\.(gate|up|down|gate_up)_proj\.(weight|bias)"
    r"|layers\.[1-9]\d*\..*"
)
_READERS = re.compile(rf"{_FIRST}\.self_attn\.((q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa)\.weight")
_EMBEDDING_NORM = re.compile(rf"{_FIRST}\.input_layernorm\.weight")
_MEDUSA = re.compile(r"(medusa_head\.)?\d+\.\d+\.linear\.weight|blocks\.\d+\.layers\.\d+\.weight")

_IMPOSSIBLE = {
    "eagle": (
        "an EAGLE-1 or EAGLE-2 head continues the states after the model's last norm, and its output o is the input of "
        "both the model's head and the draft head's next step. R1 fuses the scale g of that norm into the model's "
        "head, so o would have to become o diag(1/g) R, whose length differs from the length of o, by which the draft "
        "head's norm divides. Leave R1 out (--rotations R2), or use an EAGLE-3 head"
    ),
    "medusa": (
        "a Medusa head adds SiLU(W x) to the state x after the model's last norm. SiLU acts element by element in the "
        "unrotated basis, and R1 would rotate the state: no W and no output head give the same sum. "
        "Leave R1 out (--rotations R2)"
    ),
}


def head_kind(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kind:
    """Detect the kind of a draft head. Raises RotationError, with what was found, for an unknown one."""
    names = [_own(name) for name in tensors]
    if "fc.weight" in names and any(re.fullmatch(rf"{_FIRST}\.hidden_norm\.weight", name) for name in names):
        return "eagle3"
    if "fc.weight" in names and any(name.startswith("layers.0.") for name in names):
        return "eagle"
    if any(_MEDUSA.fullmatch(name) for name in names):
        return "medusa"
    raise RotationError(
        f"this folder (model_type {config.get('model_type')!r}, tensors such as {', '.join(sorted(tensors)[:3])}) is "
        "not a known draft head: EAGLE-3 can be rotated; EAGLE-1, EAGLE-2 and Medusa are recognized. A separate draft "
        "model reads only tokens and needs no rotation"
    )


@torch.no_grad()
def rotate_head(
    kind: Kind, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseModel
) -> dict[str, Tensor]:
    """Rotate the tensors of a draft head for a rotated base model; same names.

    Raises RotationError, with the reason, for a head that R1 rules out; R2, R3 and R4 do not change what a head reads.
    """
    if "residual" not in base.rotations:
        return dict(tensors)
    if kind in _IMPOSSIBLE:
        raise RotationError(f"R1 is impossible with this draft head: {_IMPOSSIBLE[kind]}.")
    plan, gains = eagle3_plan(config, tensors, base)
    return {name: transform(name, tensor, plan, gains, base.rotations) for name, tensor in tensors.items()}


def eagle3_plan(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: BaseModel
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of an EAGLE-3 head, and the weights of its norms that read the residual space.

    Raises RotationError for an unknown tensor, and for a draft head that uses the model's `lm_head`.
    """
    about = config.get("eagle_config") or {}
    if not isinstance(about, Mapping):
        raise RotationError(f"the draft head has eagle_config {about!r}: expected an object")
    if not about.get("use_aux_hidden_state", True):
        raise RotationError(
            f"R1 is impossible with this draft head (use_aux_hidden_state is off): {_IMPOSSIBLE['eagle']}."
        )
    hidden, residual = base.hidden_size, "residual"
    by_own = {_own(name): name for name in tensors}
    if "lm_head.weight" not in by_own:
        raise RotationError(
            "the draft head has no lm_head of its own and would use the model's, into which R1 fuses the scale of the "
            "model's last norm, while the draft head has another norm. Leave R1 out, or add a copy of the original "
            "model's lm_head to it"
        )
    fc = tensors[by_own["fc.weight"]]
    _expect(by_own["fc.weight"], fc, (None, None))
    if fc.shape[1] % hidden:
        raise RotationError(
            f"fc has {fc.shape[1]} inputs, which is not a multiple of the model's hidden size {hidden}: the draft head "
            "belongs to another model"
        )
    # A draft head of another width has its own embeddings, which are not rotated.
    shares = fc.shape[0] == hidden
    axes = [Axis(by_own["fc.weight"], 1, residual, reads=True)]
    gains: list[Gain] = []
    weights: dict[str, Tensor] = {}
    readers: list[str] = []
    for own, name in by_own.items():
        if own == "fc.weight" or _INSIDE.fullmatch(own):
            continue
        if own == "input_norm.weight":
            _expect(name, tensors[name], (fc.shape[1],))
            gains.append(Gain(name, residual, ((by_own["fc.weight"], 1),)))
            weights[name] = tensors[name]
        elif own == "embed_tokens.weight":
            _expect(name, tensors[name], (None, fc.shape[0]))
            axes += [Axis(name, 1, residual)] if shares else []
        elif _READERS.fullmatch(own):
            _expect(name, tensors[name], (None, 2 * fc.shape[0]))
            readers.append(name)
        elif not _EMBEDDING_NORM.fullmatch(own):
            raise RotationError(
                f"tensor {name!r} (shape {tuple(tensors[name].shape)}) of the draft head is unknown: rotating the "
                "others could change what the head computes"
            )
    if shares:
        norm = next((name for own, name in by_own.items() if _EMBEDDING_NORM.fullmatch(own)), None)
        if norm is None:
            raise RotationError("the draft head has no norm of the embeddings (input_layernorm): it is incomplete")
        _expect(norm, tensors[norm], (hidden,))
        span = Span(0, hidden, 2 * hidden)
        axes += [Axis(name, 1, residual, span) for name in readers]
        gains.append(Gain(norm, residual, tuple((name, 1) for name in readers)))
        # The first half of the readers' inputs is embeddings after this norm; the second half has another norm.
        weights[norm] = torch.cat([tensors[norm], torch.ones_like(tensors[norm])])
    plan = Plan(
        family="eagle3",
        spaces=(base.plan.space[residual],),
        axes=tuple(axes),
        gains=tuple(gains),
        onlines=(),
        ties=(),
        linears=(),
        attentions=(),
        blocks=(),
        head=by_own["lm_head.weight"],
    )
    return plan, weights


def _expect(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise RotationError for a tensor that is not floating-point or has another shape (None: any length)."""
    fits = len(shape) == tensor.ndim and all(want in (None, is_) for want, is_ in zip(shape, tensor.shape, strict=True))
    if not fits or not tensor.is_floating_point():
        expected = ", ".join("any" if one is None else str(one) for one in shape)
        raise RotationError(
            f"tensor {name!r} of the draft head has dtype {tensor.dtype} and shape {tuple(tensor.shape)}: expected "
            f"floating-point numbers of shape ({expected})"
        )


def _own(name: str) -> str:
    return name.removeprefix("model.")
