"""zentorch: products of weights of up to 4 bits with activations of 8 bits on CPUs with AVX512, of AMD's package.

It is asked for by name (`kernel="cpu-w4a8"`), since it computes something else than the model: each token's activations
are rounded to 8 bits first, x = code * max |x| / 127. The codes are then multiplied as integers, which no product of
bfloat16 can match on processors without AMX: 1.7 to 2.7 times as fast as a bfloat16 linear at one row, 1.25 to 1.7 at
512, where the result is off by 0.8 %, and by 5 to 7 % where single activations are fifty times as large as others.

zentorch caches its layout of a weight by the address of the tensor, and never drops an entry. So the tensor that is
passed to it lives as long as the weight. When one is freed, the whole cache is cleared. A wheel of zentorch fits one
version of torch.

Source: https://github.com/amd/ZenDNN-pytorch-plugin (Apache-2.0 and others).
Letters: M rows of activations, O out features, I in features, G scales per row.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from llmqat.extras import missing, require
from llmqat.grid import Grid, pack_int32
from llmqat.kernels.reference import PackedWeight, first_failing
from llmqat.kernels.trial import TRIAL_FEATURES, refusal

_SIGN_BITS = -2004318072
"""The upper bit of each 4-bit code in a word: what is stored as code + 8 is in two's complement with it flipped."""


class ZentorchKernel:
    """zentorch's product with activations of 8 bits, for any number of rows."""

    name = "cpu-w4a8"
    differentiable = False
    exact = False

    def declines(self, x: Tensor, weight: PackedWeight) -> str | None:
        """Returns why zentorch cannot take this product, or None."""
        columns, group = weight.in_features, weight.group_size
        checks = (
            (x.device.type == "cpu", f"it runs on the CPU, not on {x.device.type}"),
            (x.dtype == torch.bfloat16, f"it needs bfloat16 activations, not {x.dtype}"),
            (weight.grid.symmetric and weight.grid.num_bits <= 4, "it needs a symmetric grid of at most 4 bits"),
            (columns % 8 == 0, f"in_features={columns} is not a multiple of 8"),
            (group % 4 == 0, f"group size {group} is not a multiple of 4"),
        )
        if (reason := first_failing(checks)) is not None:
            return reason
        if (lacking := missing("zentorch")) is not None:
            return f"it needs {lacking}"
        return refusal(self, "zentorch", x.device, x.dtype, Grid(4), (32, TRIAL_FEATURES), rounded_to_8_bits)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x̂ @ ŵ.T + bias, x̂ being x rounded to 8 bits a token; zentorch's words are made at the first call."""
        package = load_zentorch()
        if self.name not in weight.layouts:
            weight.layouts[self.name] = zentorch_layout(weight)
            weakref.finalize(weight.layouts[self.name][0], package.zentorch_clear_weight_cache)
            weight.read()
        words, scale = weight.layouts[self.name]
        rows = x.reshape(-1, weight.in_features).contiguous()
        out: Tensor = package.zentorch_dynamic_qlinear(rows, words, scale, None)
        out.add_(rows.abs().amax(-1, keepdim=True).mul_(0))  # NaN where a token holds NaN or infinity: codes hide it
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


def rounded_to_8_bits(x: Tensor) -> Tensor:
    """Returns the activations [*, I] in float32 that are multiplied in place of `x`."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    return (values / scale).round() * scale


def zentorch_layout(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Returns codes of 4 bits in two's complement, [O, I / 8] int32, and scales [G, O] bfloat16."""
    plain = Grid(4)
    words = weight.words() if weight.grid == plain else pack_int32(weight.codes(), plain)
    return words ^ _SIGN_BITS, weight.scale.to(torch.bfloat16).t().contiguous()


@functools.cache
def load_zentorch() -> Any:
    """Returns zentorch's operators. Importing it sets up the root logger, which is undone."""
    root = logging.getLogger()
    before = list(root.handlers)
    require("zentorch", "the kernel cpu-w4a8")
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
    return torch.ops.zentorch
