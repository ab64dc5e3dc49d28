"""The sets of levels that weights are rounded to, and what a code of them stands for.

A weight is level * scale, and a code says which level: level = code - zero_point + offset. Integers of 2 to 8 bits are
symmetric around zero or have a zero point. Two grids of 2 bits are not plain integers: "ternary" has the codes -1, 0, 1
(BitNet b1.58, 2402.17764), "seq" the levels -1.5, -0.5, 0.5, 1.5 (ParetoQ's stretched elastic quantization,
2502.02631), which is an offset of a half. The offset is 0 everywhere else.

The symmetric integers have the full range [-2^(b-1), 2^(b-1)-1], and their scale may be negative, so that the entry of
largest magnitude can take the one extra code on either side.

All that differs between grids is asked of `Grid`: arithmetic, scale search, GPTQ and packing work on any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Levels = Literal["integer", "ternary", "seq"]

CELL = 0.49
"""How far from its level a weight may lie to be rounded to it for certain, as a share of the distance to the next one:
below a half, for the rounding of the division."""


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
    def reach(self) -> float:
        """What an unclipped |w| is divided by to give the scale of plain symmetric rounding."""
        return 2.0 if self.levels == "seq" else float(self.qmax)

    @property
    def steps(self) -> int:
        """Codes above zero, which LSQ calls Q_P; at least 1."""
        return max(self.qmax, 1)

    @property
    def lopsided(self) -> bool:
        """Whether the levels reach further on one side of zero, so that the sign of the scale matters."""
        return self.symmetric and self.levels == "integer"

    @property
    def code_dtype(self) -> torch.dtype:
        """Smallest dtype that holds every code."""
        return torch.int8 if self.symmetric else torch.uint8

    def round_(self, v: Tensor) -> Tensor:
        """Rounds weights divided by their scale to codes, in place, half to even; the range is not clipped yet."""
        if self.offset:
            v.sub_(self.offset)
        return v.round_()

    def rounded(self, v: Tensor) -> Tensor:
        """Returns what `round_` makes of `v`, which stays as it is."""
        return (v - self.offset).round_() if self.offset else v.round()

    def cell(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lowest and the highest number that is rounded to each level for certain (`CELL`)."""
        return level - CELL, level + CELL
