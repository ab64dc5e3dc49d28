"""Packing of codes and back: integers into int32 words, floats into bytes.

Integers of b bits: element 0 in the lowest bits, codes may straddle words. 32 consecutive codes of b bits fill exactly
b words. A row is padded with zero bits to a whole word, so a row of C codes takes ceil(C * b / 32) words. What is
stored is the unsigned offset `code - qmin`. The layout is that of compressed-tensors' `pack-quantized`.

Floats of 4 bits: two in a byte, the first in the lower half, each a sign bit above the three bits of E2M1; a zero has
no sign. The layout is that of `nvfp4-pack-quantized` and `mxfp4-pack-quantized`. Floats of 8 bits are E4M3 numbers of
torch.

Letters: R rows, C codes per row, b bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from llmqat.grid.levels import Grid

_E2M1 = (0.0, *Grid(4, levels="float").distances)
"""Levels by their three bits."""


def packed_shape(rows: int, columns: int, grid: Grid) -> tuple[tuple[int, int], torch.dtype]:
    """Returns shape and dtype of what `pack_codes` makes of codes [rows, columns]."""
    if grid.levels == "float":
        return ((rows, columns), torch.float8_e4m3fn) if grid.num_bits == 8 else ((rows, columns // 2), torch.uint8)
    return (rows, -(-columns * grid.num_bits // 32)), torch.int32


def pack_codes(codes: Tensor, grid: Grid) -> Tensor:
    """Returns `codes` [R, C] packed, of `packed_shape`.

    Raises:
        ValueError: when an integer lies outside the grid, or C is odd where two floats share a byte.
    """
    if grid.levels != "float":
        return pack_int32(codes, grid)
    if grid.num_bits == 8:
        return codes.to(torch.float8_e4m3fn)
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes a row cannot be packed two in a byte")
    bits = torch.bucketize(codes.abs(), torch.tensor(_E2M1, dtype=codes.dtype, device=codes.device)).to(torch.uint8)
    bits += (codes < 0).to(torch.uint8) * 8
    return bits[:, ::2] | (bits[:, 1::2] << 4)


def unpack_codes(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Returns the codes [R, columns] of `grid.code_dtype` that `pack_codes` packed.

    Raises:
        ValueError: when `packed` has another dtype or width than that.
    """
    if grid.levels != "float":
        return unpack_int32(packed, grid, columns)
    shape, dtype = packed_shape(packed.shape[0], columns, grid)
    if packed.dtype != dtype or tuple(packed.shape) != shape:
        raise ValueError(f"packed codes are {packed.dtype} of shape {list(packed.shape)}; {dtype} of {shape} is read")
    if grid.num_bits == 8:
        return packed.to(grid.code_dtype)
    levels = torch.tensor([*_E2M1, *(-level for level in _E2M1)], dtype=grid.code_dtype, device=packed.device)
    pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)  # of each byte
    return pairs[packed.int()].view(packed.shape[0], columns)


def pack_int32(codes: Tensor, grid: Grid) -> Tensor:
    """Returns `codes` [R, C] (integers in grid's range) packed as int32 [R, ceil(C * b / 32)].

    Raises:
        ValueError: when a code lies outside the grid.
    """
    bits = grid.num_bits
    if codes.numel() and (int(codes.min()) < grid.qmin or int(codes.max()) > grid.qmax):
        raise ValueError(
            f"codes span [{int(codes.min())}, {int(codes.max())}], outside [{grid.qmin}, {grid.qmax}] of {bits} bits"
        )
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 32 % bits == 0:
        padded = torch.nn.functional.pad(codes.to(torch.int32) - grid.qmin, (0, words * 32 // bits - columns))
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
        # The shifted codes share no bit, so their int32 sum (which wraps) is their union.
        return (padded.view(rows, words, -1) << shifts).sum(-1, dtype=torch.int32)
    offsets = codes.to(torch.int64) - grid.qmin
    # One extra word takes what the last code of a row could carry over; it is always empty and cut off.
    packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    for word, shift, selected in _positions(columns, bits, codes.device):
        value = offsets[:, selected] << shift
        packed.index_add_(1, word, value & 0xFFFFFFFF)
        packed.index_add_(1, word + 1, value >> 32)
    return _to_signed32(packed[:, :words])


def unpack_int32(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Returns the codes [R, columns] of `grid.code_dtype` that `pack_int32` packed; int8 codes of 8 bits as they are.

    Raises:
        ValueError: when `packed` is not int32 or its width is not ceil(columns * b / 32).
    """
    bits = grid.num_bits
    if packed.dtype == torch.int8 == grid.code_dtype and bits == 8 and packed.shape[-1] == columns:
        return packed  # never packed: the form `int-quantized`
    words = -(-columns * bits // 32)
    if packed.dtype != torch.int32 or packed.shape[-1] != words:
        raise ValueError(
            f"packed codes are {packed.dtype} of {packed.shape[-1]} words a row; "
            f"{columns} codes of {bits} bits need torch.int32 of {words}"
        )
    if 8 % bits == 0 and sys.byteorder == "little":
        packed_bytes = packed.contiguous().view(torch.uint8)
        spread = torch.stack([(packed_bytes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
        codes = spread.view(packed.shape[0], -1)[:, :columns]
        return (codes.view(grid.code_dtype) + grid.qmin) if grid.symmetric else codes.contiguous()
    if columns % 8 == 0 and sys.byteorder == "little":
        return _unpack_bytes(packed, grid, columns)
    unsigned = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    codes = torch.empty(packed.shape[0], columns, dtype=grid.code_dtype, device=packed.device)
    for word, shift, selected in _positions(columns, bits, packed.device):
        both = unsigned[:, word] | (unsigned[:, word + 1] << 32)
        codes[:, selected] = (((both >> shift) & (2**bits - 1)) + grid.qmin).to(grid.code_dtype)
    return codes


def _unpack_bytes(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Returns what `unpack_int32` does of words that lie in memory as one stream of bits: 8 codes are b bytes of it."""
    codes = torch.empty(packed.shape[0], columns // 8, 8, dtype=torch.uint8, device=packed.device)
    unpack_by_place(packed, grid.num_bits, codes.movedim(-1, 0))
    found = codes.view(packed.shape[0], columns)
    return found.view(grid.code_dtype).add_(grid.qmin) if grid.symmetric else found


def unpack_by_place(packed: Tensor, bits: int, out: Tensor) -> None:
    """Writes the unsigned codes of packed rows to `out`, sorted by position modulo eight; little-endian machines only.

    Args:
        packed: words [R, ceil(C * b / 32)] of rows of C codes, a multiple of eight.
        bits: b.
        out: uint8 [8, R, C / 8]; column c of a row goes to [c % 8, :, c // 8].
    """
    stream = packed.contiguous().view(torch.uint8)[:, : out.shape[-1] * bits]
    stored = [part.contiguous() for part in stream.unflatten(1, (-1, bits)).unbind(-1)]
    for place, codes in enumerate(out):
        first, shift = divmod(place * bits, 8)
        code = stored[first] >> shift
        if shift + bits > 8:
            code |= stored[first + 1] << (8 - shift)
        codes.copy_(code & (2**bits - 1))


def _positions(columns: int, bits: int, device: torch.device) -> list[tuple[Tensor, int, Tensor]]:
    """Returns, for each of the 32 places of a period, (word index [n], bit shift, column index [n])."""
    places = []
    for first in range(min(32, columns)):
        selected = torch.arange(first, columns, 32, device=device)
        places.append((selected * bits // 32, first * bits % 32, selected))
    return places


def _to_signed32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
