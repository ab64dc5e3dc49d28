"""Scale starts: against brute force, and never worse than what they replace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmqat.grid import Grid, dequantize, minmax_scale, percentile_scale, quantize, search_scale, snap_scale
from llmqat.grid.search import CLIP_RATIOS, REFINEMENTS

GRIDS = [Grid(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
GRIDS += [Grid(2, levels="ternary"), Grid(2, levels="seq")]
GRIDS += [Grid(4, levels="float", scale_dtype=kind) for kind in ("bfloat16", "e4m3", "e8m0")]
GRIDS += [Grid(8, levels="float", scale_dtype=kind) for kind in ("bfloat16", "e8m0")]
SHAPES = [(6, 4), (6, 1), (1, 1)]


def _error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid, h: torch.Tensor
) -> torch.Tensor:
    return ((dequantize(quantize(w, scale, zero, grid), scale, zero, torch.float32) - w).square() * h).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_loses_no_more_than_plain_rounding(grid: Grid, shape: tuple[int, int]) -> None:
    weight, h = torch.randn(6, 64), torch.rand(64)
    plain = _error(weight, *minmax_scale(weight, grid, shape), grid, h).sum()
    found = _error(weight, *search_scale(weight, grid, shape, h), grid, h).sum()
    assert found <= plain * (1 + 1e-5)


def test_search_finds_the_best_of_its_candidates_by_brute_force() -> None:
    grid, weight, h = Grid(3), torch.randn(4, 32), torch.rand(32)
    scale, _ = search_scale(weight, grid, (4, 2), h)
    for row in range(4):
        for group in range(2):
            w = weight[row : row + 1, group * 16 : group * 16 + 16]
            weights = h[group * 16 : group * 16 + 16]
            extreme = w.flatten()[w.abs().argmax()]

            def cost(ratio: float, w: torch.Tensor = w, h: torch.Tensor = weights, e: torch.Tensor = extreme) -> float:
                return float(_error(w, snap_scale((e * ratio / -4).view(1, 1), Grid(3)), None, grid, h).sum())

            far_apart = [sign * ratio for ratio in CLIP_RATIOS for sign in (1, -1)]
            best = min(far_apart, key=cost)
            around = [best, *(best + step for step in REFINEMENTS)]
            chosen = float(_error(w, scale[row : row + 1, group : group + 1], None, grid, weights).sum())
            assert chosen == pytest.approx(min(map(cost, around)), rel=1e-5)
            assert chosen <= 1.1 * min(cost(sign * (1.05 - 0.02 * step)) for step in range(36) for sign in (1, -1))


def test_plain_rounding_is_absmax() -> None:
    scale, zero = minmax_scale(torch.tensor([[1.0, -3.5, 2.0, 0.0]]), Grid(4), (1, 1))
    assert scale.item() == 0.5
    assert zero is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_of_zeros_stays_zero(grid: Grid) -> None:
    for start in (minmax_scale, search_scale):
        scale, zero = start(torch.zeros(2, 32), grid, (2, 1))
        assert torch.isfinite(scale).all()
        assert not dequantize(quantize(torch.zeros(2, 32), scale, zero, grid), scale, zero, torch.float32).any()


def test_important_inputs_are_rounded_better() -> None:
    grid, weight = Grid(2), torch.randn(64, 32)
    h = torch.ones(32)
    h[:4] = 1000.0
    weighted = _error(weight, *search_scale(weight, grid, (64, 1), h), grid, torch.ones(32))
    plain = _error(weight, *search_scale(weight, grid, (64, 1)), grid, torch.ones(32))
    assert weighted[:, :4].sum() < plain[:, :4].sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.randn(2, 32)
    with pytest.raises(ValueError, match="finite"):
        search_scale(weight, Grid(4), (2, 1), torch.full((32,), bad))
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        search_scale(weight, Grid(4), (2, 1))


def test_percentiles_are_those_of_numpy_and_leave_ternary_its_mean() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    groups = weight.view(18, 32).numpy()
    scale, _ = percentile_scale(weight, Grid(4), (6, 3), 90)
    wanted = torch.tensor(np.quantile(np.abs(groups), 0.9, axis=1) / 7).float()
    assert torch.equal(scale.view(-1), snap_scale(wanted, Grid(4)))
    scale, zero = percentile_scale(weight, Grid(4, symmetric=False), (6, 3), 90)
    low, high = np.quantile(groups, [0.05, 0.95], axis=1)
    assert torch.allclose(scale.view(-1), torch.tensor((high - low) / 15).float(), rtol=2**-7)
    assert zero is not None
    assert torch.equal(zero, zero.round())
    whole = percentile_scale(weight, Grid(4), (6, 3), 100)[0]
    assert torch.equal(whole, minmax_scale(weight, Grid(4), (6, 3))[0])
    ternary = Grid(2, levels="ternary")
    assert torch.equal(percentile_scale(weight, ternary, (6, 3), 90)[0], minmax_scale(weight, ternary, (6, 3))[0])
