"""Trials: a kernel is used where it gives the right numbers, the fastest of several is chosen once for each shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmqat.grid import Grid
from llmqat.kernels import KERNELS, JoinedWeight, PackedWeight, humming, packed_linear, registry, trial
from llmqat.kernels.humming import HummingKernel, humming_tensors
from llmqat.kernels.reference import ReferenceKernel
from llmqat.layers import WeightConfig
from tests.kernels.test_kernels import packed_layer

INT4 = WeightConfig(num_bits=4, group_size=64)


class Named(ReferenceKernel):
    """The reference's product under another name, wrong by a factor if asked so."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        self.name, self.factor, self.calls = name, factor, 0

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        self.calls += 1
        weight.layouts.setdefault(self.name, ())
        return F.linear(x, self.factor * weight.dequantized(x.dtype), bias)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Kernel -> microseconds that it seems to take; kernels can be timed on the CPU."""
    found: dict[str, float] = {}

    def microseconds(kernel: Any, x: Tensor, weight: PackedWeight) -> float:
        kernel.linear(x, weight, None)
        return found[kernel.name]

    monkeypatch.setattr(trial, "microseconds", microseconds)
    monkeypatch.setattr(trial, "_fastest", {})
    monkeypatch.setattr(registry, "may_time", lambda device: True)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_trial_accepts_the_reference_and_finds_what_is_wrong(bits: int, symmetric: bool) -> None:
    device, grid = torch.device("cpu"), Grid(bits, symmetric)
    for group in (32, trial.TRIAL_FEATURES):
        assert trial.agrees(ReferenceKernel(), device, torch.bfloat16, grid, group)
        assert not trial.agrees(Named("off", 1.02), device, torch.bfloat16, grid, group)
    reason = trial.refusal(Named("off", -1.0), "package", device, torch.bfloat16, grid, (32,))
    assert reason == "package gave other numbers than the reference"


def test_the_fastest_kernel_of_a_shape_is_found_once(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Named("one"), Named("two")
    monkeypatch.setattr(registry, "KERNELS", {"one": one, "two": two, "reference": ReferenceKernel()})
    first, second = (packed_layer(INT4).packed_weight() for _ in range(2))
    times |= {"one": 5.0, "two": 3.0}
    packed_linear(torch.randn(3, 384).bfloat16(), first)
    assert list(first.layouts) == ["two"]
    assert (one.calls, two.calls) == (1, 2)
    times |= {"one": 1.0}
    packed_linear(torch.randn(2, 2, 384).bfloat16(), second)  # 4 rows, as 3: of one class
    assert (one.calls, two.calls) == (1, 3)
    packed_linear(torch.randn(200, 384).bfloat16(), second)  # of another class, in which it is another
    assert {key[1]: kernel.name for key, kernel in second.chosen.items()} == {4: "two", 256: "one"}
    del times["two"]  # fails
    packed_linear(torch.randn(1, 384).bfloat16(), first)
    assert first.chosen["auto", 1, torch.bfloat16, "cpu", False].name == "one"


def test_a_kernel_of_ones_own_is_checked_and_is_used_before_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernel 'mine' calls itself 'own'"):
        KERNELS.register("mine", Named("own"))
    with pytest.raises(ValueError, match="kernel 'none' has no name, exact, differentiable, declines, linear"):
        KERNELS.register("none", object())  # type: ignore[arg-type]
    own = Named("own")
    monkeypatch.setattr(registry, "KERNELS", {"reference": ReferenceKernel(), "own": own})
    monkeypatch.setattr(registry, "may_time", lambda device: True)
    packed_linear(torch.randn(3, 384).bfloat16(), packed_layer(INT4).packed_weight())
    assert own.calls == 1


def test_the_classes_of_rows_are_powers_of_two() -> None:
    assert [trial.rows_class(rows) for rows in (0, 1, 2, 3, 32, 33, 512, 9000)] == [1, 1, 2, 4, 32, 64, 512, 512]


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scheme", [INT4, WeightConfig(num_bits=8, strategy="channel")], ids=["int4", "int8"])
def test_activations_get_their_gradient_from_any_choice(scheme: WeightConfig, rows: int) -> None:
    weight = packed_layer(scheme).packed_weight()
    x = torch.randn(rows, 384).bfloat16().requires_grad_()
    packed_linear(x, weight).sum().backward()
    expected = weight.dequantized(torch.bfloat16).sum(0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.expand_as(x), rtol=2**-6, atol=2**-6)
    assert packed_linear(x.detach(), weight).shape == (rows, 64)
    for name, kernel in KERNELS.items():
        if kernel.declines(x, weight) is None and not kernel.differentiable:
            with pytest.raises(ValueError, match=f"kernel='{name}' cannot run here: torch has no gradient"):
                packed_linear(x, weight, kernel=name)


class Layer(torch.nn.Module):
    """A stand-in for Humming's layer, which takes the tensors that its schema of `pack-quantized` names."""

    def __init__(self, shape_n: int, shape_k: int, torch_dtype: torch.dtype, weight_config: dict[str, Any]) -> None:
        super().__init__()
        assert (weight_config["quant_method"], weight_config["format"]) == ("compressed-tensors", "pack-quantized")
        self.config, self.dtype = weight_config, torch_dtype
        bits, group = weight_config["num_bits"], weight_config["group_size"] or shape_k
        assert (weight_config["strategy"] == "channel") == (weight_config["group_size"] is None)
        self.shapes = {
            "weight_packed": ((shape_n, shape_k * bits // 32), torch.int32),
            "weight_scale": ((shape_n, shape_k // group), torch_dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not weight_config["symmetric"]:
            self.shapes["weight_zero_point"] = ((shape_n * bits // 32, shape_k // group), torch.int32)

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == self.shapes
        self.tensors = tensors

    def transform(self) -> None:
        """Reads codes that lie one after another, the lowest bits first, from words that they may straddle."""
        bits, middle = self.config["num_bits"], 2 ** (self.config["num_bits"] - 1)
        codes, scale = unpacked(self.tensors["weight_packed"], bits), self.tensors["weight_scale"].double()
        if self.config["symmetric"]:
            levels = codes.view(*scale.shape, -1) - middle
        else:
            zeros = unpacked(self.tensors["weight_zero_point"].t(), bits).t()
            levels = codes.view(*scale.shape, -1) - zeros[..., None]
        self.values = (levels * scale[..., None]).flatten(1).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return F.linear(x, self.values)


def unpacked(words: Tensor, bits: int) -> Tensor:
    stream = torch.stack([words >> place & 1 for place in range(32)], dim=-1).flatten(1)
    return (stream.view(len(words), -1, bits) * 2 ** torch.arange(bits)).sum(-1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(layer=SimpleNamespace(HummingLayer=Layer))
    monkeypatch.setattr(humming, "require", lambda *_: stand_in)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_humming_is_given_the_tensors_of_the_format(bits: int, group: int | None, symmetric: bool) -> None:
    strategy = "group" if group else "channel"
    layer = packed_layer(WeightConfig(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group))
    x, bias = torch.randn(2, 3, 384).bfloat16(), torch.randn(64).bfloat16()
    weight = layer.packed_weight()
    assert torch.equal(HummingKernel().linear(x, weight, bias), F.linear(x, weight.dequantized(x.dtype)) + bias)


@pytest.mark.usefixtures("package")
def test_humming_is_given_ternary_codes_and_joined_weights_as_it_reads_them() -> None:
    members = [
        packed_layer(WeightConfig(num_bits=2, levels="ternary", group_size=64).stored, rows).packed_weight()
        for rows in (64, 128)
    ]
    joined, x = JoinedWeight(members), torch.randn(3, 384).bfloat16()
    assert torch.equal(HummingKernel().linear(x, joined, None), F.linear(x, joined.dequantized(x.dtype)))


def test_words_that_humming_can_read_are_not_copied() -> None:
    weight = packed_layer(INT4).packed_weight()
    assert humming_tensors(weight)["weight_packed"] is weight.packed


@pytest.mark.usefixtures("package")
def test_humming_is_given_words_of_codes_that_were_never_packed() -> None:
    codes = torch.randint(-128, 128, (64, 384), dtype=torch.int8)
    weight = PackedWeight(codes, torch.rand(64, 1).bfloat16(), None, Grid(8), 384)
    x = torch.randn(3, 384).bfloat16()
    assert torch.equal(HummingKernel().linear(x, weight, None), F.linear(x, weight.dequantized(x.dtype)))
