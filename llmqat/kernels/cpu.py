"""The CPU kernels: torch's int4 and int8 products for few rows (decoding), chunked dequantize + product for many.

`_weight_int4pack_mm_for_cpu` reads 4 bits a weight and wins while the product is bound by memory, up to a few dozen
rows. It computes (q - 8) * scale with q in 0..15, so any symmetric grid of up to 4 bits runs on it by shifting its
codes. `_weight_int8pack_mm` does the same for 8 bits a channel. Above that, dequantizing a slice of output rows at a
time keeps the bf16 slice in cache for the product.

Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import dequantize, unpack_int32
from llmqat.kernels.reference import PackedWeight

MAX_DECODE_ROWS = 32
MAX_INT8_ROWS = 16
_NATIVE_GROUPS = (256, 128, 64, 32)
_INNER_K_TILES = 2
_CHUNK_ELEMENTS = 262_144


class CpuInt4Kernel:
    """torch's int4 weight-only product; 3 to 3.8 times a bf16 linear at one row."""

    name = "cpu-int4"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why torch's int4 kernel cannot take this product, or None."""
        out_features = weight.packed.shape[0]
        checks = (
            (x.device.type == "cpu", f"it runs on the CPU, not on {x.device.type}"),
            (x.dtype == torch.bfloat16, f"it needs bfloat16 activations, not {x.dtype}"),
            (weight.grid.symmetric and weight.grid.num_bits <= 4, "it needs a symmetric grid of at most 4 bits"),
            (out_features % 16 == 0, f"out_features={out_features} is not a multiple of 16"),
            (_native_group(weight) is not None, f"group size {weight.group_size} of {weight.in_features} does not fit"),
            (x.numel() <= MAX_DECODE_ROWS * weight.in_features, f"it loses above {MAX_DECODE_ROWS} rows"),
        )
        return next((reason for holds, reason in checks if not holds), None)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the kernel's own layout is built at the first call and kept with the weight."""
        group_size = _native_group(weight)
        if self.name not in weight.layouts:
            weight.layouts[self.name] = _int4_layout(weight, group_size or 0)
        blob, scales_and_zeros = weight.layouts[self.name]
        rows = x.reshape(-1, weight.in_features)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, blob, group_size, scales_and_zeros)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class CpuInt8Kernel:
    """torch's int8 weight-only product, one scale a channel; 2.6 times a bf16 linear at one row of a large matrix."""

    name = "cpu-int8"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why torch's int8 kernel cannot take this product, or None."""
        checks = (
            (x.device.type == "cpu", f"it runs on the CPU, not on {x.device.type}"),
            (x.dtype == torch.bfloat16, f"it needs bfloat16 activations, not {x.dtype}"),
            (weight.grid.symmetric and weight.grid.num_bits == 8, "it needs a symmetric grid of 8 bits"),
            (weight.scale.shape[1] == 1, "it needs one scale a channel"),
            # torch 2.13 ends the process where this does not hold.
            (weight.in_features % 16 == 0, f"in_features={weight.in_features} is not a multiple of 16"),
            (x.numel() <= MAX_INT8_ROWS * weight.in_features, f"it loses above {MAX_INT8_ROWS} rows"),
        )
        return next((reason for holds, reason in checks if not holds), None)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the int8 codes are taken out of their words at the first call and kept."""
        if self.name not in weight.layouts:
            codes = unpack_int32(weight.packed, weight.grid, weight.in_features).contiguous()
            weight.layouts[self.name] = codes, weight.scale.view(-1).to(torch.bfloat16)
        codes, scale = weight.layouts[self.name]
        out = torch._weight_int8pack_mm(x.reshape(-1, weight.in_features).contiguous(), codes, scale)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class CpuDequantizeKernel:
    """Dequantize a slice of output rows, multiply, next slice: no whole dequantized weight exists."""

    name = "cpu-dequantize"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why it cannot run here, or None."""
        return None if x.device.type == "cpu" else f"it runs on the CPU, not on {x.device.type}"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias, computed slice by slice of the output features."""
        out_features = weight.packed.shape[0]
        step = max(16, _CHUNK_ELEMENTS // weight.in_features // 16 * 16)
        slices = [slice(start, start + step) for start in range(0, out_features, step)]
        parts = [
            F.linear(x, _dequantized_rows(weight, rows, x.dtype), None if bias is None else bias[rows])
            for rows in slices
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _dequantized_rows(weight: PackedWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    zero_point = None if weight.zero_point is None else weight.zero_point[rows]
    codes = unpack_int32(weight.packed[rows], weight.grid, weight.in_features)
    return dequantize(codes, weight.scale[rows], zero_point, dtype)


def _native_group(weight: PackedWeight) -> int | None:
    """Returns the largest group size of the kernel that divides the weight's own, or None."""
    return next((g for g in _NATIVE_GROUPS if min(weight.group_size, weight.in_features) % g == 0), None)


def _int4_layout(weight: PackedWeight, group_size: int) -> tuple[Tensor, Tensor]:
    """Returns torch's int4 blob and scales_and_zeros [I/g, O, 2] bfloat16."""
    codes = unpack_int32(weight.packed, weight.grid, weight.in_features).to(torch.int32) + 8
    blob = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_K_TILES)
    groups = weight.in_features // group_size
    scale = weight.scale.repeat_interleave(groups // weight.scale.shape[1], dim=1).t().to(torch.bfloat16)
    return blob, torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
