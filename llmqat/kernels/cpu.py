"""The CPU kernels: torch's int4 and int8 products for few rows (decoding), dequantize + product for many (prefill).

`_weight_int4pack_mm_for_cpu` reads 4 bits a weight and wins while the product is bound by memory, up to a few dozen
rows. It computes (q - 8) * scale + zero with q in 0..15, so any grid of up to 4 bits runs on it by shifting its
codes: 2 and 3 bits and ternary take 4 bits a weight in memory then. `_weight_int8pack_mm` does the same for 8 bits a
channel. What these kernels read is made at their first call and kept; the packed words are not read again by them.

Many rows are bound by arithmetic: the weight is dequantized, a slice of output rows at a time, and multiplied in
bfloat16. Two shortcuts make this fast:

- Codes are not put into the order of their columns. Shifting and masking the words gives the columns p, p + n,
  p + 2n, … for each place p of n: n = 8 / b codes of a byte, or n = 8 codes of 3, 5, 6 or 7 bits. The columns of the
  activations are put into that order instead.
- A code of 2, 4 or 8 bits stays in the upper bits of its byte, where it is a multiple of the code. The scale is divided
  by the same power of two, so the weights are the same numbers, bit for bit.

One pass made by Inductor takes longer than torch's six: 1.1 ms, not 0.8, for 3072 x 576 in 4 bits, on one thread.

Letters: M rows of activations, O out features, I in features, G scales per row, g weights per scale, b bits,
n codes whose places are told apart: 8 / b, or 8.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmqat.grid import Grid, dequantize, unpack_by_place, unpack_codes, unpack_int32
from llmqat.kernels.products import linear
from llmqat.kernels.reference import MAX_DECODE_ROWS, PackedWeight, int8_codes, native_group, native_scales

MAX_INT8_ROWS = 16
_INNER_K_TILES = 2
_BLOCK_ROWS = 64
"""Rows that torch's int4 layout keeps together, on any processor, or a multiple: such blocks are packed alone."""
_PACKED_ELEMENTS = 131_072
_CHUNK_ELEMENTS = 2_097_152
_INT4_PACK = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_INT4_PRODUCT = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_buffers = threading.local()


