"""Access to transformers models in memory: their class, tensors by name, and captured activations and calls."""
