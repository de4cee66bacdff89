"""Learn rotations: locally on captured activations, or end to end through the quantized network."""
