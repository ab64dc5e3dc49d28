"""The reference kernel: dequantize the whole weight, multiply. Slow, simple, and what every other kernel is held to.

Letters: O out features, I in features, G scales per row, b bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid, dequantize, unpack_int32


@dataclass
class PackedWeight:
    """A packed weight as it lies in the checkpoint, and what kernels derive from it.

    Attributes:
        packed: [O, ceil(I * b / 32)] int32.
        scale: [O, G], the checkpoint's float dtype.
        zero_point: [O, G] unpacked integers, or None when symmetric.
        grid: the code range.
        in_features: I.
        layouts: what a kernel made of it once, by the kernel's name; dropped with the weight.
        chosen: the kernel that was chosen for a number of rows, a dtype and a device.
        release: called by a kernel that has read `packed` and will not soon again; gives memory back where it can.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    in_features: int
    layouts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    chosen: dict[tuple[Any, ...], Any] = field(default_factory=dict)
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

    def rows(self, index: Tensor | slice) -> PackedWeight:
        """Returns the packed weight of the rows `index`."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return PackedWeight(self.packed[index], self.scale[index], zero_point, self.grid, self.in_features)

    def codes(self) -> Tensor:
        """Returns the codes [O, I] of the grid's code dtype."""
        return torch.cat([unpack_int32(part.packed, part.grid, part.in_features) for part in self.parts])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`."""
        return dequantize(self.codes(), self.scale, self.zero_point, dtype)

    def read(self) -> None:
        """Notes that a kernel has read the packed words and will not soon again."""
        for part in self.parts:
            if part.release is not None:
                part.release()


class JoinedWeight(PackedWeight):
    """Several packed weights of one input, seen as one with all their rows; words and scales stay where they are.

    They must be symmetric, and equal in grid, in features and group size.
    """

    def __init__(self, members: Sequence[PackedWeight]) -> None:
        first = members[0]
        self.packed, self.zero_point, self.grid, self.in_features = first.packed, None, first.grid, first.in_features
        self.members, self.layouts, self.chosen, self.release = tuple(members), {}, {}, None

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """[O, G], put together anew each time."""
        return torch.cat([member.scale for member in self.members])

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


NATIVE_GROUPS = (256, 128, 64, 32)
"""Group sizes that torch's int4 products know."""


def native_group(weight: PackedWeight) -> int | None:
    """Returns the largest group size of torch's int4 products that divides the weight's own, or None."""
    return next((g for g in NATIVE_GROUPS if weight.group_size % g == 0), None)


def native_scales(weight: PackedWeight, group_size: int) -> Tensor:
    """Returns the scales and zeros [I/g, O, 2] bfloat16 of torch's int4 products; the zeros are 0."""
    scale = weight.scale.repeat_interleave(weight.group_size // group_size, dim=1)
    out = torch.zeros(*scale.t().shape, 2, dtype=torch.bfloat16, device=scale.device)
    out[:, :, 0] = scale.t()
    return out


class ReferenceKernel:
    """Dequantize and multiply, for every scheme, dtype and device."""

    name = "reference"

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns None: it always can."""
        return None

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns F.linear(x, ŵ, bias) with ŵ dequantized to x's dtype."""
        return F.linear(x, weight.dequantized(x.dtype), bias)
