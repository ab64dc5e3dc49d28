"""Packing of b-bit codes into int32 words and back: element 0 in the lowest bits, codes may straddle words.

32 consecutive codes of b bits fill exactly b words. A row is padded with zero bits to a whole word, so a row of C
codes takes ceil(C * b / 32) words. What is stored is the unsigned offset `code - qmin`. The layout is that of
compressed-tensors' `pack-quantized`.

Letters: R rows, C codes per row, b bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from llmqat.grid.levels import Grid


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
    unsigned = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    codes = torch.empty(packed.shape[0], columns, dtype=grid.code_dtype, device=packed.device)
    for word, shift, selected in _positions(columns, bits, packed.device):
        both = unsigned[:, word] | (unsigned[:, word + 1] << 32)
        codes[:, selected] = (((both >> shift) & (2**bits - 1)) + grid.qmin).to(grid.code_dtype)
    return codes


def _positions(columns: int, bits: int, device: torch.device) -> list[tuple[Tensor, int, Tensor]]:
    """Returns, for each of the 32 places of a period, (word index [n], bit shift, column index [n])."""
    places = []
    for first in range(min(32, columns)):
        selected = torch.arange(first, columns, 32, device=device)
        places.append((selected * bits // 32, first * bits % 32, selected))
    return places


def _to_signed32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
