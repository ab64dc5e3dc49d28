"""Quantization: weight = (code - zero_point + offset) * scale, and its fake-quantized form with gradients.

One number everywhere: training forward, evaluation and the packed file share the functions of this file, so a weight
has the same value in all three, bit for bit. What makes that possible:

- A scale is snapped to its grid *inside* the forward (scales.py), so the trained scale is the stored one.
- code * scale is exact in float32 (8 bits times 8 bits of mantissa) and rounded once to the compute dtype.
- The autograd Function saves the weight and the scale and recomputes the rest: no copy of the weight is kept.

The `Grid` (levels.py) defines which codes exist and how a number is rounded to one of them.

Work is done in row chunks that stay in a core's cache: the arithmetic is a dozen elementwise passes, and done on a
whole weight each of them would go through main memory.

Letters: O out features, I in features, G scales per row, g = I / G weights per scale. A scale of shape [O, G] governs
the weight seen as [O, G, g]; one scale per channel is [O, 1], one per tensor is [1, 1] with the weight as [1, 1, O*I].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmqat.grid.fused import FusedKernels, fused_kernels
from llmqat.grid.levels import Grid

_CHUNK_ELEMENTS = 65_536


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Returns the codes of `weight`: clip(round(w / s - offset) + z, qmin, qmax), half to even.

    Args:
        weight: [O, I], any float dtype.
        scale: [O, G] float32, snapped.
        zero_point: [O, G] float32 holding integers, or None for 0.
        grid: the code range.

    Returns:
        [O, I] of `grid.code_dtype`.
    """
    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    flat = codes.view(-1, _group_size(weight, scale))
    for rows, w, s, z in _chunks(weight, scale, zero_point):
        flat[rows] = _rounded(w, s, z, grid).clamp_(grid.qmin, grid.qmax).to(grid.code_dtype)
    return codes


def of_each_weight(of_groups: Tensor, rows: int, columns: int) -> Tensor:
    """Returns per-scale values, (O, G), (O, 1) or (1, 1), repeated for each weight: [O, I]."""
    size = rows * columns // of_groups.numel()
    return of_groups.reshape(-1, 1).expand(-1, size).reshape(rows, columns)


def stored_codes(codes: Tensor, grid: Grid) -> tuple[Tensor, Grid, float]:
    """Returns (codes, grid, factor) for storage: the same weights without an offset; the scale is multiplied by factor.

    No packed format knows half-integer levels: "seq" is stored as the odd codes -3, -1, 1, 3 of 3 bits at half the
    scale, which is exact. "ternary" is stored in 2 bits.
    """
    if grid.levels == "seq":
        return 2 * codes + 1, Grid(3), 0.5
    if grid.levels == "float":
        return codes, grid, 1.0
    return codes, Grid(grid.num_bits, grid.symmetric), 1.0


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, offset: float = 0.0
) -> Tensor:
    """Returns (code - zero_point + offset) * scale, computed in float32 and rounded once to `dtype`.

    Args:
        codes: [O, I] integers.
        scale: [O, G], any float dtype (bfloat16 values are exact).
        zero_point: [O, G] or None.
        dtype: of the result.
        offset: the grid's.
    """
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    flat = weight.view(-1, _group_size(codes, scale))
    for rows, q, s, z in _chunks(codes, scale, zero_point):
        flat[rows] = _levels(q, z, offset) * s
    return weight


