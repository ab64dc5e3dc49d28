"""The grids: weight = (code - zero_point + offset) * scale, and its fake-quantized form with gradients.

One number everywhere: training forward, evaluation and the packed file share the functions of this file, so a weight
has the same value in all three, bit for bit. What makes that possible:

- A scale is snapped to bfloat16 *inside* the forward (straight-through), so the trained scale is the stored one.
- code * scale is exact in float32 (8 bits times 8 bits of mantissa) and rounded once to the compute dtype.
- The autograd Function saves the weight and the scale and recomputes the rest: no copy of the weight is kept.

The symmetric grid uses the full range [-2^(b-1), 2^(b-1)-1] and its scale may be negative, so that the entry of
largest magnitude can take the one extra code on either side. Two grids of 2 bits are not plain integers: "ternary" has
the codes -1, 0, 1 (BitNet b1.58, 2402.17764), "seq" the levels -1.5, -0.5, 0.5, 1.5 (ParetoQ's stretched elastic
quantization, 2502.02631), which is an offset of a half. The offset is 0 everywhere else.

Work is done in row chunks that stay in a core's cache: the arithmetic is a dozen elementwise passes, and done on a
whole weight each of them would go through main memory.

Letters: O out features, I in features, G scales per row, g = I / G weights per scale. A scale of shape [O, G] governs
the weight seen as [O, G, g]; one scale per channel is [O, 1], one per tensor is [1, 1] with the weight as [1, 1, O*I].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmqat.grid.fused import FusedKernels, fused_kernels

Levels = Literal["integer", "ternary", "seq"]

SCALE_FLOOR = 2.0**-100
"""Smallest |scale|: far below any weight that matters, and far enough above bfloat16's smallest normal number (2^-126)
that half of it, or the 64th part that a kernel needs, is exact too."""
ZERO_SCALE = 1e-5
"""Scale of a group whose weights are all zero: they are exact at any scale, and training can leave zero from here."""
_STORED_ZERO_SCALE = float(torch.tensor(ZERO_SCALE, dtype=torch.bfloat16))
_CHUNK_ELEMENTS = 65_536


@dataclass(frozen=True)
class Grid:
    """The set of codes of a scheme, and what they mean.

    Attributes:
        num_bits: bits a code, 2 to 8.
        symmetric: True for signed codes around zero, False for unsigned codes with a zero point.
        levels: "integer"; or, at 2 bits, "ternary" (-1, 0, 1) or "seq" (half-integers).
    """

    num_bits: int
    symmetric: bool = True
    levels: Levels = "integer"

    def __post_init__(self) -> None:
        """Raises ValueError when `num_bits` is not in 2..8, or the levels are not of such a grid."""
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits={self.num_bits} is not supported; choose 2 to 8")
        if self.levels != "integer" and (self.num_bits != 2 or not self.symmetric):
            raise ValueError(
                f"levels={self.levels!r} with num_bits={self.num_bits}, symmetric={self.symmetric}; "
                "these levels are a symmetric grid of 2 bits"
            )

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.levels == "ternary":
            return -1
        return -(2 ** (self.num_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1

    @property
    def offset(self) -> float:
        """What a code lies below its level: a half for "seq", else 0."""
        return 0.5 if self.levels == "seq" else 0.0

    @property
    def lopsided(self) -> bool:
        """Whether the levels reach further on one side of zero, so that the sign of the scale matters."""
        return self.symmetric and self.levels == "integer"

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest integer dtype that holds every code."""
        return torch.int8 if self.symmetric else torch.uint8


def snap_scale(scale: Tensor) -> Tensor:
    """Returns `scale` on the bfloat16 grid as float32, with a straight-through gradient.

    Magnitudes below `SCALE_FLOOR` become the floor and keep their sign; 0 becomes `ZERO_SCALE`.
    """
    return _SnapScale.apply(scale)  # type: ignore[no-untyped-call]


def gradient_factor(group: int, grid: Grid) -> float:
    """Returns LSQ's 1/sqrt(g * qmax) for `group` weights a scale: one clip threshold then serves scales and weights."""
    return 1.0 / math.sqrt(group * max(grid.qmax, 1))


def scale_from_log(initial_scale: Tensor, log_scale: Tensor, gradient_factor: float) -> Tensor:
    """Returns snap(initial_scale * exp(log_scale)), the scale that the forward uses.

    A step of the optimizer on `log_scale` is a relative step of the scale, so one learning rate fits all models.

    Args:
        initial_scale: [O, G] float32, signed; where the scale starts.
        log_scale: [O, G] float32; the learned theta, 0 at the start.
        gradient_factor: multiplies theta's gradient; LSQ's 1/sqrt(g * qmax).

    Source: LSQ (1902.08153) section 2.2 for the factor; exponential form so that the sign and positivity hold.
    """
    return snap_scale(initial_scale * torch.exp(_ScaleGradient.apply(log_scale.float(), gradient_factor)))  # type: ignore[no-untyped-call]


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


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Returns the integer codes of `weight`: clip(round(w / s - offset) + z, qmin, qmax), half to even.

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
        flat[rows] = _rounded(w, s, z, grid.offset).clamp_(grid.qmin, grid.qmax).to(grid.code_dtype)
    return codes


def of_each_weight(of_groups: Tensor, rows: int, columns: int) -> Tensor:
    """Returns what there is one of a scale, (O, G), (O, 1) or (1, 1), as one of each weight [O, I]."""
    size = rows * columns // of_groups.numel()
    return of_groups.reshape(-1, 1).expand(-1, size).reshape(rows, columns)


def stored_codes(codes: Tensor, grid: Grid) -> tuple[Tensor, Grid, float]:
    """Returns `codes` as plain integers, their grid, and the factor of the scale; the products stay the same numbers.

    No packed format knows half-integer levels: "seq" is stored as the odd codes -3, -1, 1, 3 of 3 bits at half the
    scale, which is exact. "ternary" is stored in 2 bits.
    """
    if grid.levels == "seq":
        return 2 * codes + 1, Grid(3), 0.5
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


class _SnapScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        snapped = scale.to(torch.bfloat16).float()
        small = torch.full_like(snapped, SCALE_FLOOR).copysign_(snapped).masked_fill_(scale == 0, _STORED_ZERO_SCALE)
        return torch.where(snapped.abs() < SCALE_FLOOR, small, snapped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


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
            q = _rounded(w, s, z, grid.offset).clamp_(grid.qmin, grid.qmax)
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
            r = (v - grid.offset).round_() if grid.offset else v.round()
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
    return fused_kernels(grid.qmin, grid.qmax, dtype, weight.device)


def _plain_rows(tensor: Tensor, columns: int) -> Tensor:
    """Returns `tensor` as contiguous [n, columns] that is no view.

    For every kind of tensor that something is a view of, the compiler would make a kernel of its own.
    """
    return tensor.reshape(-1, columns).contiguous().data


def _group_size(weight: Tensor, scale: Tensor) -> int:
    return weight.numel() // scale.numel()


def _rounded(w: Tensor, s: Tensor, z: Tensor | None, offset: float) -> Tensor:
    v = w / s
    if offset:
        v -= offset
    v.round_()
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
