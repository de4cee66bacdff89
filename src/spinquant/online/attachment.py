"""What `attach` (`hooks.py`) has put on a model, with `remove` to take it off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spinquant.online.sites import InputSite, KeyValueSite

ATTACHMENT = "_spinquant_attachment"


class Attachment:
    """The online rotations and quantizers on a model, with `remove` to restore it; a context manager.

    Hooks and replaced attributes are stored as data, not in closures, so that a deep copy of the model gets an
    attachment of its own.

    Attributes:
        inputs: Sites of activations. The key is the first of the linears that read the activation, or the first of
            the tensors of stacked experts.
        keys_values: Sites of keys and values, by the name of the attention module.

    Example:
        >>> import spinquant
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> attachment = spinquant.attach(model, spinquant.plan_of(model), {}, spinquant.parse_scheme("KV4"))
        >>> sorted(attachment.keys_values)
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
        >>> attachment.remove()
    """

    def __init__(self) -> None:
        self.inputs: dict[str, InputSite] = {}
        self.keys_values: dict[str, KeyValueSite] = {}
        self._handles: list[Any] = []
        self._checks: list[Any] = []
        self._attributes: list[tuple[Any, str, bool, Any]] = []

    def hook(self, handle: Any) -> None:
        """Register a hook's handle; `remove` removes the hook."""
        self._handles.append(handle)

    def check(self, handle: Any) -> None:
        """Register the handle of a hook that checks whether sites run."""
        self._checks.append(handle)

    def stop_checking(self) -> None:
        """End the checks of `firing.py`: probing tries what may not run, and measures what that does."""
        while self._checks:
            self._checks.pop().remove()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; `remove` restores its previous value."""
        self._attributes.append((owner, name, hasattr(owner, name), getattr(owner, name, None)))
        setattr(owner, name, value)

    def cover(self, owner: Any, name: str, value: Any) -> None:
        """Shadow an attribute of an object's class on the object itself; `remove` deletes it again."""
        self._attributes.append((owner, name, False, None))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Restore the model as it was before `attach`. A second call does nothing."""
        self.stop_checking()
        while self._handles:
            self._handles.pop().remove()
        while self._attributes:
            owner, name, existed, value = self._attributes.pop()
            if existed:
                setattr(owner, name, value)
            else:
                delattr(owner, name)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Disable all quantizers within the `with` block; online rotations stay."""
        sites: list[InputSite | KeyValueSite] = [*self.inputs.values(), *self.keys_values.values()]
        for site in sites:
            site.rounds = False
        try:
            yield
        finally:
            for site in sites:
                site.rounds = True

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment on a model, or None."""
    return getattr(model, ATTACHMENT, None)
