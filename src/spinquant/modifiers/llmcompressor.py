"""SpinQuantModifier inside llm-compressor: known to its recipes, saved in its format. Needs llm-compressor 0.14.

Importing this module makes `SpinQuantModifier` one of llm-compressor's modifiers, in Python recipes and, by that name,
in YAML recipes. It is imported by itself when a modifier is made while llm-compressor is loaded; a script that has
YAML recipes alone imports it.

Weights are fused by this library. Online rotations run as compressed-tensors' own transforms, with our matrices in
them, so that its hooks, tracing and `save_pretrained(save_compressed=True)` work: the folder then carries
`transform_config`, and matrices H such as `model.layers.0.mlp.down_proj.R4_input.weight`, applied as x H / sqrt(n).
"""

from llmcompressor.modifiers import Modifier, ModifierFactory  # pyright: ignore[reportMissingImports]

from spinquant.modifiers import modifier


class SpinQuantModifier(modifier.SpinQuantModifier, Modifier):  # pyright: ignore[reportUntypedBaseClass]
    """`spinquant.SpinQuantModifier`, which llm-compressor takes for one of its own; fields and methods are the same."""


ModifierFactory.register(SpinQuantModifier.__name__, SpinQuantModifier)


def adopt(plain: modifier.SpinQuantModifier) -> None:
    """Make a modifier an instance of the class above: what llm-compressor asks for cannot be registered virtually."""
    object.__setattr__(plain, "__class__", SpinQuantModifier)
    for name, private in SpinQuantModifier.__private_attributes__.items():
        plain.__pydantic_private__.setdefault(name, private.get_default())  # pyright: ignore[reportOptionalMemberAccess]
