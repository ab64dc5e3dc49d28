"""The reference kernel: dequantizes the whole weight and multiplies. It is slow and simple; all others must match it.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid, dequantize, unpack_codes, unpack_int32

MAX_DECODE_ROWS = 32
"""Rows up to which kernels for decoding win, on CPUs and on an H100; the choice of a kernel is kept for each number of
rows up to here, and for all above."""


@dataclass(frozen=True)
class QuantizedInput:
    """Activations as integers: x = (code - zero_point) * scale.

    Attributes:
        codes: [*, I], int8, or integers of at most 8 bits in a float dtype.
        scale: [*, 1] or [1], the dtype of the activations.
        zero_point: as `scale`; None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def values(self) -> Tensor:
        """Returns x [*, I] in the scale's dtype."""
        codes = self.codes.to(self.scale.dtype)
        return (codes if self.zero_point is None else codes - self.zero_point) * self.scale


@dataclass
class PackedWeight:
    """A packed weight as it lies in the checkpoint, and what kernels derive from it.

    Attributes:
        packed: as `grid.pack_codes` gives it, int32 words for integers; or [O, I] int8, codes of 8 bits never packed.
        scale: [O, G], the checkpoint's float dtype.
        zero_point: [O, G] unpacked integers, or None when symmetric.
        grid: the code range.
        in_features: I.
        layouts: what a kernel made of it once, by the kernel's name; dropped with the weight.
        chosen: the kernel that was chosen for a number of rows, a dtype and a device.
        kept: the dequantized weight [O, I], where it is kept beside the packed one (`layers.keep_dequantized`).
        release: called by a kernel that has read `packed` and `scale` and will not soon again; gives memory back where
            it can.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    in_features: int
    layouts: dict[str, Any] = field(default_factory=dict)
    chosen: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    kept: Tensor | None = None
    release: Callable[[], None] | None = None

    @property
    def out_features(self) -> int:
        """O."""
        return self.scale.shape[0]

    @property
    def group_size(self) -> int:
        """Weights governed by one scale, along I."""
        return self.in_features // self.scale.shape[1]

    @property
    def parts(self) -> Sequence[PackedWeight]:
        """The weights that it is made of, one's rows below another's; for a plain weight, itself."""
        return (self,)

    def words(self) -> Tensor:
        """Returns the words of all rows: `packed`, or those of the parts in one tensor, made anew each time."""
        return self.packed if len(self.parts) == 1 else torch.cat([part.packed for part in self.parts])

    def rows(self, index: Tensor | slice) -> PackedWeight:
        """Returns the packed weight of the rows `index`."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return PackedWeight(self.packed[index], self.scale[index], zero_point, self.grid, self.in_features)

    def codes(self) -> Tensor:
        """Returns the codes [O, I] of the grid's code dtype."""
        return torch.cat([unpack_codes(part.packed, part.grid, part.in_features) for part in self.parts])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`."""
        return dequantize(self.codes(), self.scale, self.zero_point, dtype)

    def read(self) -> None:
        """Notes that a kernel has read words and scales and will not soon again."""
        for part in self.parts:
            if part.release is not None:
                part.release()


class JoinedWeight(PackedWeight):
    """Several packed weights of one input, seen as one with all their rows; words and scales stay where they are.

    They must be equal in grid, in features and group size.
    """

    def __init__(self, members: Sequence[PackedWeight]) -> None:
        first = members[0]
        self.packed, self.grid, self.in_features = first.packed, first.grid, first.in_features
        self.members, self.layouts, self.chosen = tuple(members), {}, {}
        self.kept, self.release = None, None

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """[O, G], put together anew each time."""
        return torch.cat([member.scale for member in self.members])

    @property
    def zero_point(self) -> Tensor | None:  # type: ignore[override]
        """[O, G], put together anew each time; None when symmetric."""
        found = [member.zero_point for member in self.members if member.zero_point is not None]
        return torch.cat(found) if found else None

    @property
    def out_features(self) -> int:
        """O."""
        return sum(member.out_features for member in self.members)

    @property
    def group_size(self) -> int:
        """Weights governed by one scale, along I."""
        return self.members[0].group_size

    @property
    def parts(self) -> Sequence[PackedWeight]:
        """The members."""
        return self.members


def first_failing(checks: Iterable[tuple[bool, str]]) -> str | None:
    """Returns the reason of the first check that does not hold, or None; checks are (holds, reason if not)."""
    return next((reason for holds, reason in checks if not holds), None)


NATIVE_GROUPS = (256, 128, 64, 32)
"""Group sizes that torch's int4 products know."""


def native_group(weight: PackedWeight) -> int | None:
    """Returns the largest group size of torch's int4 products that divides the weight's own, or None."""
    return next((g for g in NATIVE_GROUPS if weight.group_size % g == 0), None)


def native_scales(weight: PackedWeight, group_size: int) -> Tensor:
    """Returns the scales and zeros [I/g, O, 2] bfloat16 of torch's int4 products, w = (q - 8) * scale + zero.

    The middle of the grid is their 8, so that zeros are 0 when symmetric, and else the distance of the zero point from
    the middle times the scale, which bfloat16 rounds by up to 2^-9.
    """
    scale, zeros = weight.scale, torch.zeros_like(weight.scale)
    if weight.zero_point is not None:
        zeros = (2 ** (weight.grid.num_bits - 1) - weight.zero_point.float()) * scale.float()
    both = torch.stack([scale.to(torch.bfloat16), zeros.to(torch.bfloat16)], dim=-1)
    return both.transpose(0, 1).repeat_interleave(weight.group_size // group_size, dim=0)


def int8_codes(weight: PackedWeight) -> Tensor:
    """Returns the codes [O, I] int8 of a weight of 8 bits: unpacked from words, or as held where not packed."""
    if len(weight.parts) == 1 and weight.packed.dtype == torch.int8:
        return weight.packed
    shape, device = (weight.out_features, weight.in_features), weight.parts[0].packed.device
    codes = torch.empty(shape, dtype=torch.int8, device=device)  # what stays before what goes
    return torch.cat([unpack_int32(part.packed, part.grid, part.in_features) for part in weight.parts], out=codes)


class ReferenceKernel:
    """Dequantize and multiply, for every scheme, dtype and device."""

    name = "reference"
    differentiable = True
    exact = True
    floats = True

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns None: it always can."""
        return None

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns F.linear(x, ŵ, bias) with ŵ dequantized to x's dtype."""
        return F.linear(x, weight.dequantized(x.dtype), bias)
