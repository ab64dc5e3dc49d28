"""The integer kernel: codes of inputs times codes of weights, on CPUs with AVX512-VNNI and on NVIDIA GPUs.

Where inputs are quantized as well as weights, `torch._int_mm` multiplies int8 matrices. The sums are exact, whatever
their order; scales are applied to them. With AVX512-VNNI and 2 cores, 576 x 3072: 0.03 ms at one row (weight-only int8:
0.05), 0.7 ms at 128 (dequantized: 1.4; a bfloat16 linear: 1.0). On a GPU it was never run: it is used there after a
trial, and torch asks it for more than 16 rows, so fewer are padded.

Letters: M rows of activations, O out features, I in features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid
from llmqat.kernels.reference import PackedWeight, QuantizedInput, first_failing, int8_codes
from llmqat.kernels.trial import TRIAL_FEATURES, random_weight

_MOST_IN_FEATURES = 65_536
_MULTIPLIES_INT8 = torch.cpu._is_vnni_supported()
_LEAST_ROWS = {"cuda": 32}
"""Rows of activations that torch wants, more than 16, by the kind of device."""


class IntegerKernel:
    """torch's product of int8 matrices, for weights of 8 bits with one scale a channel."""

    name = "integer"
    differentiable = False
    exact = True

    def declines(self, x: QuantizedInput, weight: PackedWeight) -> str | None:
        """Returns why inputs and weight cannot be multiplied as integers here, or None."""
        device, grid, columns = x.codes.device, weight.grid, weight.in_features
        of_8_bits = grid.symmetric and grid.num_bits == 8 and grid.levels != "float"
        checks = (
            (device.type in ("cpu", "cuda"), f"it runs on CPUs and NVIDIA GPUs, not on {device.type}"),
            (device.type != "cpu" or _MULTIPLIES_INT8, "it is slow on processors without AVX512-VNNI"),
            (of_8_bits, "it needs a symmetric grid of integers of 8 bits"),
            (weight.group_size == columns, "it needs one scale a channel"),
            (columns <= _MOST_IN_FEATURES, f"sums over more than {_MOST_IN_FEATURES} in features could pass 32 bits"),
        )
        reason = first_failing(checks)
        return _refusal(device, weight) if reason is None and device.type == "cuda" else reason

    def linear(self, x: QuantizedInput, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Returns x @ ŵ.T + bias [*, O] in the dtype of x's scale, rounded to it once before the bias."""
        if self.name not in weight.layouts:
            codes = int8_codes(weight)
            sums = codes.sum(-1, dtype=torch.int32)
            weight.layouts[self.name] = codes, weight.scale.view(-1).float(), sums
            weight.read()
        codes, scale, sums = weight.layouts[self.name]
        rows = x.codes.reshape(-1, weight.in_features).to(torch.int8)
        total = product(rows, codes).view(*x.codes.shape[:-1], -1)
        if x.zero_point is not None:
            total.sub_(x.zero_point.to(torch.int32) * sums)
        out = (total.float() * scale).mul_(x.scale.float()).to(x.scale.dtype)
        return out if bias is None else out + bias


def product(rows: Tensor, codes: Tensor) -> Tensor:
    """Returns `rows` [M, I] int8 times `codes` [O, I] int8 transposed: [M, O] int32."""
    count, least = rows.shape[0], _LEAST_ROWS.get(rows.device.type, 0)
    if count < least:
        rows = F.pad(rows, (0, 0, 0, least - count))
    return torch._int_mm(rows, codes.t())[:count]


def _refusal(device: torch.device, weight: PackedWeight) -> str | None:
    rows, columns = weight.out_features, weight.in_features
    if rows % 8 or columns % 8:
        return f"{rows} x {columns} features are not multiples of 8"
    return _trial(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _trial(device: torch.device) -> str | None:
    """Returns why int8 matrices are not multiplied on `device`, or None; torch.compile does not look into it."""
    return _tried(device)


@functools.cache
def _tried(device: torch.device) -> str | None:
    try:
        generator = torch.Generator().manual_seed(0)
        weight = random_weight(Grid(8), TRIAL_FEATURES, torch.bfloat16, generator, device)
        codes = torch.randint(-128, 128, (3, TRIAL_FEATURES), generator=generator, device="cpu").to(torch.int8)
        x = QuantizedInput(codes.to(device), torch.ones(3, 1, dtype=torch.bfloat16, device=device), None)
        found = IntegerKernel().linear(x, weight, None).cpu()
        sums = codes.long() @ weight.codes().cpu().long().T
    except RuntimeError as error:
        return f"torch cannot multiply int8 matrices here: {error}"
    expected = (sums.float() * weight.scale.view(-1).float().cpu()).to(torch.bfloat16)
    return None if torch.equal(found, expected) else "torch gave other numbers"
