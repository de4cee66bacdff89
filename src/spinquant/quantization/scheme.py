"""A scheme says what is quantized and how: weights, activations, KV cache.

Written in the paper's notation: `W4A8KV4` is 4-bit weights, 8-bit activations, 4-bit keys and values. Parts may be
left out (`W4A16`, `KV4`), 16 bits mean "not quantized", and a weight group is written `W4g128A16` or `W4A16_g128`.
Floating formats stand where bits do: `WFP8AFP8`, `WMXFP4A16`. The names that compressed-tensors gives to schemes this
notation has no other word for (`FP8_DYNAMIC`, `NVFP4A16`, ...) are read too, with or without a cache behind them
(`NVFP4KVFP8`).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from spinquant.errors import SchemeError

_BITS = r"\d+|FP8|NVFP4|MXFP4"
NOTATION = re.compile(
    rf"(?:W(?P<w>{_BITS})(?:G(?P<wg>\d+))?)?(?:A(?P<a>{_BITS})(?:G(?P<ag>\d+))?)?(?:KV(?P<kv>\d+|FP8))?"
    r"(?:[-_]G(?P<group>\d+))?",
    re.IGNORECASE,
)
Clip = float | Literal["mse"]
Kind = Literal["int", "fp8", "nvfp4", "mxfp4"]
# Bits, and the group that belongs to the format (None: any).
FLOATING: dict[str, tuple[int, int | None]] = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}
# Names of compressed-tensors. W4A16, W8A8 and their kin are this notation already (a channel per scale unless a group
# is given, where compressed-tensors means groups of 128).
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
    """How numbers become codes of `bits` bits, along the last axis.

    symmetric: the grid is centred on zero; otherwise it spans [min(x, 0), max(x, 0)] with an integer zero point.
    group_size: consecutive numbers that share a scale; None for the whole axis (a channel, a token, a head).
    clip: fraction of the range that the grid covers, or "mse" to search it per group (weights only).
    kind: int, or a floating format: fp8 (E4M3), nvfp4 (E2M1, an E4M3 scale per 16), mxfp4 (E2M1, a power of two per
    32).
    static: the range is not that of the numbers at hand but one found by calibration, of the whole tensor: the scale of
    fp8, the factor of nvfp4's scales. peak: that range, the largest magnitude; None before calibration.
    """

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    clip: Clip = 1.0
    kind: Kind = "int"
    static: bool = False
    peak: float | None = None

    def __post_init__(self):
        if self.static and (self.kind not in ("fp8", "nvfp4") or (self.kind == "fp8" and self.group_size is not None)):
            raise SchemeError(f"a static range is for fp8 without groups and for nvfp4: found {self.kind}")
        if self.peak is not None and not (self.static and 0 < self.peak < float("inf")):
            raise SchemeError(f"peak {self.peak!r}: expected a positive number, of a static quantizer")
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
            raise SchemeError(f"{self.bits} bits cannot be quantized to: expected 2 to 8, or 16 for none")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group size {self.group_size} is not a positive integer")
        if self.clip != "mse" and not 0 < self.clip <= 1:
            raise SchemeError(f"clip ratio {self.clip!r} is outside (0, 1]")

    @property
    def top(self) -> int:
        """The largest code; codes are 0 .. top."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class Scheme:
    """Quantizers of weights, activations (per token, dynamic) and cached keys and values (per head and token).

    None leaves a part at 16 bits. `lm_head` includes the output head, weights and activations.
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
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """The scheme that `to_dict` came from."""
        parts = {k: Quantizer(**data[k]) if data.get(k) else None for k in ("weights", "activations", "kv")}
        return cls(**parts, lm_head=bool(data.get("lm_head", False)))


@dataclass(frozen=True)
class Clips:
    """Clip ratios found for single places, which take precedence over the scheme's; for static quantizers the peak.

    inputs: by the first of the linears that read an activation. keys, values: by attention module.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.keys or self.values)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """As JSON."""
        return {"inputs": dict(self.inputs), "keys": dict(self.keys), "values": dict(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, float]]) -> "Clips":
        """The clips that `to_dict` came from."""
        return cls(**{name: dict(data.get(name, {})) for name in ("inputs", "keys", "values")})


def with_clip(quantizer: Quantizer | None, found: float | None) -> Quantizer | None:
    """The quantizer with another clip ratio, or a static one with another peak; as it is where none was found."""
    if quantizer is None or found is None:
        return quantizer
    return replace(quantizer, peak=found) if quantizer.static else replace(quantizer, clip=found)


def static_parts(scheme: Scheme) -> tuple[str, ...]:
    """What of a scheme has static ranges: "activations", "kv"."""
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
    """A scheme from notation such as W4A4KV4, W4g128A16, W8A8, KV4 or "none".

    Weights are symmetric per output channel, or per `group_size` inputs; activations asymmetric per token unless
    `activation_symmetric`; keys and values asymmetric per head and token. A `Scheme` is returned as it is.
    Raises SchemeError for text that is not of this form.
    """
    if isinstance(text, Scheme):
        return text
    compact = re.sub(r"\s", "", text)
    name, *cache = re.split(r"(?=KV)", compact, maxsplit=1, flags=re.IGNORECASE)
    compact = "".join((PRESETS.get(name.upper(), name), *cache))
    match = NOTATION.fullmatch(compact)
    if compact.lower() in ("none", "16"):
        return Scheme(lm_head=lm_head)
    if not compact or match is None or not any(match.group(k) for k in ("w", "a", "kv")):
        raise SchemeError(
            f"cannot read scheme {text!r}: expected the form W<bits>[g<group>]A<bits>KV<bits>, parts optional, such as "
            f"W4A4KV4, W4A16, W4g128A16, W8A8, KV4 or WFP8AFP8, or one of {', '.join(PRESETS)}"
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
