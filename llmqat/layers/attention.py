"""Fake quantization of keys and values, through transformers' attention interface; no modeling file is touched.

Every attention layer of a model that dispatches through `ALL_ATTENTION_FUNCTIONS` gets a `KVQuantizer` as a submodule,
and the model an attention implementation `llmqat_<its own>`, which quantizes what the layer passes on and calls the
original. Keys arrive after rotary embedding, keys and values as the cache holds them. Each token and head is quantized
by itself, so nothing of the future is seen and a cache (`layers.cache`) can store the codes as the tokens come.

A layer that computes attention in its own forward (BLOOM, Falcon) would silently read full-precision keys and values.
`quantize_kv` raises a ValueError for such a model.

The arithmetic is float32, rounded once to the dtype of the states. A symmetric scheme is code * scale; an asymmetric
one is code * scale + offset, the offset being the smallest entry of the group: no zero point is rounded to a code.
Floats (E4M3) have calibrated scales for the keys of a layer and for its values, one for all or one for each head, in
the dtype of the states and in the order of compressed-tensors: what vLLM keeps with an FP8 cache.

Letters: B batch, H heads, L length, D head size, g entries per scale.

Source: LLM-QAT (2305.17888) section 3.3; the offset is KIVI's (2402.02750) section 3.1.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmqat.grid import Grid
from llmqat.layers.activation import range_parameters, row_codes
from llmqat.layers.config import KVCacheConfig, KVTensorConfig
from llmqat.layers.kept import RangedModule

E4M3 = Grid(8, levels="float")
"""What floats of a KV cache are rounded to."""
IMPLEMENTATION_PREFIX = "llmqat_"
"""Begins the name of an attention implementation that quantizes keys and values."""

FROM_CACHE = "llmqat_from_cache"
"""Attribute that marks keys and values as those of a quantized cache, so that they are not quantized twice."""


class StateQuantizer(RangedModule):
    """Fake-quantizes the keys, or the values, of one attention layer.

    Attributes:
        config: the scheme.
        what: the keys or values of which layer, for errors.
        scale: float32 buffer, [1] or [H, 1, 1], NaN until it is calibrated; None where each token has its own.
    """

    scale: Tensor | None

    def __init__(
        self, config: KVTensorConfig, name: str, device: torch.device | str | None = None, heads: int = 1
    ) -> None:
        """Makes a quantizer for `heads` heads; one with scales of its own refuses to run until `set_range`."""
        super().__init__(f"the range of {name}")
        self.config, self.what = config, name
        shape = (heads, 1, 1) if config.strategy == "attn_head" else (1,)
        self.register_buffer("scale", torch.full(shape, torch.nan, device=device) if config.levels == "float" else None)

    def found(self) -> tuple[Tensor, ...]:
        """Returns the scales, or nothing."""
        return () if self.scale is None else (self.scale,)

    @torch.no_grad()
    def set_range(self, low: float | Sequence[float], high: float | Sequence[float]) -> None:
        """Sets the scale for states in [low, high], snapped to bfloat16, as it will be stored; or that of each head.

        Raises:
            ValueError: when a range is not finite, or the layer has another number of heads.
        """
        assert self.scale is not None
        lows, highs = torch.tensor(low).view(-1), torch.tensor(high).view(-1)
        if len(lows) != len(self.scale):
            self._refuse(len(lows))
        for ends in zip(lows.tolist(), highs.tolist(), strict=True):
            self.check_range(*ends)
        scale, _ = range_parameters(lows, highs, E4M3)
        self.scale.copy_(scale.to(torch.bfloat16).view(self.scale.shape))

    def forward(self, x: Tensor, enabled: bool) -> Tensor:
        """Returns x [B, H, L, D], quantized and dequantized where `enabled`; gradients pass straight through.

        Raises:
            RuntimeError: for a scale that was never calibrated.
            ValueError: for scales of another number of heads.
        """
        if not enabled:
            return x
        if self.scale is not None and self.scale.dim() == 3 and x.shape[1] != len(self.scale):
            self._refuse(x.shape[1])
        return _StraightThrough.apply(x, self.config, self.calibrated_scale())  # type: ignore[no-untyped-call]

    def calibrated_scale(self) -> Tensor | None:
        """Returns the scale of all states, or of each head; None where each token has its own.

        Raises:
            RuntimeError: it was never calibrated.
        """
        if not torch.compiler.is_compiling():
            self.numbers()  # which raises
        return self.scale

    def _refuse(self, heads: int) -> None:
        assert self.scale is not None
        raise ValueError(
            f"quant.kv_cache: {self.what} have {heads} heads, but the configuration of the model says "
            f"{len(self.scale)}; take strategy: tensor"
        )


class KVQuantizer(nn.Module):
    """Fake-quantizes the keys and values of one attention layer.

    Attributes:
        config: the scheme.
        key: quantizes keys.
        value: quantizes values.
        enabled: False lets keys and values through.
    """

    def __init__(
        self, config: KVCacheConfig, device: torch.device | str | None = None, name: str = "", heads: int = 1
    ) -> None:
        """Makes a quantizer for a layer of so many KV heads; `name` is the layer's, for errors."""
        super().__init__()
        self.config, self.enabled = config, True
        self.key = StateQuantizer(config.key, f"the keys of {name or 'a layer'}", device, heads)
        self.value = StateQuantizer(config.value, f"the values of {name or 'a layer'}", device, heads)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns key and value [B, H, L, D], quantized and dequantized; gradients pass straight through."""
        if getattr(key, FROM_CACHE, False):
            return key, value
        return self.key(key, self.enabled), self.value(value, self.enabled)

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return self.config.label


def quantize_states(
    x: Tensor, config: KVTensorConfig, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns codes 0..2^b-1 uint8 [*, D], scale [*, D/g] and offset [*, D/g] (None when symmetric) of states [*, D].

    Scale and offset have the dtype of the states, and the codes are made with the rounded ones. Of floats, `scale`, [1]
    or [H, 1, 1] for states [B, H, L, D], is the calibrated one, and codes are the bytes of E4M3 numbers.
    """
    if scale is not None:
        own = scale.to(x.dtype)
        return row_codes(x, own, None, E4M3).to(torch.float8_e4m3fn).view(torch.uint8), own, None
    groups = x.unflatten(-1, (-1, config.group_size or x.shape[-1])).float()
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    levels, middle = 2**config.num_bits - 1, 2 ** (config.num_bits - 1)
    span = torch.maximum(-low, high) / (levels / 2) if config.symmetric else (high - low) / levels
    scale = torch.where(span == 0, 1.0, span).to(x.dtype)
    shifted = groups if config.symmetric else groups - low
    codes = (shifted / scale.float()).round_().add_(middle if config.symmetric else 0).clamp_(0, levels)
    offset = None if config.symmetric else low.squeeze(-1).to(x.dtype)
    return codes.flatten(-2).to(torch.uint8), scale.squeeze(-1), offset


