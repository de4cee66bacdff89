"""Quantized KV cache that stores packed integers: 4-bit keys and values take about a quarter of the memory of 16-bit.

Keys and values are quantized once per token, after rotation, per head and token, and stored as int32 words with a scale
and a zero point each. Attention gets the dequantized keys and values. A layer of transformers' own `DynamicCache` is
replaced by a packed layer before its first token (`pack_layer`), so `generate`, beam search and cropping work as they
do without quantization.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from spinquant.errors import SchemeError
from spinquant.quantization.integer import Packed, dequantize, quantize
from spinquant.quantization.scheme import Quantizer

SEQUENCE = 2  # the axis of tokens in (batch, heads, tokens, ..)


class PackedLayer(DynamicLayer):
    """Cache layer that stores keys and values as packed integers, (batch, heads, tokens, words).

    Args:
        quantizer: Quantizer of the keys.
        value_quantizer: Quantizer of the values. Default: that of the keys.
    """

    is_croppable = True

    def __init__(self, quantizer: Quantizer, value_quantizer: Quantizer | None = None):
        self.packed: tuple[Packed, Packed] | None = None
        super().__init__()
        self.quantizers = (quantizer, value_quantizer or quantizer)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dequantized keys, for code that reads the layers of a cache directly."""
        return dequantize(self.packed[0]) if self.packed else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Ignored: the base class assigns keys and values, but here they are stored packed."""

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dequantized values, as for the keys."""
        return dequantize(self.packed[1]) if self.packed else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """Ignored, as for the keys."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.packed = self._quantize(key_states[:, :, :0], value_states[:, :, :0])

    def _quantize(self, keys: Tensor, values: Tensor) -> tuple[Packed, Packed]:
        return quantize(keys, self.quantizers[0]), quantize(values, self.quantizers[1])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.packed is not None
        new = self._quantize(key_states, value_states)
        self.packed = (_append(self.packed[0], new[0]), _append(self.packed[1], new[1]))
        return dequantize(self.packed[0]), dequantize(self.packed[1])

    @property
    def nbytes(self) -> int:
        """Size of the stored keys and values in bytes, scales and zero points included."""
        return sum(packed.nbytes for packed in self.packed or ())

    def get_seq_length(self) -> int:
        return self.packed[0].words.shape[SEQUENCE] if self.packed else 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, found {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._map(lambda t: t[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices, ...])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def reset(self) -> None:
        # transformers 5.17 would zero the tensors of an initialized layer, and keep its length.
        self.packed, self.is_initialized = None, False
        super().reset()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None:
            keys, values = self.packed
            self.packed = (_mapped(keys, function), _mapped(values, function))


class PackedSlidingLayer(PackedLayer):
    """Packed cache layer with a sliding window: the last `sliding_window - 1` tokens are kept."""

    is_sliding = True

    def __init__(self, sliding_window: int, quantizer: Quantizer, value_quantizer: Quantizer | None = None):
        super().__init__(quantizer, value_quantizer)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        new = key_states.shape[SEQUENCE]
        self.cumulative_length += new
        keys, values = super().update(key_states, value_states)
        visible = self.sliding_window - 1 + new
        if not self.record_past:
            self._keep_window()
        return keys[:, :, -visible:], values[:, :, -visible:]

    def _keep_window(self) -> None:
        kept = self.sliding_window - 1
        self._map(lambda t: t[:, :, max(t.shape[SEQUENCE] - kept, 0) :])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("crop past a full sliding window needs activate_past_recording() before the update")
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + min(tokens_to_remove, 0), 0)
        self._keep_window()


class QuantizedCache(DynamicCache):
    """KV cache that stores quantized keys and values as packed integers; a `DynamicCache` of transformers.

    A model with a quantized KV scheme attached packs every `DynamicCache` by itself. Make one of these to keep the
    cache between calls and to read its size. With a model that has no KV scheme, it quantizes keys and values as the
    model computes them.

    Args:
        config: The model's config, which gives the number of layers and which of them have a sliding window.
        quantizer: How keys and values are quantized, per head and token (`Scheme.kv` of the model's scheme).

    Raises:
        SchemeError: At the first forward pass, when the model's own scheme asks for another quantizer.

    Example:
        >>> import spinquant, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        >>> cache = spinquant.QuantizedCache(config, spinquant.Quantizer(bits=4))
        >>> output = model(torch.tensor([[1, 2, 3]]), None, None, cache)
        >>> cache.get_seq_length(), cache.nbytes < 2 * 2 * 3 * 32 * 2  # less than layers x (K, V) x tokens x width x 2
        (3, True)
    """

    def __init__(self, config, quantizer: Quantizer):
        super().__init__(config=config)
        for layer_idx in range(len(self.layers)):
            pack_layer(self, layer_idx, quantizer)

    @property
    def nbytes(self) -> int:
        """Size of all stored keys and values in bytes, scales and zero points included."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)


def pack_layer(cache: Cache, layer_idx: int, quantizer: Quantizer, value_quantizer: Quantizer | None = None) -> bool:
    """Replace an empty layer of a dynamic cache by a packed layer; returns whether the layer is packed afterwards.

    Other layers (static, offloaded, or not empty) are left as they are. Raises SchemeError for a packed layer with
    another quantizer.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, PackedLayer):
        _check_quantizers(layer, (quantizer, value_quantizer or quantizer))
        return True
    if not isinstance(layer, DynamicLayer) or layer.is_initialized or cache.offloading:
        return False
    if type(layer) is DynamicLayer:
        cache.layers[layer_idx] = PackedLayer(quantizer, value_quantizer)
    elif type(layer) is DynamicSlidingWindowLayer:
        packed = PackedSlidingLayer(layer.sliding_window, quantizer, value_quantizer)
        packed.record_past = layer.record_past
        cache.layers[layer_idx] = packed
    else:
        return False
    return True


def _check_quantizers(layer: PackedLayer, wanted: tuple[Quantizer, Quantizer]) -> None:
    """Raise SchemeError if a layer has other quantizers. An empty layer takes over the clip ratios of `wanted`."""
    if layer.quantizers == wanted:
        return
    # A QuantizedCache is made from the scheme, without the clip ratios that calibration finds layer by layer.
    if not layer.is_initialized and all(
        replace(found, clip=other.clip) == other for found, other in zip(layer.quantizers, wanted, strict=True)
    ):
        layer.quantizers = wanted
        return
    raise SchemeError(
        f"the KV cache quantizes with {layer.quantizers}, but the model's scheme needs {wanted}: make the cache with "
        "the model's own scheme (Scheme.kv)"
    )


def _append(packed: Packed, new: Packed) -> Packed:
    pairs = zip(packed.tensors(), new.tensors(), strict=True)
    return packed.with_tensors(*(torch.cat(pair, dim=SEQUENCE) for pair in pairs))


def _mapped(packed: Packed, function: Callable[[Tensor], Tensor]) -> Packed:
    return packed.with_tensors(*(function(tensor) for tensor in packed.tensors()))
