"""Learned rotations: on captured activations, block by block, or end to end through the quantized network."""
