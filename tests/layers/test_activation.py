"""Fake quantization of inputs: bit-equal to compressed-tensors, straight-through, shared, calibrated."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmqat.layers import ActivationConfig, ActivationQuantizer, QuantLinear, WeightConfig, quantizers_off
from llmqat.layers import activation as activation_module


@settings(max_examples=60, deadline=None)
@given(
    num_bits=st.sampled_from([4, 6, 8]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    length=st.integers(1, 9),
    features=st.integers(1, 70),
    spread=st.floats(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_dynamic_quantization_is_that_of_compressed_tensors(
    num_bits: int, symmetric: bool, dtype: torch.dtype, length: int, features: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, length, features, generator=generator) * 2.0**spread + 0.3).to(dtype)
    x[0, 0] = 0
    args = QuantizationArgs(num_bits=num_bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, nn.Module())
    expected = fake_quantize(x, scale, zero_point, args)
    quantizer = ActivationQuantizer(ActivationConfig(num_bits=num_bits, symmetric=symmetric))
    assert torch.equal(quantizer(x)[1:], expected[1:])
    assert torch.equal(quantizer(x)[0, 1:], expected[0, 1:])
    assert torch.equal(quantizer(x)[0, 0], torch.zeros_like(x[0, 0]))


def test_codes_of_a_hand_worked_token() -> None:
    # absmax 5.1 over 127.5 is 0.04: codes -127.5 -> -128 (even), 25, 0.
    x = torch.tensor([[-5.1, 1.0, 0.01]])
    expected = torch.tensor([[-128.0, 25.0, 0.0]]) * (5.1 / 127.5)
    assert torch.allclose(ActivationQuantizer(ActivationConfig())(x), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_passes_straight_through(symmetric: bool) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    upstream = torch.randn(3, 16)
    (gradient,) = torch.autograd.grad(ActivationQuantizer(ActivationConfig(symmetric=symmetric))(x), x, upstream)
    assert torch.equal(gradient, upstream)


def count_quantizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = ActivationQuantizer._quantized

    def counted(self: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
        counts.append(x.numel())
        return original(self, x)

    monkeypatch.setattr(ActivationQuantizer, "_quantized", counted)
    return counts


def test_an_input_read_by_several_layers_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_quantizations(monkeypatch)
    config = ActivationConfig()
    scheme = WeightConfig(num_bits=4, group_size=32)
    q, k = (QuantLinear.from_linear(nn.Linear(64, 32), scheme, "", config) for _ in range(2))
    x = torch.randn(2, 5, 64)
    fresh = copy.deepcopy(k)(x.clone())
    assert len(counts) == 1
    first, second = q(x), k(x)
    assert len(counts) == 2
    assert torch.equal(second, fresh)
    (first.sum() + second.sum()).backward()
    with torch.no_grad():
        x += 1  # the same tensor, changed in place
    assert not torch.equal(k(x), second)
    assert len(counts) == 3
    with torch.no_grad():
        k(x)
    assert len(counts) == 4  # the result made with gradients is not given where there are none, nor the other way
    other = QuantLinear.from_linear(nn.Linear(64, 32), scheme, "", ActivationConfig(symmetric=False))
    other(x)
    assert len(counts) == 5


def test_a_buffer_that_is_filled_anew_in_inference_mode_is_quantized_anew() -> None:
    quantizer = ActivationQuantizer(ActivationConfig())
    with torch.inference_mode():
        x = torch.randn(2, 8)
        first = quantizer(x).clone()
        x.copy_(torch.randn(2, 8))
        assert not torch.equal(quantizer(x), first)


def test_a_shared_result_is_let_go_with_its_input() -> None:
    quantizer, x = ActivationQuantizer(ActivationConfig()), torch.randn(2, 8)
    quantizer(x)
    assert activation_module._shared.result is not None
    del x
    assert activation_module._shared.result is None


def test_layers_with_equal_static_ranges_share_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_quantizations(monkeypatch)
    config = ActivationConfig(dynamic=False)
    quantizers = [ActivationQuantizer(config) for _ in range(3)]
    for quantizer, high in zip(quantizers, (2.0, 2.0, 3.0), strict=True):
        quantizer.set_range(-1.0, high)
    x = torch.randn(2, 8)
    results = [quantizer(x) for quantizer in quantizers]
    assert results[0] is results[1]
    assert not torch.equal(results[1], results[2])
    assert len(counts) == 2


def test_a_static_range_must_be_calibrated_and_finite() -> None:
    quantizer = ActivationQuantizer(ActivationConfig(dynamic=False), name="layers.3.up_proj")
    with pytest.raises(RuntimeError, match=r"static input range of layers\.3\.up_proj is not calibrated"):
        quantizer(torch.ones(1, 4))
    with pytest.raises(ValueError, match="is not finite"):
        quantizer.set_range(0.0, float("nan"))
    quantizer.set_range(-1.0, 1.0)
    assert quantizer.scale.item() == torch.tensor(1 / 127.5).bfloat16().float().item()  # type: ignore[union-attr]
    x = torch.tensor([[0.5, 9.0]])
    quantized = quantizer(x)
    assert quantized[0, 1] < 1.1  # clipped


def test_a_loaded_range_replaces_the_remembered_one() -> None:
    first, second = (ActivationQuantizer(ActivationConfig(dynamic=False)) for _ in range(2))
    first.set_range(-1.0, 1.0)
    second.set_range(-4.0, 4.0)
    x = torch.randn(2, 8)
    before = first(x)
    first.load_state_dict(second.state_dict())
    assert not torch.equal(first(x), before)
    assert torch.equal(first(x), second(x))


def test_switched_off_it_lets_the_input_through() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 8), WeightConfig(num_bits=4, group_size=32), "", ActivationConfig())
    x = torch.randn(2, 64)
    with quantizers_off(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
