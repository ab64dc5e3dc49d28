"""QuantizedCache: a key-value cache for `generate` that stores 8 or 4 bits an entry.

Each token's keys and values are quantized as they arrive, head by head or in FP8, with the arithmetic that training saw
(`layers.attention`), so generation reads the numbers that the model was trained and evaluated with. The first tokens
(attention sinks) and the most recent ones can be kept in full precision; a token leaves the recent ones when newer ones
push it out.

    model.generate(**inputs, past_key_values=QuantizedCache(model))

Letters: B batch, H heads, T tokens, D head size, g entries per scale, G = D / g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from llmqat.layers.attention import FROM_CACHE, KVQuantizer, check_kv_groups, dequantize_states, quantize_states
from llmqat.layers.config import KVCacheConfig, KVTensorConfig


class QuantizedStates:
    """The keys, or the values ("states"), of one layer: F first tokens, Q quantized ones and R recent ones; T in all.

    Attributes:
        codes: uint8 [B, H, Q, D]; [B, H, Q, D/2] with two codes a byte for up to 4 bits and even D.
        scale: [B, H, Q, G] in the dtype of the states; [1] or [H, 1, 1] where it was calibrated.
        offset: [B, H, Q, G] in the dtype of the states, or None when symmetric.
        first: [B, H, F, D], kept in full precision.
        recent: [B, H, R, D], kept in full precision.
    """

    TENSORS = ("codes", "scale", "offset", "first", "recent")

    def __init__(
        self, config: KVTensorConfig, first_tokens: int, last_tokens: int, calibrated: Tensor | None = None
    ) -> None:
        self.config, self.first_tokens, self.last_tokens = config, first_tokens, last_tokens
        self.calibrated = calibrated
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.offset: Tensor | None = None
        self.first: Tensor | None = None
        self.recent: Tensor | None = None

    def append(self, states: Tensor) -> Tensor:
        """Takes the states [B, H, n, D] of new tokens; returns those of all tokens [B, H, T, D]."""
        recent = states if self.recent is None else torch.cat([self.recent, states], dim=-2)
        if self.first is None:
            self.first = recent[..., :0, :]
        missing = self.first_tokens - self.first.shape[-2]
        if missing > 0:
            self.first = torch.cat([self.first, recent[..., :missing, :]], dim=-2)
            recent = recent[..., missing:, :]
        leaving = recent.shape[-2] - self.last_tokens
        if leaving > 0:
            self._store(recent[..., :leaving, :])
            recent = recent[..., leaving:, :]
        self.recent = recent.contiguous()
        return self.states()

    def states(self) -> Tensor:
        """Returns the states of all tokens [B, H, T, D]; quantized ones are dequantized."""
        assert self.first is not None
        assert self.recent is not None
        if self.codes is None or self.scale is None:
            return torch.cat([self.first, self.recent], dim=-2)
        middle = dequantize_states(self._unpacked(self.codes), self.scale, self.offset, self.config)
        return torch.cat([self.first, middle, self.recent], dim=-2)

    @property
    def length(self) -> int:
        """Tokens held."""
        parts = (self.first, self.codes, self.recent)
        return sum(part.shape[-2] for part in parts if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        held = (getattr(self, name) for name in self.TENSORS)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        for names in (("recent",), ("codes", "scale", "offset"), ("first",)):
            held = getattr(self, names[0])
            taken = 0 if held is None else min(count, held.shape[-2])
            for name in names:
                if getattr(self, name) is not None and taken and not self._is_fixed(name):
                    kept = getattr(self, name).shape[-2] - taken
                    setattr(self, name, getattr(self, name)[..., :kept, :].contiguous())
            count -= taken

    def change(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor held by what `fn` makes of it."""
        for name in self.TENSORS:
            if getattr(self, name) is not None and not self._is_fixed(name):
                setattr(self, name, fn(getattr(self, name)))

    def _store(self, states: Tensor) -> None:
        codes, scale, offset = quantize_states(states, self.config, self.calibrated)
        for name, new in (("codes", self._packed(codes)), ("scale", scale), ("offset", offset)):
            old = getattr(self, name)
            if old is not None and new is not None and not self._is_fixed(name):
                new = torch.cat([old, new], dim=-2)
            setattr(self, name, new)

    def _is_fixed(self, name: str) -> bool:
        """Returns whether a tensor is one for all tokens."""
        return name == "scale" and self.calibrated is not None

    def _packed(self, codes: Tensor) -> Tensor:
        if self.config.num_bits > 4 or codes.shape[-1] % 2:
            return codes
        return codes[..., 0::2] | (codes[..., 1::2] << 4)

    def _unpacked(self, packed: Tensor) -> Tensor:
        assert self.recent is not None
        if packed.shape[-1] == self.recent.shape[-1]:
            return packed
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