def dequantize_states(codes: Tensor, scale: Tensor, offset: Tensor | None, config: KVTensorConfig) -> Tensor:
    """Returns the states [*, D] in the scale's dtype; the way back from `quantize_states`."""
    if config.levels == "float":
        return codes.view(torch.float8_e4m3fn).to(scale.dtype) * scale
    values = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    if offset is None:
        values = (values - 2 ** (config.num_bits - 1)) * scale.unsqueeze(-1).float()
    else:
        values = values * scale.unsqueeze(-1).float() + offset.unsqueeze(-1).float()
    return values.to(scale.dtype).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, config: KVTensorConfig, scale: Tensor | None) -> Tensor:
        return dequantize_states(*quantize_states(x, config, scale), config)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def quantize_kv(model: nn.Module, config: KVCacheConfig) -> None:
    """Makes the attention layers of `model` read quantized keys and values, in place.

    Raises:
        ValueError: when the model's attention does not go through transformers' interface, or a group size does not
            divide the head size. The model is then unchanged.
    """
    layers = attention_layers(model)
    assert isinstance(model, PreTrainedModel)
    check_kv_groups(layers, config)
    heads = heads_with_scales(model, config)
    for name, layer in layers.items():
        device = next((parameter.device for parameter in layer.parameters()), None)
        layer.add_module("kv_quantizer", KVQuantizer(config, device, name, heads))
    implementation = str(model.config._attn_implementation)
    if not implementation.startswith(IMPLEMENTATION_PREFIX):
        model.set_attn_implementation(quantizing_implementation(implementation))
    model.register_forward_pre_hook(_check_dispatch)
    _check_dispatch(model)


