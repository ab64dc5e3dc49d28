"""Weights that already lie on a lattice keep their codes, and no others are taken for such."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from llmqat.grid import Grid, dequantize, keep_lattice, minmax_scale, on_lattice, quantize, search_scale, snap_scale
from tests.grid.test_search import GRIDS, SHAPES

ALL_GRIDS = [*GRIDS, *(Grid(bits, symmetric) for bits in (5, 6, 7) for symmetric in (True, False))]
KNOWN_GRIDS = [grid for grid in ALL_GRIDS if grid.distances]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_weights(rows: int = 64, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def levels(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """What the scale's magnitude is multiplied with, [groups, weights]: codes, whichever way the scale points."""
    flat = codes.reshape(scale.numel(), -1).float() + grid.offset
    return (flat if zero is None else flat - zero.reshape(-1, 1)) * scale.reshape(-1, 1).sign()


def rounded(grid: Grid, shape: tuple[int, int], scales: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a scheme in float32, the levels of their codes, their scales: no range of them, but as if trained."""
    weight = random_weights(shape[0] if shape[0] > 1 else 64)
    scale, zero = search_scale(weight, grid, shape)
    moved = scale * (1 + 0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(2)))
    scale = moved.to(scales).float() if grid.scale_dtype == "bfloat16" else snap_scale(moved, grid)
    codes = quantize(weight, scale, zero, grid)
    found = dequantize(codes, scale, zero, torch.float32, grid.offset)
    return found, levels(codes, scale, zero, grid), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 8), (64, 4), *SHAPES[1:]])
@pytest.mark.parametrize("grid", KNOWN_GRIDS, ids=str)
def test_weights_of_a_scheme_keep_their_codes_and_their_numbers(
    grid: Grid, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, wanted, _ = rounded(grid, shape)
    weight = weight.to(dtype)
    scale, zero, count = keep_lattice(weight, grid, *minmax_scale(weight, grid, shape))
    codes = quantize(weight, scale, zero, grid)
    if not grid.symmetric and grid.num_bits == 8 and dtype == torch.bfloat16:
        return  # bfloat16 gives some of 256 levels the same number
    assert count == scale.numel()
    assert torch.equal(levels(codes, scale, zero, grid), wanted)
    assert torch.equal(dequantize(codes, scale, zero, dtype, grid.offset), weight)
    assert on_lattice(weight, scale, zero, grid).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "grid", [grid for grid in KNOWN_GRIDS if grid.num_bits <= 6 and grid.scale_dtype == "bfloat16"], ids=str
)
def test_scales_of_float16_move_by_bfloat16_rounding_and_no_code_does(grid: Grid, dtype: torch.dtype) -> None:
    weight, wanted, given = rounded(grid, (64, 8), torch.float16)
    scale, zero, count = keep_lattice(weight.to(dtype), grid, *minmax_scale(weight, grid, (64, 8)))
    codes = quantize(weight.to(dtype), scale, zero, grid)
    assert count == scale.numel()
    assert torch.equal(levels(codes, scale, zero, grid), wanted)
    assert ((scale.abs() - given.abs()).abs() <= 1.5 * 2**-8 * given.abs()).all()  # a float16 may lie between two


@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_other_weights_are_taken_for_none(grid: Grid, group: int) -> None:
    weight, shape = random_weights(512), (512, 256 // group)
    for dtype in (torch.float32, torch.bfloat16):
        for start in (minmax_scale, search_scale):
            scale, zero = start(weight.to(dtype), grid, shape)
            same, zeros, count = keep_lattice(weight.to(dtype), grid, scale, zero)
            assert count == 0
            assert torch.equal(same, scale)
            assert zero is None or torch.equal(zeros, zero)


def test_codes_of_another_scheme_are_taken_for_none() -> None:
    """4 bits with a minimum of their own (Q4_1) in groups of 32, and such without one, are none of groups of 64."""
    blocks = gguf.quants.quantize(random_weights(256).numpy(), gguf.GGMLQuantizationType.Q4_1)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)).bfloat16()
    assert keep_lattice(weight, Grid(4), *minmax_scale(weight, Grid(4), (256, 4)))[2] == 0
    by_32, _, _ = rounded(Grid(4), (64, 8))
    assert keep_lattice(by_32, Grid(4), *minmax_scale(by_32, Grid(4), (64, 4)))[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_gguf_keep_their_codes(dtype: torch.dtype) -> None:
    """Against gguf-py's own Q4_0: d is the entry of largest magnitude divided by -8, in float16."""
    blocks = gguf.quants.quantize(random_weights().numpy(), gguf.GGMLQuantizationType.Q4_0)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)).to(dtype)
    parts = torch.from_numpy(blocks).view(-1, 18)
    d = parts[:, :2].contiguous().view(torch.float16).float()
    nibbles = torch.cat([parts[:, 2:] & 15, parts[:, 2:] >> 4], dim=1).float() - 8
    scale, _, count = keep_lattice(weight, Grid(4), *minmax_scale(weight, Grid(4), (64, 8)))
    assert count == scale.numel()
    codes = quantize(weight, scale, None, Grid(4)).view(-1, 32).float()
    turned = scale.view(-1, 1).sign() * d.sign()
    assert torch.equal(codes * turned, nibbles)
    reached = (nibbles == -8).any(1)
    assert reached.all()
    assert (turned == 1).all()
    assert ((scale.view(-1, 1) - d).abs() <= 1.5 * 2**-8 * d.abs()).all()
    naive = quantize(weight, minmax_scale(weight, Grid(4), (64, 8))[0], None, Grid(4)).view(-1, 32).float()
    assert (naive.abs() != nibbles.abs()).float().mean() > 0.1


def test_groups_are_told_apart_one_by_one() -> None:
    grid, other = Grid(4), random_weights()
    weight, wanted, given = rounded(grid, (64, 8))
    weight = torch.where(torch.arange(64)[:, None] % 2 == 0, weight, other)
    weight[0], weight[3, 5] = 0, torch.nan
    scale, _, count = keep_lattice(weight, grid, *minmax_scale(weight, grid, (64, 8)))
    assert count == 31 * 8
    assert torch.equal(scale[2::2].abs(), given[2::2].abs())
    assert torch.equal(
        levels(quantize(weight[2::2], scale[2::2], None, grid), scale[2::2], None, grid).view(31, -1),
        wanted.view(64, -1)[2::2],
    )
    found = on_lattice(weight, scale, None, grid)
    assert found[::2].all()
    assert not found[1::2].any()


def test_a_group_with_few_levels_keeps_its_numbers() -> None:
    """Codes that have a common divisor are those of a coarser lattice: other codes, the same numbers."""
    scale = snap_scale(torch.tensor([[0.013], [-0.7], [3.0]]), Grid(4))
    weight = torch.tensor([[-8.0, 4, 0, 2], [6, 3, -3, 0], [0, 0, 5, 0]]).repeat(1, 8) * scale
    found, _, count = keep_lattice(weight.bfloat16(), Grid(4), *minmax_scale(weight, Grid(4), (3, 1)))
    assert count == 3
    codes = quantize(weight.bfloat16(), found, None, Grid(4))
    assert torch.equal(dequantize(codes, found, None, torch.bfloat16), weight.bfloat16())
