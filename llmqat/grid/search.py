"""Where a scale starts: the plain range, or the clip ratio that loses least.

Plain rounding takes the scale from the extreme of a group. Below 8 bits it pays to clip that extreme: the search tries
clip ratios, first far apart and then around the best, and for the symmetric grid both signs of the scale (the sign
decides on which side the one extra code lies). It keeps for each group the candidate with the smallest
sum_j h_j (ŵ_j - w_j)^2, where h_j = E[x_j^2] is the mean square of input feature j over calibration text: the diagonal
of the layer's Hessian.

Letters: O out features, I in features, G scales per row, g weights per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmqat.grid.levels import Grid
from llmqat.grid.scales import SCALE_FLOOR, range_scale, snap_scale

CLIP_RATIOS = tuple(1.05 - 0.1 * i for i in range(8))
"""Shares of a group's extreme that are tried first."""
FLOAT_RATIOS = (1.5, 1.35, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Those for floats, whose levels lie the farther apart the larger they are: the extreme may do better on 4 than on 6
(Four Over Six, 2512.02010)."""
REFINEMENTS = (-0.06, -0.04, -0.02, 0.02, 0.04, 0.06)
"""What is then tried beside the best of them."""
_CHUNK_ELEMENTS = 65_536


def minmax_scale(weight: Tensor, grid: Grid, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Returns (scale, zero_point) of plain rounding: the range of each group, unclipped.

    Symmetric: max|w| / (2^(b-1) - 1), the field's plain "absmax" rounding. Asymmetric: (max - min) / (2^b - 1) over a
    range that includes 0. Ternary: mean|w| (BitNet b1.58, 2402.17764, equation 3). SEQ: max|w| / 2 (ParetoQ,
    2502.02631, section 3).

    Args:
        weight: [O, I] float.
        grid: the code range.
        shape: (O, G), (O, 1) or (1, 1): the scale's.

    Returns:
        scale [*shape] float32 snapped, zero_point [*shape] float32 or None when symmetric.
    """
    flat = weight.detach().reshape(shape[0] * shape[1], -1).float()
    scale, zero_point = _plain(flat, *torch.aminmax(flat, dim=-1, keepdim=True), grid)
    return scale.view(shape), None if zero_point is None else zero_point.view(shape)


def percentile_scale(
    weight: Tensor, grid: Grid, shape: tuple[int, int], percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Returns (scale, zero_point) of plain rounding whose range leaves (100 - percentile) % of a group outside.

    Half of it lies beyond each end for an asymmetric grid; a symmetric one takes the percentile of |w|. The ternary
    grid has no range to cut, and keeps mean|w|.

    Args:
        weight: [O, I] float.
        grid: the code range.
        shape: (O, G), (O, 1) or (1, 1): the scale's.
        percentile: above 50, at most 100, which is `minmax_scale`'s range.

    Returns:
        scale [*shape] float32 snapped, zero_point [*shape] float32 or None when symmetric.
    """
    if grid.levels == "ternary":  # whose plain scale is a mean, not a range
        return minmax_scale(weight, grid, shape)
    flat = weight.detach().reshape(shape[0] * shape[1], -1).float()
    if grid.symmetric:
        high = _row_quantile(flat.abs(), percentile / 100)
        return snap_scale(high / grid.reach, grid).view(shape), None
    tail = (1 - percentile / 100) / 2
    scale, zero_point = _asymmetric(_row_quantile(flat, tail), _row_quantile(flat, 1 - tail), grid)
    return scale.view(shape), zero_point.view(shape)


def _row_quantile(rows: Tensor, share: float) -> Tensor:
    """Returns the linearly interpolated quantile of each row, [N, 1]; torch.quantile refuses large inputs."""
    ordered = rows.sort(dim=-1).values
    position = share * (rows.shape[1] - 1)
    below = min(int(position), rows.shape[1] - 1)
    above = min(below + 1, rows.shape[1] - 1)
    return torch.lerp(ordered[:, below : below + 1], ordered[:, above : above + 1], position - below)


@torch.no_grad()
def search_scale(
    weight: Tensor, grid: Grid, shape: tuple[int, int], importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns the (scale, zero_point) with the least weighted squared error: plain rounding, clip ratios, both signs.

    Args:
        weight: [O, I] float.
        grid: the code range.
        shape: (O, G), (O, 1) or (1, 1): the scale's.
        importance: [I] float, h_j >= 0; equal weights when None.

    Returns:
        scale [*shape] float32 snapped, zero_point [*shape] float32 or None when symmetric.

    Raises:
        ValueError: when the weight or the importance is not finite.
    """
    if not bool(torch.isfinite(weight).all()) or (
        importance is not None and not bool(torch.isfinite(importance).all())
    ):
        raise ValueError("the weight or its importance holds NaN or infinity; the scale search needs finite numbers")
    flat = weight.detach().reshape(shape[0] * shape[1], -1)
    spread = None if importance is None else _group_importance(importance, weight, shape)
    scales = torch.empty(flat.shape[0], 1, device=weight.device)
    zeros = None if grid.symmetric else torch.empty_like(scales)
    step = max(1, _CHUNK_ELEMENTS // flat.shape[1]) if weight.device.type == "cpu" else flat.shape[0]
    for start in range(0, flat.shape[0], step):
        rows = slice(start, start + step)
        chunk = flat[rows].float()
        numbers = torch.arange(start, start + len(chunk), device=flat.device)
        h = None if spread is None else spread[numbers % spread.shape[0]]
        scale, zero_point = _search_rows(chunk, grid, h)
        scales[rows] = scale
        if zeros is not None and zero_point is not None:
            zeros[rows] = zero_point
    return scales.view(shape), None if zeros is None else zeros.view(shape)


def _search_rows(w: Tensor, grid: Grid, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
    low, high = torch.aminmax(w, dim=-1, keepdim=True)
    # A power of two, so that it changes no comparison: squares of small scales would be 0 without it.
    unit = torch.exp2(-torch.floor(torch.log2(torch.maximum(high, -low).clamp(min=SCALE_FLOOR))))
    root = None if h is None else h.sqrt()
    buffers = torch.empty_like(w), torch.empty_like(w)
    best_scale, best_zero = _plain(w, low, high, grid)
    best_error = _weighted_error(w, best_scale, best_zero, grid, root, unit, buffers)
    ratios = FLOAT_RATIOS if grid.levels == "float" else CLIP_RATIOS
    best_ratio = torch.full_like(low, ratios[0])

    def consider(ratio: Tensor) -> None:
        nonlocal best_error, best_scale, best_zero, best_ratio
        scale, zero_point = _candidate(low, high, grid, ratio)
        error = _weighted_error(w, scale, zero_point, grid, root, unit, buffers)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_ratio = torch.where(better, ratio, best_ratio)
        if zero_point is not None and best_zero is not None:
            best_zero = torch.where(better, zero_point, best_zero)

    for coarse in ratios:
        for sign in (1.0, -1.0) if grid.lopsided else (1.0,):
            consider(torch.full_like(low, sign * coarse))
    around = best_ratio
    for step in REFINEMENTS:
        consider(around + step)
    return best_scale, best_zero


def _weighted_error(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    root: Tensor | None,
    unit: Tensor,
    buffers: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns (s * unit)^2 * sum_j h_j (q_j - v_j)^2 [n, 1] with v = w/s; `root` is sqrt(h). It all stays in cache."""
    v, q = buffers
    torch.mul(w, scale.reciprocal(), out=v)
    if zero_point is not None:
        v.add_(zero_point)
    if grid.offset:
        v.sub_(grid.offset)
    torch.clamp(v, grid.qmin, grid.qmax, out=q)
    grid.nearest_(q).sub_(v)
    if root is not None:
        q.mul_(root)
    return torch.linalg.vecdot(q, q).unsqueeze(-1).mul_((scale * unit).square())


def _plain(w: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    if grid.levels == "ternary":
        return snap_scale(w.abs().mean(-1, keepdim=True), grid), None
    if grid.symmetric:
        return range_scale(torch.maximum(high, -low), grid), None
    return _asymmetric(low, high, grid)


def _candidate(low: Tensor, high: Tensor, grid: Grid, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the snapped scale and the zero point for the range [low, high] * ratio; below 0 turns the scale over."""
    if not grid.symmetric:
        return _asymmetric(low * ratio, high * ratio, grid)
    # The entry of largest magnitude lands on qmin = -2^(b-1): a negative maximum takes a positive scale.
    extreme = torch.where(high > -low, high, low)
    divisor = grid.qmin if grid.lopsided else grid.reach
    return snap_scale(extreme * (ratio / divisor), grid), None


def _asymmetric(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = snap_scale((high - low) / grid.qmax, grid)
    return scale, torch.round(-low / scale).clamp_(grid.qmin, grid.qmax)


def _group_importance(importance: Tensor, weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns importance [I] as rows [n, g] such that scale number k uses row k % n."""
    h = importance.to(weight.device).float()
    if shape == (1, 1):
        return h.repeat(weight.shape[0]).view(1, -1)
    return h.view(shape[1], -1)
