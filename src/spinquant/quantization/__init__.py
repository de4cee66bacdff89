"""Quantization: the scheme (what is rounded, and how), the integer arithmetic, and ways to choose weights."""
