"""What runs at run time: online rotations, activation quantizers, the quantized KV cache."""
