"""Weights that already are codes times a scale: recognized group by group, so that quantization keeps every code.

What quantization-aware training publishes "unquantized" (Gemma's `-qat-q4_0-unquantized`) are plain numbers that lie on
the lattice of a scheme: w = level * d, rounded to bfloat16. A range or a clip ratio is not d, and the codes that it
gives are others: Gemma 4 loses 8 points of top-1 agreement (llama.cpp#24603). But d can be found. On a lattice that
reaches up to level R no weight but zero is smaller than the largest one divided by R, which rules out most groups of
other weights at once. In what is left, the smallest weight has one of the first few levels k. So d is about smallest /
k, and the right k shows itself: there is a number d of which all weights of the group are rounded multiples.

bfloat16 has 8 bits, so rounding to it moves a number by 2^-8 of itself at most. Other weights pass for a lattice of 4
bits about once in 10^30 groups of 32, of 8 bits once in 10^8 and more seldom in longer groups; where they do, the codes
give them back as exactly.

The scale that is kept is d on the bfloat16 grid, or on that of the format where d lies on it. Where d was a bfloat16
number, nothing at all is lost. A float16 d of GGUF moves by 2^-8 of itself at most, and the weights of its group with
it, but no code does up to 6 bits; at 7 and 8 bits bfloat16 cannot tell the largest codes apart without d, and groups in
which a code would move are left to the methods for other weights.

Letters: O out features, I in features, G scales per row, g weights per scale, N groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmqat.grid.arithmetic import quantize
from llmqat.grid.levels import Grid
from llmqat.grid.scales import snap_scale

ROUNDING = 2.0**-8
"""What rounding to bfloat16 moves a number by, at most, as a share of it."""
CERTAIN = 16
"""Largest level that is read off rightly while the scale is known up to rounding only."""
_SLACK = 1 + 2.0**-5
_PRECISIONS = ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 22))
"""Where weights may have been rounded, and bits that are left then; float32 also holds products made in float32."""
_CHUNK_ELEMENTS = 65_536


@torch.no_grad()
def keep_lattice(
    weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """Returns (scale, zero point, count): groups on a lattice of `grid` get its scale, others keep theirs.

    The zero point is replaced likewise. `count` is the number of groups on a lattice. A group of zeros is exact at
    any scale, and does not count.

    Args:
        weight: [O, I] float.
        grid: the code range.
        scale: (O, G), (O, 1) or (1, 1) float32, snapped, as found otherwise.
        zero_point: of its shape, or None when symmetric.
    """
    flat = weight.detach().reshape(scale.numel(), -1)
    scales = scale.reshape(-1, 1).clone()
    zeros = None if zero_point is None else zero_point.reshape(-1, 1).clone()
    count = 0
    step = max(1, _CHUNK_ELEMENTS // flat.shape[1]) if weight.device.type == "cpu" else flat.shape[0]
    for start in range(0, flat.shape[0], step):
        for rows, found, zero in _recognized(flat[start : start + step].float(), grid):
            scales[start + rows] = found
            if zeros is not None:
                zeros[start + rows] = zero
            count += len(rows)
    return scales.view(scale.shape), None if zeros is None else zeros.view(scale.shape), count


@torch.no_grad()
def on_lattice(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Returns which groups equal their dequantized codes, up to rounding; bool of the scale's shape.

    Args:
        weight: [O, I] float.
        scale: (O, G), (O, 1) or (1, 1) float32, snapped.
        zero_point: of its shape, or None.
        grid: the code range.
    """
    w, s = weight.reshape(scale.numel(), -1).float(), scale.reshape(-1, 1)
    level = quantize(weight, scale, zero_point, grid).reshape(w.shape).float() + grid.offset
    if zero_point is not None:
        level -= zero_point.reshape(-1, 1)
    return ((w - level * s).abs() <= 2 * ROUNDING * _SLACK * w.abs()).all(-1).view(scale.shape)


def _recognized(w: Tensor, grid: Grid) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns numbers of groups of `w` [N, g] that lie on a lattice, their scales and zero points [n, 1], in parts."""
    size = w.abs()
    largest = size.amax(-1)
    smallest = size.masked_fill_(w == 0, torch.inf).amin(-1)
    reach = max(-grid.qmin - grid.offset, grid.qmax + grid.offset) * (1 + 2 * ROUNDING * _SLACK)
    left = (largest > 0).nonzero().squeeze(1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for level in grid.distances:  # of the smallest weight
        left = left[largest[left] * level <= reach * smallest[left]]
        if not len(left):
            break
        kept, scale, zero = _fitted(w[left], (smallest[left] / level).unsqueeze(1), grid)
        parts.append((left[kept], scale[kept], zero[kept]))
        left = left[~kept]
    return parts


def _fitted(w: Tensor, step: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Returns which groups of `w` [n, g] lie on the lattice of about `step` [n, 1], and its scale and zero point."""
    level = _nearest(w, step, grid)
    certain = torch.where(level.abs() <= CERTAIN, level, 0)
    level = _nearest(w, snap_scale(_least_squares(w, certain), grid), grid)
    least, most = _bounds(w, level)
    kept = (least <= most) & ((level != 0) == (w != 0)).all(-1, keepdim=True)
    scale = snap_scale(_least_squares(w, level), grid)
    if grid.scale_dtype == "bfloat16":  # where such a number gives the very weights, it is that one
        exact = _next_bfloat16(least)
        scale = torch.where(((scale < least) | (scale > most)) & (exact <= most), exact, scale)
    else:  # coarse scales: one that gives other weights is worse than what a search finds
        kept &= (scale >= least) & (scale <= most)
    low, high = torch.aminmax(level, dim=-1, keepdim=True)
    if grid.symmetric:  # a level that only the side below zero reaches turns the scale over
        turned = torch.where(high > grid.qmax + grid.offset, -1.0, 1.0)
        low, high = torch.where(turned > 0, low, -high), torch.where(turned > 0, high, -low)
        level, scale, zero = level * turned, scale * turned, torch.zeros_like(scale)
        kept &= (low >= grid.qmin + grid.offset) & (high <= grid.qmax + grid.offset)
    else:
        zero = -low.clamp(max=0)
        kept &= high.clamp(min=0) + zero <= grid.qmax
    kept &= (_nearest(w, scale, grid) == level).all(-1, keepdim=True)
    return kept.squeeze(1), scale, zero


def _nearest(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return grid.round_(w / scale).add_(grid.offset)


def _least_squares(w: Tensor, level: Tensor) -> Tensor:
    """Returns the scale [n, 1] with the least error; the roundings of many weights cancel in it."""
    return (w * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True).clamp(min=0.25)


def _bounds(w: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest scale [n, 1] with round(scale * level) = w; least > largest where none has."""
    bits = torch.full((len(w), 1), float(_PRECISIONS[-1][1]), device=w.device)
    for dtype, kept in reversed(_PRECISIONS):
        bits[(w.to(dtype).float() == w).all(-1)] = kept
    exponent = torch.frexp(w).exponent
    half = torch.exp2(exponent - bits - 1)  # of the distance between two numbers of so many bits
    size, wanted = w.abs(), level.abs()
    used = level != 0
    least = torch.where(used, (size - half) / wanted, 0).amax(-1, keepdim=True)
    most = torch.where(used, (size + half) / wanted, torch.inf).amin(-1, keepdim=True)
    return least * (1 - 2.0**-22), most * (1 + 2.0**-22)  # for the rounding of these divisions


def _next_bfloat16(size: Tensor) -> Tensor:
    """Returns the smallest bfloat16 number that is not below `size` [n, 1], positive float32."""
    return ((size.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
