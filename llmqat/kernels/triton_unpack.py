# mypy: ignore-errors
"""Triton: packed weights unpacked. Imported where it runs, since it needs triton.

A tile of weights is made from the checkpoint's own words: each lane takes the word that its code lies in (a code of 3
bits may straddle two), and multiplies level and scale in float32, rounded once: the reference's weights, bit for bit.
Lanes lie along the in features, so that neighbours read one word, or the next.

Letters: O out features, I in features, G scales per row, W words per row.
"""

import importlib

from llmqat.extras import require

triton = require("triton", "the kernel that unpacks weights")
tl = importlib.import_module("triton.language")


@triton.jit
def unpacked_weight(
    packed,  # [O, W] int32
    scale,  # [O, G]
    zero_point,  # [O, G] int32, or None when symmetric
    out,  # [O, I]
    columns,  # O
    I: tl.constexpr,  # noqa: E741
    GROUP: tl.constexpr,  # weights that share a scale
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,  # what is stored is code + OFFSET; 0 when asymmetric
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Writes ŵ to `out`."""
    o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    there = (o < columns) & (i < I)
    word = packed + o * ((I * BITS + 31) // 32) + i * BITS // 32
    shift = (i * BITS % 32).to(tl.uint32)
    code = tl.load(word, mask=there, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        over = (shift + BITS > 32) & there
        rest = tl.load(word + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
        code = tl.where(over, code | (rest << ((32 - shift) & 31)), code)
    level = (code & (2**BITS - 1)).to(tl.int32)
    place = o * (I // GROUP) + i // GROUP
    if zero_point is not None:
        level -= tl.load(zero_point + place, mask=there, other=0)
    factor = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
    weight = (level - OFFSET).to(tl.float32) * factor
    tl.store(out + o * I + i, weight.to(out.dtype.element_ty), mask=there)
