"""The sets of levels that weights are rounded to, and what a code of them stands for.

A weight is level * scale, and a code says which level: level = code - zero_point + offset. Integers of 2 to 8 bits are
symmetric around zero or have a zero point. Two grids of 2 bits are not plain integers: "ternary" has the codes -1, 0, 1
(BitNet b1.58, 2402.17764), "seq" the levels -1.5, -0.5, 0.5, 1.5 (ParetoQ's stretched elastic quantization,
2502.02631), which is an offset of a half. The offset is 0 everywhere else.

The symmetric integers have the full range [-2^(b-1), 2^(b-1)-1], and their scale may be negative, so that the entry of
largest magnitude can take the one extra code on either side.

"float" are the small floating-point numbers of the OCP formats: E2M1 at 4 bits (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives), E4M3 at 8 bits (up to 448; no infinity). Their codes are the numbers themselves. Source: OCP Microscaling
Formats (MX) specification 1.0, sections 5.3.1 and 5.3.3; FP8 Formats for Deep Learning (2209.05433), table 1.

All that differs between grids is asked of `Grid`: arithmetic, scale search, GPTQ and packing work on any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Levels = Literal["integer", "ternary", "seq", "float"]
ScaleDtype = Literal["bfloat16", "e4m3", "e8m0"]
"""What scales are stored as: bfloat16; E4M3 under one float32 scale for the tensor (NVFP4); a power of two (MX)."""

CELL = 0.49
"""How far from its level a weight may lie to be rounded to it for certain, as a share of the distance to the next one:
below a half, for the rounding of the division."""


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format with a sign, and no infinities.

    Attributes:
        mantissa: bits after the leading one.
        lowest: exponent of the smallest normal number; below it numbers are as far apart as there.
        largest: the largest number.
    """

    mantissa: int
    lowest: int
    largest: int

    def spacing(self, v: Tensor) -> Tensor:
        """Returns how far apart numbers lie at `v` (float32) and above it in magnitude; a power of two."""
        exponent = (v.view(torch.int32) & EXPONENT).clamp_((self.lowest + 127) << 23, 254 << 23)
        return exponent.sub_(self.mantissa << 23).view(torch.float32)

    def round_(self, v: Tensor) -> Tensor:
        """Rounds `v` (float32) in place to the nearest number, half to even, as if there were no largest one."""
        spacing = self.spacing(v)
        return v.div_(spacing).round_().mul_(spacing)


EXPONENT = 0x7F800000
"""Bits of a float32 that hold its exponent."""
FLOATS = {4: FloatFormat(mantissa=1, lowest=0, largest=6), 8: FloatFormat(mantissa=3, lowest=-6, largest=448)}
"""Bits -> format: E2M1 and E4M3."""


@dataclass(frozen=True)
class Grid:
    """The set of codes of a scheme, and what they mean.

    Attributes:
        num_bits: bits a code, 2 to 8.
        symmetric: True for signed codes around zero, False for unsigned codes with a zero point.
        levels: "integer"; at 2 bits "ternary" (-1, 0, 1) or "seq" (half-integers); at 4 and 8 bits "float".
        scale_dtype: what scales are stored as; other than bfloat16 for floats only.
    """

    num_bits: int
    symmetric: bool = True
    levels: Levels = "integer"
    scale_dtype: ScaleDtype = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError when `num_bits` is not in 2..8, or the levels are not of such a grid."""
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits={self.num_bits} is not supported; choose 2 to 8")
        bits = {"integer": (self.num_bits,), "float": tuple(FLOATS)}.get(self.levels, (2,))
        if self.num_bits not in bits or (self.levels != "integer" and not self.symmetric):
            raise ValueError(
                f"levels={self.levels!r} with num_bits={self.num_bits}, symmetric={self.symmetric}; "
                f"these levels are a symmetric grid of {' or '.join(map(str, bits))} bits"
            )
        if self.scale_dtype != "bfloat16" and self.levels != "float":
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} with levels={self.levels!r}; scales that are no bfloat16 numbers "
                "belong to levels='float'"
            )

    @property
    def float_format(self) -> FloatFormat | None:
        """The format that codes are numbers of; None where they are integers."""
        return FLOATS[self.num_bits] if self.levels == "float" else None

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.levels == "ternary":
            return -1
        if self.float_format is not None:
            return -self.float_format.largest
        return -(2 ** (self.num_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.float_format is not None:
            return self.float_format.largest
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1

    @property
    def offset(self) -> float:
        """What a code lies below its level: a half for "seq", else 0."""
        return 0.5 if self.levels == "seq" else 0.0

    @property
    def reach(self) -> float:
        """What an unclipped |w| is divided by to give the scale of plain symmetric rounding."""
        return 2.0 if self.levels == "seq" else float(self.qmax)

    @property
    def steps(self) -> int:
        """Codes above zero, which LSQ calls Q_P; at least 1."""
        return 2 ** (self.num_bits - 1) - 1 if self.levels == "float" else max(self.qmax, 1)

    @property
    def distances(self) -> list[float]:
        """How far levels lie from zero, from the nearest on; none where they are too many to be told apart (E4M3)."""
        if self.float_format is None:
            return [code - self.offset for code in range(1, max(-self.qmin, self.qmax) + 1)]
        levels = torch.arange(1, 2 * self.qmax + 1) / 2
        return [] if self.num_bits > 4 else [float(level) for level in self.nearest_(levels).unique()]

    @property
    def lopsided(self) -> bool:
        """Whether the levels reach further on one side of zero, so that the sign of the scale matters."""
        return self.symmetric and self.levels == "integer"

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest dtype that holds every code and that torch computes with."""
        if self.levels == "float":
            return torch.bfloat16
        return torch.int8 if self.symmetric else torch.uint8

    def round_(self, v: Tensor) -> Tensor:
        """Rounds weights divided by their scale to codes, in place, half to even; the range is not clipped yet."""
        return self.nearest_(v.sub_(self.offset) if self.offset else v)

    def nearest_(self, v: Tensor) -> Tensor:
        """Rounds what `offset` has been taken off, in place, as `round_` does."""
        return v.round_() if self.float_format is None else self.float_format.round_(v)

    def rounded(self, v: Tensor) -> Tensor:
        """Returns what `round_` makes of `v`, which stays as it is."""
        if self.float_format is not None:
            return self.float_format.round_(v.clone())
        return (v - self.offset).round_() if self.offset else v.round()

    def spacing(self, v: Tensor) -> Tensor:
        """Returns how far apart levels lie where weights divided by their scale are `v` (float32)."""
        return torch.ones_like(v) if self.float_format is None else self.float_format.spacing(v)

    @property
    def ends(self) -> tuple[float, float]:
        """Weights divided by their scale that lie outside are clipped: half a step beyond the outermost levels."""
        if self.float_format is None:
            return self.qmin + self.offset - 0.5, self.qmax + self.offset + 0.5
        end = self.qmax + float(self.spacing(torch.tensor(float(self.qmax)))) / 2
        return -end, end

    def cell(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lowest and the highest number that is rounded to each level for certain (`CELL`)."""
        if self.float_format is None:
            return level - CELL, level + CELL
        size, turned = level.abs(), level < 0
        above = self.float_format.spacing(size)
        power = (size.view(torch.int32) & ~EXPONENT) == 0  # below a power of two numbers lie twice as close
        below = torch.where(power & (size > 2.0**self.float_format.lowest), above / 2, above)
        nearer, farther = size - CELL * below, size + CELL * above
        return torch.where(turned, -farther, nearer), torch.where(turned, -nearer, farther)
