"""Rotate and quantize safetensors checkpoints tensor by tensor, in bounded memory."""
