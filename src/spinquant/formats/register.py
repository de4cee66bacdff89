"""Register `quant_method: spinquant` with transformers, without importing transformers or torch.

`import spinquant` calls this. Where transformers' registry of quantizers is imported already, the format is registered
at once; otherwise a finder on `sys.meta_path` registers it as soon as that one module has been imported, which
`from_pretrained` does before it reads a folder. What is registered are two small classes that import `formats.native`
when a folder of this format is loaded: importing it from here would import modules that transformers is in the middle
of importing.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "spinquant"
REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> Callable[[], None]:
    """Register the format now or when transformers is imported; returns the undo. A second call changes nothing."""
    if any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        return lambda: None
    finder = _RegistryFinder()
    # The finder stays, so that a registry that is imported anew (importlib.reload) knows the format too.
    sys.meta_path.insert(0, finder)
    if REGISTRY in sys.modules:
        _register(import_module(REGISTRY))  # waits where another thread is importing it

    def undo() -> None:
        sys.meta_path.remove(finder)
        if (registry := sys.modules.get(REGISTRY)) is not None:
            registry.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
            registry.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)

    return undo


class _RegistryFinder:
    """Finds the registry as the other finders do, and has the format registered once the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


def _register(registry: Any) -> None:
    if METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return

    class SpinQuantConfig(registry.QuantizationConfigMixin):
        """Stands for `formats.native.SpinQuantConfig`."""

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return import_module("spinquant.formats.native").SpinQuantConfig.from_dict(*args, **kwargs)

    class SpinQuantizer(registry.HfQuantizer):
        """Stands for `formats.native.SpinQuantizer`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return import_module("spinquant.formats.native").SpinQuantizer(*args, **kwargs)

    registry.register_quantization_config(METHOD)(SpinQuantConfig)
    registry.register_quantizer(METHOD)(SpinQuantizer)
