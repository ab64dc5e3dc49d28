"""Unpacks the whole weight by a Triton kernel (`triton_unpack.py`), then multiplies by torch.

On an H100 a product of 4,096 x 4,096 weights of 4 bits takes 51 microseconds with 32 rows, and 66 with 512. With 32
rows the reference takes 235 and bfloat16 weights 15. A kernel that unpacked and multiplied in one took 44 with one row
and 617 with 512, with the best tiles for each. That is not worth a second kernel (eval/results/kernels-h100.txt).

Letters: O out features, I in features.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.extras import missing
from llmqat.kernels.reference import PackedWeight

_TILE = (8, 256)
"""Out and in features of a tile."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernel:
    """Unpacks the checkpoint's own words, 2 to 8 bits, any shape, and multiplies by torch."""

    name = "triton"
    differentiable = True
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why it cannot run here, or None."""
        if x.device.type != "cuda" and not is_interpreted(x):
            return f"it runs on a GPU, not on {x.device.type}"
        if (lacking := missing("triton")) is not None:
            return f"it needs {lacking}"
        if weight.packed.dtype != torch.int32:
            return "the codes are not packed"
        return None if x.dtype in _DTYPES else f"it has no weights of {x.dtype}"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns F.linear(x, ŵ, bias)."""
        return F.linear(x, unpacked(weight, x.dtype), bias)


def is_interpreted(x: Tensor) -> bool:
    """Returns whether Triton's kernels run on the CPU, where `x` lies, under its interpreter."""
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which the GPU of `x` is the current one, on which Triton runs whatever holds the tensors.

    What torch.compile makes cares for that itself.
    """
    return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight [O, I] in `dtype`, as `weight.dequantized(dtype)` does."""
    from llmqat.kernels.triton_unpack import unpacked_weight

    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.packed.device)
    tiles = -(-weight.out_features // _TILE[0]), -(-weight.in_features // _TILE[1])
    with on_device_of(out):
        unpacked_weight[tiles](
            weight.words().contiguous(),
            weight.scale.contiguous(),
            None if weight.zero_point is None else weight.zero_point.to(torch.int32).contiguous(),
            out,
            weight.out_features,
            I=weight.in_features,
            GROUP=weight.group_size,
            BITS=weight.grid.num_bits,
            OFFSET=-weight.grid.qmin,
            BLOCK_O=_TILE[0],
            BLOCK_I=_TILE[1],
        )
    return out
