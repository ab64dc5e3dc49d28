"""Marlin, vLLM's product of 16-bit activations with 4- and 8-bit weights on NVIDIA GPUs, through the `kernels` package.

`kernels` downloads compiled kernels from the Hugging Face hub. `kernels-community/vllm-quantization` has version 0, for
which `kernels` promises no stable interface, and it is built for some versions of torch only. So Marlin is used only
after it was loaded and gave the right numbers in a trial on the device. If the trial fails, for a changed signature or
any other reason, Marlin declines with that reason and the next kernel is tried.

Written from vLLM's and kernels-community's sources. It was never run or timed, since no GPU was at hand. The tests
check the layout, with a stand-in that reads it as the CUDA code does.

Marlin keeps tiles of 16 in features and 64 out features, in the order in which the threads of its four warps hold them
for the tensor cores: thread 4 c + t of warp w has the in features 8 h + 2 t + e and the out features 16 w + 8 b + c,
for b, h, e in {0, 1}.

Source: MARLIN (2408.11743); vllm/csrc/quantization/gptq_marlin/gptq_marlin_repack.cu and
vllm/model_executor/layers/quantization/utils/marlin_utils.py (Apache-2.0), whose layout this is.
Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llmqat.extras import missing, require
from llmqat.grid import Grid, pack_int32
from llmqat.kernels.reference import PackedWeight
from llmqat.kernels.trial import TRIAL_FEATURES, refusal, too_old

REPOSITORY, VERSION = "kernels-community/vllm-quantization", 0
_DTYPES = (torch.bfloat16, torch.float16)
_GROUPS = (128, 64, 32)
_TILES = ((64, 128), (128, 64))
"""Multiples of which out and in features must be, one pair or the other: the tiles of Marlin's thread blocks."""


class MarlinKernel:
    """Marlin's product for any number of rows; grids of 2 and 3 bits run on it as 4 bits, of 5 to 7 as 8."""

    name = "marlin"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why Marlin cannot take this product, or None."""
        if x.device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {x.device.type}"
        if x.dtype not in _DTYPES or x.dtype != weight.parts[0].scale.dtype:
            return f"it needs activations and scales of one 16-bit dtype, not {x.dtype}, {weight.parts[0].scale.dtype}"
        if not weight.grid.symmetric:
            return "it needs a symmetric grid"
        rows, columns = weight.out_features, weight.in_features
        if not any(rows % o == 0 and columns % i == 0 for o, i in _TILES):
            return f"{rows} x {columns} features are not multiples of 64 x 128 or 128 x 64"
        if marlin_group(weight) is None:
            return f"group size {weight.group_size} does not fit"
        if (lacking := missing("kernels")) is not None:
            return f"it needs {lacking}"
        if (reason := too_old(x.device)) is not None:
            return reason
        grid = Grid(marlin_bits(weight.grid))
        return refusal(self, REPOSITORY, x.device, x.dtype, grid, (32, TRIAL_FEATURES))

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; Marlin's own layout is built at the first call and kept with the weight."""
        kernel = load_marlin()
        if self.name not in weight.layouts:
            workspace = kernel.marlin_make_workspace_new(x.device)
            weight.layouts[self.name] = *marlin_layout(weight), workspace
            weight.read()
        out = _product(kernel, x.reshape(-1, weight.in_features), weight.layouts[self.name], marlin_bits(weight.grid))
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def marlin_bits(grid: Grid) -> int:
    """Returns the bits that a code of `grid` has in Marlin's layout, 4 or 8."""
    return 4 if grid.num_bits <= 4 else 8


def marlin_group(weight: PackedWeight) -> int | None:
    """Returns the weights per scale in Marlin's layout: I for one scale a channel; None where it does not fit."""
    if weight.group_size == weight.in_features:
        return weight.in_features
    return next((g for g in _GROUPS if weight.group_size % g == 0), None)


def marlin_layout(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Returns Marlin's codes [I / 16, O * b / 2] int32, b = 4 or 8 bits, and scales [G, O], tile after tile."""
    bits = marlin_bits(weight.grid)
    # O is (tile, w, b, c), I is (tile, h, t, e); what one word holds comes last, from its lowest bits.
    codes = weight.codes().unflatten(1, (-1, 2, 4, 2)).unflatten(0, (-1, 4, 2, 8))
    order = (4, 0, 3, 6, 1, 7, 2, 5) if bits == 4 else (4, 0, 3, 6, 1, 2, 7, 5)
    codes = codes.permute(order).reshape(weight.in_features // 16, -1)
    return pack_int32(codes, Grid(bits)), _scales(weight)


def _scales(weight: PackedWeight) -> Tensor:
    """Returns the scales [G, O] in the order in which a thread reads those of its out features."""
    group = marlin_group(weight) or weight.in_features
    scale = weight.scale.t().repeat_interleave(weight.group_size // group, dim=0)
    if len(scale) == 1:  # one scale a channel: applied to sums, of which a thread holds two neighbours
        return scale.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).reshape(1, -1)
    return scale.unflatten(1, (-1, 8, 8)).transpose(2, 3).reshape(len(scale), -1)


def _product(kernel: Any, rows: Tensor, layout: tuple[Tensor, ...], bits: int) -> Tensor:
    """Returns the product [M, O] of `rows` [M, I]; sums are reduced in float32."""
    codes, scales, workspace = layout
    kind = kernel.scalar_types.uint4b8 if bits == 4 else kernel.scalar_types.uint8b128
    out: Tensor = kernel.gptq_marlin_gemm(
        rows.contiguous(),
        None,  # the output, allocated there
        codes,
        scales,
        None,  # global scale, zero points and the two orders of in features, which other schemes have
        None,
        None,
        None,
        workspace,
        kind,
        size_m=rows.shape[0],
        size_n=scales.shape[1],
        size_k=rows.shape[1],
        use_fp32_reduce=True,
    )
    return out


@functools.cache
def load_marlin() -> Any:
    """Returns the kernel's Python module, from the hub or its cache.

    Raises:
        Exception: of any kind, where it cannot be had here.
    """
    return require("kernels", "Marlin").get_kernel(REPOSITORY, version=VERSION)
