"""Rotate LoRA adapters and draft heads to match a rotated base model."""