class CpuInt4Kernel:
    """torch's int4 weight-only product; 3 to 3.8 times a bf16 linear at one row."""

    name = "cpu-int4"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why torch's int4 kernel cannot take this product, or None."""
        if x.device.type != "cpu":
            return f"it runs on the CPU, not on {x.device.type}"
        if x.dtype != torch.bfloat16:
            return f"it needs bfloat16 activations, not {x.dtype}"
        if weight.grid.num_bits > 4:
            return "it needs a grid of at most 4 bits"
        if weight.out_features % 16:
            return f"out_features={weight.out_features} is not a multiple of 16"
        if native_group(weight) is None:
            return f"group size {weight.group_size} of {weight.in_features} does not fit"
        few = x.numel() <= MAX_DECODE_ROWS * weight.in_features
        return None if few else f"others are faster above {MAX_DECODE_ROWS} rows"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the kernel's own layout is built at the first call and kept with the weight."""
        if self.name not in weight.layouts:
            weight.layouts[self.name] = _int4_layout(weight, native_group(weight) or 0)
            weight.read()
        blob, scales_and_zeros = weight.layouts[self.name]
        group_size = weight.in_features // scales_and_zeros.shape[0]
        rows = x.reshape(-1, weight.in_features).contiguous()
        out = _INT4_PRODUCT(rows, blob, group_size, scales_and_zeros)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class CpuInt8Kernel:
    """torch's int8 weight-only product, one scale a channel; 2.6 times a bf16 linear at one row of a large matrix."""

    name = "cpu-int8"
    differentiable = False
    exact = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why torch's int8 kernel cannot take this product, or None."""
        if x.device.type != "cpu":
            return f"it runs on the CPU, not on {x.device.type}"
        if x.dtype != torch.bfloat16:
            return f"it needs bfloat16 activations, not {x.dtype}"
        if not weight.grid.symmetric or weight.grid.num_bits != 8:
            return "it needs a symmetric grid of 8 bits"
        if weight.group_size != weight.in_features:
            return "it needs one scale a channel"
        if weight.in_features % 16:  # torch 2.13 ends the process where this does not hold
            return f"in_features={weight.in_features} is not a multiple of 16"
        few = x.numel() <= MAX_INT8_ROWS * weight.in_features
        return None if few else f"others are faster above {MAX_INT8_ROWS} rows"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias; the int8 codes are taken out of their words at the first call and kept."""
        if self.name not in weight.layouts:
            weight.layouts[self.name] = int8_codes(weight), weight.scale.view(-1).to(torch.bfloat16)
            weight.read()
        codes, scale = weight.layouts[self.name]
        out = torch._weight_int8pack_mm(x.reshape(-1, weight.in_features).contiguous(), codes, scale)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


class CpuDequantizeKernel:
    """Dequantize a slice of output rows, multiply, next slice: no whole dequantized weight of a large layer exists."""

    name = "cpu-dequantize"
    differentiable = True
    exact = True
    floats = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why it cannot run here, or None."""
        return None if x.device.type == "cpu" else f"it runs on the CPU, not on {x.device.type}"

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias, computed slice by slice of the output features."""
        # The backward pass would need the weight, which the next layer overwrites.
        planes = 0 if x.requires_grad and torch.is_grad_enabled() else _planes(weight, x.dtype)
        if planes > 1:  # the columns in the order that the unpacked codes have
            x = x.unflatten(-1, (-1, planes)).transpose(-1, -2).flatten(-2)
        pieces = []
        for first, part in _slices(weight):
            rows = part.out_features
            dequantized = _dequantized_planes(part, planes) if planes else _dequantized(part, x.dtype)
            pieces.append(linear(x, dequantized, None if bias is None else bias[first : first + rows]))
        weight.read()
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _slices(weight: PackedWeight) -> Iterator[tuple[int, PackedWeight]]:
    """Yields (first row, weight of some rows) with at most `_CHUNK_ELEMENTS` weights each."""
    most = max(16, _CHUNK_ELEMENTS // weight.in_features // 16 * 16)
    first = 0
    if len(weight.parts) > 1 and weight.out_features <= most:
        yield 0, PackedWeight(weight.words(), weight.scale, weight.zero_point, weight.grid, weight.in_features)
        return
    for part in weight.parts:
        pieces = -(-part.out_features // most)
        step = -(-part.out_features // pieces // 16) * 16  # of about the same size
        for start in range(0, part.out_features, step):
            yield first + start, part if pieces == 1 else part.rows(slice(start, start + step))
        first += part.out_features


def _dequantized(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    codes = unpack_codes(weight.packed, weight.grid, weight.in_features)
    return dequantize(codes, weight.scale, weight.zero_point, dtype)


def _planes(weight: PackedWeight, dtype: torch.dtype) -> int:
    """Returns n, the places in a byte, or among eight codes of 3, 5, 6 or 7 bits, that `_codes_by_place` tells apart.

    0 where it does not take this weight.
    """
    bits = weight.grid.num_bits
    if weight.grid.levels == "float":
        return 0
    if sys.byteorder != "little" or not dtype == weight.parts[0].scale.dtype == torch.bfloat16:
        return 0
    planes = 8 // bits if 8 % bits == 0 else 8
    return 0 if weight.in_features * bits % 32 or weight.group_size % planes else planes


def _dequantized_planes(weight: PackedWeight, planes: int) -> Tensor:
    """Returns the weight [O, I] in bfloat16, its columns ordered by their place."""
    scale, zero_point = weight.scale, weight.zero_point
    rows, groups = scale.shape
    codes, unit = _codes_by_place(weight, planes)
    out = _scratch("weight", (rows, planes, codes.shape[-1]), torch.bfloat16)
    out.transpose(0, 1).copy_(codes)
    grouped = out.view(rows, planes, groups, -1)
    if zero_point is not None:
        grouped.sub_(_spread(zero_point.to(torch.bfloat16) * unit, grouped))
    grouped.mul_(_spread(scale / unit, grouped))
    return out.view(rows, -1)


def _codes_by_place(weight: PackedWeight, planes: int) -> tuple[Tensor, int]:
    """Returns the codes [n, O, I / n] of the places, each times a power of two, int8 or uint8, and that power."""
    packed, zero_point, bits = weight.packed, weight.zero_point, weight.grid.num_bits
    if 8 % bits:
        codes = _scratch("codes", (planes, weight.out_features, weight.in_features // planes), torch.uint8)
        unpack_by_place(packed, bits, codes)
        return (codes if zero_point is not None else codes.view(torch.int8).add_(weight.grid.qmin)), 1
    unit = 2 ** (8 - bits)  # a code stays in the upper bits of its byte; powers of two are exact
    words = packed
    if zero_point is None and packed.dtype == torch.int32:
        # What is stored of a signed code is code - qmin: with its upper bit flipped it is the code in two's complement.
        words = _scratch("words", packed.shape, torch.int32)
        torch.bitwise_xor(packed, _repeated(2 ** (bits - 1), bits), out=words)
    stored = words.view(torch.uint8)
    codes = stored
    if planes > 1:
        codes = _scratch("codes", (planes, *stored.shape), torch.uint8)
        for plane in range(planes):
            shift = 8 - bits * (plane + 1)
            shifted = torch.bitwise_left_shift(stored, shift, out=codes[plane]) if shift else stored
            if plane:  # the lowest code is alone in its byte once it is shifted up
                mask = _repeated((2**bits - 1) * unit, 8)
                torch.bitwise_and(shifted.view(torch.int32), mask, out=codes[plane].view(torch.int32))
    return codes.view(torch.int8 if zero_point is None else torch.uint8).view(planes, weight.out_features, -1), unit


def _spread(values: Tensor, grouped: Tensor) -> Tensor:
    """Returns `values` [O, G] as [O, 1, G, g / n], to be multiplied with the planes [O, n, G, g / n] of a weight.

    A plane has few columns of a group, and torch's loops over so few take most of the time: with 2 bits in groups of
    64, 1.9 of 2.2 ns a weight. So the values of a plane are written out once; all planes are alike.
    """
    rows, planes, *shape = grouped.shape
    if planes == 1:
        return values[:, None, :, None]
    return _scratch("spread", (rows, 1, *shape), values.dtype).copy_(values[:, None, :, None])


def _scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor that the next call with this name, in this thread, overwrites.

    The buffers are kept: fresh ones for every layer would cost page faults, and leave holes in the heap.
    """
    size = math.prod(shape)
    buffer: Tensor | None = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of inference mode
            buffer = torch.empty(size, dtype=dtype)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(shape)


