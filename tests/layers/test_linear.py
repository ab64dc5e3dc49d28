"""QuantLinear and PackedLinear: sharing, inverses, the meta device, and train == packed for every scheme."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmqat.grid import search_scale
from llmqat.layers import PackedLinear, QuantLinear, WeightConfig, quantizers_off

LEVELS = [
    WeightConfig(num_bits=2, levels=levels, strategy=strategy, group_size=32 if strategy == "group" else None)
    for levels in ("ternary", "seq")
    for strategy in ("group", "channel", "tensor")
]
MODES = [
    WeightConfig(num_bits=4, symmetric=symmetric, group_size=32, scales=scales)
    for scales in ("fixed", "dynamic")
    for symmetric in (True, False)
]
SCHEMES = (
    [
        WeightConfig(
            num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
        )
        for bits in (2, 3, 4, 5, 8)
        for symmetric in (True, False)
        for strategy in ("group", "channel", "tensor")
    ]
    + LEVELS
    + MODES
)


def _layer(scheme: WeightConfig, bias: bool = True) -> QuantLinear:
    layer = QuantLinear.from_linear(nn.Linear(96, 48, bias=bias), scheme)
    with torch.no_grad():
        if layer.log_scale is not None:
            layer.log_scale.normal_(std=0.3)
        if isinstance(layer.zero_point, nn.Parameter):
            layer.zero_point.add_(torch.rand_like(layer.zero_point) * 3 - 1.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_packed_weight_is_the_training_weight(scheme: WeightConfig, dtype: torch.dtype) -> None:
    layer = _layer(scheme)
    packed = PackedLinear.from_quant_linear(layer, dtype)
    assert torch.equal(packed.dequantized_weight(dtype), layer.quantized_weight(dtype))
    packed.kernel = "reference"
    x = torch.randn(5, 96).to(dtype)
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_state_dicts_round_trip(scheme: WeightConfig) -> None:
    layer = _layer(scheme)
    fresh = QuantLinear.from_linear(nn.Linear(96, 48), scheme)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.quantized_weight(torch.float32), layer.quantized_weight(torch.float32))
    packed = PackedLinear.from_quant_linear(layer)
    empty = PackedLinear(96, 48, True, scheme.stored, device="meta")
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in packed.state_dict().items()
    }
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty.dequantized_weight(torch.bfloat16), packed.dequantized_weight(torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES[:6], ids=lambda scheme: scheme.label)
def test_layers_are_made_on_the_meta_device(scheme: WeightConfig) -> None:
    with torch.device("meta"):
        layer = QuantLinear.from_linear(nn.Linear(96, 48), scheme)
        out = layer(torch.empty(3, 96))
    assert out.shape == (3, 48)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_the_weight_is_shared_in_both_directions() -> None:
    linear = nn.Linear(96, 48)
    layer = QuantLinear.from_linear(linear, SCHEMES[0])
    back = layer.to_linear()
    assert layer.weight is linear.weight is back.weight
    assert layer.bias is linear.bias is back.bias
    x = torch.randn(2, 96)
    assert torch.equal(back(x), linear(x))


def test_without_quantizers_it_is_the_plain_linear() -> None:
    linear = nn.Linear(96, 48)
    layer, x = QuantLinear.from_linear(linear, SCHEMES[0]), torch.randn(2, 96)
    with quantizers_off(nn.Sequential(layer)):
        assert torch.equal(layer(x), linear(x))
    assert layer.enabled
    assert not torch.equal(layer(x), linear(x))


def test_it_follows_autocast() -> None:
    layer, x = _layer(WeightConfig(num_bits=4, group_size=32)), torch.randn(2, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()))


def test_one_step_of_descent_moves_weight_and_scale_towards_the_target() -> None:
    torch.manual_seed(1)
    layer = QuantLinear.from_linear(nn.Linear(96, 48), WeightConfig(num_bits=2, group_size=32))
    x, target = torch.randn(64, 96), torch.randn(64, 48)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.log_scale.abs().max() > 0
    assert losses[-1] < losses[0]


def test_the_scale_gradient_is_divided_by_the_root_of_group_and_range() -> None:
    scheme = WeightConfig(num_bits=4, group_size=32)
    layer, x = _layer(scheme), torch.randn(8, 96)
    layer(x).sum().backward()
    copied = copy.deepcopy(layer)
    scale = copied.scale().detach().requires_grad_()
    from llmqat.grid import fake_quantize

    weight = fake_quantize(copied.weight, scale, None, copied.grid)
    (gradient,) = torch.autograd.grad((x @ weight.T).sum(), scale)
    expected = gradient * layer.initial_scale * layer.log_scale.detach().exp() / (32 * 7) ** 0.5
    assert torch.allclose(layer.log_scale.grad, expected, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_a_conv1d_is_quantized_over_its_inputs_and_comes_back() -> None:
    conv = Conv1D(48, 96)
    layer = QuantLinear.from_linear(conv, WeightConfig(num_bits=4, group_size=32))
    plain = nn.Linear(96, 48)
    with torch.no_grad():
        plain.weight.copy_(conv.weight.t())
        plain.bias.copy_(conv.bias)
    other = QuantLinear.from_linear(plain, WeightConfig(num_bits=4, group_size=32))
    x = torch.randn(2, 96)
    assert torch.equal(layer.quantized_weight(torch.float32), other.quantized_weight(torch.float32).t())
    assert torch.allclose(layer(x), other(x), atol=1e-6)
    assert layer.weight is conv.weight
    back = layer.to_linear()
    assert isinstance(back, Conv1D)
    assert torch.equal(back(x), conv(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fixed_scale_is_not_trained_and_a_dynamic_one_follows_the_weight(symmetric: bool) -> None:
    fixed, dynamic = (
        QuantLinear.from_linear(
            nn.Linear(96, 48), WeightConfig(num_bits=4, symmetric=symmetric, group_size=32, scales=mode)
        )
        for mode in ("fixed", "dynamic")
    )
    assert {name for name, _ in fixed.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in dynamic.named_parameters()} == {"weight", "bias"}
    before = fixed.scale().clone(), dynamic.scale().clone()
    with torch.no_grad():
        fixed.weight.mul_(2)
        dynamic.weight.mul_(2)
    assert torch.equal(fixed.scale(), before[0])
    assert torch.equal(dynamic.scale(), before[1] * 2)
    scale, zero_point = search_scale(dynamic.weight, dynamic.grid, (48, 3))
    dynamic.set_scale(scale, zero_point)
    # A searched scale is kept as a ratio of the range; the zero point is made anew from the clipped range.
    assert torch.equal(dynamic.scale(), scale)
    dynamic(torch.randn(2, 96)).sum().backward()
    assert dynamic.weight.grad.abs().max() > 0


def test_the_warm_up_blends_from_the_master_weight_to_the_quantized_one() -> None:
    layer = _layer(WeightConfig(num_bits=2, levels="ternary", group_size=32))
    quantized = layer.quantized_weight(torch.float32)
    for share in (0.25, 0.75):
        layer.strength = share
        blended = layer.quantized_weight(torch.float32)
        assert torch.allclose(blended, layer.weight + share * (quantized - layer.weight), atol=1e-6)
    layer.strength = 1.0
    assert torch.equal(layer.quantized_weight(torch.float32), quantized)


def test_a_group_size_that_does_not_divide_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"group_size=64 does not divide in_features=96 of down; choose one of 32, 96"):
        QuantLinear.from_linear(nn.Linear(96, 48), WeightConfig(num_bits=4, group_size=64), "down")


def test_a_scale_that_is_not_finite_is_refused() -> None:
    layer = _layer(SCHEMES[0])
    with pytest.raises(ValueError, match="finite"):
        layer.set_scale(torch.full_like(layer.log_scale, float("nan")))
