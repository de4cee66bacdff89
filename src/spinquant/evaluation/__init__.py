"""Perplexity, KL divergence, and proof that a rotated model is equivalent to the original."""