def _check_dispatch(model: nn.Module, inputs: Any = None) -> None:
    """Raises where the model would read plain keys and values: its attention implementation was changed since."""
    config: Any = model.config
    found = str(config.get_text_config(decoder=True)._attn_implementation)
    if not found.startswith(IMPLEMENTATION_PREFIX):
        raise RuntimeError(
            f"the model's keys and values are to be quantized, but its attention implementation is {found!r}, which "
            f"does not do it; set_attn_implementation({IMPLEMENTATION_PREFIX + found!r}), or choose the implementation "
            "before llmqat.prepare"
        )


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the attention layers of `model` that have a place in a KV cache, by name.

    Raises:
        ValueError: when there is none, or one that computes attention past transformers' interface.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "layer_idx", None) is None or "attention" not in type(module).__name__.lower():
            continue
        if not _dispatches(module):
            raise ValueError(
                f"quant.kv_cache: {type(module).__name__} of {model_kind(model)} computes attention by itself, past "
                "transformers' attention interface, so its keys and values cannot be quantized; leave out "
                "quant.kv_cache"
            )
        found[name] = module
    if not found or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"quant.kv_cache: {model_kind(model)} has no attention layer that goes through transformers' attention "
            "interface; leave out quant.kv_cache"
        )
    return found


def heads_with_scales(model: nn.Module, config: KVCacheConfig) -> int:
    """Returns how many heads of a layer have scales of their own: its KV heads, or 1 where the scheme has none.

    Raises:
        ValueError: not all layers have the same number of KV heads, which no checkpoint can say.
    """
    if config.key.strategy != "attn_head":
        return 1
    assert isinstance(model, PreTrainedModel)
    try:
        return kv_heads(model.config.get_text_config(decoder=True))
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"quant.kv_cache: {model_kind(model)} does not have the same number of KV heads in all layers ({error}); "
            "take strategy: tensor"
        ) from error


def kv_heads(config: Any) -> int:
    """Returns the number of KV heads that a text model's `config` states, as vLLM reads it there."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def model_kind(model: nn.Module) -> str:
    """Returns the model type by which errors name `model`, or its class."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _dispatches(layer: nn.Module) -> bool:
    """Returns whether the layer's forward looks its attention function up in transformers' registry."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def check_kv_groups(layers: Mapping[str, nn.Module], config: KVCacheConfig) -> None:
    """Raises ValueError where a group size does not divide the head size of one of the `layers` that have heads."""
    for name, layer in layers.items():
        size = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
        for kind, tensor in (("key", config.key), ("value", config.value)):
            if isinstance(size, int) and tensor.group_size and size % tensor.group_size:
                raise ValueError(
                    f"quant.kv_cache.{kind}.group_size={tensor.group_size} does not divide the head size {size} of "
                    f"{name}; choose a divisor, or leave it out for the whole head"
                )


def quantizing_implementation(implementation: str) -> str:
    """Returns the name of the attention implementation that quantizes and then calls `implementation`."""
    name = IMPLEMENTATION_PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _quantizing(implementation))
        # Without its mask function an implementation runs with no mask at all.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _quantizing(implementation: str) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        quantizer = getattr(module, "kv_quantizer", None)
        if quantizer is not None:
            key, value = quantizer(key, value)
        with _named(implementation, module):
            return _original(implementation, module)(module, query, key, value, *args, **options)

    return attention


@contextmanager
def _named(implementation: str, layer: nn.Module) -> Iterator[None]:
    """Inside, the layer's configuration names the original implementation, by which flash attention finds itself."""
    config: Any = layer.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _original(implementation: str, layer: nn.Module) -> Callable[..., Any]:
    if implementation == "eager":  # each modeling file has its own
        return sys.modules[type(layer).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]
