"""Packing: the identity law, and the layout of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat.grid import Grid, pack_codes, pack_int32, packed_shape, unpack_codes, unpack_int32


def _codes(grid: Grid, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=generator).to(grid.code_dtype)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31))
def test_unpacking_undoes_packing(bits: int, symmetric: bool, rows: int, columns: int, seed: int) -> None:
    grid = Grid(bits, symmetric)
    codes = _codes(grid, rows, columns, seed)
    packed = pack_int32(codes, grid)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_int32(packed, grid, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 96, 100, 64])
def test_the_layout_is_that_of_compressed_tensors(bits: int, columns: int) -> None:
    grid = Grid(bits)
    codes = _codes(grid, 5, columns, bits)
    packed = pack_int32(codes, grid)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(codes.shape)), codes)


def test_a_hand_worked_word() -> None:
    codes = torch.tensor([[-8, -7, 7, 0, 0, 0, 0, 1]], dtype=torch.int8)
    assert [hex(word & 0xFFFFFFFF) for word in pack_int32(codes, Grid(4))[0].tolist()] == ["0x98888f10"]


def test_codes_outside_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside \[-8, 7\]"):
        pack_int32(torch.tensor([[8]]), Grid(4))


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need torch\.int32 of 2"):
        unpack_int32(torch.zeros(1, 3, dtype=torch.int32), Grid(4), 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_floats_come_back_as_they_were(bits: int) -> None:
    grid = Grid(bits, levels="float")
    drawn = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)) * grid.qmax / 2
    codes = grid.rounded(drawn.clamp(grid.qmin, grid.qmax)).to(grid.code_dtype)
    packed = pack_codes(codes, grid)
    assert (tuple(packed.shape), packed.dtype) == packed_shape(7, 48, grid)
    assert torch.equal(unpack_codes(packed, grid, 48), codes)
    with pytest.raises(ValueError, match="is read"):
        unpack_codes(packed, grid, 50)


def test_halves_of_a_byte_of_a_hand_worked_row() -> None:
    codes = torch.tensor([[0.0, 0.5, -0.5, 6.0, -6.0, -0.0]], dtype=torch.bfloat16)
    assert pack_codes(codes, Grid(4, levels="float")).tolist() == [[0x10, 0x79, 0x0F]]
    with pytest.raises(ValueError, match="cannot be packed two in a byte"):
        pack_codes(codes[:, :5], Grid(4, levels="float"))
