"""Reach the queries of attention modules, through transformers' attention interface under a name of its own."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from spinquant.errors import RotationError
from spinquant.online.attachment import Attachment
from spinquant.online.sites import KeyValueSite

PREFIX = "spinquant_"
ATTENTIONS = ("sdpa", "eager", "flex_attention")
QUERIES = "_spinquant_queries"


def check_implementation(found: str, supported: Sequence[str] = ATTENTIONS) -> None:
    """Raise RotationError for an attention implementation under which R3 cannot run."""
    if found not in supported:
        # Flash attention looks up its kernel by the implementation's name, which R3 replaces while it is attached.
        raise RotationError(
            f"R3 cannot run under attention implementation {found!r}: load the model with attn_implementation='sdpa' "
            f"(supported: {', '.join(supported)}), or leave R3 out"
        )


def text_config(model: Any) -> Any:
    """The config of a model's text decoder: that of the language model of a multimodal model, else the model's own."""
    return model.config.get_text_config()


def rotate_queries(model: nn.Module, attachment: Attachment) -> str:
    """Have the attention interface call the site of each module for its queries; returns the implementation's name."""
    config: Any = text_config(model)  # a vision encoder has an attention implementation of its own
    base = config._attn_implementation
    check_implementation(base)
    implementation = PREFIX + base
    AttentionInterface.register(implementation, _attention_with_rotated_queries(base))
    AttentionMaskInterface.register(implementation, AttentionMaskInterface()[base])
    attachment.set(config, "_attn_implementation", implementation)
    return implementation


@dataclass(frozen=True)
class _Watching:
    """In the place of the site that rotates queries: an observer of them."""

    watch: Callable[[Tensor], object]

    def rotate_queries(self, queries: Tensor) -> Tensor:
        self.watch(queries)
        return queries


def watch_queries(
    model: nn.Module, attachment: Attachment, observers: Mapping[str, Callable[[Tensor], object]]
) -> None:
    """Show observers the queries, (batch, heads, tokens, size), of attention modules until the attachment is removed.

    The attachment has to rotate none itself (`attach` with `around`, or without R3).

    Raises:
        RotationError: The attention implementation has no place for it.
    """
    if observers:
        rotate_queries(model, attachment)
    for name, watch in observers.items():
        attachment.set(model.get_submodule(name), QUERIES, _Watching(watch))


def _attention_with_rotated_queries(base: str) -> Callable[..., Any]:
    interface = AttentionInterface()

    def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Every modeling file has an eager function of its own, which the interface does not list.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = interface.get_interface(base, eager)  # pyright: ignore[reportArgumentType]
        site: KeyValueSite | _Watching | None = getattr(module, QUERIES, None)
        return function(module, query if site is None else site.rotate_queries(query), *args, **kwargs)

    return attention
