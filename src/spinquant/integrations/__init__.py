"""Plugins for vLLM and lm-eval."""
