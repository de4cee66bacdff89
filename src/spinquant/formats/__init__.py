"""Checkpoint formats: load models, and write native and compressed-tensors checkpoints, one file per format."""
