"""The reference kernel: dequantize the whole weight, multiply. Slow, simple, and what every other kernel is held to.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid, dequantize, unpack_int32


@dataclass
class PackedWeight:
    """A packed weight as it lies in the checkpoint, and what kernels derive from it.

    Attributes:
        packed: [O, ceil(I * b / 32)] int32.
        scale: [O, G], the checkpoint's float dtype.
        zero_point: [O, G] unpacked integers, or None when symmetric.
        grid: the code range.
        in_features: I.
        layouts: what a kernel made of it once, by the kernel's name; dropped with the weight.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    in_features: int
    layouts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """Weights governed by one scale, along I."""
        return self.packed.shape[0] * self.in_features // self.scale.numel()

    def rows(self, index: Tensor) -> PackedWeight:
        """Returns the packed weight of the rows `index` [n]."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return PackedWeight(self.packed[index], self.scale[index], zero_point, self.grid, self.in_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`."""
        codes = unpack_int32(self.packed, self.grid, self.in_features)
        return dequantize(codes, self.scale, self.zero_point, dtype)


class ReferenceKernel:
    """Dequantize and multiply, for every scheme, dtype and device."""

    name = "reference"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns None: it always can."""
        return None

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns F.linear(x, ŵ, bias) with ŵ dequantized to x's dtype."""
        return F.linear(x, weight.dequantized(x.dtype), bias)
