"""The scales of groups of weights, the grid that they lie on, and zero points.

A scale is snapped to its grid *inside* the forward (straight-through), so the trained scale is the stored one. That
grid is bfloat16, or for floats (levels.py) what their formats store:

- "e8m0": a power of two. A learned scale is rounded to the nearest one by its logarithm: log_scale moves all the time,
  and the power of two follows once it has come half the way.
- "e4m3": E4M3 numbers under one float32 scale for the whole tensor. That one is made a power of two, so what is left of
  a scale is four bits of significand, whatever the tensor's scale is. Scales below 2^-10 of the largest one are raised
  to that: E4M3 holds these ratios at full precision, with room for matrices that have to share the tensor's scale.

All of them are bfloat16 numbers.

Letters: O out features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmqat.grid.levels import EXPONENT, Grid

SCALE_FLOOR = 2.0**-100
"""Smallest |scale|: far below any weight that matters, and far enough above bfloat16's smallest normal number (2^-126)
that half of it, or the 64th part that a kernel needs, is exact too."""
ZERO_SCALE = 1e-5
"""Scale of a group whose weights are all zero: they are exact at any scale, and training can leave zero from here."""
_STORED_ZERO_SCALE = float(torch.tensor(ZERO_SCALE, dtype=torch.bfloat16))
E4M3_OCTAVES = 10
"""How far below the largest E4M3 scale of a tensor the smallest may lie, in powers of two; E4M3 has 14."""
_FOUR_BIT_ZERO_SCALE = 2.0**-17
_SQRT_HALF_UP = (1 << 23) - 0x3504F3
"""Added to the bits of a float32, it carries into the exponent where the significand is at least the root of 2."""


def snap_scale(scale: Tensor, grid: Grid) -> Tensor:
    """Returns `scale` rounded to `grid.scale_dtype`, as float32 of its shape, with a straight-through gradient.

    "bfloat16": magnitudes below `SCALE_FLOOR` become the floor and keep their sign; 0 becomes `ZERO_SCALE`. "e8m0" and
    "e4m3" drop the sign. "e4m3" raises small scales, and 0, to 2^-`E4M3_OCTAVES` of the largest.
    """
    return _SnapScale.apply(scale, grid)  # type: ignore[no-untyped-call]


def gradient_factor(group: int, grid: Grid) -> float:
    """Returns LSQ's 1/sqrt(g * Q_P) for `group` weights a scale: one clip threshold then serves scales and weights."""
    return 1.0 / math.sqrt(group * grid.steps)


def scale_from_log(initial_scale: Tensor, log_scale: Tensor, gradient_factor: float, grid: Grid) -> Tensor:
    """Returns snap(initial_scale * exp(log_scale)), the scale that the forward uses.

    A step of the optimizer on `log_scale` is a relative step of the scale, so one learning rate fits all models.

    Args:
        initial_scale: [O, G] float32, signed; where the scale starts.
        log_scale: [O, G] float32; the learned theta, 0 at the start.
        gradient_factor: multiplies theta's gradient; LSQ's 1/sqrt(g * Q_P).
        grid: says what scales are snapped to.

    Source: LSQ (1902.08153) section 2.2 for the factor; exponential form so that the sign and positivity hold.
    """
    factored = _ScaleGradient.apply(log_scale.float(), gradient_factor)  # type: ignore[no-untyped-call]
    return snap_scale(initial_scale * torch.exp(factored), grid)


def round_zero_point(zero_point: Tensor, grid: Grid, gradient_factor: float) -> Tensor:
    """Returns the learned zero point [O, G] as the integers that the forward uses, straight-through.

    Args:
        zero_point: [O, G] float32, the trained parameter.
        grid: the code range, which the integer is clipped to.
        gradient_factor: multiplies the parameter's gradient; the scale's factor serves.

    Source: LSQ+ (2004.09576) section 3, with the zero point as a code instead of a real offset.
    """
    factored = _ScaleGradient.apply(zero_point.float(), gradient_factor)  # type: ignore[no-untyped-call]
    return _RoundZeroPoint.apply(factored, grid.qmin, grid.qmax)  # type: ignore[no-untyped-call]


def of_all_rows(scale: Tensor, block: int, rows: int) -> Tensor:
    """Returns scales [ceil(rows / block), G], each for `block` rows, as those of every row, [rows, G]."""
    return scale if block == 1 else scale.repeat_interleave(block, dim=0)[:rows]


def range_scale(extreme: Tensor, grid: Grid) -> Tensor:
    """Returns the scale that takes weights up to `extreme` in magnitude to the levels of `grid`, snapped.

    For powers of two it is the rule of compressed-tensors: `extreme` with a quarter of its power of two added, rounded
    down to a power of two, over the largest power of two that the format has. Weights above 7/8 of the next power of
    two are so not clipped.
    """
    if grid.scale_dtype != "e8m0":
        return snap_scale(extreme / grid.reach, grid)
    power = ((extreme.float().view(torch.int32) + (1 << 21)) & EXPONENT).view(torch.float32)
    return snap_scale(power / 2.0 ** math.floor(math.log2(grid.qmax)), grid)


def _to_bfloat16(scale: Tensor) -> Tensor:
    snapped = scale.to(torch.bfloat16).float()
    small = torch.full_like(snapped, SCALE_FLOOR).copysign_(snapped).masked_fill_(scale == 0, _STORED_ZERO_SCALE)
    return torch.where(snapped.abs() < SCALE_FLOOR, small, snapped)


def _to_power(scale: Tensor) -> Tensor:
    bits = scale.abs().masked_fill(scale == 0, ZERO_SCALE).float().view(torch.int32)
    return ((bits + _SQRT_HALF_UP) & EXPONENT).view(torch.float32).clamp(SCALE_FLOOR, 2.0**120)


def _to_four_bits(scale: Tensor) -> Tensor:
    bits = scale.abs().float().view(torch.int32)
    even = (bits >> 20) & 1
    snapped = ((bits + 0x7FFFF + even) & ~0xFFFFF).view(torch.float32)
    largest = snapped.amax() if snapped.numel() else snapped.new_ones(())
    largest = torch.where(largest > 0, largest, _FOUR_BIT_ZERO_SCALE)
    return torch.maximum(snapped, (largest * 2.0**-E4M3_OCTAVES).clamp(min=SCALE_FLOOR))


_SNAPS = {"bfloat16": _to_bfloat16, "e8m0": _to_power, "e4m3": _to_four_bits}


class _SnapScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, grid: Grid) -> Tensor:
        return _SNAPS[grid.scale_dtype](scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _RoundZeroPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        return zero_point.round().clamp_(qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None
