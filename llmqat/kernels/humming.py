"""Humming: products of 16-bit activations with weights of 2 to 8 bits on NVIDIA GPUs, of the package humming-kernels.

It reads the checkpoint's own words, scales and zero points, and makes tiles of its own of them. Its kernels are
compiled at run time for each shape, by NVRTC or nvcc and with the headers of torch's CUDA version, which the extras
cu12 and cu13 of that package bring.

Written from the sources of humming-kernels 0.1.20; it was never run, since no GPU was at hand. So it is used only where
it gives the right numbers in a trial on the device. Tested is what is handed to it.

Source: https://github.com/inclusionAI/humming (Apache-2.0).
Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale, b bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmqat.extras import missing, require
from llmqat.grid import Grid, pack_int32
from llmqat.kernels.reference import PackedWeight, first_failing
from llmqat.kernels.trial import TRIAL_FEATURES, refusal, too_old

_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_GROUP = 16


class HummingKernel:
    """Humming's product, for any number of rows."""

    name = "humming"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why Humming cannot take this product, or None."""
        rows, columns, scales = weight.out_features, weight.in_features, weight.parts[0].scale.dtype
        checks = (
            (x.device.type == "cuda", f"it runs on NVIDIA GPUs, not on {x.device.type}"),
            (
                x.dtype in _DTYPES and x.dtype == scales,
                f"it needs 16 bits in activations and scales, not {x.dtype}, {scales}",
            ),
            (rows % 64 == 0 and columns % 32 == 0, f"{rows} x {columns} features are not multiples of 64 x 32"),
            (weight.group_size >= _LEAST_GROUP, f"group size {weight.group_size} is below {_LEAST_GROUP}"),
        )
        if (reason := first_failing(checks)) is not None:
            return reason
        if (lacking := missing("humming")) is not None:
            return f"it needs {lacking}"
        if (reason := too_old(x.device)) is not None:
            return reason
        groups = (32, 64, TRIAL_FEATURES)
        return refusal(self, "humming-kernels", x.device, x.dtype, plain(weight.grid), groups)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; Humming's own layout is made at the first call and kept with the weight."""
        if self.name not in weight.layouts:
            weight.layouts[self.name] = humming_layer(weight)
            weight.read()
        out: Tensor = weight.layouts[self.name](x.reshape(-1, weight.in_features).contiguous())
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def plain(grid: Grid) -> Grid:
    """Returns the grid of as many bits whose codes are stored from its smallest one: ternary ones are not."""
    return Grid(grid.num_bits, grid.symmetric)


def humming_layer(weight: PackedWeight) -> Any:
    """Returns Humming's layer for `weight`, on its device."""
    humming = require("humming", "the kernel humming")
    per_channel = weight.group_size == weight.in_features
    device = weight.parts[0].packed.device
    with torch.cuda.device(device), torch.no_grad():
        layer = humming.layer.HummingLayer(
            shape_n=weight.out_features,
            shape_k=weight.in_features,
            torch_dtype=weight.parts[0].scale.dtype,
            weight_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "type": "int",
                "num_bits": weight.grid.num_bits,
                "strategy": "channel" if per_channel else "group",
                "group_size": None if per_channel else weight.group_size,
                "symmetric": weight.grid.symmetric,
            },
        ).to(device)
        layer.load_from_tensors(humming_tensors(weight))
        layer.transform()
    return layer


def humming_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Returns what a layer of compressed-tensors' `pack-quantized` format has, by its names."""
    packed = weight.grid == plain(weight.grid) and weight.packed.dtype == torch.int32
    tensors = {
        "weight_packed": weight.words() if packed else pack_int32(weight.codes(), plain(weight.grid)),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if weight.zero_point is not None:
        zeros = pack_int32(weight.zero_point.t().to(torch.int64), weight.grid)
        tensors["weight_zero_point"] = zeros.t().contiguous()
    return tensors
