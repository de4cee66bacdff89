"""Quantization schemes: which of weights, activations and KV cache are quantized, and how.

The notation is the paper's: `W4A8KV4` is 4-bit weights, 8-bit activations, 4-bit keys and values. Parts may be left
out (`W4A16`, `KV4`), 16 bits mean "not quantized", and a weight group is written `W4g128A16` or `W4A16_g128`.
Floating-point formats take the place of bits: `WFP8AFP8`, `WMXFP4A16`. Preset names of compressed-tensors
(`FP8_DYNAMIC`, `NVFP4A16`, ...) are read too, optionally followed by a KV cache part (`NVFP4KVFP8`).
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from spinquant.compute.values import check_integer, validated
from spinquant.errors import SchemeError

_BITS = r"\d+|FP8|NVFP4|MXFP4"
NOTATION = re.compile(
    rf"(?:W(?P<w>{_BITS})(?:G(?P<wg>\d+))?)?(?:A(?P<a>{_BITS})(?:G(?P<ag>\d+))?)?(?:KV(?P<kv>\d+|FP8))?"
    r"(?:[-_]G(?P<group>\d+))?",
    re.IGNORECASE | re.ASCII,
)
LONGEST = 100  # characters of a scheme
Clip = float | Literal["mse"]
Kind = Literal["int", "fp8", "nvfp4", "mxfp4"]
# Bits, and the group size that the format prescribes (None: any).
FLOATING: dict[str, tuple[int, int | None]] = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}
# Preset names of compressed-tensors. W4A16, W8A8 and the like are read as this notation: one scale per channel unless
# a group is given, whereas compressed-tensors means groups of 128.
PRESETS = {
    "FP8_DYNAMIC": "WFP8AFP8",
    "NVFP4": "WNVFP4ANVFP4",
    "NVFP4A16": "WNVFP4A16",
    "MXFP4": "WMXFP4AMXFP4",
    "MXFP4A16": "WMXFP4A16",
    "INT8": "W8A8",
}


@dataclass(frozen=True)
class Quantizer:
    """How numbers are quantized to codes of a few bits, along the last axis.

    Attributes:
        bits: bits per code, 2 to 8.
        symmetric: the grid is centered on zero; otherwise it spans [min(x, 0), max(x, 0)] with an integer zero point.
        group_size: consecutive numbers that share a scale; None for the whole axis (a channel, a token, a head).
        clip: clip ratio, the fraction of the range in (0, 1] that the grid covers; "mse" searches it per group
            (weights only).
        kind: "int", or a floating-point format: "fp8" (E4M3), "nvfp4" (E2M1, an E4M3 scale per group of 16), "mxfp4"
            (E2M1, a power-of-two scale per group of 32).
        static: the range of the whole tensor is fixed by calibration, instead of computed from the numbers at hand. It
            sets the scale of fp8, and the per-tensor factor of nvfp4's scales.
        peak: the static range, as the largest magnitude; None before calibration.

    Raises:
        SchemeError: bits, group size, clip ratio or peak out of range, or a combination that the format does not have.

    Example:
        >>> from spinquant import Quantizer
        >>> Quantizer(bits=4, symmetric=True, group_size=128).top
        15
        >>> Quantizer(bits=4, symmetric=True, group_size=16, kind="nvfp4").kind
        'nvfp4'
    """

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    clip: Clip = 1.0
    kind: Kind = "int"
    static: bool = False
    peak: float | None = None

    def __post_init__(self):
        self._check_types()
        if self.static and (self.kind not in ("fp8", "nvfp4") or (self.kind == "fp8" and self.group_size is not None)):
            raise SchemeError(f"a static range needs fp8 without groups, or nvfp4: found {self.kind}")
        if self.peak is not None and not (self.static and 0 < self.peak < float("inf")):
            raise SchemeError(f"peak {self.peak!r}: expected a positive number, for a static quantizer")
        if self.kind in FLOATING:
            bits, group = FLOATING[self.kind]
            if self.bits != bits or not self.symmetric or group not in (None, self.group_size):
                groups = f" in groups of {group}" if group else ""
                raise SchemeError(
                    f"{self.kind} is symmetric, has {bits} bits{groups}: found {self.bits} bits, "
                    f"{'' if self.symmetric else 'not '}symmetric, group size {self.group_size}"
                )
        elif self.kind != "int":
            raise SchemeError(f"unknown kind of numbers {self.kind!r}: expected int, {', '.join(FLOATING)}")
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"cannot quantize to {self.bits} bits: expected 2 to 8, or 16 for none")
        if self.clip != "mse" and not 0 < self.clip <= 1:
            raise SchemeError(f"clip ratio {self.clip!r} is outside (0, 1]")

    def _check_types(self) -> None:
        check_integer(self.bits, "bits", SchemeError, least=0)
        if self.group_size is not None:
            check_integer(self.group_size, "group size", SchemeError)
        for name in ("symmetric", "static"):
            if not isinstance(getattr(self, name), bool):
                raise SchemeError(f"{name} is {getattr(self, name)!r}: expected True or False")
        numbers = {"peak": self.peak} | ({} if self.clip == "mse" else {"clip ratio": self.clip})
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SchemeError(f"{name} is {value!r}: expected a number")

    @property
    def top(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class Scheme:
    """Quantization scheme of a model: quantizers of weights, activations and KV cache.

    Usually made by `parse_scheme`. Its text form is the notation, such as "W4A8KV4".

    Attributes:
        weights: per output channel or group of inputs; None leaves them at 16 bits, as below.
        activations: inputs of linears, per token, dynamic unless the quantizer is static.
        kv: cached keys and values, per head and token.
        lm_head: quantize the output head too, its weights and its inputs.

    Example:
        >>> from spinquant import Quantizer, Scheme
        >>> scheme = Scheme(weights=Quantizer(4, symmetric=True, group_size=128), kv=Quantizer(8))
        >>> str(scheme)
        'W4g128A16KV8'
        >>> Scheme.from_dict(scheme.to_dict()) == scheme
        True
    """

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    kv: Quantizer | None = None
    lm_head: bool = False

    def __str__(self) -> str:
        def part(letter: str, quantizer: Quantizer | None) -> str:
            if quantizer is None:
                return f"{letter}16"
            if FLOATING.get(quantizer.kind, (0, None))[1]:
                return f"{letter}{quantizer.kind.upper()}"  # the group belongs to the format
            bits = quantizer.bits if quantizer.kind == "int" else quantizer.kind.upper()
            return f"{letter}{bits}" + (f"g{quantizer.group_size}" if quantizer.group_size else "")

        return part("W", self.weights) + part("A", self.activations) + part("KV", self.kv)

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain dicts for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Scheme":
        """The scheme from its `to_dict()` form. Raises SchemeError for other data."""
        if not isinstance(data, Mapping) or set(data) - {field.name for field in fields(cls)}:
            raise SchemeError(f"a saved scheme is {reprlib.repr(data)}: expected the parts of one")
        parts = {k: _from_dict(data[k]) if data.get(k) else None for k in ("weights", "activations", "kv")}
        return cls(**parts, lm_head=bool(data.get("lm_head", False)))


def _from_dict(data: Any) -> Quantizer:
    if not isinstance(data, Mapping) or "bits" not in data or set(data) - {field.name for field in fields(Quantizer)}:
        raise SchemeError(f"a saved quantizer is {reprlib.repr(data)}: expected bits, and what goes with them")
    return Quantizer(**data)


@dataclass(frozen=True)
class Clips:
    """Clip ratios of single modules, found by calibration; they override the scheme's.

    For static quantizers the numbers are peaks (largest magnitudes) instead of ratios.

    Attributes:
        inputs: by the name of the first linear that reads an activation.
        keys: by the name of the attention module.
        values: by the name of the attention module.

    Example:
        >>> from spinquant import Clips
        >>> clips = Clips(inputs={"model.layers.0.mlp.down_proj": 0.9})
        >>> bool(clips), clips.to_dict()["keys"]
        (True, {})
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.keys or self.values)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The clips as plain dicts for JSON."""
        return {"inputs": dict(self.inputs), "keys": dict(self.keys), "values": dict(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, float]]) -> "Clips":
        """The clips from their `to_dict()` form. Raises SchemeError for other data."""
        found = validated(dict[str, dict[str, float]], data, "saved clip ratios", SchemeError)
        names = [field.name for field in fields(cls)]
        wrong = [value for part in found.values() for value in part.values() if not 0 < value < math.inf]
        if set(found) - set(names) or wrong:
            raise SchemeError(f"saved clip ratios are {reprlib.repr(data)}: expected positive numbers by site")
        return cls(**{name: found.get(name, {}) for name in names})


def with_clip(quantizer: Quantizer | None, found: float | None) -> Quantizer | None:
    """The quantizer with the clip ratio (or peak, if static) that was found; unchanged if none was."""
    if quantizer is None or found is None:
        return quantizer
    return replace(quantizer, peak=found) if quantizer.static else replace(quantizer, clip=found)


def static_parts(scheme: Scheme) -> tuple[str, ...]:
    """Which of "activations" and "kv" have static ranges in a scheme."""
    parts = {"activations": scheme.activations, "kv": scheme.kv}
    return tuple(name for name, quantizer in parts.items() if quantizer is not None and quantizer.static)


def parse_scheme(
    text: "str | Scheme",
    *,
    group_size: int | None = None,
    weight_clip: Clip = "mse",
    activation_clip: float = 1.0,
    activation_symmetric: bool = False,
    kv_clip: float = 1.0,
    lm_head: bool = False,
) -> Scheme:
    """Parse a quantization scheme from notation such as W4A4KV4, W4g128A16, W8A8, KV4, WFP8AFP8 or "none".

    Weights are symmetric per output channel or group of inputs, activations per token, keys and values asymmetric per
    head and token. 16 bits, or a part left out, means not quantized.

    Args:
        text: the notation, a preset name of compressed-tensors (FP8_DYNAMIC, NVFP4, ...), or a `Scheme`, which is
            returned unchanged.
        group_size: inputs that share a weight scale; None for one scale per output channel.
        weight_clip: clip ratio of weights in (0, 1]; "mse" searches it per channel or group.
        activation_clip: clip ratio of activations.
        activation_symmetric: symmetric activations; by default they are asymmetric.
        kv_clip: clip ratio of keys and values.
        lm_head: quantize the output head too.

    Returns:
        The scheme.

    Raises:
        SchemeError: the text is not of this form, or contradicts the options.

    Example:
        >>> from spinquant import parse_scheme
        >>> scheme = parse_scheme("W4A8KV4", group_size=128)
        >>> scheme.weights.bits, scheme.weights.group_size, scheme.activations.bits, scheme.kv.bits
        (4, 128, 8, 4)
        >>> str(parse_scheme("FP8_DYNAMIC"))
        'WFP8AFP8KV16'
    """
    if isinstance(text, Scheme):
        return text
    readable = isinstance(text, str) and text.isascii() and len(text) <= LONGEST
    compact = re.sub(r"\s", "", text) if readable else ""
    name, *cache = re.split(r"(?=KV)", compact, maxsplit=1, flags=re.IGNORECASE)
    compact = "".join((PRESETS.get(name.upper(), name), *cache))
    match = NOTATION.fullmatch(compact)
    if compact.lower() in ("none", "16"):
        return Scheme(lm_head=lm_head)
    if not compact or match is None or not any(match.group(k) for k in ("w", "a", "kv")):
        raise SchemeError(
            f"cannot parse scheme {str(text)[:LONGEST]!r}: expected W<bits>[g<group>]A<bits>KV<bits> with optional "
            f"parts, such as W4A4KV4, W4A16, W4g128A16, W8A8, KV4 or WFP8AFP8, or one of {', '.join(PRESETS)}"
        )
    weights = _quantizer(match.group("w"), symmetric=True, clip=weight_clip)
    groups = {int(g) for g in (match.group("wg"), match.group("group"), group_size) if g is not None}
    if len(groups) > 1:
        raise SchemeError(f"scheme {text!r} and the options give several group sizes: {sorted(groups)}")
    if groups and not weights:
        raise SchemeError(f"scheme {text!r} does not quantize weights, so it takes no group size for them")
    if weights and groups:
        weights = replace(weights, group_size=groups.pop())
    activations = _quantizer(match.group("a"), symmetric=activation_symmetric, clip=activation_clip)
    if activations and match.group("ag"):
        activations = replace(activations, group_size=int(match.group("ag")))
    kv = _quantizer(match.group("kv"), symmetric=False, clip=kv_clip)
    return Scheme(weights=weights, activations=activations, kv=kv, lm_head=lm_head)


def _quantizer(bits: str | None, *, symmetric: bool, clip: Clip) -> Quantizer | None:
    if bits is not None and bits.lower() in FLOATING:
        kind: Any = bits.lower()
        return Quantizer(FLOATING[kind][0], symmetric=True, group_size=FLOATING[kind][1], clip=clip, kind=kind)
    if bits is None or int(bits) in (16, 32):
        return None
    return Quantizer(int(bits), symmetric=symmetric, clip=clip)
