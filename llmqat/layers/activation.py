"""Fake quantization of a layer's input: each token by its own range, or the whole tensor by a calibrated one.

The arithmetic is that of compressed-tensors, in the dtype of the input and in its order of operations. So stock
transformers computes the same bits.

- Integers: scale = absmax / 127.5 for codes -128..127, or (max - min) / 255 with a rounded zero point.
- Floats of 8 bits: scale = absmax / 448, of the tensor, a token, or a group of a token.
- MX formats: each group of a token has a power of two.
- NVFP4: each group of a token has an E4M3 scale, under one calibrated scale for the tensor. The latter gives the
  largest entry seen the largest code under the largest E4M3 scale.

Scales are not differentiated. The gradient passes through unchanged, clipped or not.

A tensor that several layers read (q, k and v; gate and up) is quantized once. Each thread keeps the last result until
another tensor is quantized or the input is freed, and returns it for the same tensor.

Letters: B batch, L length, I in features.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmqat.grid import Grid, range_scale
from llmqat.kernels import QuantizedInput
from llmqat.layers.config import ActivationConfig
from llmqat.layers.kept import RangedModule

_UNSET = float("nan")
_E4M3 = torch.finfo(torch.float8_e4m3fn)
_LOCAL_FLOOR = 0.125
"""The E4M3 scale of a group of zeros in compressed-tensors."""
_TINY = torch.finfo(torch.float32).tiny


class ActivationQuantizer(RangedModule):
    """Fake-quantizes the input of a linear layer.

    Attributes:
        config: the scheme.
        scale: [1] float32 buffer of a static range, NaN until it is calibrated; None when dynamic.
        zero_point: [1] float32 buffer of a static asymmetric range, an integer in -2^(b-1)..2^(b-1)-1; else None.
        global_scale: [1] float32 buffer of NVFP4, NaN until it is calibrated; else None. Scales of groups are
            multiplied with it before they become E4M3.
        enabled: False lets the input through.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None

    def __init__(self, config: ActivationConfig, device: torch.device | str | None = None, name: str = "") -> None:
        """Makes a quantizer; a static one refuses to run until `set_range`. `name` is the layer's, for errors."""
        static = not config.dynamic
        super().__init__(f"the {'static ' if static else ''}input range of {name or 'a layer'}")
        self.config, self.layer, self.enabled = config, name or "a layer", True
        self.register_buffer("scale", torch.full((1,), _UNSET, device=device) if static else None)
        zero_point = torch.zeros(1, device=device) if static and not config.symmetric else None
        self.register_buffer("zero_point", zero_point)
        shared = config.calibrated and config.dynamic
        self.register_buffer("global_scale", torch.full((1,), _UNSET, device=device) if shared else None)

    def found(self) -> tuple[Tensor, ...]:
        """Returns scale and zero point of a static range, NVFP4's global scale, or nothing."""
        return tuple(tensor for tensor in (self.scale, self.global_scale, self.zero_point) if tensor is not None)

    @property
    def way_out(self) -> str:
        """What else than calibrating helps."""
        return "" if self.scale is None else ", or use dynamic=True"

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Sets the static range, whose scale is snapped to bfloat16, as it will be stored; or NVFP4's global scale.

        Raises:
            ValueError: when the range is not finite.
        """
        self.check_range(low, high)
        if self.global_scale is not None:  # takes the largest entry to the largest product of a code and a scale
            self.global_scale.copy_(self.config.grid.qmax * _E4M3.max / torch.tensor(max(-low, high, _TINY)))
            return
        assert self.scale is not None
        scale, zero_point = range_parameters(torch.tensor([low]), torch.tensor([high]), self.config.grid)
        self.scale.copy_(scale.to(torch.bfloat16))
        if zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns x [*, I] fake-quantized, in `dtype` (x's own where not given).

        Raises:
            RuntimeError: for a static range, or NVFP4's global scale, that was never calibrated.
            ValueError: when the group size does not divide I.
        """
        dtype = dtype or x.dtype
        if not self.enabled:
            return x.to(dtype)
        # The compiler finds the common subexpression by itself; an inference tensor does not tell when it was changed.
        if torch.compiler.is_compiling() or x.is_inference():
            return self._quantized(x.to(dtype))
        key = (self.config, self.numbers(), dtype, torch.is_grad_enabled())
        return _shared.get(x, key, lambda: self._quantized(x.to(dtype)))

    def integers(self, x: Tensor) -> QuantizedInput:
        """Returns x [*, I] as its codes, of which `values` makes what `forward` returns, bit for bit.

        Raises:
            RuntimeError: for a static range that was never calibrated.
        """
        if not torch.compiler.is_compiling():
            self.numbers()  # which raises
        scale, zero_point = self._range_of(x)
        codes = row_codes(x, scale, zero_point, self.config.grid)
        return QuantizedInput(codes.to(torch.int8), scale, zero_point)

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return self.config.label

    def _range_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns scale and zero point of x, [*, 1] or the static ones [1], in x's dtype."""
        if self.scale is not None:
            return self.scale.to(x.dtype), None if self.zero_point is None else self.zero_point.to(x.dtype)
        low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True)
        return range_parameters(low, high, self.config.grid, self.global_scale)

    def _quantized(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        groups = x if self.config.group_size is None else _in_groups(x, self.config.group_size, self.layer)
        quantized = _StraightThrough.apply(groups, *self._range_of(groups), self.config.grid)  # type: ignore[no-untyped-call]
        return quantized.view(x.shape)


def range_parameters(
    low: Tensor, high: Tensor, grid: Grid, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns scale and zero point of the ranges [low, high], in their dtype, with codes -2^(b-1)..2^(b-1)-1.

    Of NVFP4 the scale is float32: E4M3, divided by `global_scale` [1]; of MX formats too, since float16 lacks powers.

    Source: compressed-tensors' `calculate_qparams`, bit for bit.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.levels == "float":
        extreme = torch.maximum(-low, high)
        if grid.scale_dtype == "e8m0":
            return range_scale(extreme, grid), None
        scale = extreme / grid.qmax
        if global_scale is None:
            return _above_zero(scale), None
        local = (global_scale * scale).clamp(max=_E4M3.max).to(torch.float8_e4m3fn).float()
        return torch.where(local == 0, _LOCAL_FLOOR, local) / global_scale, None
    levels, qmin = 2**grid.num_bits - 1, -(2 ** (grid.num_bits - 1))
    if grid.symmetric:
        return _above_zero(torch.maximum(-low, high) / (levels / 2)), None
    scale = (high - low) / levels
    zero_point = (qmin - low / scale).clamp(qmin, qmin + levels)
    return _above_zero(scale), torch.nan_to_num(zero_point, nan=0.0).round()


def row_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Returns the codes of x, integers or floats, in the dtype of x / scale; scale and zero point broadcast to x."""
    q = x / scale
    if grid.levels == "float":
        return grid.round_(q.clamp_(grid.qmin, grid.qmax).float()).to(q.dtype)
    qmin = -(2 ** (grid.num_bits - 1))
    if zero_point is not None:
        q += zero_point
    return q.clamp_(qmin, qmin + 2**grid.num_bits - 1).round_()


def _in_groups(x: Tensor, size: int, name: str) -> Tensor:
    """Returns x [*, I] as [*, I / size, size].

    Raises:
        ValueError: `size` does not divide I.
    """
    if x.shape[-1] % size:
        raise ValueError(
            f"the inputs of {name} have {x.shape[-1]} features, which groups of {size} do not divide; "
            f"leave the layer out with quant.ignore, or its inputs with quant.overrides"
        )
    return x.unflatten(-1, (-1, size))


def row_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Returns (code - zero_point) * scale, in the scale's dtype."""
    return QuantizedInput(codes, scale, zero_point).values()


def _above_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
        return row_values(row_codes(x, scale, zero_point, grid), scale, zero_point).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class _LastResult(threading.local):
    """The last input that was quantized, and what came of it."""

    def __init__(self) -> None:
        self.source: weakref.ref[Tensor] | None = None
        self.key: Any = None
        self.result: Tensor | None = None

    def get(self, x: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Returns what `make` made last for the very tensor `x`, unchanged since, under `key`; or makes it."""
        key = (key, x._version)
        if self.result is not None and self.source is not None and self.source() is x and self.key == key:
            return self.result
        self.result = None
        result = make()
        self.source, self.key, self.result = weakref.ref(x, self._forget), key, result
        return result

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self.source is source:
            self.source = self.key = self.result = None


_shared = _LastResult()
