"""Calibration data, and sequential (block-by-block) calibration for GPTQ and clip search."""
