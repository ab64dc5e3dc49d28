# mypy: ignore-errors
"""Triton: the product of activations with packed weights. Imported where it runs, since it needs triton.

Each program makes one tile of the output. It walks along the in features, takes the codes of its columns out of their
words (a code of 3 bits may straddle two), multiplies them with their scales in float32, rounds once to the activations'
dtype, and multiplies tiles with float32 sums. So the weights are the reference's, bit for bit, and nothing but the
checkpoint's tensors is kept in memory. Words are loaded once for each code in them; neighbouring lanes read the same
word, which the cache serves. Triton's interpreter multiplies bfloat16 tiles wrongly: there they are made float32 first.

Letters: M rows of activations, O out features, I in features, G scales per row, W words per row, b bits.
"""

import triton
import triton.language as tl


@triton.jit
def packed_product(
    x,  # [M, I]
    packed,  # [O, W] int32
    scale,  # [O, G]
    zero_point,  # [O, G] int32, or None when symmetric
    out,  # [M, O]
    rows,  # M
    columns,  # O
    features,  # I
    words,  # W
    group_size,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,  # what is stored is code + OFFSET; 0 when asymmetric
    IN_FLOAT32: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Writes x @ ŵ.T to `out`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    groups = features // group_size
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        there = (i[:, None] < features) & (o[None, :] < columns)
        tile = tl.load(
            x + m[:, None] * features + i[None, :], mask=(m[:, None] < rows) & (i[None, :] < features), other=0.0
        )
        word = packed + o[None, :] * words + (i * BITS // 32)[:, None]
        shift = (i * BITS % 32).to(tl.uint32)[:, None]
        code = tl.load(word, mask=there, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % BITS != 0:
            over = (shift + BITS > 32) & there
            rest = tl.load(word + 1, mask=over, other=0).to(tl.uint32, bitcast=True)
            code = tl.where(over, code | (rest << ((32 - shift) & 31)), code)
        level = (code & (2**BITS - 1)).to(tl.int32)
        place = o[None, :] * groups + (i // group_size)[:, None]
        if zero_point is not None:
            level -= tl.load(zero_point + place, mask=there, other=0)
        level -= OFFSET
        factor = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
        weight = (level.to(tl.float32) * factor).to(tile.dtype)
        if IN_FLOAT32:
            total += tl.dot(tile.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(tile, weight, input_precision="ieee")
    place = m[:, None] * columns + o[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (o[None, :] < columns))
