"""Integrations with vLLM (a plugin for online rotations) and lm-eval (zero-shot tasks)."""
