"""cpu-w4a8: what zentorch is handed, read by a stand-in as zentorch reads it; that nobody gets 8-bit inputs unasked.

Where zentorch is installed, test_kernels.py runs its own product.
"""

from __future__ import annotations

import gc
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.kernels import JoinedWeight, packed_linear, trial, zentorch
from llmqat.kernels.registry import _choice
from llmqat.kernels.zentorch import ZentorchKernel, rounded_to_8_bits
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

CLEARED: list[None] = []


def zentorch_dynamic_qlinear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """The product that zentorch documents: codes of 4 bits in two's complement, tokens rounded to int8."""
    assert weight.dtype == torch.int32
    assert weight_scales.is_contiguous()
    assert x.dim() == 2
    assert x.dtype == weight_scales.dtype == torch.bfloat16
    codes = torch.stack([weight >> place & 15 for place in range(0, 32, 4)], dim=-1).flatten(1)
    codes = torch.where(codes > 7, codes - 16, codes)
    scale = weight_scales.t().float().repeat_interleave(codes.shape[1] // len(weight_scales), dim=1)
    return F.linear(rounded_to_8_bits(x), codes * scale).bfloat16()


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        zentorch_dynamic_qlinear=zentorch_dynamic_qlinear, zentorch_clear_weight_cache=lambda: CLEARED.append(None)
    )
    monkeypatch.setattr(zentorch, "load_zentorch", lambda: stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(zentorch, "missing", lambda name: None)
    trial.refusal.cache_clear()


@pytest.mark.parametrize("group", [32, 48, None])
@pytest.mark.parametrize(
    "scheme", [{"num_bits": 4}, {"num_bits": 3}, {"num_bits": 2}, {"num_bits": 2, "levels": "ternary"}], ids=str
)
def test_zentorch_is_handed_codes_and_scales_as_it_reads_them(scheme: dict[str, Any], group: int | None) -> None:
    config = WeightConfig(**scheme, strategy="group" if group else "channel", group_size=group).stored
    members = [packed_layer(config, rows).packed_weight() for rows in (16, 40)]
    x, bias = torch.randn(2, 3, 384).bfloat16(), torch.randn(56).bfloat16()
    joined = JoinedWeight(members)
    expected = F.linear(rounded_to_8_bits(x), joined.dequantized(torch.float32)).bfloat16() + bias
    got = packed_linear(x, joined, bias, "cpu-w4a8")
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-5)


def test_inputs_of_8_bits_are_only_had_by_name() -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for rows in (1, 20, 40):
        x = torch.randn(rows, 384).bfloat16()
        assert ZentorchKernel().declines(x, weight) is None
        assert _choice(x, weight, wants_gradient=False).name in ("cpu-int4", "cpu-dequantize")


def test_tokens_that_are_not_finite_give_nan() -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    x = torch.randn(4, 384).bfloat16()
    zentorch.load_zentorch().zentorch_dynamic_qlinear = lambda rows, *_: torch.ones(len(rows), 64).bfloat16()
    trial.refusal.cache_clear()
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    out = ZentorchKernel().linear(x, weight, None)  # whose codes hide it
    assert out.isfinite().all(-1).tolist() == [True, False, False, True]


def test_zentorch_forgets_a_weight_that_goes() -> None:
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    packed_linear(torch.randn(3, 384).bfloat16(), weight, kernel="cpu-w4a8")
    before = len(CLEARED)
    del weight
    gc.collect()
    assert len(CLEARED) == before + 1


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        ({"num_bits": 4, "group_size": 64}, torch.float32, "it needs bfloat16 activations"),
        ({"num_bits": 4, "group_size": 64, "symmetric": False}, torch.bfloat16, "it needs a symmetric grid"),
        ({"num_bits": 8, "strategy": "channel"}, torch.bfloat16, "of at most 4 bits"),
    ],
)
def test_what_zentorch_does_not_take_is_declined(scheme: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    weight = packed_layer(WeightConfig(**scheme)).packed_weight()
    with pytest.raises(ValueError, match=f"kernel='cpu-w4a8' cannot run here: .*{reason}"):
        packed_linear(torch.randn(1, 384).to(dtype), weight, kernel="cpu-w4a8")
