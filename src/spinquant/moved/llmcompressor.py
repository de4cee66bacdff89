"""`import spinquant.llmcompressor`, now `spinquant.modifiers.llmcompressor`. Needs llm-compressor."""

from spinquant.modifiers.llmcompressor import SpinQuantModifier

__all__ = ["SpinQuantModifier"]
