"""Rotations: Hadamard constructions, fast transforms, and fusing into weights."""
