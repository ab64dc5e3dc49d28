"""PackedLinear: a linear layer that holds its weight as packed integer codes and runs on the kernel that fits.

Its buffers have the names, shapes and dtypes of compressed-tensors' `pack-quantized` files, so a checkpoint loads into
it by name. Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.grid import Grid, pack_int32, unpack_int32
from llmqat.kernels import PackedWeight, packed_linear
from llmqat.layers.config import WeightConfig
from llmqat.layers.linear import QuantLinear


class PackedLinear(nn.Module):
    """A linear layer over packed codes; inference only.

    Attributes:
        weight_packed: [O, ceil(I * b / 32)] int32.
        weight_scale: [O, G], the checkpoint's dtype.
        weight_zero_point: [ceil(O * b / 32), G] int32, packed along O; None when symmetric.
        weight_shape: [2] int64, (O, I).
        bias: [O] or None.
        kernel: "auto", or the name of the kernel to insist on.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weights: WeightConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
    ) -> None:
        """Makes an empty layer, to be filled by `load_state_dict` or `from_quant_linear`.

        Raises:
            ValueError: when the group size does not divide I.
        """
        super().__init__()
        self.in_features, self.out_features, self.weights, self.kernel = in_features, out_features, weights, "auto"
        bits = weights.num_bits
        shape = weights.scale_shape(out_features, in_features, name or "the layer")

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        self.register_buffer("weight_packed", empty(out_features, -(-in_features * bits // 32), dtype=torch.int32))
        self.register_buffer("weight_scale", empty(*shape, dtype=dtype))
        zeros = None if weights.symmetric else empty(-(-shape[0] * bits // 32), shape[1], dtype=torch.int32)
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_shape", empty(2, dtype=torch.int64))
        self.register_buffer("bias", empty(out_features, dtype=dtype) if bias else None)
        self._runtime: PackedWeight | None = None

    @classmethod
    @torch.no_grad()
    def from_quant_linear(cls, layer: QuantLinear, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
        """Returns the packed form of `layer`; its scales and bias are stored in `dtype`."""
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, layer.weights, dtype, "meta")
        packed.weight_packed = pack_int32(layer.codes(), layer.grid)
        packed.weight_scale = layer.scale().to(dtype)
        packed.weight_shape = torch.tensor([layer.out_features, layer.in_features], dtype=torch.int64)
        if layer.zero_point is not None:
            packed.weight_zero_point = pack_int32(layer.zero_point.t().to(torch.int64), layer.grid).t().contiguous()
        if layer.bias is not None:
            packed.bias = layer.bias.detach().to(dtype)
        return packed.train(layer.training)

    @property
    def grid(self) -> Grid:
        """The code range."""
        return self.weights.grid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._runtime = None  # moved or cast buffers: what kernels derived from the old ones is stale
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._runtime = None
        super()._load_from_state_dict(*args, **options)

    def packed_weight(self) -> PackedWeight:
        """Returns the weight as kernels take it; rebuilt when the buffers were loaded, moved or replaced."""
        if self._runtime is None or self._runtime.packed is not self.weight_packed:
            zero_point = None
            if self.weight_zero_point is not None:
                rows = self.weight_scale.shape[0]
                zero_point = unpack_int32(self.weight_zero_point.t().contiguous(), self.grid, rows).t()
            self._runtime = PackedWeight(self.weight_packed, self.weight_scale, zero_point, self.grid, self.in_features)
        return self._runtime

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`, bit-equal to QuantLinear.quantized_weight."""
        return self.packed_weight().dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [*, I] @ ŵ.T + bias, [*, O], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return packed_linear(x, self.packed_weight(), bias, self.kernel)

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights.label}, kernel={self.kernel}"
        )
