"""Resume training from a checkpoint in the native format (`Trainer.train(resume_from_checkpoint=...)`).

A trainer puts the tensors of its checkpoint into the model that it has, with `load_state_dict`; there they have the
shapes of the native format. They are unpacked on the way, and have to be of this model: the same grids, the same online
rotations. Of a quantized weight that is being trained, the checkpoint has the unrounded numbers too (`X_latent`,
written in training mode), since training goes on from those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spinquant.errors import CheckpointError
from spinquant.models.modules import named_tensor
from spinquant.quantization.integer import Packed, dequantize
from spinquant.quantization.scheme import Quantizer
from spinquant.quantization.targets import PARTS, Weight

LATENT = "latent"  # suffix of the unrounded numbers of a weight


def unpack_state(
    state: dict[str, Any],
    prefix: str,
    model: Any,
    weights: Sequence[Weight],
    quantizer: Quantizer | None,
    rotations: Mapping[str, Tensor],
) -> bool:
    """Turn tensors of the native format into those of the model, in place; whether there were unrounded numbers.

    Args:
        state: a state dict, of which a plain one is left as it is.
        prefix: of its names.
        model: the model that they are loaded into.
        weights: the weights that the format packs, or at 16 bits flattens.
        quantizer: of the weights; None at 16 bits.
        rotations: the model's online rotations by the names of their tensors in the format.

    Raises:
        CheckpointError: the tensors are of another model.
    """
    packed = [weight for weight in weights if _is_packed(state.get(prefix + weight.tensor), model, weight)]
    for name, tensor in rotations.items():
        found = state.pop(prefix + name, None)
        if packed and (found is None or not torch.equal(found.to(tensor), tensor)):
            raise CheckpointError(_another(f"online rotations ({name})"))
    if packed and len(packed) < len(weights):
        names = {weight.tensor for weight in packed}
        missing = next(weight.tensor for weight in weights if weight.tensor not in names)
        raise CheckpointError(
            f"the training cannot be resumed: the checkpoint has no tensor {missing!r}, as one that stores experts one "
            "by one has not. Load the checkpoint with spinquant.load and train that model further"
        )
    latents = False
    for weight in packed:
        key, shape = prefix + weight.tensor, named_tensor(model, weight.tensor).shape
        if quantizer is None:
            state[key] = state[key].view(shape)
            continue
        scale, zero = weight.grid(model)
        assert scale is not None
        for part, ours in zip(PARTS, (scale, zero), strict=True):
            theirs = state.pop(f"{key}_{part}", None)
            if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs.to(ours))):
                raise CheckpointError(_another(f"grid of {weight.tensor}"))
        latent = state.pop(f"{key}_{LATENT}", None)
        latents = latents or latent is not None
        length = shape[-2 if weight.transposed else -1]
        words = state[key].to(scale.device)
        rounded = weight.turned(dequantize(Packed(words, scale, zero, length, quantizer)))
        state[key] = rounded if latent is None else latent
    return latents


def _is_packed(stored: Tensor | None, model: Any, weight: Weight) -> bool:
    return stored is not None and stored.shape != named_tensor(model, weight.tensor).shape


def _another(what: str) -> str:
    return (
        f"the training cannot be resumed: the checkpoint has another {what} than the model. Load the folder that the "
        "training started from, and resume with it"
    )
