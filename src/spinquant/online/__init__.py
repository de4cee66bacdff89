"""Online rotations, activation quantizers and the quantized KV cache: what runs at inference time."""
