"""Check after every forward pass that each online rotation and quantizer was applied; one that was not is an error.

Rotations and quantizers are attached by names that belong to a model's class or to transformers: a linear that is
called as a module, the keyword of the KV cache, the attention interface, a method of stacked experts. A release that
changes such a name gives no sign of it: queries would be rotated and keys not, or a 4-bit cache would hold 16 bits. So
every site counts the calls that went through it, and the decoder block around it compares the counts with what was
attached. A module that is replaced afterwards takes its hooks with it, so the model looks before each pass whether
decoder blocks, attention and experts are still the ones that rotations and quantizers were attached to. All of it costs
some comparisons per block and forward pass (`benchmarks/generate_overhead.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from spinquant.errors import OnlineError
from spinquant.models.cache_names import CACHE_NAMES, cache_parameter
from spinquant.online.sites import InputSite, KeyValueSite

# Attribute of a function that takes the place of a block's forward, so that nothing in the block runs.
STANDS_IN = "stands_in"


def versions() -> str:
    """The versions that an error names."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def cache_argument(module: nn.Module, name: str) -> tuple[str, int]:
    """Name and position of the parameter of an attention module's forward that takes the KV cache.

    Raises OnlineError if there is none: keys and values could be neither rotated nor quantized.
    """
    found = cache_parameter(type(module).forward)
    if found is None:
        raise OnlineError(
            f"keys and values of {name!r} can be neither rotated (R3) nor quantized: {type(module).__name__}.forward "
            f"takes no KV cache under a known name ({', '.join(CACHE_NAMES)}; {versions()}). Leave R3 out and the KV "
            "cache at 16 bits, or use another version of the library that defines the class"
        )
    return found


@dataclass(frozen=True)
class FiringCheck:
    """The sites of activations inside one module, compared with their calls after each of its forward passes.

    Attributes:
        name: Of the module, "" for the whole model.
        sites: By the name of the first linear that reads the activation.
        readers: Names of the linears that read it, by the same name.
    """

    name: str
    sites: Mapping[str, InputSite]
    readers: Mapping[str, Sequence[str]]

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: count from zero."""
        for site in self.sites.values():
            site.calls = 0

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: raise OnlineError for a site that not all of its linears called."""
        if getattr(module.forward, STANDS_IN, False):
            return
        for name, site in self.sites.items():
            if site.calls < site.readers:
                self._fail(module, name, site)

    def _fail(self, module: nn.Module, name: str, site: InputSite) -> None:
        what = " and ".join(
            word for word, part in (("rotation", site.rotation), ("quantizer", site.quantizer)) if part is not None
        )
        raise OnlineError(
            f"the {what} at the input of {', '.join(self.readers[name])} ran {site.calls} times and not {site.readers} "
            f"times in a forward pass of {self.name or type(module).__name__!r} ({type(module).__name__}, {versions()})"
            ": the result would be wrong. A linear was replaced after rotations and quantizers were attached, or the "
            "class does not call it as a module. Replace modules first and attach (or load) afterwards, or use the "
            "versions that spinquant was tested with"
        )


@dataclass(frozen=True)
class ModulesCheck:
    """The modules that rotations and quantizers are attached to, looked for before each forward pass of the model.

    Attributes:
        places: Of each module: the module that holds it, its name there, and its name in the model.
        present: The module at each place, by its name in the model.
        sites: Names of the linears, experts and attention modules that have a rotation or quantizer.
    """

    places: Sequence[tuple[nn.Module, str, str]]
    present: dict[str, nn.Module]
    sites: Sequence[str]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str], sites: Iterable[str]) -> "ModulesCheck":
        """Check modules by their names, with all modules that hold them."""
        parts = [name.split(".") for name in names]
        prefixes = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
        places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in prefixes]
        return cls(places, {name: model.get_submodule(name) for name in prefixes}, list(sites))

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: raise OnlineError for a module that another one has taken the place of."""
        present = self.present
        for owner, attribute, name in self.places:
            found = owner._modules.get(attribute)
            if found is present[name]:
                continue
            # One that wraps it, as adapters and compiled blocks do, runs it with its hooks.
            if found is not None and any(inner is present[name] for inner in found.modules()):
                present[name] = found
            else:
                self._fail(name, found)

    def _fail(self, name: str, found: nn.Module | None) -> None:
        lost = [site for site in self.sites if site == name or site.startswith(f"{name}.")]
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} others" if len(lost) > 3 else "")
        raise OnlineError(
            f"{name!r} ({type(found).__name__ if found is not None else 'missing'}, {versions()}) is not the module "
            f"that rotations and quantizers were attached to: those of {shown} would not run, and the result would be "
            "wrong. Replace modules first and attach (or load) afterwards"
        )


@dataclass(frozen=True)
class AttentionCheck:
    """Keys, values and queries of one attention module, checked after each of its forward passes."""

    name: str
    site: KeyValueSite

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: raise OnlineError if keys and values, or with R3 queries, did not pass their site."""
        missing = [] if self.site.stored else ["keys and values"]
        missing += ["queries"] if self.site.rotation is not None and not self.site.queried else []
        if missing:
            raise OnlineError(
                f"{' and '.join(missing)} of {self.name!r} ({type(module).__name__}, {versions()}) did not pass their "
                "rotation or quantizer in a forward pass: the result would be wrong. The class does not call "
                "`cache.update` or the attention interface as spinquant expects it to. Leave R3 out and the KV cache "
                "at 16 bits, or use the versions that spinquant was tested with"
            )
