"""The integer grid against hand-worked arrays, numerics written in NumPy, and the exactness law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat.grid import (
    SCALE_FLOOR,
    Grid,
    dequantize,
    fake_quantize,
    minmax_scale,
    percentile_scale,
    quantize,
    round_zero_point,
    scale_from_log,
    search_scale,
    snap_scale,
    stored_codes,
)

GRIDS = [Grid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
GRIDS += [Grid(2, levels="ternary"), Grid(2, levels="seq")]
GRIDS += [Grid(4, levels="float", scale_dtype=kind) for kind in ("bfloat16", "e4m3", "e8m0")]
GRIDS += [Grid(8, levels="float", scale_dtype=kind) for kind in ("bfloat16", "e8m0")]


def _case(
    grid: Grid, rows: int, groups: int, size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator)
    # Scales of both signs, small enough that some weights are clipped.
    scale = snap_scale(torch.randn(rows, groups, generator=generator) * 1.5 / grid.qmax, grid)
    zero = None
    if not grid.symmetric:
        scale = scale.abs()
        zero = torch.randint(0, grid.qmax + 1, (rows, groups), generator=generator).float()
    return weight, scale, zero


def test_codes_of_a_hand_worked_array() -> None:
    weight = torch.tensor([[0.26, -0.8, 0.5, 0.1]])
    # v = w / 0.25 = 1.04, -3.2, 2.0, 0.4 in groups of two; the second group has a negative scale.
    scale = torch.tensor([[0.25, -0.25]])
    assert quantize(weight, scale, None, Grid(3)).tolist() == [[1, -3, -2, 0]]
    assert dequantize(torch.tensor([[1, -3, -2, 0]]), scale, None, torch.float32).tolist() == [[0.25, -0.75, 0.5, 0.0]]


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize(weight, torch.ones(1, 1), None, Grid(4)).tolist() == [[0, 2, 2, 0, -2, -2]]


def test_symmetric_grid_uses_the_full_range() -> None:
    weight = torch.tensor([[-8.0, 7.0, 9.0, -9.0]])
    assert quantize(weight, torch.ones(1, 1), None, Grid(4)).tolist() == [[-8, 7, 7, -8]]
    assert quantize(weight, -torch.ones(1, 1), None, Grid(4)).tolist() == [[7, -7, -8, 7]]


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"num_bits={bits}"):
        Grid(bits)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    master=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_forward_is_dequantized_codes_bit_for_bit(
    grid: Grid, rows: int, groups: int, size: int, dtype: torch.dtype, master: torch.dtype, seed: int
) -> None:
    weight, scale, zero = _case(grid, rows, groups, size, seed)
    weight = weight.to(master)
    forward = fake_quantize(weight, scale, zero, grid, dtype)
    codes = quantize(weight, scale, zero, grid)
    assert codes.dtype == grid.code_dtype
    assert int(codes.min()) >= grid.qmin
    assert int(codes.max()) <= grid.qmax
    assert torch.equal(forward, dequantize(codes, scale, zero, dtype, grid.offset))
    # The stored scale is bfloat16; nothing is lost by that, nor by storing codes as plain integers.
    stored, plain, factor = stored_codes(codes, grid)
    assert plain.levels == ("float" if grid.levels == "float" else "integer")
    assert plain.qmin <= int(stored.min())
    assert int(stored.max()) <= plain.qmax
    assert torch.equal(forward, dequantize(stored, (scale * factor).bfloat16(), zero, dtype))


def test_forward_is_the_same_in_one_chunk_and_in_many() -> None:
    grid = Grid(4)
    weight, scale, _ = _case(grid, 1024, 9, 64, 0)
    whole = fake_quantize(weight, scale, None, grid)
    rows = [fake_quantize(weight[i : i + 1], scale[i : i + 1], None, grid) for i in range(0, 1024, 97)]
    assert torch.equal(whole[::97], torch.cat(rows))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_equations(grid: Grid) -> None:
    weight, scale, zero = _case(grid, 6, 3, 32, 1)
    weight.requires_grad_()
    scale = scale.clone().requires_grad_()
    leaves = [weight, scale]
    if zero is not None:
        zero = zero.requires_grad_()
        leaves.append(zero)
    upstream = torch.randn(6, 96)
    got = torch.autograd.grad(fake_quantize(weight, scale, zero, grid), leaves, upstream)

    w, g = weight.detach().numpy().reshape(6, 3, 32), upstream.numpy().reshape(6, 3, 32)
    s = scale.detach().numpy()[..., None]
    z = 0.0 if zero is None else zero.detach().numpy()[..., None]
    v = (w / s).astype(np.float32)
    r = (grid.rounded(torch.from_numpy(v)).numpy() if grid.levels == "float" else np.round(v - grid.offset)) + z
    q = np.clip(r, grid.qmin, grid.qmax)
    inside = (grid.qmin <= r) & (r <= grid.qmax)
    assert inside.any()
    assert not inside.all()
    np.testing.assert_array_equal(got[0].numpy().reshape(w.shape), g * inside)
    level = q - z + grid.offset
    expected = (g * np.where(inside, level - v, level)).sum(-1)
    np.testing.assert_allclose(got[1].numpy(), expected, rtol=1e-4, atol=1e-4 * grid.qmax)
    if zero is not None:
        np.testing.assert_allclose(got[2].numpy(), (g * np.where(inside, 0, -s)).sum(-1), rtol=1e-4, atol=1e-5)


def test_scale_gradient_of_clipped_weights_is_a_finite_difference() -> None:
    # Where every weight is clipped, ŵ = q * s is linear in s and the gradient is exact.
    weight, scale = torch.tensor([[5.0, -7.0, 6.0]]), torch.tensor([[0.25]], requires_grad=True)
    upstream = torch.tensor([[0.3, -0.2, 0.5]])
    (got,) = torch.autograd.grad(fake_quantize(weight, scale, None, Grid(3)), scale, upstream)
    step = 2.0**-6
    values = [
        float((fake_quantize(weight, torch.tensor([[0.25 + d]]), None, Grid(3)) * upstream).sum())
        for d in (step, -step)
    ]
    assert got.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scale_gradient_is_a_finite_difference_where_codes_do_not_change(grid: Grid) -> None:
    # ŵ = level * s, and the straight-through term of the entries inside is -v: at a level itself it is the level, so
    # entries are put where the rounding error is known and the codes survive the step.
    scale = torch.tensor([[0.25]], dtype=torch.float32)
    codes = torch.arange(grid.qmin, grid.qmax + 1).float()
    if grid.levels == "float":
        codes = grid.rounded(codes / 16).unique()
    level = codes + grid.offset
    v = level + (grid.cell(level)[1] - level) / 4
    weight = (v * scale).view(1, -1)
    zero = None if grid.symmetric else torch.zeros(1, 1)
    upstream = torch.linspace(-1, 1, weight.numel()).view(1, -1)
    leaf = scale.clone().requires_grad_()
    (got,) = torch.autograd.grad(fake_quantize(weight, leaf, zero, grid), leaf, upstream)
    # With the codes held, d(level * s)/ds = level; the straight-through estimate takes v = w/s off where inside.
    assert got.item() == pytest.approx(float((upstream[0] * (level - v)).sum()), abs=1e-4 * grid.steps)
    held = [
        float((dequantize(codes.view(1, -1), s, None, torch.float64, grid.offset) * upstream.double()).sum())
        for s in (scale + 2**-6, scale - 2**-6)
    ]
    slope = (held[0] - held[1]) / 2**-5
    assert got.item() == pytest.approx(slope - float((upstream[0].double() * v).sum()), abs=1e-3 * grid.steps)


def test_ternary_and_seq_codes_of_hand_worked_arrays() -> None:
    weight = torch.tensor([[-0.9, -0.3, 0.2, 0.26, 2.0]])
    half = torch.tensor([[0.5]])
    ternary, seq = Grid(2, levels="ternary"), Grid(2, levels="seq")
    assert quantize(weight, half, None, ternary).tolist() == [[-1, -1, 0, 1, 1]]
    # v = w / 0.5 = -1.8, -0.6, 0.4, 0.52, 4.0; levels -1.5, -0.5, 0.5, 0.5, 1.5.
    assert quantize(weight, half, None, seq).tolist() == [[-2, -1, 0, 0, 1]]
    assert fake_quantize(weight, half, None, seq).tolist() == [[-0.75, -0.25, 0.25, 0.25, 0.75]]
    stored, grid, factor = stored_codes(quantize(weight, half, None, seq), seq)
    assert (stored.tolist(), grid, factor) == ([[-3, -1, 1, 1, 3]], Grid(3), 0.5)


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (2, False)])
def test_levels_of_two_bits_are_refused_elsewhere(bits: int, symmetric: bool) -> None:
    with pytest.raises(ValueError, match=r"levels='ternary' with num_bits"):
        Grid(bits, symmetric, "ternary")


def test_a_learned_zero_point_is_rounded_clipped_and_straight_through() -> None:
    zero = torch.tensor([[2.6, -3.0, 99.0]], requires_grad=True)
    rounded = round_zero_point(zero, Grid(4, symmetric=False), gradient_factor=0.25)
    assert rounded.tolist() == [[3.0, 0.0, 15.0]]
    (gradient,) = torch.autograd.grad(rounded.sum(), zero)
    assert gradient.tolist() == [[0.25, 0.25, 0.25]]


def test_the_incoming_gradient_is_left_alone() -> None:
    weight, scale, _ = _case(Grid(4), 4, 2, 16, 2)
    upstream = torch.randn(4, 32)
    before = upstream.clone()
    torch.autograd.grad(fake_quantize(weight.requires_grad_(), scale, None, Grid(4)), weight, upstream)
    assert torch.equal(upstream, before)


def test_only_weight_and_scale_are_saved_for_the_backward() -> None:
    weight, scale, _ = _case(Grid(4), 8, 2, 32, 3)
    out = fake_quantize(weight.requires_grad_(), scale, None, Grid(4))
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert {t.data_ptr() for t in saved} == {weight.data_ptr(), scale.data_ptr()}


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_snapped_scale_is_bfloat16_and_above_the_floor(value: float) -> None:
    snapped = snap_scale(torch.tensor([value]), Grid(4))
    assert torch.equal(snapped, snapped.bfloat16().float())
    assert snapped.abs().item() >= SCALE_FLOOR
    if abs(value) > SCALE_FLOOR:
        assert snapped.item() == torch.tensor(value).bfloat16().item()
    elif value:
        assert snapped.item() == math.copysign(SCALE_FLOOR, value)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_group_of_zeros_has_a_scale_from_which_training_can_leave_zero(zero: float) -> None:
    assert snap_scale(torch.tensor([zero]), Grid(4)).item() == torch.tensor(1e-5).bfloat16().item()
    for grid in (Grid(4), Grid(8, symmetric=False), Grid(2, levels="ternary")):
        weight = torch.full((2, 32), zero)
        for scale, zero_point in (minmax_scale(weight, grid, (2, 1)), search_scale(weight, grid, (2, 1))):
            assert not fake_quantize(weight, scale, zero_point, grid).any()


@pytest.mark.parametrize("shape", [(8, 4), (8, 1), (1, 1)], ids=["group", "channel", "tensor"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_small_weights_are_as_exact_as_others(grid: Grid, shape: tuple[int, int]) -> None:
    """A power of two changes no digit: codes stay the same, and scales are multiplied by it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 128, generator=generator) * 0.02
    importance = torch.rand(128, generator=generator)
    for factor in (2.0**-10, 2.0**-20, 2.0**-60, 2.0**-88 if grid.qmax < 256 else 2.0**-80):
        for start in (
            lambda w: minmax_scale(w, grid, shape),
            lambda w: percentile_scale(w, grid, shape, 99.0),
            lambda w: search_scale(w, grid, shape, importance),
        ):
            (scale, zero_point), (small_scale, small_zero) = start(weight), start(weight * factor)
            assert torch.equal(small_scale, scale * factor)
            assert (zero_point is None) if small_zero is None else torch.equal(zero_point, small_zero)
            codes = quantize(weight, scale, zero_point, grid)
            assert torch.equal(codes, quantize(weight * factor, small_scale, small_zero, grid))
            exact = fake_quantize(weight * factor, small_scale, small_zero, grid)
            assert torch.equal(exact, fake_quantize(weight, scale, zero_point, grid) * factor)


def test_log_scale_moves_the_scale_relatively_and_keeps_its_sign() -> None:
    initial, theta = torch.tensor([[0.5, -0.5]]), torch.full((1, 2), 0.5, requires_grad=True)
    scale = scale_from_log(initial, theta, gradient_factor=0.25, grid=Grid(4))
    assert torch.equal(scale, snap_scale(initial * torch.tensor(0.5).exp(), Grid(4)))
    (gradient,) = torch.autograd.grad(scale.sum(), theta)
    # d(s0 exp(theta))/dtheta = s, times the factor; snapping is straight-through.
    assert torch.allclose(gradient, initial * torch.tensor(0.5).exp() * 0.25)