def fake_quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns dequantize(quantize(weight)) as a differentiable function of weight and scale.

    With v = w/s, r = round(v - offset) + z, q = clip(r, qmin, qmax), l = q - z + offset, inside = [q == r]:
        dL/dw = dL/dŵ * inside
        dL/ds = sum over the group of dL/dŵ * (l - v if inside else l)
        dL/dz = sum over the group of dL/dŵ * (0 if inside else -s)

    Args:
        weight: [O, I] float; the master weight.
        scale: [O, G] float32, from `snap_scale`.
        zero_point: [O, G] float32 holding integers, or None.
        grid: the code range.
        dtype: of the result; the weight's by default.

    Returns:
        [O, I] in `dtype`.

    Source: LSQ (1902.08153) equations 1-3; LSQ+ (2004.09576) section 3 for the zero point.
    """
    return _FakeQuantize.apply(weight, scale, zero_point, grid, dtype or weight.dtype)  # type: ignore[no-untyped-call]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.grid, ctx.dtype = grid, dtype
        fused = _fused(weight, scale, zero_point, grid, dtype)
        if fused is not None:
            pair = _plain_rows(weight, _group_size(weight, scale)), _plain_rows(scale, 1)
            return fused.forward(*pair).view(weight.shape)
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        flat = out.view(-1, _group_size(weight, scale))
        for rows, w, s, z in _chunks(weight, scale, zero_point):
            q = _rounded(w, s, z, grid).clamp_(grid.qmin, grid.qmax)
            torch.mul(_levels(q, z, grid.offset), s, out=flat[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        grid: Grid = ctx.grid
        group_size = _group_size(weight, scale)
        fused = _fused(weight, scale, zero_point, grid, ctx.dtype)
        if fused is not None:
            pair = _plain_rows(weight, group_size), _plain_rows(scale, 1)
            dense, scales = fused.backward(*pair, _plain_rows(grads[0], group_size))
            return dense.view(weight.shape).to(weight.dtype), scales.view(scale.shape), None, None, None
        needs_zero = zero_point is not None and ctx.needs_input_grad[2]
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        grad_scale = torch.empty(scale.numel(), 1, dtype=torch.float32, device=weight.device)
        grad_zero = torch.empty_like(grad_scale) if needs_zero else None
        flat_grad = grads[0].reshape(-1, group_size)
        flat_grad_weight = grad_weight.view(-1, group_size)
        for rows, w, s, z in _chunks(weight, scale, zero_point):
            g = flat_grad[rows].float()
            v = w / s
            r = grid.rounded(v)
            if z is not None:
                r += z
            q = r.clamp(grid.qmin, grid.qmax)
            inside = r.eq_(q)
            if grad_zero is not None:
                grad_zero[rows] = ((inside - 1).mul_(g)).sum(-1, keepdim=True) * s
            q = _levels(q, z, grid.offset)
            grad_scale[rows] = torch.linalg.vecdot(q.addcmul_(v, inside, value=-1), g).unsqueeze(-1)
            torch.mul(g, inside, out=flat_grad_weight[rows])
        return (
            grad_weight,
            grad_scale.view(scale.shape),
            None if grad_zero is None else grad_zero.view(scale.shape),
            None,
            None,
        )


def _fused(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype
) -> FusedKernels | None:
    # One scale for all is a shape that the compiler would specialize on, past the trial.
    if zero_point is not None or grid.offset or scale.numel() == 1:
        return None
    return fused_kernels(grid, dtype, weight.device)


def _plain_rows(tensor: Tensor, columns: int) -> Tensor:
    """Returns `tensor` as contiguous [n, columns] that is no view.

    For every kind of tensor that something is a view of, the compiler would make a kernel of its own.
    """
    return tensor.reshape(-1, columns).contiguous().data


def _group_size(weight: Tensor, scale: Tensor) -> int:
    return weight.numel() // scale.numel()


def _rounded(w: Tensor, s: Tensor, z: Tensor | None, grid: Grid) -> Tensor:
    v = grid.round_(w / s)
    return v if z is None else v.add_(z)


def _levels(q: Tensor, z: Tensor | None, offset: float) -> Tensor:
    """Returns q - z + offset."""
    q = q if z is None else q - z
    return q + offset if offset else q


def _chunks(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Yields (rows, weight rows [n, g] float32, scale [n, 1] float32, zero point [n, 1] or None), n*g cache-sized."""
    group_size = _group_size(weight, scale)
    flat = weight.reshape(-1, group_size)
    scales = scale.reshape(-1, 1).float()
    zeros = None if zero_point is None else zero_point.reshape(-1, 1).float()
    # A GPU wants one launch over everything; only a CPU gains from staying in cache.
    step = max(1, _CHUNK_ELEMENTS // group_size) if weight.device.type == "cpu" else max(1, flat.shape[0])
    for start in range(0, flat.shape[0], step):
        rows = slice(start, start + step)
        yield rows, flat[rows].float(), scales[rows], None if zeros is None else zeros[rows]
