"""QuantLinear and PackedLinear: sharing, inverses, the meta device, and train == packed for every scheme."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmqat.layers import PackedLinear, QuantLinear, WeightConfig, quantizers_off

SCHEMES = [
    WeightConfig(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for strategy in ("group", "channel", "tensor")
]


def _layer(scheme: WeightConfig, bias: bool = True) -> QuantLinear:
    layer = QuantLinear.from_linear(nn.Linear(96, 48, bias=bias), scheme)
    with torch.no_grad():
        layer.log_scale.normal_(std=0.3)
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


def test_a_group_size_that_does_not_divide_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"group_size=64 does not divide in_features=96 of down; choose one of 32, 96"):
        QuantLinear.from_linear(nn.Linear(96, 48), WeightConfig(num_bits=4, group_size=64), "down")


def test_a_scale_that_is_not_finite_is_refused() -> None:
    layer = _layer(SCHEMES[0])
    with pytest.raises(ValueError, match="finite"):
        layer.set_scale(torch.full_like(layer.log_scale, float("nan")))
