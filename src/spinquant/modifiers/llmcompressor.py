"""Register SpinQuantModifier with llm-compressor, for Python and YAML recipes. Needs llm-compressor 0.14.

Importing this module makes `SpinQuantModifier` one of llm-compressor's modifiers, in Python recipes and, by that name,
in YAML recipes. It is imported automatically when a modifier is made while llm-compressor is loaded; a script that uses
only YAML recipes has to import it.

Weights are fused by this library. Online rotations run as compressed-tensors' own transforms, with this library's
matrices, so that its hooks, tracing and `save_pretrained(save_compressed=True)` work: the folder then has a
`transform_config`, and matrices H such as `model.layers.0.mlp.down_proj.R4_input.weight`, applied as x H / sqrt(n).
"""

from llmcompressor.modifiers import Modifier, ModifierFactory  # pyright: ignore[reportMissingImports]

from spinquant.modifiers import modifier


class SpinQuantModifier(modifier.SpinQuantModifier, Modifier):  # pyright: ignore[reportUntypedBaseClass]
    """`spinquant.SpinQuantModifier` as a subclass of llm-compressor's Modifier; same fields and methods."""


ModifierFactory.register(SpinQuantModifier.__name__, SpinQuantModifier)


def adopt(plain: modifier.SpinQuantModifier) -> None:
    """Change a modifier's class to the one above: llm-compressor's isinstance checks need a real subclass."""
    object.__setattr__(plain, "__class__", SpinQuantModifier)
    for name, private in SpinQuantModifier.__private_attributes__.items():
        plain.__pydantic_private__.setdefault(name, private.get_default())  # pyright: ignore[reportOptionalMemberAccess]
