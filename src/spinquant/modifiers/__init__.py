"""`SpinQuantModifier`: rotate models from Python or from llm-compressor recipes."""
