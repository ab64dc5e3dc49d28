"""Small floats against torch's own and compressed-tensors', and what a grid says of its levels."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from torch import Tensor

from llmqat.grid import Grid
from tests.grid.test_arithmetic import GRIDS

E2M1, E4M3 = Grid(4, levels="float"), Grid(8, levels="float")


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(20_000, generator=generator) * torch.exp2(
        torch.randint(-14, 12, (20_000,), generator=generator)
    )
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 2.0**-10, 3 * 2.0**-10, 17.0, 19.0, 432.0])
    ends = torch.tensor([0.0, 6.0, 7.0, 448.0, 464.0, 465.0, 1e30, torch.inf])
    return torch.cat([random, ties, -ties, ends, -ends])


def levels(grid: Grid) -> Tensor:
    """All levels of a symmetric grid without an offset, in order."""
    if grid.levels != "float":
        return torch.arange(grid.qmin, grid.qmax + 1).float()
    steps = torch.cat([torch.arange(0, 64) * 2.0**-9, torch.arange(0, 449 * 64) / 64])
    return grid.rounded(torch.cat([-steps, steps]).clamp(grid.qmin, grid.qmax)).unique()


def test_e4m3_rounds_as_torch_does() -> None:
    x = numbers()
    assert torch.equal(E4M3.rounded(x).clamp(-448, 448), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(E4M3.round_(x.clone()), E4M3.rounded(x))


def test_e2m1_rounds_as_compressed_tensors_does() -> None:
    x = numbers()
    assert torch.equal(E2M1.rounded(x).clamp(-6, 6), FP4_E2M1_DATA.cast_to_fp4(x.clamp(-6, 6)))
    assert levels(E2M1).tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.distances == [0.5, 1, 1.5, 2, 3, 4, 6]
    assert len(levels(E4M3)) == 2 * 126 + 1
    assert E4M3.distances == []


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.symmetric and not grid.offset], ids=str)
def test_what_lies_in_a_cell_is_rounded_to_its_level(grid: Grid) -> None:
    found = levels(grid)
    low, high = grid.cell(found)
    assert torch.equal(grid.rounded(low), found)
    assert torch.equal(grid.rounded(high), found)
    middle = (found[1:] + found[:-1]) / 2
    assert ((middle - high[:-1]) <= 0.0101 * (found[1:] - found[:-1])).all()
    assert ((low[1:] - middle) <= 0.0101 * (found[1:] - found[:-1])).all()
    apart = found[1:] - found[:-1]
    assert torch.equal(grid.spacing(found[:-1].abs())[found[:-1] >= 0], apart[found[:-1] >= 0])
    lowest, highest = grid.ends
    assert grid.rounded(torch.tensor([highest * 1.001])) > grid.qmax
    assert grid.rounded(torch.tensor([highest * 0.999])) == grid.qmax
    assert grid.rounded(torch.tensor([lowest * 0.999])) == grid.qmin
