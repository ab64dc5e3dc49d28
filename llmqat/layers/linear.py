"""QuantLinear: an nn.Linear whose weight is fake-quantized at every forward, with a learnable log-scale.

The master weight stays a parameter, shared with the nn.Linear it came from. What the forward multiplies with is
`quantized_weight`: the number that evaluation and the packed file also hold. The scale is initial_scale *
exp(log_scale), snapped to bfloat16, so a step of log_scale is a relative one. All of its state is in the state dict.

Letters: O out features, I in features, G scales per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.grid import Grid, fake_quantize, minmax_scale, quantize, scale_from_log
from llmqat.layers.config import WeightConfig


class QuantLinear(nn.Module):
    """A linear layer with a fake-quantized weight.

    Attributes:
        weight: [O, I] master weight; float32 where it trains.
        log_scale: [O, G] float32 parameter theta, 0 at the start.
        initial_scale: [O, G] float32 buffer, signed.
        zero_point: [O, G] float32 buffer of integers, or None when symmetric.
        bias: [O] or None, never quantized.
        weights: the scheme.
        enabled: False makes the forward a plain linear with the master weight.
    """

    weight: Tensor
    bias: Tensor | None
    initial_scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, weights: WeightConfig, name: str = "") -> None:
        """Takes over `weight` and `bias` (shared, not copied); the scale starts at plain rounding's.

        Raises:
            ValueError: when the group size does not divide I.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weights = weights
        self.enabled = True
        self.weight = weight
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        shape = weights.scale_shape(self.out_features, self.in_features, name or "the layer")
        # LSQ's gradient factor: one clip threshold then serves scales and weights alike.
        self._gradient_factor = 1.0 / math.sqrt(weight.numel() / (shape[0] * shape[1]) * max(self.grid.qmax, 1))
        self.log_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=weight.device))
        scale, zero_point = minmax_scale(weight, self.grid, shape)
        self.register_buffer("initial_scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: WeightConfig, name: str = "") -> QuantLinear:
        """Returns a QuantLinear over the weight and bias of `linear`, which it shares. Works on the meta device."""
        quantized = cls(linear.weight, linear.bias, weights, name)
        quantized.train(linear.training)
        return quantized

    def to_linear(self) -> nn.Linear:
        """Returns an nn.Linear that shares the master weight and bias: the inverse of `from_linear`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.register_parameter("weight", self.get_parameter("weight"))
        linear.register_parameter("bias", None if self.bias is None else self.get_parameter("bias"))
        return linear.train(self.training)

    @property
    def grid(self) -> Grid:
        """The code range."""
        return self.weights.grid

    def scale(self) -> Tensor:
        """Returns the scale [O, G] of the forward: float32, on the bfloat16 grid, differentiable in log_scale."""
        return scale_from_log(self.initial_scale, self.log_scale, self._gradient_factor)

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Makes `scale` [O, G] (and `zero_point`) the starting point: log_scale returns to 0.

        Raises:
            ValueError: when a shape differs, a value is not finite, or a zero point is missing or not wanted.
        """
        if scale.shape != self.log_scale.shape or not bool(torch.isfinite(scale).all()):
            raise ValueError(f"scale must be finite of shape {tuple(self.log_scale.shape)}, got {tuple(scale.shape)}")
        if (zero_point is None) != (self.zero_point is None):
            raise ValueError("a zero point belongs to an asymmetric scheme and only to it")
        self.initial_scale.copy_(scale)
        self.log_scale.zero_()
        if zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(zero_point)

    def quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight of the forward [O, I] in `dtype`, differentiable in weight and log_scale."""
        return fake_quantize(self.weight, self.scale(), self.zero_point, self.grid, dtype)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Returns the integer codes [O, I] of the forward's weight."""
        return quantize(self.weight, self.scale(), self.zero_point, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [*, I] @ ŵ.T + bias, [*, O], in the autocast dtype or else x's."""
        dtype = _compute_dtype(x)
        weight = self.quantized_weight(dtype) if self.enabled else self.weight.to(dtype)
        return F.linear(x.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights.label}"
        )


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Inside, every QuantLinear of `model` is a plain linear with its master weight."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the autocast dtype where autocast is on, or else x's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