class QuantizedCacheLayer(CacheLayerMixin):
    """The quantized cache of one attention layer."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        config: KVCacheConfig,
        first_tokens: int = 0,
        last_tokens: int = 0,
        calibrated: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        super().__init__()
        self.key_states = QuantizedStates(config.key, first_tokens, last_tokens, calibrated[0])
        self.value_states = QuantizedStates(config.value, first_tokens, last_tokens, calibrated[1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Takes keys and values [B, H, n, D] of new tokens; returns those of all tokens [B, H, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.key_states.append(key_states), self.value_states.append(value_states)
        setattr(keys, FROM_CACHE, True)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns length and offset of the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens held."""
        return self.key_states.length

    def get_max_length(self) -> int:
        """Returns -1: it grows without a limit."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens."""
        for states in self._both():
            for name in states.TENSORS:
                setattr(states, name, None)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens (a negative number, as transformers gives it)."""
        for states in self._both():
            states.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the batch rows `beam_idx`, for beam search."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the batch rows `indices`."""
        self._change(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Moves what is held to the CPU."""
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves what is held back to the layer's device."""
        self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _both(self) -> tuple[QuantizedStates, QuantizedStates]:
        return self.key_states, self.value_states

    def _change(self, fn: Callable[[Tensor], Tensor]) -> None:
        for states in self._both():
            states.change(fn)


class QuantizedCache(Cache):
    """A cache whose layers store quantized keys and values.

    Sliding-window layers keep all tokens; the mask hides those outside the window.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KVCacheConfig | None = None,
        *,
        first_tokens: int = 0,
        last_tokens: int = 0,
    ) -> None:
        """Makes an empty cache for `model`.

        Args:
            model: a transformers causal language model.
            config: the scheme; that of the model's own KV quantizers where not given.
            first_tokens: tokens at the start kept in full precision.
            last_tokens: most recent tokens kept in full precision.

        Raises:
            ValueError: when no scheme is given and the model has none, a group size does not divide the head size, a
                count is negative, or the model has layers that keep something else than keys and values.
        """
        for name, count in (("first_tokens", first_tokens), ("last_tokens", last_tokens)):
            if count < 0:
                raise ValueError(f"{name}={count} is negative; give the number of tokens to keep in full precision")
        scheme = config or kv_scheme(model)
        if scheme is None:
            raise ValueError(
                "the model has no quantized KV cache of its own; give one: QuantizedCache(model, KVCacheConfig(...))"
            )
        check_kv_groups(dict(model.named_modules()), scheme)
        text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"QuantizedCache holds keys and values only; the model has layers of {sorted(kinds)}")
        count = text.num_hidden_layers
        scales = _calibrated_scales(model, scheme, count)
        super().__init__(layers=[QuantizedCacheLayer(scheme, first_tokens, last_tokens, own) for own in scales])

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(states.nbytes for layer in self.layers for states in layer._both())


def _calibrated_scales(
    model: nn.Module, scheme: KVCacheConfig, count: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Returns the calibrated scales of keys and values of each of `count` layers; None where tokens have their own."""
    if not scheme.calibrated:
        return [(None, None)] * count
    found: dict[int, tuple[Tensor | None, Tensor | None]] = {}
    for layer in model.modules():
        quantizer, index = getattr(layer, "kv_quantizer", None), getattr(layer, "layer_idx", None)
        if isinstance(quantizer, KVQuantizer) and isinstance(index, int) and quantizer.config == scheme:
            found[index] = quantizer.key.calibrated_scale(), quantizer.value.calibrated_scale()
    if sorted(found) != list(range(count)):
        raise ValueError(
            "the model has no calibrated scales for keys and values in floats; calibrate it with such a scheme, or "
            "give one of integers: QuantizedCache(model, KVCacheConfig())"
        )
    return [found[index] for index in range(count)]


def new_cache(model: nn.Module) -> QuantizedCache | None:
    """Returns an empty cache for a model with quantized keys and values; None for one that takes any cache."""
    return None if kv_scheme(model) is None else QuantizedCache(model)


def kv_scheme(model: nn.Module) -> KVCacheConfig | None:
    """Returns the scheme of the model's KV quantizers, or None."""
    return next((module.config for module in model.modules() if isinstance(module, KVQuantizer)), None)
