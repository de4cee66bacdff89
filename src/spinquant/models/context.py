"""The context of a model: how many tokens a text may have by its config.

Models with a table of positions (GPT-2, OPT, GPT-J) cannot compute a longer text at all, and others were not trained on
it.
"""

from typing import Any

from spinquant.errors import TextError

CONTEXT = ("max_position_embeddings", "max_seq_len")  # the second is MPT's


def context_of(config: Any) -> int | None:
    """Tokens of the longest text that a config allows; None if it names no limit."""
    return next(iter(_limits(config).values()), None)


def _limits(config: Any) -> dict[str, int]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(text, name, None) for name in CONTEXT}
    return {name: size for name, size in found.items() if isinstance(size, int) and size > 0}


def check_context(config: Any, length: int, remedy: str) -> None:
    """Raise TextError for texts of more tokens than the model's context; remedy: how to make them shorter."""
    for name, context in list(_limits(config).items())[:1]:
        if length > context:
            raise TextError(
                f"texts of {length} tokens are longer than the model's context of {context} ({name}): {remedy}"
            )


def fitting_length(config: Any, length: int | None, default: int, remedy: str) -> int:
    """The length of texts: the given one, else `default`, or the model's context if that is shorter.

    Raises TextError for a given length beyond the context, as `check_context`.
    """
    if length is not None:
        check_context(config, length, remedy)
        return length
    return min(default, context_of(config) or default)
