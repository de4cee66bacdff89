"""Measure perplexity and KL divergence, and prove that a rotated model is equivalent to the original."""
