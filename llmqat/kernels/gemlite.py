"""gemlite: a package of Triton products of 16-bit activations with weights of 2, 4 and 8 bits, on GPUs.

It needs no compiler but Triton's own. It stores codes in words as the checkpoint does, transposed. Codes of 3 bits are
stored in 4, and codes of 5 to 7 bits in 8. The weight is (code - zero point) * scale, rounded once, as in the
reference. Two options of gemlite are turned off: adding up sums in bfloat16, and multiplying a sum that was rounded
before by the scale of a whole row.

Written from gemlite 0.6's sources and tested with Triton's interpreter; no GPU was at hand. So it is used only where
it gives the right numbers in a trial on the device.

Source: https://github.com/mobiusml/gemlite (Apache-2.0).
Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llmqat.extras import missing, require
from llmqat.grid import Grid
from llmqat.kernels.reference import PackedWeight, first_failing
from llmqat.kernels.trial import TRIAL_FEATURES, refusal
from llmqat.kernels.triton import is_interpreted, on_device_of

_BITS = (2, 4, 8)
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}
_LEAST_GROUP = 16
_TILE_OF_8_BITS = 128
"""In features of the tile that gemlite takes for one and two rows of 8 bits where it does not tune."""
_MOST_BLOCK = 512
"""Out features of gemlite's largest tile: it reads scales up to the end of a tile, past the last out feature."""


class GemliteKernel:
    """gemlite's product, for any number of rows."""

    name = "gemlite"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why gemlite cannot take this product, or None."""
        interpreted = is_interpreted(x)
        dtypes = (torch.float32,) if interpreted else (torch.bfloat16, torch.float16)
        scales = weight.parts[0].scale.dtype
        group = weight.group_size
        fits = group == weight.in_features or (group >= _LEAST_GROUP and group & (group - 1) == 0)
        untuned = widened(weight.grid) == 8 and group < _TILE_OF_8_BITS and x.numel() <= 2 * weight.in_features
        checks = (
            (x.device.type == "cuda" or interpreted, f"it runs on GPUs, not on {x.device.type}"),
            (
                x.dtype in dtypes and x.dtype == scales,
                f"it needs 16 bits in activations and scales, not {x.dtype}, {scales}",
            ),
            (weight.in_features % 32 == 0, f"in_features={weight.in_features} is not a multiple of 32"),
            (fits, f"group size {group} is no power of two from {_LEAST_GROUP}"),
            (not untuned, f"one or two rows of 8 bits in groups below {_TILE_OF_8_BITS} are wrong unless it is tuned"),
        )
        if (reason := first_failing(checks)) is not None:
            return reason
        if (lacking := missing("gemlite")) is not None:
            return f"it needs {lacking}"
        groups = (32, 64, TRIAL_FEATURES)
        return refusal(self, self.name, x.device, x.dtype, Grid(widened(weight.grid), weight.grid.symmetric), groups)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; gemlite's own layout is made at the first call and kept with the weight."""
        if self.name not in weight.layouts:
            weight.layouts[self.name] = gemlite_layout(weight)
            weight.read()
        tensors, settings = weight.layouts[self.name]
        with on_device_of(x):
            out: Tensor = torch.ops.gemlite.forward_functional(x, None, tensors, settings)
        return out if bias is None else out + bias


def widened(grid: Grid) -> int:
    """Returns the bits that a code of `grid` has in gemlite's words."""
    return next(bits for bits in _BITS if bits >= grid.num_bits)


def gemlite_layout(weight: PackedWeight) -> tuple[list[Tensor], list[int]]:
    """Returns the tensors and the settings that gemlite's product takes beside activations."""
    package, dtype = load_gemlite(), weight.parts[0].scale.dtype
    kind = getattr(package.DType, _DTYPES[dtype])
    layer = package.GemLiteLinear(
        widened(weight.grid),
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        input_dtype=kind,
        output_dtype=kind,
    )
    grid, zero_point = weight.grid, weight.zero_point
    zeros: Tensor | int = -grid.qmin if zero_point is None else zero_point.to(dtype).contiguous()
    codes = (weight.codes().to(torch.int16) - grid.qmin).to(torch.uint8)  # stored as they are; gemlite subtracts zeros
    layer.pack(codes, weight.scale.contiguous(), zeros, fma_mode=False)
    layer.W_group_mode, layer.channel_scale_mode = 3, 0  # (code - zero) * scale, also where a row has one scale
    words, scale, *rest = layer.get_tensor_args()
    return [words, _with_room(scale), _with_room(rest[0]), *rest[1:]], layer.get_meta_args()


def _with_room(values: Tensor) -> Tensor:
    """Returns a copy of `values` [G, O], or of a number, behind which memory may be read."""
    room = values.new_zeros(values.numel() + _MOST_BLOCK)
    return room[: values.numel()].view(values.shape).copy_(values)


@functools.cache
def load_gemlite() -> Any:
    """Returns the package, set up to add up in float32."""
    package = require("gemlite", "the kernel gemlite")
    package.set_native_atomic_bfp16(False)
    return package
