"""Short hashes of tensors."""

import hashlib

import torch


def digest(tokens: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, the first 16 hexadecimal digits; the dtype has to be one that numpy has."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
