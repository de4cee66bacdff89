"""Perplexity, KL divergence and proofs of equivalence."""
