"""`SpinQuantModifier`: the recipe object with llm-compressor's interface."""