def _repeated(value: int, bits: int) -> int:
    """Returns the int32 that has `value` in each of its fields of `bits` bits."""
    word = sum(value << place for place in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word


def _int4_layout(weight: PackedWeight, group_size: int) -> tuple[Tensor, Tensor]:
    """Returns torch's int4 blob [O, I / 2] uint8 and scales_and_zeros [I/g, O, 2] bfloat16.

    Rows are packed a few at a time: torch wants int32 codes, eight times what it makes of them. Where its layout is
    known, words of 4 bits are put into it as they are, in a quarter of the time.
    """
    # What stays is allocated before what goes: the other way round, the heap is left full of holes.
    blob = torch.empty(weight.out_features, weight.in_features // 2, dtype=torch.uint8)
    scales_and_zeros = native_scales(weight, group_size)
    words = weight.words()
    rows = max(1, _PACKED_ELEMENTS // (_BLOCK_ROWS * weight.in_features)) * _BLOCK_ROWS
    known = weight.grid.num_bits == 4 and weight.out_features % _BLOCK_ROWS == 0 and _interleaves()
    for packed, some in zip(blob.split(rows), words.split(rows), strict=True):
        if known:
            _interleave(some, packed)
        else:
            packed.copy_(_INT4_PACK(_unsigned_codes(some, weight), _INNER_K_TILES))
    return blob, scales_and_zeros


def _interleave(words: Tensor, out: Tensor) -> None:
    """Writes words [R, I / 8] of 4-bit codes to `out` [R, I / 2] uint8, in torch's int4 layout for AVX512.

    A block of 64 rows has 32 bytes for each column; the byte at place p holds the codes of the rows p and p + 32.
    """
    stored = words.view(torch.uint8).unflatten(0, (-1, 2, _BLOCK_ROWS // 2))
    first, second = stored[:, 0], stored[:, 1]  # [R / 64, 32, I / 2]: two columns a byte, the even one below
    pairs = out.view(len(stored), -1, 2, _BLOCK_ROWS // 2).permute(2, 0, 3, 1)
    pairs[0] = (first & 15) | (second << 4)
    pairs[1] = (first >> 4) | (second & 240)


@functools.cache
def _interleaves() -> bool:
    """Returns whether torch's int4 layout on this processor is that of `_interleave`, from a trial."""
    if sys.byteorder != "little":
        return False
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2 * _BLOCK_ROWS, 8), generator=generator).to(torch.int32)
    ours = torch.empty(len(words), 32, dtype=torch.uint8)
    _interleave(words, ours)
    codes = unpack_int32(words, Grid(4, symmetric=False), 64).to(torch.int32)
    return torch.equal(ours, _INT4_PACK(codes, _INNER_K_TILES))


def _unsigned_codes(words: Tensor, weight: PackedWeight) -> Tensor:
    """Returns the codes [R, I] of some rows as torch's int4 products take them: int32, the grid's middle moved to 8."""
    codes = _scratch("unsigned", (words.shape[0], weight.in_features), torch.int32)
    middle = 0 if weight.grid.symmetric else 2 ** (weight.grid.num_bits - 1)
    return codes.copy_(unpack_int32(words, weight.grid, weight.in_features)).add_(8 - middle)
