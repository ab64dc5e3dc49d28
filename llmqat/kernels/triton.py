"""The choice of the Triton kernel: where it runs and with which tiles. The kernel itself is in `triton_product.py`.

It was run under Triton's interpreter only (TRITON_INTERPRET=1, on CPU tensors), against the product in float64. It has
never been timed, nor run on a GPU; the tiles are chosen by hand.

Letters: M rows of activations, O out features, I in features.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from llmqat.kernels.reference import PackedWeight

_DECODE_ROWS = 16
_DECODE_TILE = (16, 64, 64)
_PREFILL_TILE = (64, 64, 32)
"""Rows, columns and depth of a tile: flat for few rows, which are bound by memory; square for many."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernel:
    """Unpacks, dequantizes and multiplies in one kernel, from the checkpoint's own words: 2 to 8 bits, any shape."""

    name = "triton"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why it cannot run here, or None."""
        interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if x.device.type != "cuda" and not interpreted:
            return f"it runs on a GPU, not on {x.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run `pip install llmqat[triton]`"
        if len(weight.parts) > 1:
            return "it takes one weight at a time"
        return None if x.dtype in _DTYPES else f"it has no products of {x.dtype}"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias."""
        from llmqat.kernels.triton_product import packed_product

        rows = x.reshape(-1, weight.in_features).contiguous()
        out = torch.empty(rows.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
        tile = _DECODE_TILE if rows.shape[0] <= _DECODE_ROWS else _PREFILL_TILE
        grid = -(-rows.shape[0] // tile[0]), -(-weight.out_features // tile[1])
        zero_point = None if weight.zero_point is None else weight.zero_point.to(torch.int32).contiguous()
        packed_product[grid](
            rows,
            weight.packed.contiguous(),
            weight.scale.contiguous(),
            zero_point,
            out,
            *(rows.shape[0], weight.out_features, weight.in_features, weight.packed.shape[1], weight.group_size),
            BITS=weight.grid.num_bits,
            OFFSET=-weight.grid.qmin,
            IN_FLOAT32=x.device.type == "cpu",
            BLOCK_M=tile[0],
            BLOCK_O=tile[1],
            BLOCK_I=tile[2],
        )
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
