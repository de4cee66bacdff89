"""Look into a transformers model: its class, its tensors by name, the calls of its modules."""
