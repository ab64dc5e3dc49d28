"""The integer grid against hand-worked arrays, numerics written in NumPy, and the exactness law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat.grid import Grid, dequantize, fake_quantize, quantize, scale_from_log, snap_scale

GRIDS = [Grid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]


def _case(
    grid: Grid, rows: int, groups: int, size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator)
    # Scales of both signs, small enough that some weights are clipped.
    scale = snap_scale(torch.randn(rows, groups, generator=generator) * 1.5 / grid.qmax)
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
    assert torch.equal(forward, dequantize(codes, scale, zero, dtype))
    # The stored scale is bfloat16; nothing is lost by that.
    assert torch.equal(forward, dequantize(codes, scale.bfloat16(), zero, dtype))


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
    r = np.round(v) + z
    q = np.clip(r, grid.qmin, grid.qmax)
    inside = (grid.qmin <= r) & (r <= grid.qmax)
    assert inside.any()
    assert not inside.all()
    np.testing.assert_array_equal(got[0].numpy().reshape(w.shape), g * inside)
    expected = (g * np.where(inside, q - z - v, q - z)).sum(-1)
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
    snapped = snap_scale(torch.tensor([value]))
    assert torch.equal(snapped, snapped.bfloat16().float())
    assert snapped.abs().item() >= 1e-5
    if abs(value) > 2e-5:
        assert snapped.item() == torch.tensor(value).bfloat16().item()


def test_log_scale_moves_the_scale_relatively_and_keeps_its_sign() -> None:
    initial, theta = torch.tensor([[0.5, -0.5]]), torch.full((1, 2), 0.5, requires_grad=True)
    scale = scale_from_log(initial, theta, gradient_factor=0.25)
    assert torch.equal(scale, snap_scale(initial * torch.tensor(0.5).exp()))
    (gradient,) = torch.autograd.grad(scale.sum(), theta)
    # d(s0 exp(theta))/dtheta = s, times the factor; snapping is straight-through.
    assert torch.allclose(gradient, initial * torch.tensor(0.5).exp() * 0.25)
