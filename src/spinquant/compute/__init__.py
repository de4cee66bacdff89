"""Threads, reusable working memory, torchrun processes, and hashes of tensors."""
