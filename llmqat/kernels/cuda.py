"""torch's own int4 product on NVIDIA GPUs (tinygemm).

`_weight_int4pack_mm` computes (q - 8) * scale with q in 0..15 as the CPU's does, on a layout of its own that takes 4
bits a weight beside the checkpoint's words. On an H100 a product of 4,096 x 4,096 weights takes 6.8 microseconds with
one row (bfloat16 weights: 16.1), 21.6 with 16, 41 with 32 and 77 with 64, where unpacking the weight first takes 51
(eval/results/kernels-h100.txt): hence for at most 32 rows.

Letters: M rows of activations, O out features, I in features, g weights per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmqat.kernels.reference import MAX_DECODE_ROWS, PackedWeight, first_failing, native_group, native_scales

_INNER_K_TILES = (8, 4, 2)


class CudaInt4Kernel:
    """torch's int4 weight-only product for few rows."""

    name = "cuda-int4"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why torch's int4 kernel cannot take this product, or None."""
        checks = (
            (x.device.type == "cuda", f"it runs on NVIDIA GPUs, not on {x.device.type}"),
            (x.dtype == torch.bfloat16, f"it needs bfloat16 activations, not {x.dtype}"),
            (weight.grid.symmetric and weight.grid.num_bits <= 4, "it needs a symmetric grid of at most 4 bits"),
            (weight.out_features % 8 == 0, f"out_features={weight.out_features} is not a multiple of 8"),
            (_tiles(weight) is not None, f"in_features={weight.in_features} is not a multiple of 32"),
            (native_group(weight) is not None, f"group size {weight.group_size} does not fit"),
            (x.numel() <= MAX_DECODE_ROWS * weight.in_features, f"it is for at most {MAX_DECODE_ROWS} rows"),
        )
        return first_failing(checks)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the kernel's own layout is built at the first call and kept with the weight."""
        group_size = native_group(weight) or 0
        if self.name not in weight.layouts:
            weight.layouts[self.name] = int4_layout(weight, group_size)
        blob, scales_and_zeros = weight.layouts[self.name]
        rows = x.reshape(-1, weight.in_features).contiguous()
        out = torch.ops.aten._weight_int4pack_mm(rows, blob, group_size, scales_and_zeros)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def int4_layout(weight: PackedWeight, group_size: int) -> tuple[Tensor, Tensor]:
    """Returns torch's int4 blob, and scales_and_zeros [I/g, O, 2] bfloat16."""
    codes = (weight.codes().to(torch.int32) + 8).to(torch.uint8)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    blob = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _tiles(weight))
    return blob, native_scales(weight, group_size)


def _tiles(weight: PackedWeight) -> int | None:
    """Returns the most inner tiles of 16 in features that divide the weight."""
    return next((tiles for tiles in _INNER_K_TILES if weight.in_features % (tiles * 16) == 0), None)
