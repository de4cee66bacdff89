"""Register `SpinQuantModifier` with llm-compressor, for Python and YAML recipes. Needs llm-compressor 0.14.

This module is imported automatically when a `SpinQuantModifier` is created while llm-compressor is loaded; a script
that uses only YAML recipes has to import it.

Rotations are fused into the weights by spinquant. Online rotations run as compressed-tensors' own transforms with
spinquant's matrices (`compressed_transforms.py`), so that its hooks, tracing and
`save_pretrained(save_compressed=True)` work: the saved folder has a `transform_config`, and matrices H such as
`model.layers.0.mlp.down_proj.R4_input.weight`, applied as x H / sqrt(n).
"""

from llmcompressor.modifiers import Modifier, ModifierFactory  # pyright: ignore[reportMissingImports]

from spinquant.modifiers import modifier


class SpinQuantModifier(modifier.SpinQuantModifier, Modifier):  # pyright: ignore[reportUntypedBaseClass]
    """`spinquant.SpinQuantModifier` as a subclass of llm-compressor's Modifier; same fields and methods."""


ModifierFactory.register(SpinQuantModifier.__name__, SpinQuantModifier)


def adopt(plain: modifier.SpinQuantModifier) -> None:
    """Change the class of a plain modifier to the one above, since llm-compressor checks with isinstance."""
    object.__setattr__(plain, "__class__", SpinQuantModifier)
    for name, private in SpinQuantModifier.__private_attributes__.items():
        plain.__pydantic_private__.setdefault(name, private.get_default())  # pyright: ignore[reportOptionalMemberAccess]
