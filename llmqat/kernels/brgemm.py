"""brgemm: products of bfloat16 activations with weights of up to 4 bits on CPUs with AVX512-BF16, from the hub.

The package `kernels` downloads compiled kernels from the Hugging Face hub. `kernels-community/quantization-gptq`
multiplies up to 4 rows straight from the codes. With more rows, it writes the weight in bfloat16 for `brgemm`, oneDNN's
product of small blocks. On two cores of an AMD EPYC a product took 0.20 to 0.27 of the time of a bfloat16 linear with
one row, and 0.76 to 1.03 of it with 128 rows (built from the sources of commit 40d4194f).

It is used only after it gave the right numbers in a trial. If the trial fails, it declines with the reason, and the
next kernel is tried.

Its layout: for each 32 out features and each two in features k and k + 1, 32 bytes. Byte 2 n + e holds the code of out
feature n and in feature k + e in its lower half, and that of out feature 16 + n in its upper half.

Source: https://huggingface.co/kernels-community/quantization-gptq (MIT), whose layout this is.
Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from llmqat.extras import missing, require
from llmqat.grid import Grid, unpack_int32
from llmqat.kernels.reference import PackedWeight, first_failing, native_group
from llmqat.kernels.trial import TRIAL_FEATURES, refusal

REPOSITORY, VERSION = "kernels-community/quantization-gptq", 1
Product = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
_loaded: list[Product] = []
"""What `load_brgemm` has found. A layout does not hold it: other processes could not read it from a pickle."""
_MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported()
_BLOCK_ROWS = 32
_MOST_WHOLE_ROWS = 100
"""Above so many rows of activations the kernel writes the whole weight that it is given in bfloat16."""
_LAYOUT_ELEMENTS = 1_048_576
"""Weights that are put into the layout at once."""
_SLICE_ELEMENTS = 2_097_152
"""Weights that are given to it at once then. Memory of more than 32 MB comes anew from the system for each product,
which takes longer than the product."""


class CpuBrgemmKernel:
    """The hub's product for any number of rows; grids of 2 and 3 bits run on it as 4 bits."""

    name = "cpu-brgemm"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why this kernel cannot take this product, or None."""
        scale = weight.parts[0].scale.dtype
        checks = (
            (x.device.type == "cpu", f"it runs on the CPU, not on {x.device.type}"),
            (x.dtype == scale == torch.bfloat16, f"it needs bfloat16 activations and scales, not {x.dtype}, {scale}"),
            (weight.grid.num_bits <= 4, "it needs a grid of at most 4 bits"),
            (weight.out_features % _BLOCK_ROWS == 0, f"out_features={weight.out_features} is not a multiple of 32"),
            (native_group(weight) is not None, f"group size {weight.group_size} does not fit"),
            (sys.byteorder == "little", "it needs a little-endian machine"),
            (_MULTIPLIES_BF16, "it is slow on processors without AVX512-BF16"),
        )
        if (reason := first_failing(checks)) is not None:
            return reason
        return _unusable()

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the kernel's own layout is built at the first call and kept with the weight."""
        if self.name not in weight.layouts:
            weight.layouts[self.name] = brgemm_layout(weight)
            weight.read()
        product = _loaded[0] if _loaded else load_brgemm()  # torch.compile reads the first, and calls it
        blob, zeros, scales = weight.layouts[self.name]
        rows = x.reshape(-1, weight.in_features).contiguous()
        group = weight.in_features // scales.shape[0]
        most = _SLICE_ELEMENTS // weight.in_features // _BLOCK_ROWS * _BLOCK_ROWS or _BLOCK_ROWS
        if rows.shape[0] > _MOST_WHOLE_ROWS and most < blob.shape[0]:
            parts = zip(blob.split(most), zeros.split(most, dim=1), scales.split(most, dim=1), strict=True)
            pieces = [product(rows, part, z.contiguous(), s.contiguous(), group) for part, z, s in parts]
            out = torch.cat(pieces, dim=-1)
        else:
            out = product(rows, blob, zeros, scales, group)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def brgemm_layout(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes [O, I / 2] uint8, zero points [I/g, O] uint8 and scales [I/g, O] bfloat16; g fits the kernel.

    What is stored of a code is code + 8 where the grid is symmetric, so that the zero points are 8.
    """
    # What stays is allocated before what goes: the other way round, the heap is left full of holes.
    blob = torch.empty(weight.out_features, weight.in_features // 2, dtype=torch.uint8)
    repeats = weight.group_size // (native_group(weight) or weight.group_size)
    scales = weight.scale.t().repeat_interleave(repeats, dim=0)
    middle, zeros = 8, torch.full_like(scales, 8, dtype=torch.uint8)
    if weight.zero_point is not None:
        middle, zeros = 0, weight.zero_point.t().repeat_interleave(repeats, dim=0).to(torch.uint8)
    rows = max(1, _LAYOUT_ELEMENTS // (_BLOCK_ROWS * weight.in_features)) * _BLOCK_ROWS
    for packed, words in zip(blob.split(rows), weight.words().split(rows), strict=True):
        pairs = _pairs(words, weight.grid, weight.in_features, middle)
        low, high = pairs.unflatten(0, (-1, 2, _BLOCK_ROWS // 2)).unbind(1)
        both = high.bitwise_left_shift(4).bitwise_or_(low)  # [O/32, n, I/2]
        packed.view(torch.int16).view(-1, both.shape[2], both.shape[1]).copy_(both.transpose(1, 2))
    return blob, zeros.contiguous(), scales.contiguous()


def _pairs(words: Tensor, grid: Grid, columns: int, middle: int) -> Tensor:
    """Returns the codes of some rows plus `middle`, [R, I / 2] int16: that of in feature k below that of k + 1."""
    if grid.num_bits == 4:
        stored = words.view(torch.uint8).to(torch.int16)
        return (stored & 15).bitwise_or_((stored & 240).bitwise_left_shift_(4))
    return unpack_int32(words, grid, columns).to(torch.int8).add_(middle).view(torch.int16)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unusable() -> str | None:
    """Returns why the kernel is not used on this machine, or None; torch.compile does not look into it."""
    return _trial()


@functools.cache
def _trial() -> str | None:
    if (lacking := missing("kernels")) is not None:
        return f"it needs {lacking}"
    return refusal(_KERNEL, REPOSITORY, torch.device("cpu"), torch.bfloat16, Grid(4), (32, TRIAL_FEATURES))


@functools.cache
def load_brgemm() -> Product:
    """Returns the product, of a kernel from the hub or its cache; torch.compile is told the shape that it gives.

    Raises:
        Exception: of any kind, where it cannot be had here.
    """
    get_kernel = require("kernels", "the kernel cpu-brgemm").get_kernel
    # Where torch is built for CUDA, the build for CPUs has to be asked for, which kernels 0.12 does not know.
    known = inspect.signature(get_kernel).parameters
    module = get_kernel(REPOSITORY, version=VERSION, **({"backend": "cpu"} if "backend" in known else {}))
    product: Product = module.gemm_int4_forward
    with suppress(AttributeError, RuntimeError):  # named otherwise, or known: a compiled step is divided here then
        name = module._ops.add_op_namespace_prefix("gemm_int4_forward")
        torch.library.register_fake(name, lambda x, blob, *rest: x.new_empty(x.shape[0], blob.shape[0]))
    _loaded[:] = [product]
    return product


_KERNEL = CpuBrgemmKernel()
