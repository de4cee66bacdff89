"""Quantization: schemes, integer and floating-point formats, and the rounding of weights (RTN, GPTQ)."""
