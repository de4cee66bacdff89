"""Calibration data and the sequential, block-by-block walk that GPTQ and clip search share."""
